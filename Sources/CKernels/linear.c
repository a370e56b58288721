// Linear layers: packing of weights and out = x . w^T + bias.
//
// Packed weights are panels of 64 outputs. A panel is [units][64] units (see tile.h), so a pass over it reads
// memory front to back. Outputs beyond the last and inputs beyond the last unit are zero. bfloat16 panels are the
// same at every level.
//
// A chunk of a region is a run of panels by a run of rows. Within a panel, tiles of rows share it while it stays in
// the cache; where it is too large, the summed dimension is cut and sums are carried in `out`, which changes no bit
// of them.

#ifndef APUS_LEVEL

#include "codes.h"

#include <stdlib.h>

enum {
  panel_outputs = 64,
  // 128 KiB of a panel: this block, the next one and the rows they meet share a core's second-level cache.
  block_units = 512,
  // Rows that stay in that cache while panels pass by.
  cached_rows = 48,
};

struct apus_linear {
  int64_t outputs;
  int64_t inputs;
  apus_dtype format;
  // Units in a row.
  int64_t units;
  int64_t panels;
  uint32_t *data;
  size_t data_bytes;
  // int8: a scale and the sum of the weights for each output, padded to whole panels.
  float *scales;
  int32_t *sums;
  size_t scale_bytes;
  // Weights that stay quantised; everything else is empty then.
  apus_codes *codes;
  // Whether the memory is someone else's.
  int is_view;
};

typedef struct {
  const apus_linear *weight;
  const uint32_t *x;
  int64_t x_stride;
  // int8: a scale for each row of x.
  const float *x_scales;
  int64_t rows;
  const float *bias;
  float *out;
  int64_t out_stride;
} linear_arguments;

typedef struct {
  const apus_linear *weight;
  const float *x;
  int64_t x_stride;
  int64_t rows;
  uint32_t *out;
  int64_t out_stride;
  float *scales;
} prepare_arguments;

typedef struct {
  apus_linear *weight;
  const apus_weight_rows *sources;
  int count;
} pack_arguments;

// Numbers in a unit.
APUS_INLINE int64_t unit_numbers(apus_dtype format) {
  return format == APUS_FLOAT32 ? 1 : format == APUS_INT8 ? 4 : 2;
}

#define APUS_FILE "linear.c"
#include "each_level.h"

typedef void panel_function(const linear_arguments *, int64_t panel, int64_t first_row, int64_t last_row);
typedef void prepare_function(const prepare_arguments *, int64_t first_row, int64_t last_row);
typedef void pack_function(const pack_arguments *, int64_t panel);
typedef void error_function(const pack_arguments *, int64_t panel, double *sums);

static panel_function *const panel_float32[] = APUS_LEVELS(panel_float32);
static panel_function *const panel_float16[] = APUS_LEVELS(panel_float16);
static panel_function *const panel_bfloat16[] = APUS_LEVELS(panel_bfloat16);
static panel_function *const panel_int8[] = APUS_LEVELS(panel_int8);
static panel_function *const *const panels_of_format[] = {panel_float32, panel_float16, panel_bfloat16, panel_int8};
static prepare_function *const prepare_rows[] = APUS_LEVELS(prepare_rows);
static pack_function *const pack_panel[] = APUS_LEVELS(pack_panel);
static error_function *const panel_error[] = APUS_LEVELS(panel_error);

// A weight without memory.
static apus_linear *linear_describe(int64_t outputs, int64_t inputs, apus_dtype format) {
  if (outputs < 0 || inputs < 0 || outputs > INT64_MAX / 2 - 64) return NULL;
  apus_linear *weight = calloc(1, sizeof *weight);
  if (!weight) return NULL;
  weight->outputs = outputs;
  weight->inputs = inputs;
  weight->format = format;
  weight->units = apus_ceil_div(inputs, unit_numbers(format));
  weight->panels = apus_ceil_div(outputs, panel_outputs);
  if (weight->units > 0 && weight->panels > INT64_MAX / 2 / panel_outputs / 4 / weight->units) {
    free(weight);
    return NULL;
  }
  weight->data_bytes = (size_t)(weight->panels * panel_outputs * weight->units) * 4;
  if (format == APUS_INT8) weight->scale_bytes = (size_t)(weight->panels * panel_outputs) * 4;
  return weight;
}

apus_linear *apus_linear_create(int64_t outputs, int64_t inputs, apus_dtype format) {
  apus_linear *weight = linear_describe(outputs, inputs, format);
  if (!weight) return NULL;
  weight->data = apus_allocate(weight->data_bytes);
  if (format == APUS_INT8) {
    weight->scales = apus_allocate(weight->scale_bytes);
    weight->sums = apus_allocate(weight->scale_bytes);
  }
  if (!weight->data || (format == APUS_INT8 && (!weight->scales || !weight->sums))) {
    apus_linear_free(weight);
    return NULL;
  }
  return weight;
}

apus_linear *apus_linear_create_codes(
    int64_t outputs, int64_t inputs, const apus_code_layout *layout, const int32_t *order) {
  if (outputs < 0 || inputs < 0 || outputs > INT64_MAX / 2 - 64 || inputs > INT32_MAX / 1024) return NULL;
  apus_linear *weight = calloc(1, sizeof *weight);
  if (!weight) return NULL;
  weight->outputs = outputs;
  weight->inputs = inputs;
  weight->codes = apus_codes_create(outputs, inputs, layout);
  if (!weight->codes) {
    free(weight);
    return NULL;
  }
  if (order && !apus_codes_set_order(weight->codes, order)) {
    apus_linear_free(weight);
    return NULL;
  }
  return weight;
}

int apus_linear_regions(const apus_linear *weight, apus_region regions[APUS_REGIONS]) {
  int count = 0;
  if (weight->codes) {
    const apus_codes *codes = weight->codes;
    regions[count++] = (apus_region){codes->data, codes->data_bytes};
    if (codes->order) regions[count++] = (apus_region){codes->order, (size_t)codes->inputs * 4};
    return count;
  }
  regions[count++] = (apus_region){weight->data, weight->data_bytes};
  if (weight->format == APUS_INT8) {
    regions[count++] = (apus_region){weight->scales, weight->scale_bytes};
    regions[count++] = (apus_region){weight->sums, weight->scale_bytes};
  }
  return count;
}

apus_linear *apus_linear_view(
    int64_t outputs, int64_t inputs, apus_dtype format, const apus_region regions[APUS_REGIONS], int count) {
  apus_linear *weight = linear_describe(outputs, inputs, format);
  if (!weight) return NULL;
  weight->is_view = 1;
  int is_int8 = format == APUS_INT8;
  if (count != (is_int8 ? 3 : 1) || regions[0].bytes != weight->data_bytes
      || (is_int8 && (regions[1].bytes != weight->scale_bytes || regions[2].bytes != weight->scale_bytes))) {
    apus_linear_free(weight);
    return NULL;
  }
  weight->data = regions[0].address;
  if (is_int8) {
    weight->scales = regions[1].address;
    weight->sums = regions[2].address;
  }
  return weight;
}

apus_linear *apus_linear_view_codes(
    int64_t outputs, int64_t inputs, const apus_code_layout *layout, const apus_region regions[APUS_REGIONS],
    int count) {
  if (outputs < 0 || inputs < 0 || outputs > INT64_MAX / 2 - 64 || inputs > INT32_MAX / 1024) return NULL;
  if (count != 1 && (count != 2 || regions[1].bytes != (size_t)inputs * 4)) return NULL;
  if (count == 2) {
    // Numbers that would be read with.
    const int32_t *order = regions[1].address;
    for (int64_t i = 0; i < inputs; i++) {
      if (order[i] < 0 || order[i] >= inputs) return NULL;
    }
  }
  apus_linear *weight = calloc(1, sizeof *weight);
  if (!weight) return NULL;
  weight->outputs = outputs;
  weight->inputs = inputs;
  weight->is_view = 1;
  weight->codes = apus_codes_describe(outputs, inputs, layout);
  if (!weight->codes) {
    free(weight);
    return NULL;
  }
  weight->codes->is_view = 1;
  if (regions[0].bytes != weight->codes->data_bytes
      || (count == 2 && !apus_codes_set_order(weight->codes, regions[1].address))) {
    apus_linear_free(weight);
    return NULL;
  }
  weight->codes->data = regions[0].address;
  return weight;
}

void apus_linear_pack_codes(apus_linear *weight, int64_t panel, const apus_code_rows *rows) {
  apus_codes_pack_panel(weight->codes, panel, rows);
}

void apus_linear_quantize(apus_context *context, apus_linear *weight, const apus_weight_rows *sources, int count) {
  apus_codes_quantize(context, weight->codes, sources, count);
}

void apus_linear_read_codes(const apus_linear *weight, int64_t output, float *numbers) {
  apus_codes_read(weight->codes, output, numbers);
}

void apus_linear_free(apus_linear *weight) {
  if (!weight) return;
  apus_codes_free(weight->codes);
  if (!weight->is_view) {
    apus_release(weight->data, weight->data_bytes);
    apus_release(weight->scales, weight->scale_bytes);
    apus_release(weight->sums, weight->scale_bytes);
  }
  free(weight);
}

size_t apus_linear_bytes(const apus_linear *weight) {
  return weight->data_bytes + 2 * weight->scale_bytes + (weight->codes ? weight->codes->data_bytes : 0);
}

int64_t apus_linear_panels(const apus_linear *weight) {
  return weight->codes ? weight->codes->panels : weight->panels;
}

void apus_linear_run_panels(
    apus_context *context, const apus_linear *weight, int64_t first, int64_t last, const float *x, int64_t x_stride,
    int64_t rows, const float *bias, float *out, int64_t out_stride) {
  // A weight that is those panels.
  apus_linear part = *weight;
  apus_codes codes;
  int64_t output = first * panel_outputs;
  part.outputs = apus_min(weight->outputs, last * panel_outputs) - output;
  part.panels = last - first;
  if (weight->codes) {
    codes = *weight->codes;
    codes.outputs = part.outputs;
    codes.panels = part.panels;
    codes.data += first * codes.panel_bytes;
    part.codes = &codes;
  } else {
    part.data += output * weight->units;
    if (part.scales) part.scales += output;
    if (part.sums) part.sums += output;
  }
  apus_linear_run(
      context, &part, x, x_stride, rows, bias ? bias + output : NULL, out + output, out_stride);
}

typedef struct {
  pack_function *function;
  pack_arguments arguments;
} pack_region;

static void pack_task(void *argument, int chunk, int thread) {
  (void)thread;
  const pack_region *region = argument;
  region->function(&region->arguments, chunk);
}

void apus_linear_pack(apus_context *context, apus_linear *weight, const apus_weight_rows *sources, int count) {
  pack_region region = {pack_panel[context->isa], {weight, sources, count}};
  apus_pool_run(context->pool, (int)weight->panels, pack_task, &region);
}

typedef struct {
  error_function *function;
  pack_arguments arguments;
  // Two sums for each panel.
  double *sums;
} error_region;

static void error_task(void *argument, int chunk, int thread) {
  (void)thread;
  const error_region *region = argument;
  region->function(&region->arguments, chunk, region->sums + 2 * chunk);
}

double apus_linear_int8_error(
    apus_context *context, const apus_linear *weight, const apus_weight_rows *sources, int count) {
  error_region region = {
      panel_error[context->isa], {(apus_linear *)weight, sources, count},
      apus_scratch_reserve(&context->shared[0], (size_t)(weight->panels + 1) * 16)};
  apus_pool_run(context->pool, (int)weight->panels, error_task, &region);
  double error = 0, total = 0;
  for (int64_t panel = 0; panel < weight->panels; panel++) {
    error += region.sums[2 * panel];
    total += region.sums[2 * panel + 1];
  }
  return total > 0 ? sqrt(error / total) : 0;
}

typedef struct {
  prepare_function *function;
  prepare_arguments arguments;
  int64_t grain;
} prepare_region;

static void prepare_task(void *argument, int chunk, int thread) {
  (void)thread;
  const prepare_region *region = argument;
  int64_t first = chunk * region->grain;
  region->function(&region->arguments, first, apus_min(region->arguments.rows, first + region->grain));
}

typedef struct {
  panel_function *function;
  linear_arguments arguments;
  int64_t grain;
  int64_t row_grain;
  int64_t row_blocks;
} linear_region;

static void linear_task(void *argument, int chunk, int thread) {
  (void)thread;
  const linear_region *region = argument;
  const linear_arguments *a = &region->arguments;
  int64_t first_row = chunk % region->row_blocks * region->row_grain;
  int64_t last_row = apus_min(a->rows, first_row + region->row_grain);
  int64_t first = chunk / region->row_blocks * region->grain;
  int64_t last = apus_min(a->weight->panels, first + region->grain);
  for (int64_t panel = first; panel < last; panel++) region->function(a, panel, first_row, last_row);
}

void apus_linear_run(
    apus_context *context, const apus_linear *weight, const float *x, int64_t x_stride, int64_t rows,
    const float *bias, float *out, int64_t out_stride) {
  if (rows <= 0 || weight->outputs == 0) return;
  if (weight->codes) {
    apus_codes_run(context, weight->codes, x, x_stride, rows, bias, out, out_stride);
    return;
  }
  linear_region region = {
      panels_of_format[weight->format][context->isa],
      {weight, (const uint32_t *)x, x_stride, NULL, rows, bias, out, out_stride}, 0, 0, 1};
  int copies = weight->format == APUS_BFLOAT16 || weight->format == APUS_INT8
      || (weight->format == APUS_FLOAT16 && weight->inputs % 2 != 0);
  if (copies) {
    // An odd number of cache lines between rows spreads a tile's rows over the cache's sets.
    int is_wide = weight->format == APUS_INT8 ? !apus_keeps_int8_rows(context->isa)
        : weight->format == APUS_FLOAT16 || !apus_has_bfloat16_units(context->isa);
    int64_t words = is_wide ? 2 * weight->units : weight->units;
    int64_t stride = apus_round_up(words, 16);
    if (stride / 16 % 2 == 0) stride += 16;
    char *scratch = apus_scratch_reserve(&context->shared[0], (size_t)(rows * (stride + 1)) * 4);
    float *scales = (float *)(void *)(scratch + rows * stride * 4);
    prepare_region prepare = {
        prepare_rows[context->isa],
        {weight, x, x_stride, rows, (uint32_t *)(void *)scratch, stride, scales},
        apus_grain(context, rows, weight->inputs * 4)};
    apus_pool_run(context->pool, (int)apus_ceil_div(rows, prepare.grain), prepare_task, &prepare);
    region.arguments.x = (const uint32_t *)(const void *)scratch;
    region.arguments.x_stride = stride;
    region.arguments.x_scales = scales;
  }
  // Bytes to stream, or their like in arithmetic, decide how many chunks are worth their claim.
  int64_t work = weight->units * panel_outputs * 4 * apus_max(1, rows / 8);
  region.grain = apus_grain(context, weight->panels, work);
  region.row_grain = rows;
  int64_t chunks = apus_ceil_div(weight->panels, region.grain);
  int64_t pieces = apus_ceil_div(rows, cached_rows);
  if (chunks < 2 * context->threads && rows >= 24 && work * chunks > 65536 && context->threads > 1) {
    // Few outputs: share the rows too, in pieces of at least two tiles.
    pieces = apus_max(pieces, apus_min(rows / 12, apus_ceil_div(4 * context->threads, chunks)));
  }
  region.row_grain = apus_round_up(apus_ceil_div(rows, pieces), 12);
  region.row_blocks = apus_ceil_div(rows, region.row_grain);
  apus_pool_run(context->pool, (int)(chunks * region.row_blocks), linear_task, &region);
}

#else

#include "tile.h"

// MARK: Rows of x

// Rounds to int8, biased by 128 unless APUS_INT8_SIGNED, or rounds to bfloat16, or copies; zero beyond the last input.
static void FN(prepare_rows)(const prepare_arguments *a, int64_t first_row, int64_t last_row) {
  int64_t inputs = a->weight->inputs;
  int64_t whole = inputs & ~(int64_t)15;
  for (int64_t r = first_row; r < last_row; r++) {
    const float *x = a->x + r * a->x_stride;
    uint32_t *out = a->out + r * a->out_stride;
    if (a->weight->format == APUS_FLOAT16) {
      memcpy(out, x, (size_t)inputs * 4);
      if (inputs % 2 != 0) out[inputs] = 0;
    } else if (a->weight->format == APUS_BFLOAT16) {
#if APUS_LEVEL >= 3
      uint16_t *halves = (uint16_t *)(void *)out;
      for (int64_t i = 0; i < whole; i += 16) FN(store_bf16_activations)(halves + i, FN(load)(x + i));
      if (whole < inputs) {
        uint16_t last[16];
        FN(store_bf16_activations)(last, FN(load_some)(x + whole, inputs - whole));
        memcpy(halves + whole, last, (size_t)apus_round_up(inputs - whole, 2) * 2);
      }
#else
      float *wide = (float *)(void *)out;
      for (int64_t i = 0; i < whole; i += 16) FN(store)(wide + i, FN(bf16_activations)(FN(load)(x + i)));
      if (whole < inputs) {
        float last[16];
        FN(store)(last, FN(bf16_activations)(FN(load_some)(x + whole, inputs - whole)));
        memcpy(wide + whole, last, (size_t)apus_round_up(inputs - whole, 2) * 4);
      }
#endif
    } else {
      vf most = 0;
      for (int64_t i = 0; i < inputs; i += 16) {
        vf v = FN(load_some)(x + i, apus_min(16, inputs - i));
        most = FN(max)(__builtin_elementwise_abs(v), most);
      }
      float largest = FN(largest)(most);
      float factor = largest > 0 ? 127.0f / largest : 0;
      // The largest magnitude may be so small that its reciprocal overflows: such a row counts as zero.
      if (!(factor <= 3.0e38f)) factor = 0;
      a->scales[r] = factor > 0 ? largest / 127.0f : 0;
      uint8_t *bytes = (uint8_t *)(void *)out;
#if APUS_INT8_WORDS == 1
      typedef uint8_t vb __attribute__((ext_vector_type(16)));
#endif
      for (int64_t i = 0; i < inputs; i += 16) {
        vf v = FN(load_some)(x + i, apus_min(16, inputs - i)) * factor;
        v = v > 127.0f ? (vf)127.0f : v;
        v = v < -127.0f ? (vf)-127.0f : v;
        // As in `round`, the integer is in the low bits of the sum.
        vu q = __builtin_bit_cast(vu, v + 12582912.0f) + (APUS_INT8_SIGNED ? 0u : 128u);
#if APUS_INT8_WORDS == 1
        vb b = __builtin_convertvector(q & 0xffu, vb);
        memcpy(bytes + i, &b, (size_t)apus_min(16, apus_round_up(inputs - i, 4)));
#else
        vh h = __builtin_convertvector(q & 0xffu, vh);
        h = __builtin_shufflevector(h, h, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
        memcpy(bytes + 2 * i, &h, 2 * (size_t)apus_min(16, apus_round_up(inputs - i, 4)));
#endif
      }
    }
  }
}

// MARK: Tiles

APUS_INLINE vf FN(result)(
    const linear_arguments *a, vf sum, int64_t row, int64_t output, int64_t count) {
  (void)row;
  if (!a->bias) return sum;
  return sum + FN(load_some)(a->bias + output, count);
}

APUS_INLINE vf FN(result_int8)(const linear_arguments *a, vi sum, int64_t row, int64_t output, int64_t count) {
#if !APUS_INT8_SIGNED
  vi correction = __builtin_bit_cast(vi, FN(load_units)((const uint32_t *)a->weight->sums + output));
  sum -= correction * 128;
#endif
  vf value = __builtin_convertvector(sum, vf);
  vf scale = FN(load)(a->weight->scales + output) * a->x_scales[row];
  return FN(result)(a, value * scale, row, output, count);
}

#undef APUS_PANEL
#define APUS_PANEL(FORMAT, SUM, WORDS, RESULT)                                                                      \
  APUS_INLINE void FN(block_##FORMAT)(                                                                              \
      const linear_arguments *a, int rows, int vectors, int64_t row, int64_t output, const uint32_t *w,             \
      int64_t first_unit, int64_t last_unit, const uint32_t *ahead, int64_t ahead_stride) {                         \
    SUM sums[6][4];                                                                                                 \
    const uint32_t *columns[4];                                                                                     \
    int64_t valid = a->weight->outputs - output;                                                                    \
    APUS_UNROLL for (int v = 0; v < vectors; v++) columns[v] = w + first_unit * panel_outputs + 16 * v;             \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      const float *out = a->out + (row + i) * a->out_stride + output;                                               \
      APUS_UNROLL for (int v = 0; v < vectors; v++) {                                                               \
        int64_t count = apus_max(0, apus_min(16, valid - 16 * v));                                                  \
        sums[i][v] = first_unit == 0 ? (SUM)0 : __builtin_bit_cast(SUM, FN(load_some)(out + 16 * v, count));        \
      }                                                                                                             \
    }                                                                                                               \
    FN(tile_##FORMAT)(                                                                                              \
        rows, vectors, sums, a->x + row * a->x_stride + first_unit * WORDS, a->x_stride, columns, panel_outputs,    \
        last_unit - first_unit, rows > 1, &ahead, ahead_stride);                                                    \
    int last = last_unit == a->weight->units;                                                                       \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      float *out = a->out + (row + i) * a->out_stride + output;                                                     \
      APUS_UNROLL for (int v = 0; v < vectors; v++) {                                                               \
        int64_t count = apus_min(16, valid - 16 * v);                                                               \
        if (count <= 0) break;                                                                                      \
        vf value = last ? FN(RESULT)(a, sums[i][v], row + i, output + 16 * v, count)                                \
                        : __builtin_bit_cast(vf, sums[i][v]);                                                       \
        if (count == 16) {                                                                                          \
          FN(store)(out + 16 * v, value);                                                                           \
        } else {                                                                                                    \
          FN(store_some)(out + 16 * v, value, count);                                                               \
        }                                                                                                           \
      }                                                                                                             \
    }                                                                                                               \
  }                                                                                                                 \
                                                                                                                    \
  static void FN(panel_##FORMAT)(const linear_arguments *a, int64_t panel, int64_t first_row, int64_t last_row) {   \
    const apus_linear *weight = a->weight;                                                                          \
    const uint32_t *w = weight->data + panel * panel_outputs * weight->units;                                       \
    int64_t output = panel * panel_outputs;                                                                         \
    int64_t tiles = apus_ceil_div(last_row - first_row, APUS_TILE_ROWS);                                            \
    int64_t step = tiles == 1 ? apus_max(1, weight->units) : block_units;                                           \
    for (int64_t u = 0; u == 0 || u < weight->units; u += step) {                                                   \
      int64_t end = apus_min(weight->units, u + step);                                                              \
      for (int64_t t = 0; t < tiles; t++) {                                                                         \
        /* Tiles as equal as can be. */                                                                             \
        int64_t row = first_row + (last_row - first_row) * t / tiles;                                               \
        int64_t rows = first_row + (last_row - first_row) * (t + 1) / tiles - row;                                  \
        int vectors = APUS_TILE_VECTORS(rows);                                                                      \
        /* Up to sixteen tiles fetch the block that follows, evenly, so that reading it hides behind products. */   \
        int64_t sharers = apus_min(tiles, 16), ahead_stride = apus_max(1, vectors * 16 / sharers);                  \
        for (int v = 0; v < 4 && output + 16 * v < weight->outputs; v += vectors) {                                 \
          const uint32_t *ahead =                                                                                   \
              w + end * panel_outputs + (t % sharers * 4 + v) * (end - u) * 16 / sharers;                           \
          APUS_ROWS(FORMAT, rows, row, output + 16 * v, w + 16 * v, u, end, ahead, ahead_stride)                    \
        }                                                                                                           \
      }                                                                                                             \
    }                                                                                                               \
  }

// The tile's shape must be a constant where it is inlined.
#undef APUS_ROWS_CASE
#define APUS_ROWS_CASE(FORMAT, N, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                             \
  case N:                                                                                                           \
    FN(block_##FORMAT)(a, N, APUS_TILE_VECTORS(N), ROW, OUTPUT, W, U, END, NEXT, STRIDE);                           \
    break;
#undef APUS_ROWS
#if APUS_TILE_ROWS == 6
#define APUS_ROWS(FORMAT, ROWS, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                               \
  switch (ROWS) {                                                                                                   \
    APUS_ROWS_CASE(FORMAT, 1, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 2, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 3, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 4, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 5, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 6, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
  }
#elif APUS_TILE_ROWS == 4
#define APUS_ROWS(FORMAT, ROWS, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                               \
  switch (ROWS) {                                                                                                   \
    APUS_ROWS_CASE(FORMAT, 1, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 2, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 3, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 4, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
  }
#else
#define APUS_ROWS(FORMAT, ROWS, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                               \
  switch (ROWS) {                                                                                                   \
    APUS_ROWS_CASE(FORMAT, 1, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
    APUS_ROWS_CASE(FORMAT, 2, ROW, OUTPUT, W, U, END, NEXT, STRIDE)                                                 \
  }
#endif

APUS_PANEL(float32, vf, 1, result)
APUS_PANEL(float16, vf, 2, result)
APUS_PANEL(bfloat16, vf, APUS_WIDE_WORDS, result)
APUS_PANEL(int8, vi, APUS_INT8_WORDS, result_int8)

// MARK: Packing

// Transposes 16 x 16 units: four rounds of exchanging halves.
APUS_INLINE void FN(transpose)(vu rows[16]) {
  APUS_UNROLL
  for (int distance = 8; distance >= 1; distance /= 2) {
    APUS_UNROLL
    for (int i = 0; i < 16; i++) {
      if (i & distance) continue;
      vu a = rows[i], b = rows[i + distance];
      if (distance == 8) {
        rows[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        rows[i + 8] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      } else if (distance == 4) {
        rows[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        rows[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
      } else if (distance == 2) {
        rows[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        rows[i + 2] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      } else {
        rows[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        rows[i + 1] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
      }
    }
  }
}

// Sixteen units of one row in the packed format, from number `index` of the source on; zero beyond `count` numbers.
static inline vu FN(row_units)(
    const char *row, apus_dtype dtype, int64_t index, int64_t count, apus_dtype format, float factor, int32_t *sum) {
  vu units = 0;
  if (dtype == format) {
    size_t bytes = apus_dtype_bytes(dtype);
    const char *from = row + index * (int64_t)bytes;
    if (dtype == APUS_INT8) {
      for (int64_t i = 0; i < count; i++) *sum += (int8_t)from[i];
    }
    if (count * (int64_t)bytes == 64) return FN(load_units)((const uint32_t *)(const void *)from);
    memcpy(&units, from, (size_t)count * bytes);
    return units;
  }
  char packed[64] = {0};
  for (int64_t i = 0; i < count; i += 16) {
    int64_t n = apus_min(16, count - i);
    vf v = n == 16 ? FN(load_as)(row, dtype, index + i) : FN(load_some_as)(row, dtype, index + i, n);
    if (format == APUS_INT8) {
      v *= factor;
      v = v > 127.0f ? (vf)127.0f : v;
      v = v < -127.0f ? (vf)-127.0f : v;
      vi q = __builtin_bit_cast(vi, v + 12582912.0f) << 10 >> 10;
      int32_t lanes[16];
      memcpy(lanes, &q, 64);
      for (int64_t j = 0; j < n; j++) {
        packed[i + j] = (char)lanes[j];
        *sum += (int8_t)packed[i + j];
      }
    } else {
      FN(store_as)(packed, format, i, v, n);
    }
  }
  memcpy(&units, packed, 64);
  return units;
}

static void FN(pack_panel)(const pack_arguments *a, int64_t panel) {
  apus_linear *weight = a->weight;
  int64_t numbers = unit_numbers(weight->format);
  uint32_t *data = weight->data + panel * panel_outputs * weight->units;
  for (int group = 0; group < 4; group++) {
    // Sixteen outputs: where their rows are, and their scales.
    const char *rows[16];
    apus_dtype dtypes[16];
    float factors[16];
    float scales[16] = {0};
    int32_t sums[16] = {0};
    for (int i = 0; i < 16; i++) {
      int64_t output = panel * panel_outputs + group * 16 + i;
      rows[i] = NULL;
      dtypes[i] = APUS_FLOAT32;
      factors[i] = 0;
      int64_t row = output;
      for (int s = 0; s < a->count; s++) {
        if (row < a->sources[s].rows) {
          dtypes[i] = a->sources[s].dtype;
          rows[i] = (const char *)a->sources[s].address
              + (size_t)row * (size_t)weight->inputs * apus_dtype_bytes(dtypes[i]);
          if (a->sources[s].scales) scales[i] = a->sources[s].scales[row];
          break;
        }
        row -= a->sources[s].rows;
      }
      if (weight->format == APUS_INT8 && dtypes[i] == APUS_INT8) {
        weight->scales[output] = scales[i];
      } else if (weight->format == APUS_INT8) {
        vf most = 0;
        for (int64_t k = 0; rows[i] && k < weight->inputs; k += 16) {
          int64_t n = apus_min(16, weight->inputs - k);
          vf v = n == 16 ? FN(load_as)(rows[i], dtypes[i], k) : FN(load_some_as)(rows[i], dtypes[i], k, n);
          most = FN(max)(__builtin_elementwise_abs(v), most);
        }
        float largest = FN(largest)(most);
        factors[i] = largest > 0 ? 127.0f / largest : 0;
        if (!(factors[i] <= 3.0e38f)) factors[i] = 0;
        weight->scales[output] = factors[i] > 0 ? largest / 127.0f : 0;
      }
    }
    for (int64_t u = 0; u < weight->units; u += 16) {
      int64_t count = apus_min(16 * numbers, weight->inputs - u * numbers);
      vu block[16];
      for (int i = 0; i < 16; i++) {
        block[i] = rows[i] ? FN(row_units)(
                                 rows[i], dtypes[i], u * numbers, count, weight->format, factors[i], &sums[i])
                           : (vu)0;
      }
      FN(transpose)(block);
      for (int i = 0; i < 16 && u + i < weight->units; i++) {
        uint32_t *to = data + (u + i) * panel_outputs + group * 16;
        if (weight->format == APUS_FLOAT16) {
          *(vh_at *)to = __builtin_convertvector(block[i] & 0xffffu, vh);
          *(vh_at *)(to + 8) = __builtin_convertvector(block[i] >> 16, vh);
        } else {
          *(vu_at *)to = block[i];
        }
      }
    }
    if (weight->format == APUS_INT8) {
      memcpy(weight->sums + panel * panel_outputs + group * 16, sums, sizeof sums);
    }
  }
}

// The summed squared error of a panel's int8 weights, and the sum of the squares.
static void FN(panel_error)(const pack_arguments *a, int64_t panel, double *sums) {
  const apus_linear *weight = a->weight;
  int64_t first = panel * panel_outputs, last = apus_min(weight->outputs, first + panel_outputs);
  sums[0] = sums[1] = 0;
  for (int64_t output = first; output < last; output++) {
    int64_t row = output;
    int s = 0;
    while (row >= a->sources[s].rows) row -= a->sources[s++].rows;
    apus_dtype dtype = a->sources[s].dtype;
    const char *from =
        (const char *)a->sources[s].address + (size_t)row * (size_t)weight->inputs * apus_dtype_bytes(dtype);
    vf error = 0, total = 0;
    float scale = weight->scales[output];
    float inverse = scale > 0 ? 1.0f / scale : 0;
    for (int64_t k = 0; k < weight->inputs; k += 16) {
      int64_t n = apus_min(16, weight->inputs - k);
      vf v = n == 16 ? FN(load_as)(from, dtype, k) : FN(load_some_as)(from, dtype, k, n);
      vf difference = v - FN(round)(v * inverse) * scale;
      error += difference * difference;
      total += v * v;
    }
    sums[0] += FN(sum)(error);
    sums[1] += FN(sum)(total);
  }
}

#endif
