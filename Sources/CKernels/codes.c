// Products with quantised weights. codes.h says how weights lie in memory.
//
// Codes are unsigned and rows of x are rounded to signed bytes, block by block; what a code's offset takes away is the
// offset times the sum of the group's x, with which integer sums begin. A tile is some rows by some vectors of 16
// outputs. It goes through a block group by group: the group's integer sum, which is exact whatever the
// instructions, then one multiplication with the weights' scale and one addition; at the end of a block one
// multiplication with the scale of x and one addition. Neither is fused, so every level has the same bits.
//
// On AVX2 and on AVX-512 without VNNI, pairs of products of up to 6 bits are summed in 16 bits as long as they fit;
// wider codes are multiplied as 16-bit numbers, and rows of x are laid out for that: for each unit first inputs 0 and
// 2, then 1 and 3.

#ifndef APUS_LEVEL

#include "codes.h"

#include <stdlib.h>

typedef struct {
  const apus_codes *codes;
  // [rows][x_stride]: units of x as the inner loop takes them.
  uint32_t *x;
  int64_t x_stride;
  // [rows][groups]: minus offset times the sum of the group's x, and the sum itself.
  int32_t *starts;
  float *sums;
  // [rows][blocks].
  float *scales;
  int64_t rows;
  const float *bias;
  float *out;
  int64_t out_stride;
  const float *input;
  int64_t input_stride;
} codes_call;

typedef struct {
  apus_codes *codes;
  const apus_weight_rows *sources;
  int count;
} quantize_call;

// From how many rows on, which is more than a tile has, a level that unpacks a block once for all of them does so.
enum { least_shared_rows = 7 };

static const int8_t levels_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int8_t levels_iq4_nl[16] = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Sub-blocks of a block.
APUS_INLINE int64_t subs_of_block(const apus_codes *c, int64_t block) {
  int64_t whole = c->layout.block / codes_sub;
  return apus_min(whole, c->subs - block * whole);
}

APUS_INLINE const uint8_t *block_data(const apus_codes *c, int64_t panel, int64_t block) {
  return c->data + panel * c->panel_bytes + block * c->block_bytes;
}

// The code of an output (0..<64 of its panel) for the input at place `k`.
static uint8_t code_at(const apus_codes *c, int64_t panel, int64_t output, int64_t k) {
  int64_t block = k / c->layout.block, inside = k % c->layout.block;
  const uint8_t *v = block_data(c, panel, block) + c->header_bytes + inside / codes_sub * c->sub_bytes
      + output / 16 * c->vector_bytes;
  int64_t unit = inside % codes_sub / 4, byte = inside % 4, lane = output % 16 * 4;
  if (c->class == class_float8) return v[unit * 64 + lane + (byte == 1 ? 2 : byte == 2 ? 1 : byte)];
  if (c->class == class_8) return v[unit * 64 + lane + byte];
  uint8_t code = v[unit / 2 * 64 + lane + byte] >> (unit % 2 * 4) & 15;
  if (c->class == class_5) code |= (v[256 + lane + byte] >> unit & 1) << 4;
  if (c->class == class_6) code |= (v[256 + unit / 4 * 64 + lane + byte] >> (unit % 4 * 2) & 3) << 4;
  return code;
}

static void set_code(apus_codes *c, int64_t panel, int64_t output, int64_t k, uint8_t code) {
  int64_t block = k / c->layout.block, inside = k % c->layout.block;
  uint8_t *v = (uint8_t *)block_data(c, panel, block) + c->header_bytes + inside / codes_sub * c->sub_bytes
      + output / 16 * c->vector_bytes;
  int64_t unit = inside % codes_sub / 4, byte = inside % 4, lane = output % 16 * 4;
  if (c->class == class_float8) {
    v[unit * 64 + lane + (byte == 1 ? 2 : byte == 2 ? 1 : byte)] = code;
  } else if (c->class == class_8) {
    v[unit * 64 + lane + byte] = code;
  } else {
    v[unit / 2 * 64 + lane + byte] |= (code & 15) << (unit % 2 * 4);
    if (c->class == class_5) v[256 + lane + byte] |= (code >> 4) << unit;
    if (c->class == class_6) v[256 + unit / 4 * 64 + lane + byte] |= (code >> 4) << (unit % 4 * 2);
  }
}

static void store_number(uint8_t *to, apus_dtype dtype, float value);
static float load_number(const uint8_t *from, apus_dtype dtype);

#define APUS_FILE "codes.c"
#include "each_level.h"

typedef void codes_prepare_function(const codes_call *, int64_t row);
typedef void codes_panel_function(const codes_call *, int64_t panel, int64_t first_row, int64_t last_row);
typedef void quantize_panel_function(const quantize_call *, int64_t panel);

static codes_prepare_function *const codes_prepare[] = APUS_LEVELS(codes_prepare);
static codes_panel_function *const panel_4[] = APUS_LEVELS(panel_4);
static codes_panel_function *const panel_4_levels[] = APUS_LEVELS(panel_4_levels);
static codes_panel_function *const panel_4_small[] = APUS_LEVELS(panel_4_small);
static codes_panel_function *const panel_5[] = APUS_LEVELS(panel_5);
static codes_panel_function *const panel_6[] = APUS_LEVELS(panel_6);
static codes_panel_function *const panel_8[] = APUS_LEVELS(panel_8);
static codes_panel_function *const panel_float8[] = APUS_LEVELS(panel_float8);
static codes_panel_function *const *const panels_of_class[] = {
    panel_4, panel_4_levels, panel_4_small, panel_5, panel_6, panel_8, panel_float8};
static quantize_panel_function *const quantize_panel[] = APUS_LEVELS(quantize_panel);

// MARK: Making and freeing

apus_codes *apus_codes_describe(int64_t outputs, int64_t inputs, const apus_code_layout *layout) {
  int64_t group = layout->group, block = layout->block;
  if (block != 32 && block != 64 && block != 128 && block != 256) return NULL;
  if (group != 16 && (group <= 0 || group % codes_sub != 0)) return NULL;
  if (block % group != 0 && group % block != 0) return NULL;
  if (group == 16 && layout->bits != 4 && layout->bits != 6) return NULL;
  if (layout->scale_dtype == APUS_INT8 || (layout->has_factors && group > block)) return NULL;
  int levels = layout->levels == APUS_LEVELS_E2M1 || layout->levels == APUS_LEVELS_IQ4_NL;
  if (levels && (layout->bits != 4 || group == 16)) return NULL;
  if (layout->levels == APUS_LEVELS_E4M3
      && (layout->bits != 8 || group < codes_sub || layout->has_factors || layout->minimum || layout->offset)) {
    return NULL;
  }
  if (layout->offset < 0 || layout->offset > 255) return NULL;
  apus_codes *c = NULL;
  if (posix_memalign((void **)&c, 64, sizeof *c) != 0) return NULL;
  memset(c, 0, sizeof *c);
  c->outputs = outputs;
  c->inputs = inputs;
  c->layout = *layout;
  switch (layout->bits) {
    case 4:
      c->class = !levels ? class_4 : layout->levels == APUS_LEVELS_E2M1 ? class_4_small : class_4_levels;
      c->vector_bytes = 256;
      break;
    case 5:
      c->class = class_5;
      c->vector_bytes = 320;
      break;
    case 6:
      c->class = class_6;
      c->vector_bytes = 384;
      break;
    case 8:
      c->class = layout->levels == APUS_LEVELS_E4M3 ? class_float8 : class_8;
      c->vector_bytes = 512;
      break;
    default:
      free(c);
      return NULL;
  }
  if (levels) {
    const int8_t *values = layout->levels == APUS_LEVELS_E2M1 ? levels_e2m1 : levels_iq4_nl;
    // Levels are made unsigned, with an offset of their own.
    c->layout.offset = layout->levels == APUS_LEVELS_E2M1 ? 12 : 127;
    for (int i = 0; i < 64; i++) c->levels[i] = (uint8_t)(values[i % 16] + c->layout.offset);
  }
  c->panels = apus_ceil_div(outputs, codes_panel);
  c->blocks = apus_ceil_div(inputs, block);
  c->subs = apus_ceil_div(inputs, codes_sub);
  c->block_groups = group >= block ? 1 : block / group;
  c->groups = c->blocks * c->block_groups;
  c->block_tops = layout->has_factors ? 1 : c->block_groups;
  int64_t top_bytes = c->block_tops * codes_panel * (int64_t)apus_dtype_bytes(layout->scale_dtype);
  int64_t factor_bytes = c->block_groups * codes_panel;
  c->factors_at = c->scales_at + top_bytes;
  c->minimums_at = c->factors_at + (layout->has_factors ? factor_bytes : 0);
  c->minimum_factors_at = c->minimums_at + (layout->minimum == APUS_MINIMUM_OWN ? top_bytes : 0);
  int factored = layout->minimum == APUS_MINIMUM_ZERO_POINT
      || (layout->minimum == APUS_MINIMUM_OWN && layout->has_factors);
  c->header_bytes = c->minimum_factors_at + (factored ? factor_bytes : 0);
  c->sub_bytes = 4 * c->vector_bytes;
  c->block_bytes = c->header_bytes + block / codes_sub * c->sub_bytes;
  c->panel_bytes = c->blocks * c->header_bytes + c->subs * c->sub_bytes;
  if (c->panel_bytes > 0 && c->panels > INT64_MAX / 2 / c->panel_bytes) {
    free(c);
    return NULL;
  }
  c->data_bytes = (size_t)(c->panels * c->panel_bytes);
  return c;
}

apus_codes *apus_codes_create(int64_t outputs, int64_t inputs, const apus_code_layout *layout) {
  apus_codes *c = apus_codes_describe(outputs, inputs, layout);
  if (!c) return NULL;
  c->data = apus_allocate(c->data_bytes);
  if (!c->data) {
    free(c);
    return NULL;
  }
  return c;
}

int apus_codes_set_order(apus_codes *codes, const int32_t *order) {
  codes->order = malloc((size_t)codes->inputs * 4 + 4);
  if (!codes->order) return 0;
  memcpy(codes->order, order, (size_t)codes->inputs * 4);
  return 1;
}

void apus_codes_free(apus_codes *codes) {
  if (!codes) return;
  if (!codes->is_view) apus_release(codes->data, codes->data_bytes);
  free(codes->order);
  free(codes);
}

// MARK: Packing

static void store_number(uint8_t *to, apus_dtype dtype, float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (dtype == APUS_FLOAT32) {
    memcpy(to, &value, 4);
    return;
  }
  uint16_t halves[16];
  if (dtype == APUS_BFLOAT16) {
    store_bf16_portable(halves, (vf)value);
  } else {
    store_f16_portable(halves, (vf)value);
  }
  memcpy(to, halves, 2);
}

static float load_number(const uint8_t *from, apus_dtype dtype) {
  float values[16];
  uint8_t bytes[64] = {0};
  memcpy(bytes, from, apus_dtype_bytes(dtype));
  store_portable(values, load_as_portable(bytes, dtype, 0));
  return values[0];
}

void apus_codes_pack_panel(apus_codes *c, int64_t panel, const apus_code_rows *rows) {
  const apus_code_layout *layout = &c->layout;
  int64_t outputs = apus_min(codes_panel, c->outputs - panel * codes_panel);
  int64_t width = (int64_t)apus_dtype_bytes(layout->scale_dtype);
  int64_t source_groups = apus_ceil_div(c->inputs, layout->group);
  int64_t source_tops = layout->has_factors ? apus_ceil_div(c->inputs, layout->block) : source_groups;
  int factored = layout->minimum == APUS_MINIMUM_ZERO_POINT
      || (layout->minimum == APUS_MINIMUM_OWN && layout->has_factors);
  // float8 weights are computed 2^8 times too small.
  float multiple = c->class == class_float8 ? 256.0f : 1.0f;
  for (int64_t b = 0; b < c->blocks; b++) {
    uint8_t *data = (uint8_t *)block_data(c, panel, b);
    memset(data, 0, (size_t)(c->header_bytes + subs_of_block(c, b) * c->sub_bytes));
    for (int64_t t = 0; t < c->block_tops; t++) {
      int64_t top = layout->group > layout->block ? b * layout->block / layout->group : b * c->block_tops + t;
      if (top >= source_tops) continue;
      for (int64_t o = 0; o < outputs; o++) {
        int64_t at = (t * codes_panel + o) * width;
        store_number(
            data + c->scales_at + at, layout->scale_dtype, rows->scales[o * source_tops + top] * multiple);
        if (layout->minimum == APUS_MINIMUM_OWN) {
          store_number(data + c->minimums_at + at, layout->scale_dtype, rows->minimums[o * source_tops + top]);
        }
      }
    }
    for (int64_t g = 0; g < c->block_groups; g++) {
      int64_t group = layout->group > layout->block ? b * layout->block / layout->group : b * c->block_groups + g;
      if (group >= source_groups) continue;
      for (int64_t o = 0; o < outputs; o++) {
        if (layout->has_factors) {
          data[c->factors_at + g * codes_panel + o] = (uint8_t)rows->factors[o * source_groups + group];
        }
        if (factored) {
          data[c->minimum_factors_at + g * codes_panel + o] = rows->minimum_factors[o * source_groups + group];
        }
      }
    }
  }
  for (int64_t o = 0; o < outputs; o++) {
    const uint8_t *codes = rows->codes + o * c->inputs;
    for (int64_t k = 0; k < c->inputs; k++) set_code(c, panel, o, k, codes[k]);
  }
}

static float float8_number(uint8_t code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float magnitude = exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

void apus_codes_read(const apus_codes *c, int64_t output, float *numbers) {
  const apus_code_layout *layout = &c->layout;
  int64_t panel = output / codes_panel, o = output % codes_panel;
  int64_t width = (int64_t)apus_dtype_bytes(layout->scale_dtype);
  for (int64_t k = 0; k < c->inputs; k++) {
    int64_t b = k / layout->block;
    int64_t g = layout->group >= layout->block ? 0 : k % layout->block / layout->group;
    const uint8_t *data = block_data(c, panel, b);
    int64_t top = layout->has_factors ? 0 : g;
    float scale = load_number(data + c->scales_at + (top * codes_panel + o) * width, layout->scale_dtype);
    float base = scale, minimum = 0;
    if (layout->has_factors) scale *= (float)(int8_t)data[c->factors_at + g * codes_panel + o];
    float factor = (float)data[c->minimum_factors_at + g * codes_panel + o];
    if (layout->minimum == APUS_MINIMUM_OWN) {
      minimum = load_number(data + c->minimums_at + (top * codes_panel + o) * width, layout->scale_dtype);
      if (layout->has_factors) minimum *= factor;
    } else if (layout->minimum == APUS_MINIMUM_ZERO_POINT) {
      minimum = base * factor;
    }
    uint8_t code = code_at(c, panel, o, k);
    float number = c->class == class_float8 ? float8_number(code) * (scale / 256)
                                            : (float)((c->class == class_4_levels || c->class == class_4_small ? c->levels[code] : code)
                                                      - layout->offset) * scale - minimum;
    numbers[c->order ? c->order[k] : k] = number;
  }
}

typedef struct {
  quantize_panel_function *function;
  quantize_call call;
} quantize_region;

static void quantize_task(void *argument, int chunk, int thread) {
  (void)thread;
  const quantize_region *region = argument;
  region->function(&region->call, chunk);
}

void apus_codes_quantize(apus_context *context, apus_codes *codes, const apus_weight_rows *sources, int count) {
  quantize_region region = {quantize_panel[context->isa], {codes, sources, count}};
  apus_pool_run(context->pool, (int)codes->panels, quantize_task, &region);
}

// MARK: Running

typedef struct {
  codes_prepare_function *prepare;
  codes_panel_function *panel;
  codes_call call;
  int64_t grain;
  int64_t row_grain;
  int64_t row_blocks;
} codes_region;

static void codes_prepare_task(void *argument, int chunk, int thread) {
  (void)thread;
  const codes_region *region = argument;
  int64_t first = chunk * region->grain, last = apus_min(region->call.rows, first + region->grain);
  for (int64_t row = first; row < last; row++) region->prepare(&region->call, row);
}

static void codes_task(void *argument, int chunk, int thread) {
  (void)thread;
  const codes_region *region = argument;
  int64_t first_row = chunk % region->row_blocks * region->row_grain;
  int64_t last_row = apus_min(region->call.rows, first_row + region->row_grain);
  int64_t first = chunk / region->row_blocks * region->grain;
  int64_t last = apus_min(region->call.codes->panels, first + region->grain);
  for (int64_t panel = first; panel < last; panel++) region->panel(&region->call, panel, first_row, last_row);
}

// Whether rows of x are laid out for products of 16 bits.
static int is_wide(const apus_context *context, codes_class class) {
  return !apus_has_int8_units(context->isa)
      && (context->isa == APUS_ISA_PORTABLE || class == class_8 || class == class_4_levels);
}

void apus_codes_run(
    apus_context *context, const apus_codes *codes, const float *x, int64_t x_stride, int64_t rows, const float *bias,
    float *out, int64_t out_stride) {
  int64_t unit_words = is_wide(context, codes->class) ? 2 : 1;
  if (codes->class == class_float8) unit_words = apus_has_bfloat16_units(context->isa) ? 2 : 4;
  int64_t stride = apus_round_up(codes->subs * 8 * unit_words, 16);
  // An odd number of cache lines between rows spreads a tile's rows over the cache's sets.
  if (stride / 16 % 2 == 0) stride += 16;
  int64_t groups = apus_round_up(codes->groups, 16), blocks = apus_round_up(codes->blocks, 16);
  char *scratch =
      apus_scratch_reserve(&context->shared[0], (size_t)(rows * (stride + 2 * groups + blocks)) * 4 + 64);
  codes_region region = {
      .prepare = codes_prepare[context->isa],
      .panel = panels_of_class[codes->class][context->isa],
      .call = {
          .codes = codes,
          .x = (uint32_t *)(void *)scratch,
          .x_stride = stride,
          .rows = rows,
          .bias = bias,
          .out = out,
          .out_stride = out_stride,
          .input = x,
          .input_stride = x_stride}};
  region.call.starts = (int32_t *)region.call.x + rows * stride;
  region.call.sums = (float *)region.call.starts + rows * groups;
  region.call.scales = region.call.sums + rows * groups;
  region.grain = apus_grain(context, rows, codes->inputs * 8);
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.grain), codes_prepare_task, &region);
  // Bytes to stream, or their like in arithmetic, decide how many chunks are worth their claim.
  int64_t work = codes->panel_bytes * apus_max(1, rows / 4);
  region.grain = apus_grain(context, codes->panels, work);
  region.row_grain = rows;
  region.row_blocks = 1;
  int64_t chunks = apus_ceil_div(codes->panels, region.grain);
  if (chunks < 2 * context->threads && rows >= 24 && work * chunks > 65536 && context->threads > 1) {
    // Few outputs: share the rows too, in pieces of at least two tiles.
    int64_t pieces = apus_min(rows / 12, apus_ceil_div(4 * context->threads, chunks));
    region.row_grain = apus_round_up(apus_ceil_div(rows, pieces), 6);
    region.row_blocks = apus_ceil_div(rows, region.row_grain);
  }
  apus_pool_run(context->pool, (int)(chunks * region.row_blocks), codes_task, &region);
}

#else

#include "tile.h"

// Whether rows of x are laid out for products of 16 bits.
#undef CODES_WIDE
#define CODES_WIDE(CLASS) \
  (APUS_LEVEL < 3 && !APUS_NEON && (APUS_LEVEL == 0 || (CLASS) == class_8 || (CLASS) == class_4_levels))
// Whether codes are taken as signed bytes, 128 less than they are: NEON's dot products know no others.
#undef CODES_SIGNED
#define CODES_SIGNED(CLASS) (APUS_NEON == 1 && ((CLASS) == class_8 || (CLASS) == class_4_levels))

// MARK: Rows of x

// Rounds a row of x to int8 block by block, or to bfloat16 for float8 weights. Inputs beyond the last are zero.
static void FN(codes_prepare)(const codes_call *a, int64_t row) {
  const apus_codes *c = a->codes;
  const float *from = a->input + row * a->input_stride;
  uint32_t *x = a->x + row * a->x_stride;
  int64_t length = c->layout.block;
  int wide = CODES_WIDE(c->class);
  int32_t offset = c->layout.offset - (CODES_SIGNED(c->class) ? 128 : 0);
  for (int64_t b = 0; b < c->blocks; b++) {
    float numbers[256];
    int64_t count = apus_min(length, c->inputs - b * length), padded = subs_of_block(c, b) * codes_sub;
    if (c->order) {
      for (int64_t i = 0; i < count; i++) numbers[i] = from[c->order[b * length + i]];
    } else {
      memcpy(numbers, from + b * length, (size_t)count * 4);
    }
    memset(numbers + count, 0, (size_t)(padded - count) * 4);
    if (c->class == class_float8) {
      for (int64_t i = 0; i < padded; i += 16) {
#if APUS_LEVEL >= 3
        FN(store_bf16_activations)((uint16_t *)(void *)x + b * length + i, FN(load)(numbers + i));
#else
        FN(store)((float *)(void *)x + b * length + i, FN(bf16_activations)(FN(load)(numbers + i)));
#endif
      }
      continue;
    }
    vf most = 0;
    vi odd = 0;
    for (int64_t i = 0; i < padded; i += 16) {
      vf v = __builtin_elementwise_abs(FN(load)(numbers + i));
      most = FN(max)(v, most);
      odd |= !(v <= 3.0e38f);
    }
    float largest = FN(largest)(most);
    float factor = largest > 0 ? 127.0f / largest : 0;
    // The largest magnitude may be so small that its reciprocal overflows: such a block counts as zero.
    if (!(factor <= 3.0e38f)) factor = 0;
    float scale = factor > 0 ? largest / 127.0f : 0;
    if (FN(any)(odd)) {
      // Infinities and NaN make the row NaN.
      factor = 0;
      scale = NAN;
      memset(numbers, 0, (size_t)padded * 4);
    }
    a->scales[row * c->blocks + b] = scale;
    int64_t group = apus_min(c->layout.group, length);
    int32_t *starts = a->starts + row * c->groups + b * c->block_groups;
    float *sums = a->sums + row * c->groups + b * c->block_groups;
    int32_t sum = 0;
    for (int64_t i = 0; i < padded; i += 16) {
      vf v = FN(load)(numbers + i) * factor;
      v = v > 127.0f ? (vf)127.0f : v;
      v = v < -127.0f ? (vf)-127.0f : v;
      // The integer is in the low bits of the sum.
      vi q = __builtin_bit_cast(vi, v + 12582912.0f) << 10 >> 10;
      if (wide) {
        typedef int16_t vs __attribute__((ext_vector_type(16)));
        vs s = __builtin_convertvector(q, vs);
        s = __builtin_shufflevector(s, s, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
        memcpy(x + (b * length + i) / 2, &s, 32);
      } else {
        typedef int8_t vb __attribute__((ext_vector_type(16)));
        vb s = __builtin_convertvector(q, vb);
        memcpy(x + (b * length + i) / 4, &s, 16);
      }
      __attribute__((ext_vector_type(8))) int32_t s8 = q.lo + q.hi;
      __attribute__((ext_vector_type(4))) int32_t s4 = s8.lo + s8.hi;
      __attribute__((ext_vector_type(2))) int32_t s2 = s4.lo + s4.hi;
      sum += s2.x + s2.y;
      if ((i + 16) % group == 0 || i + 16 == padded) {
        starts[i / group] = -offset * sum;
        sums[i / group] = (float)sum;
        sum = 0;
      }
    }
    for (int64_t g = apus_ceil_div(padded, group); g < c->block_groups; g++) {
      starts[g] = 0;
      sums[g] = 0;
    }
  }
}

// MARK: Steps

typedef struct {
#if APUS_LEVEL == 1
  __m256i part[2];
#elif APUS_LEVEL >= 2
  __m512i part[1];
#elif APUS_NEON
  int32x4_t part[4];
#else
  vi part[1];
#endif
} FN(bytes);

#undef BYTES
#define BYTES FN(bytes)

// Registers bound the tile.
#undef CODES_ROWS
#undef CODES_VECTORS_ONE
#undef CODES_VECTORS_MANY
#if APUS_LEVEL >= 2
#define CODES_ROWS 6
#define CODES_VECTORS_ONE 4
#define CODES_VECTORS_MANY 2
#elif APUS_LEVEL == 1
#define CODES_ROWS 6
#define CODES_VECTORS_ONE 2
#define CODES_VECTORS_MANY 1
#elif APUS_NEON
#define CODES_ROWS 6
#define CODES_VECTORS_ONE 2
#define CODES_VECTORS_MANY 1
#else
#define CODES_ROWS 2
#define CODES_VECTORS_ONE 1
#define CODES_VECTORS_MANY 1
#endif

APUS_INLINE vu FN(codes_load)(const uint8_t *from) { return *(const vu_at *)(const void *)from; }

// The codes of unit `u` (a constant) of a vector, a byte each.
APUS_INLINE vu FN(codes_unit)(const apus_codes *c, codes_class class, const uint8_t *w, int u) {
  if (class == class_8) return FN(codes_load)(w + u * 64);
  vu low = FN(codes_load)(w + u / 2 * 64);
  low = (u % 2 == 0 ? low : low >> 4) & 0x0f0f0f0fu;
  if (class == class_5) {
    vu high = FN(codes_load)(w + 256);
    high = u < 4 ? high << (4 - u) : high >> (u - 4);
    low |= high & 0x10101010u;
  } else if (class == class_6) {
    vu high = FN(codes_load)(w + 256 + u / 4 * 64);
    int shift = 4 - u % 4 * 2;
    high = shift >= 0 ? high << shift : high >> -shift;
    low |= high & 0x30303030u;
  } else if (class == class_4_levels || class == class_4_small) {
#if APUS_LEVEL >= 2
    low = (vu)_mm512_shuffle_epi8(_mm512_load_si512(c->levels), (__m512i)low);
#elif APUS_LEVEL == 1
    BYTES both = __builtin_bit_cast(BYTES, low);
    __m256i table = _mm256_load_si256((const __m256i *)(const void *)c->levels);
    for (int i = 0; i < 2; i++) both.part[i] = _mm256_shuffle_epi8(table, both.part[i]);
    low = __builtin_bit_cast(vu, both);
#else
    uint8_t bytes[64];
    memcpy(bytes, &low, 64);
    for (int i = 0; i < 64; i++) bytes[i] = c->levels[bytes[i]];
    memcpy(&low, bytes, 64);
#endif
  }
  (void)c;
  return low;
}

// sum += products of a unit whose row of x is laid out in two words of 16-bit numbers.
APUS_INLINE vi FN(step_wide)(vi sum, vu w, const uint32_t *x) {
  vu even = w & 0x00ff00ffu, odd = w >> 8 & 0x00ff00ffu;
#if APUS_LEVEL >= 2
  vi a = (vi)_mm512_madd_epi16((__m512i)even, _mm512_set1_epi32((int)x[0]));
  vi b = (vi)_mm512_madd_epi16((__m512i)odd, _mm512_set1_epi32((int)x[1]));
  return sum + a + b;
#elif APUS_LEVEL == 1
  BYTES e = __builtin_bit_cast(BYTES, even), o = __builtin_bit_cast(BYTES, odd), s = __builtin_bit_cast(BYTES, sum);
  APUS_UNROLL for (int i = 0; i < 2; i++) {
    __m256i a = _mm256_madd_epi16(e.part[i], _mm256_set1_epi32((int)x[0]));
    __m256i b = _mm256_madd_epi16(o.part[i], _mm256_set1_epi32((int)x[1]));
    s.part[i] = _mm256_add_epi32(s.part[i], _mm256_add_epi32(a, b));
  }
  return __builtin_bit_cast(vi, s);
#elif defined(__SSE2__)
  struct {
    __m128i part[4];
  } e, o, s;
  memcpy(&e, &even, 64);
  memcpy(&o, &odd, 64);
  memcpy(&s, &sum, 64);
  APUS_UNROLL for (int i = 0; i < 4; i++) {
    __m128i a = _mm_madd_epi16(e.part[i], _mm_set1_epi32((int)x[0]));
    __m128i b = _mm_madd_epi16(o.part[i], _mm_set1_epi32((int)x[1]));
    s.part[i] = _mm_add_epi32(s.part[i], _mm_add_epi32(a, b));
  }
  memcpy(&sum, &s, 64);
  return sum;
#else
  sum += (vi)(even & 0xffffu) * (int32_t)(int16_t)x[0] + (vi)(even >> 16) * ((int32_t)x[0] >> 16);
  return sum + (vi)(odd & 0xffffu) * (int32_t)(int16_t)x[1] + (vi)(odd >> 16) * ((int32_t)x[1] >> 16);
#endif
}

#if APUS_NEON
// The codes of unit `u` of a vector, for outputs 4p..<4p + 4.
APUS_INLINE uint8x16_t FN(codes_quarter)(const apus_codes *c, codes_class class, const uint8_t *w, int u, int p) {
  uint8x16_t codes = vld1q_u8(w + (class == class_8 ? u : u / 2) * 64 + p * 16);
  if (class != class_8) codes = u % 2 == 0 ? codes & 15 : codes >> 4;
  if (class == class_5) {
    uint8x16_t high = vld1q_u8(w + 256 + p * 16);
    codes |= (u < 4 ? high << (4 - u) : high >> (u - 4)) & 0x10;
  } else if (class == class_6) {
    uint8x16_t high = vld1q_u8(w + 256 + u / 4 * 64 + p * 16);
    int shift = 4 - u % 4 * 2;
    codes |= (shift >= 0 ? high << shift : high >> -shift) & 0x30;
  } else if (class == class_4_levels || class == class_4_small) {
    codes = vqtbl1q_u8(vld1q_u8(c->levels), codes);
  }
  return CODES_SIGNED(class) ? codes ^ 0x80 : codes;
}

#undef CODES_DOT_LANE
#if APUS_NEON == 2
#define CODES_DOT_LANE(N) sum = vusdotq_laneq_s32(sum, code[N], value, N);
#else
#define CODES_DOT_LANE(N) sum = vdotq_laneq_s32(sum, vreinterpretq_s8_u8(code[N]), value, N);
#endif
#endif

// Rows of a tile whose sums lie in pairs, zipped, where there are products of matrices: in the first row's place those of
// a quarter's first two outputs, in the second row's those of the other two.
#undef CODES_PAIRED
#define CODES_PAIRED(ROWS) (APUS_NEON == 2 ? (ROWS) / 2 * 2 : 0)

// Where the sums of row `i` begin; rows' starts lie `stride` numbers apart.
APUS_INLINE vi FN(codes_begin)(const int32_t *starts, int64_t stride, int rows, int i) {
#if APUS_NEON == 2
  if (i < CODES_PAIRED(rows)) {
    int32_t a = starts[i / 2 * 2 * stride], b = starts[(i / 2 * 2 + 1) * stride];
    return (vi){a, b, a, b, a, b, a, b, a, b, a, b, a, b, a, b};
  }
#endif
  (void)rows;
  return (vi)starts[i * stride];
}

// Sums that lie in pairs, row by row.
APUS_INLINE void FN(codes_end)(int rows, int vectors, vi (*sums)[CODES_VECTORS_ONE]) {
#if APUS_NEON == 2
  APUS_UNROLL for (int i = 0; i < CODES_PAIRED(rows); i += 2) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) {
      BYTES low = __builtin_bit_cast(BYTES, sums[i][v]), high = __builtin_bit_cast(BYTES, sums[i + 1][v]), a, b;
      APUS_UNROLL for (int p = 0; p < 4; p++) {
        a.part[p] = vuzp1q_s32(low.part[p], high.part[p]);
        b.part[p] = vuzp2q_s32(low.part[p], high.part[p]);
      }
      sums[i][v] = __builtin_bit_cast(vi, a);
      sums[i + 1][v] = __builtin_bit_cast(vi, b);
    }
  }
#endif
  (void)rows, (void)vectors, (void)sums;
}

// sums[i][v] += the products of units first..<first + count of a sub-block. All but the addresses are constants.
APUS_INLINE void FN(codes_dot)(
    const apus_codes *c, codes_class class, int rows, int vectors, vi (*sums)[CODES_VECTORS_ONE], const uint32_t *x,
    int64_t x_stride, const uint8_t *w, int first, int count) {
#if APUS_LEVEL >= 3
  APUS_UNROLL for (int u = first; u < first + count; u++) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) {
      vu code = FN(codes_unit)(c, class, w + v * c->vector_bytes, u);
      APUS_UNROLL for (int i = 0; i < rows; i++) {
        sums[i][v] = (vi)_mm512_dpbusd_epi32(
            (__m512i)sums[i][v], (__m512i)code, _mm512_set1_epi32((int)x[i * x_stride + u]));
      }
    }
  }
#elif APUS_NEON
  APUS_UNROLL for (int v = 0; v < vectors; v++) {
    BYTES s[CODES_ROWS];
    APUS_UNROLL for (int i = 0; i < rows; i++) s[i] = __builtin_bit_cast(BYTES, sums[i][v]);
    APUS_UNROLL for (int u = first; u < first + count; u += 4) {
      APUS_UNROLL for (int p = 0; p < 4; p++) {
        // Left alone, the compiler unpacks all quarters at once, for which there are not enough registers.
        __asm__ volatile("" : : : "memory");
        uint8x16_t code[4];
        APUS_UNROLL for (int n = 0; n < 4; n++) {
          code[n] = FN(codes_quarter)(c, class, w + v * c->vector_bytes, u + n, p);
        }
#if APUS_NEON == 2
        // Two rows by two outputs, eight inputs at a time.
        uint8x16_t low[2], high[2];
        APUS_UNROLL for (int n = 0; n < 2; n++) {
          uint32x4_t a = vreinterpretq_u32_u8(code[2 * n]), b = vreinterpretq_u32_u8(code[2 * n + 1]);
          low[n] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
          high[n] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
        }
        APUS_UNROLL for (int i = 0; i < CODES_PAIRED(rows); i += 2) {
          uint64x2_t a = vreinterpretq_u64_u32(vld1q_u32(x + i * x_stride + u));
          uint64x2_t b = vreinterpretq_u64_u32(vld1q_u32(x + (i + 1) * x_stride + u));
          int8x16_t value[2] = {vreinterpretq_s8_u64(vzip1q_u64(a, b)), vreinterpretq_s8_u64(vzip2q_u64(a, b))};
          APUS_UNROLL for (int n = 0; n < 2; n++) {
            s[i].part[p] = vusmmlaq_s32(s[i].part[p], low[n], value[n]);
            s[i + 1].part[p] = vusmmlaq_s32(s[i + 1].part[p], high[n], value[n]);
          }
        }
#endif
        APUS_UNROLL for (int i = CODES_PAIRED(rows); i < rows; i++) {
          int8x16_t value = vreinterpretq_s8_u32(vld1q_u32(x + i * x_stride + u));
          int32x4_t sum = s[i].part[p];
          CODES_DOT_LANE(0) CODES_DOT_LANE(1) CODES_DOT_LANE(2) CODES_DOT_LANE(3)
          s[i].part[p] = sum;
        }
      }
    }
    APUS_UNROLL for (int i = 0; i < rows; i++) sums[i][v] = __builtin_bit_cast(vi, s[i]);
  }
#else
  if (APUS_LEVEL == 0 || class == class_8 || class == class_4_levels) {
    APUS_UNROLL for (int u = first; u < first + count; u++) {
      APUS_UNROLL for (int v = 0; v < vectors; v++) {
        vu code = FN(codes_unit)(c, class, w + v * c->vector_bytes, u);
        APUS_UNROLL for (int i = 0; i < rows; i++) {
          sums[i][v] = FN(step_wide)(sums[i][v], code, x + i * x_stride + u * 2);
        }
      }
    }
    return;
  }
#if APUS_LEVEL > 0
  // 2 * 127 * largest code * steps must stay below 2^15.
  const int steps = class == class_4 ? 8 : class == class_5 || class == class_4_small ? 4 : 2;
  APUS_UNROLL for (int v = 0; v < vectors; v++) {
    APUS_UNROLL for (int begin = first; begin < first + count; begin += steps) {
      BYTES pairs[CODES_ROWS];
      int end = begin + steps < first + count ? begin + steps : first + count;
      APUS_UNROLL for (int u = begin; u < end; u++) {
        BYTES code = __builtin_bit_cast(BYTES, FN(codes_unit)(c, class, w + v * c->vector_bytes, u));
        APUS_UNROLL for (int i = 0; i < rows; i++) {
#if APUS_LEVEL == 1
          __m256i b = _mm256_set1_epi32((int)x[i * x_stride + u]);
          APUS_UNROLL for (int p = 0; p < 2; p++) {
            __m256i product = _mm256_maddubs_epi16(code.part[p], b);
            pairs[i].part[p] = u == begin ? product : _mm256_add_epi16(pairs[i].part[p], product);
          }
#else
          __m512i product = _mm512_maddubs_epi16(code.part[0], _mm512_set1_epi32((int)x[i * x_stride + u]));
          pairs[i].part[0] = u == begin ? product : _mm512_add_epi16(pairs[i].part[0], product);
#endif
        }
      }
      APUS_UNROLL for (int i = 0; i < rows; i++) {
#if APUS_LEVEL == 1
        APUS_UNROLL for (int p = 0; p < 2; p++) {
          pairs[i].part[p] = _mm256_madd_epi16(pairs[i].part[p], _mm256_set1_epi16(1));
        }
#else
        pairs[i].part[0] = _mm512_madd_epi16(pairs[i].part[0], _mm512_set1_epi16(1));
#endif
        sums[i][v] += __builtin_bit_cast(vi, pairs[i]);
      }
    }
  }
#endif
#endif
}

// Sixteen factors of 8 bits.
APUS_INLINE vf FN(signed_factors)(const uint8_t *from) {
  typedef int8_t vb __attribute__((ext_vector_type(16), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*(const vb *)(const void *)from, vi), vf);
}
APUS_INLINE vf FN(unsigned_factors)(const uint8_t *from) {
  typedef uint8_t vb __attribute__((ext_vector_type(16), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*(const vb *)(const void *)from, vi), vf);
}

// Stores what a tile summed: rows of four vectors.
APUS_INLINE void FN(codes_store)(const codes_call *a, int rows, const vf *total, int64_t panel, int64_t row) {
  int64_t output = panel * codes_panel;
  for (int i = 0; i < rows; i++) {
    float *out = a->out + (row + i) * a->out_stride + output;
    for (int v = 0; v < 4; v++) {
      int64_t count = apus_min(16, a->codes->outputs - output - 16 * v);
      if (count <= 0) break;
      vf value = total[i * 4 + v];
      if (a->bias) value += FN(load_some)(a->bias + output + 16 * v, count);
      if (count == 16) {
        FN(store)(out + 16 * v, value);
      } else {
        FN(store_some)(out + 16 * v, value, count);
      }
    }
  }
}

// MARK: Tiles

// All outputs of a panel for `rows` rows, a constant.
APUS_INLINE void FN(codes_tile)(
    const codes_call *a, codes_class class, int rows, int vectors, int64_t panel, int64_t row, int fetches) {
  const apus_codes *c = a->codes;
  const apus_code_layout *layout = &c->layout;
  vf total[CODES_ROWS][4];
  APUS_UNROLL for (int i = 0; i < rows; i++) {
    APUS_UNROLL for (int v = 0; v < 4; v++) total[i][v] = 0;
  }
  const uint32_t *x = a->x + row * a->x_stride;
  const int64_t unit_words = CODES_WIDE(class) ? 2 : 1;
  int64_t used = apus_min(4, apus_ceil_div(c->outputs - panel * codes_panel, 16));
  int64_t group_subs = layout->group >= layout->block ? layout->block / codes_sub : layout->group / codes_sub;
  for (int64_t b = 0; b < c->blocks; b++) {
    const uint8_t *data = block_data(c, panel, b);
    int64_t subs = subs_of_block(c, b);
    const uint32_t *block_x = x + b * (layout->block / 4) * unit_words;
    for (int64_t v0 = 0; v0 < used; v0 += vectors) {
      const uint8_t *w = data + c->header_bytes + v0 * c->vector_bytes;
      vf part[CODES_ROWS][CODES_VECTORS_ONE];
      vi sums[2][CODES_ROWS][CODES_VECTORS_ONE];
      APUS_UNROLL for (int i = 0; i < rows; i++) {
        APUS_UNROLL for (int v = 0; v < vectors; v++) part[i][v] = 0;
      }
      int64_t group = 0;
      for (int64_t sub = 0; sub < subs;) {
        // One group of whole sub-blocks, or the two halves of a sub-block.
        int halves = (class == class_4 || class == class_6) && layout->group == 16;
        const int32_t *starts = a->starts + row * c->groups + b * c->block_groups + group;
        APUS_UNROLL for (int i = 0; i < rows; i++) {
          vi start = FN(codes_begin)(starts, c->groups, rows, i);
          APUS_UNROLL for (int v = 0; v < vectors; v++) sums[0][i][v] = start;
        }
        if (halves) {
          APUS_UNROLL for (int i = 0; i < rows; i++) {
            vi start = FN(codes_begin)(starts + 1, c->groups, rows, i);
            APUS_UNROLL for (int v = 0; v < vectors; v++) sums[1][i][v] = start;
          }
          FN(codes_dot)(
              c, class, rows, vectors, sums[0], block_x + sub * 8 * unit_words, a->x_stride, w + sub * c->sub_bytes, 0,
              4);
          FN(codes_dot)(
              c, class, rows, vectors, sums[1], block_x + sub * 8 * unit_words, a->x_stride, w + sub * c->sub_bytes, 4,
              4);
          sub++;
        } else {
          int64_t end = apus_min(subs, sub + group_subs);
          for (; sub < end; sub++) {
            if (fetches) {
              // 4 KiB ahead: as much as this sub-block, and with the first one as much as the header.
              const int lines = (class == class_8 ? 8 : class == class_6 ? 6 : class == class_5 ? 5 : 4) * vectors;
              const uint8_t *ahead = w + sub * c->sub_bytes + 4096;
              APUS_UNROLL for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + 64 * i, 0, 3);
              if (sub == 0) {
                ahead = data + v0 * c->header_bytes / 4 + 4096;
                for (int64_t i = 0; i < c->header_bytes * vectors / 4; i += 64) __builtin_prefetch(ahead + i, 0, 3);
              }
            }
            FN(codes_dot)(
                c, class, rows, vectors, sums[0], block_x + sub * 8 * unit_words, a->x_stride,
                w + sub * c->sub_bytes, 0, 8);
          }
        }
        for (int half = 0; half <= halves; half++, group++) {
          FN(codes_end)(rows, vectors, sums[half]);
          int64_t top = layout->has_factors ? 0 : group;
          APUS_UNROLL for (int v = 0; v < vectors; v++) {
            int64_t lane = (v0 + v) * 16;
            vf scale = FN(load_as)(data + c->scales_at, layout->scale_dtype, top * codes_panel + lane);
            vf base = scale;
            if (layout->has_factors) {
              scale *= FN(signed_factors)(data + c->factors_at + group * codes_panel + lane);
            }
            APUS_UNROLL for (int i = 0; i < rows; i++) {
              part[i][v] += __builtin_convertvector(sums[half][i][v], vf) * scale;
            }
            if (layout->minimum != APUS_MINIMUM_NONE) {
              vf minimum = base;
              if (layout->minimum == APUS_MINIMUM_OWN) {
                minimum = FN(load_as)(data + c->minimums_at, layout->scale_dtype, top * codes_panel + lane);
              }
              if (layout->minimum == APUS_MINIMUM_ZERO_POINT || layout->has_factors) {
                minimum *= FN(unsigned_factors)(data + c->minimum_factors_at + group * codes_panel + lane);
              }
              APUS_UNROLL for (int i = 0; i < rows; i++) {
                part[i][v] -= minimum * a->sums[(row + i) * c->groups + b * c->block_groups + group];
              }
            }
          }
        }
      }
      APUS_UNROLL for (int i = 0; i < rows; i++) {
        float scale = a->scales[(row + i) * c->blocks + b];
        APUS_UNROLL for (int v = 0; v < vectors; v++) total[i][v0 + v] += part[i][v] * scale;
      }
    }
  }
  FN(codes_store)(a, rows, total[0], panel, row);
}

// MARK: float8

// float8 weights of a unit as bfloat16 pairs, 2^8 times too small: inputs 0 and 1, and inputs 2 and 3.
//
// A float8 number with its exponent's four bits at the end of float16's five is that number times 2^-8.
#if APUS_LEVEL >= 3
APUS_INLINE vu FN(float8_pairs)(vu w, int second) {
  __m512i halves = (__m512i)(second ? w : w << 8);
  halves = _mm512_and_si512(_mm512_srai_epi16(halves, 1), _mm512_set1_epi32((int)0xbf80bf80u));
  __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  return (vu)_mm512_cvtne2ps_pbh(high, low);
}
#else
APUS_INLINE vf FN(float8_number)(vu w, int shift) {
  vi bits = ((vi)(w << shift) >> 4) & (vi)0x87f00000u;
  return __builtin_bit_cast(vf, bits) * 0x1p112f;
}
#endif

APUS_INLINE void FN(float8_tile)(
    const codes_call *a, int rows, int vectors, int64_t panel, int64_t row, int fetches) {
  const apus_codes *c = a->codes;
  const apus_code_layout *layout = &c->layout;
  vf total[CODES_ROWS][4];
  APUS_UNROLL for (int i = 0; i < rows; i++) {
    APUS_UNROLL for (int v = 0; v < 4; v++) total[i][v] = 0;
  }
  const uint32_t *x = a->x + row * a->x_stride;
  int64_t used = apus_min(4, apus_ceil_div(c->outputs - panel * codes_panel, 16));
  int64_t group_subs = apus_min(layout->group, layout->block) / codes_sub;
  for (int64_t b = 0; b < c->blocks; b++) {
    const uint8_t *data = block_data(c, panel, b);
    int64_t subs = subs_of_block(c, b);
    const int64_t unit_words = 2 * APUS_WIDE_WORDS;
    const uint32_t *block_x = x + b * (layout->block / 4) * unit_words;
    for (int64_t v0 = 0; v0 < used; v0 += vectors) {
      const uint8_t *w = data + c->header_bytes + v0 * c->vector_bytes;
      int64_t group = 0;
      for (int64_t sub = 0; sub < subs; group++) {
        vf sums[CODES_ROWS][CODES_VECTORS_ONE];
        APUS_UNROLL for (int i = 0; i < rows; i++) {
          APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = 0;
        }
        int64_t end = apus_min(subs, sub + group_subs);
        for (; sub < end; sub++) {
          _Pragma("clang loop unroll(disable)") for (int u = 0; u < 8; u++) {
            const uint32_t *unit_x = block_x + (sub * 8 + u) * unit_words;
            APUS_UNROLL for (int v = 0; v < vectors; v++) {
              const uint8_t *from = w + sub * c->sub_bytes + v * c->vector_bytes + u * 64;
              if (fetches) __builtin_prefetch(from + 4096, 0, 3);
              vu codes = FN(codes_load)(from);
#if APUS_LEVEL >= 3
              vu first = FN(float8_pairs)(codes, 0), second = FN(float8_pairs)(codes, 1);
              APUS_UNROLL for (int i = 0; i < rows; i++) {
                sums[i][v] = FN(step_bfloat16)(sums[i][v], unit_x + i * a->x_stride, first);
                sums[i][v] = FN(step_bfloat16)(sums[i][v], unit_x + i * a->x_stride + 1, second);
              }
#else
              APUS_UNROLL for (int pair = 0; pair < 2; pair++) {
                vf first = FN(float8_number)(codes, pair ? 16 : 24), second = FN(float8_number)(codes, pair ? 0 : 8);
                APUS_UNROLL for (int i = 0; i < rows; i++) {
                  float value[2];
                  memcpy(value, unit_x + i * a->x_stride + 2 * pair, 8);
                  sums[i][v] = FN(fma)((vf)value[1], second, sums[i][v]);
                  sums[i][v] = FN(fma)((vf)value[0], first, sums[i][v]);
                }
              }
#endif
            }
          }
        }
        APUS_UNROLL for (int v = 0; v < vectors; v++) {
          vf scale = FN(load_as)(
              data + c->scales_at, layout->scale_dtype, group * codes_panel + (v0 + v) * 16);
          APUS_UNROLL for (int i = 0; i < rows; i++) total[i][v0 + v] += sums[i][v] * scale;
        }
      }
    }
  }
  FN(codes_store)(a, rows, total[0], panel, row);
}

#undef CODES_CASE
#define CODES_CASE(CALL, N)                                                                                         \
  case N:                                                                                                           \
    CALL(N, N == 1 ? CODES_VECTORS_ONE : CODES_VECTORS_MANY);                                                       \
    break;
#undef CODES_EACH_ROWS
#if CODES_ROWS == 6
#define CODES_EACH_ROWS(CALL) \
  CODES_CASE(CALL, 1) CODES_CASE(CALL, 2) CODES_CASE(CALL, 3) CODES_CASE(CALL, 4) CODES_CASE(CALL, 5) CODES_CASE(CALL, 6)
#else
#define CODES_EACH_ROWS(CALL) CODES_CASE(CALL, 1) CODES_CASE(CALL, 2)
#endif

#undef CODES_SHARED
#if APUS_LEVEL == 1
static void FN(shared_panel)(const codes_call *a, int64_t panel, int64_t first_row, int64_t last_row);
#define CODES_SHARED(CALL, PANEL, FIRST, LAST)                                                                      \
  if (LAST - FIRST >= least_shared_rows) {                                                                          \
    FN(shared_panel)(CALL, PANEL, FIRST, LAST);                                                                     \
    return;                                                                                                         \
  }
#else
#define CODES_SHARED(CALL, PANEL, FIRST, LAST)
#endif

// Rows share a panel in tiles as equal as can be; the first one fetches it from memory.
#undef CODES_PANEL
#define CODES_PANEL(NAME, CALL)                                                                                     \
  static void FN(NAME)(const codes_call *a, int64_t panel, int64_t first_row, int64_t last_row) {                   \
    CODES_SHARED(a, panel, first_row, last_row)                                                                     \
    int64_t tiles = apus_ceil_div(last_row - first_row, CODES_ROWS);                                                \
    for (int64_t t = 0; t < tiles; t++) {                                                                           \
      int64_t row = first_row + (last_row - first_row) * t / tiles;                                                 \
      int64_t rows = first_row + (last_row - first_row) * (t + 1) / tiles - row;                                    \
      switch (rows) { CODES_EACH_ROWS(CALL) }                                                                       \
    }                                                                                                               \
  }

#undef CALL_4
#undef CALL_4_LEVELS
#undef CALL_4_SMALL
#undef CALL_5
#undef CALL_6
#undef CALL_8
#undef CALL_FLOAT8
#define CALL_4(N, V) FN(codes_tile)(a, class_4, N, V, panel, row, t == 0)
#define CALL_4_LEVELS(N, V) FN(codes_tile)(a, class_4_levels, N, V, panel, row, t == 0)
#define CALL_4_SMALL(N, V) FN(codes_tile)(a, class_4_small, N, V, panel, row, t == 0)
#define CALL_5(N, V) FN(codes_tile)(a, class_5, N, V, panel, row, t == 0)
#define CALL_6(N, V) FN(codes_tile)(a, class_6, N, V, panel, row, t == 0)
#define CALL_8(N, V) FN(codes_tile)(a, class_8, N, V, panel, row, t == 0)
#define CALL_FLOAT8(N, V) FN(float8_tile)(a, N, V, panel, row, t == 0)
CODES_PANEL(panel_4, CALL_4)
CODES_PANEL(panel_4_levels, CALL_4_LEVELS)
CODES_PANEL(panel_4_small, CALL_4_SMALL)
CODES_PANEL(panel_5, CALL_5)
CODES_PANEL(panel_6, CALL_6)
CODES_PANEL(panel_8, CALL_8)
CODES_PANEL(panel_float8, CALL_FLOAT8)

#if APUS_LEVEL == 1

// MARK: Several tiles of rows

// Rows that one tile does not hold share what a block's codes are as the inner loop multiplies them: bytes, pairs of 16
// bits where codes are wide, or float32. Sixteen outputs of a block are unpacked into the nearest cache, then meet
// all rows. Sums and their order are those of `codes_tile` and `float8_tile`.

typedef enum {
  // A group's units are summed in 16 bits at once.
  shared_bytes_group,
  shared_bytes_8,
  shared_bytes_4,
  shared_bytes_2,
  shared_wide,
  shared_float,
} shared_kind;

// Sixteen outputs of some neighbouring blocks.
typedef struct {
  // 16 KiB: units of 64 bytes, 128 where they are wide, 256 as float32. Then scales and minimums of groups.
  _Alignas(64) uint8_t units[16384];
  _Alignas(64) float scales[64][16];
  _Alignas(64) float minimums[64][16];
  int64_t first_block;
  int64_t unit_count;
  int64_t block_units;
  int64_t group_units;
  int has_minimums;
  // What is fetched from memory meanwhile, for each block.
  const uint8_t *ahead;
  int64_t ahead_bytes;
} shared_blocks;

// The rows of a pass over a panel.
enum { shared_rows = 48, shared_tile_rows = 4 };

APUS_INLINE void FN(shared_unpack)(
    const apus_codes *c, codes_class class, int64_t panel, int64_t first, int64_t last, int64_t v, shared_blocks *s) {
  const apus_code_layout *layout = &c->layout;
  s->first_block = first;
  s->unit_count = 0;
  s->block_units = layout->block / 4;
  s->group_units = apus_min(layout->group, layout->block) / 4;
  s->has_minimums = layout->minimum != APUS_MINIMUM_NONE;
  // A quarter of each of the blocks that follow these.
  s->ahead_bytes = c->block_bytes / 4;
  s->ahead = block_data(c, panel, first) + (last - first) * c->block_bytes + v * s->ahead_bytes;
  int64_t lane = 16 * v, group = 0;
  for (int64_t b = first; b < last; b++) {
    const uint8_t *data = block_data(c, panel, b);
    int64_t subs = subs_of_block(c, b);
    const uint8_t *w = data + c->header_bytes + v * c->vector_bytes;
    for (int64_t sub = 0; sub < subs; sub++, w += c->sub_bytes, s->unit_count += 8) {
      APUS_UNROLL for (int u = 0; u < 8; u++) {
        int64_t unit = s->unit_count + u;
        if (class == class_float8) {
          vu codes = FN(codes_load)(w + u * 64);
          float *to = (float *)(void *)(s->units + unit * 256);
          FN(store)(to, FN(float8_number)(codes, 8));
          FN(store)(to + 16, FN(float8_number)(codes, 24));
          FN(store)(to + 32, FN(float8_number)(codes, 0));
          FN(store)(to + 48, FN(float8_number)(codes, 16));
        } else {
          vu code = FN(codes_unit)(c, class, w, u);
          if (class == class_8 || class == class_4_levels) {
            vu *to = (vu *)(void *)(s->units + unit * 128);
            to[0] = code & 0x00ff00ffu;
            to[1] = code >> 8 & 0x00ff00ffu;
          } else {
            *(vu *)(void *)(s->units + unit * 64) = code;
          }
        }
      }
    }
    int64_t groups = apus_ceil_div(subs * 8, s->group_units);
    for (int64_t g = 0; g < groups; g++, group++) {
      int64_t top = layout->has_factors ? 0 : g;
      vf scale = FN(load_as)(data + c->scales_at, layout->scale_dtype, top * codes_panel + lane);
      vf minimum = scale;
      if (layout->has_factors) scale *= FN(signed_factors)(data + c->factors_at + g * codes_panel + lane);
      FN(store)(s->scales[group], scale);
      if (layout->minimum == APUS_MINIMUM_NONE) continue;
      if (layout->minimum == APUS_MINIMUM_OWN) {
        minimum = FN(load_as)(data + c->minimums_at, layout->scale_dtype, top * codes_panel + lane);
      }
      if (layout->minimum == APUS_MINIMUM_ZERO_POINT || layout->has_factors) {
        minimum *= FN(unsigned_factors)(data + c->minimum_factors_at + g * codes_panel + lane);
      }
      FN(store)(s->minimums[group], minimum);
    }
  }
}

// total[i] += the products of `rows` rows, a constant, with some blocks. Rows of totals lie 64 numbers apart. Tile `tile`
// of `tiles` fetches its share of what follows.
APUS_INLINE void FN(shared_tile)(
    const codes_call *a, const shared_blocks *s, shared_kind kind, int rows, int64_t row, int64_t tile, int64_t tiles,
    float *total) {
  const apus_codes *c = a->codes;
  const int64_t unit_words = kind == shared_float ? 4 : kind == shared_wide ? 2 : 1;
  const uint32_t *x = a->x + row * a->x_stride + s->first_block * s->block_units * unit_words;
  const int32_t *starts = a->starts + row * c->groups + s->first_block * c->block_groups;
  const float *row_sums = a->sums + row * c->groups + s->first_block * c->block_groups;
  const float *row_scales = a->scales + row * c->blocks + s->first_block;
  const uint8_t *ahead = s->ahead;
  int64_t group = 0;
  for (int64_t first = 0; first < s->unit_count; row_scales++, ahead += c->block_bytes) {
    for (int64_t at = tile * 64; at < s->ahead_bytes; at += tiles * 64) __builtin_prefetch(ahead + at, 0, 2);
    int64_t block_end = apus_min(s->unit_count, first + s->block_units);
    // Parts of the result are added in memory, where the compiler must leave them: registers are for the sums.
    vf memory[shared_tile_rows], *part = memory;
    APUS_UNROLL for (int i = 0; i < rows; i++) part[i] = 0;
    for (; first < block_end; group++) {
      __asm__("" : "+r"(part) : : "memory");
      int64_t end = apus_min(block_end, first + s->group_units);
      vf scale = FN(load)(s->scales[group]);
      if (kind == shared_float) {
        vf sums[shared_tile_rows];
        APUS_UNROLL for (int i = 0; i < rows; i++) sums[i] = 0;
        _Pragma("clang loop unroll(disable)") for (; first < end; first++) {
          const float *w = (const float *)(const void *)(s->units + first * 256);
          APUS_UNROLL for (int n = 0; n < 4; n++) {
            vf numbers = FN(load)(w + 16 * n);
            APUS_UNROLL for (int i = 0; i < rows; i++) {
              float value;
              memcpy(&value, x + i * a->x_stride + first * 4 + (n ^ 1), 4);
              sums[i] = FN(fma)((vf)value, numbers, sums[i]);
            }
          }
        }
        APUS_UNROLL for (int i = 0; i < rows; i++) {
          FN(store)(total + 64 * i, FN(load)(total + 64 * i) + sums[i] * scale);
        }
        continue;
      }
      BYTES sums[shared_tile_rows];
      if (kind != shared_bytes_group) {
        APUS_UNROLL for (int i = 0; i < rows; i++) {
          sums[i] = __builtin_bit_cast(BYTES, (vi)starts[i * c->groups + group]);
        }
      }
      if (kind == shared_wide) {
        _Pragma("clang loop unroll(disable)") for (; first < end; first++) {
          const __m256i *w = (const __m256i *)(const void *)(s->units + first * 128);
          APUS_UNROLL for (int half = 0; half < 2; half++) {
            __m256i low = _mm256_load_si256(w + 2 * half), high = _mm256_load_si256(w + 2 * half + 1);
            APUS_UNROLL for (int i = 0; i < rows; i++) {
              __m256i value = _mm256_set1_epi32((int)x[i * a->x_stride + first * 2 + half]);
              sums[i].part[0] = _mm256_add_epi32(sums[i].part[0], _mm256_madd_epi16(low, value));
              sums[i].part[1] = _mm256_add_epi32(sums[i].part[1], _mm256_madd_epi16(high, value));
            }
          }
        }
      } else {
        // As in `codes_dot`, as many units as 16 bits hold.
        const int steps = kind == shared_bytes_4 ? 4 : kind == shared_bytes_2 ? 2 : 8;
        _Pragma("clang loop unroll(disable)") do {
          BYTES pairs[shared_tile_rows];
          APUS_UNROLL for (int u = 0; u < steps; u++) {
            const __m256i *w = (const __m256i *)(const void *)(s->units + (first + u) * 64);
            __m256i low = _mm256_load_si256(w), high = _mm256_load_si256(w + 1);
            APUS_UNROLL for (int i = 0; i < rows; i++) {
              __m256i value = _mm256_set1_epi32((int)x[i * a->x_stride + first + u]);
              __m256i p0 = _mm256_maddubs_epi16(low, value), p1 = _mm256_maddubs_epi16(high, value);
              pairs[i].part[0] = u == 0 ? p0 : _mm256_add_epi16(pairs[i].part[0], p0);
              pairs[i].part[1] = u == 0 ? p1 : _mm256_add_epi16(pairs[i].part[1], p1);
              // Left alone, the compiler makes trees of these sums, which take more registers than there are.
              __asm__("" : "+x"(pairs[i].part[0]), "+x"(pairs[i].part[1]));
            }
          }
          APUS_UNROLL for (int i = 0; i < rows; i++) {
            __m256i start = _mm256_set1_epi32(kind == shared_bytes_group ? starts[i * c->groups + group] : 0);
            APUS_UNROLL for (int p = 0; p < 2; p++) {
              __m256i pair = _mm256_madd_epi16(pairs[i].part[p], _mm256_set1_epi16(1));
              sums[i].part[p] = _mm256_add_epi32(kind == shared_bytes_group ? start : sums[i].part[p], pair);
            }
          }
          first += steps;
        } while (kind != shared_bytes_group && first < end);
      }
      APUS_UNROLL for (int i = 0; i < rows; i++) {
        part[i] += __builtin_convertvector(__builtin_bit_cast(vi, sums[i]), vf) * scale;
      }
      if (s->has_minimums) {
        vf minimum = FN(load)(s->minimums[group]);
        APUS_UNROLL for (int i = 0; i < rows; i++) part[i] -= minimum * row_sums[i * c->groups + group];
      }
    }
    if (kind == shared_float) continue;
    APUS_UNROLL for (int i = 0; i < rows; i++) {
      FN(store)(total + 64 * i, FN(load)(total + 64 * i) + part[i] * row_scales[i * c->blocks]);
    }
  }
}

#undef SHARED_TILES
#define SHARED_TILES(KIND)                                                                                          \
  static void FN(KIND##_tiles)(                                                                                     \
      const codes_call *a, const shared_blocks *s, int64_t first_row, int64_t last_row, float *totals) {            \
    int64_t tiles = apus_ceil_div(last_row - first_row, shared_tile_rows);                                          \
    for (int64_t t = 0; t < tiles; t++) {                                                                           \
      int64_t row = first_row + (last_row - first_row) * t / tiles;                                                 \
      int64_t rows = first_row + (last_row - first_row) * (t + 1) / tiles - row;                                    \
      float *total = totals + 64 * (row - first_row);                                                               \
      switch (rows) {                                                                                               \
        case 1:                                                                                                     \
          FN(shared_tile)(a, s, KIND, 1, row, t, tiles, total);                                                     \
          break;                                                                                                    \
        case 2:                                                                                                     \
          FN(shared_tile)(a, s, KIND, 2, row, t, tiles, total);                                                     \
          break;                                                                                                    \
        case 3:                                                                                                     \
          FN(shared_tile)(a, s, KIND, 3, row, t, tiles, total);                                                     \
          break;                                                                                                    \
        case 4:                                                                                                     \
          FN(shared_tile)(a, s, KIND, 4, row, t, tiles, total);                                                     \
          break;                                                                                                    \
      }                                                                                                             \
    }                                                                                                               \
  }

SHARED_TILES(shared_bytes_group)
SHARED_TILES(shared_bytes_8)
SHARED_TILES(shared_bytes_4)
SHARED_TILES(shared_bytes_2)
SHARED_TILES(shared_wide)
SHARED_TILES(shared_float)

static void FN(shared_panel)(const codes_call *a, int64_t panel, int64_t first_row, int64_t last_row) {
  const apus_codes *c = a->codes;
  shared_blocks s;
  _Alignas(64) float totals[shared_rows][64];
  int64_t used = apus_min(4, apus_ceil_div(c->outputs - panel * codes_panel, 16));
  // Blocks that are unpacked together.
  int64_t unit_bytes = c->class == class_float8 ? 256 : c->class == class_8 || c->class == class_4_levels ? 128 : 64;
  int64_t blocks = (int64_t)sizeof s.units / unit_bytes / (c->layout.block / 4);
  blocks = apus_min(blocks, (int64_t)(sizeof s.scales / sizeof s.scales[0]) / c->block_groups);
  // Pieces of rows as equal as can be.
  int64_t pieces = apus_ceil_div(last_row - first_row, shared_rows);
  for (int64_t piece = 0; piece < pieces; piece++) {
    int64_t row = first_row + (last_row - first_row) * piece / pieces;
    int64_t end = first_row + (last_row - first_row) * (piece + 1) / pieces;
    memset(totals, 0, (size_t)(end - row) * sizeof totals[0]);
    for (int64_t b = 0; b < c->blocks; b += blocks) {
      int64_t end_block = apus_min(c->blocks, b + blocks);
      for (int64_t v = 0; v < used; v++) {
        float *total = totals[0] + 16 * v;
        switch (c->class) {
          case class_4:
            FN(shared_unpack)(c, class_4, panel, b, end_block, v, &s);
            if (c->layout.group == 16) {
              FN(shared_bytes_4_tiles)(a, &s, row, end, total);
            } else if (c->layout.group == codes_sub) {
              FN(shared_bytes_group_tiles)(a, &s, row, end, total);
            } else {
              FN(shared_bytes_8_tiles)(a, &s, row, end, total);
            }
            break;
          case class_4_levels:
            FN(shared_unpack)(c, class_4_levels, panel, b, end_block, v, &s);
            FN(shared_wide_tiles)(a, &s, row, end, total);
            break;
          case class_4_small:
            FN(shared_unpack)(c, class_4_small, panel, b, end_block, v, &s);
            FN(shared_bytes_4_tiles)(a, &s, row, end, total);
            break;
          case class_5:
            FN(shared_unpack)(c, class_5, panel, b, end_block, v, &s);
            FN(shared_bytes_4_tiles)(a, &s, row, end, total);
            break;
          case class_6:
            FN(shared_unpack)(c, class_6, panel, b, end_block, v, &s);
            FN(shared_bytes_2_tiles)(a, &s, row, end, total);
            break;
          case class_8:
            FN(shared_unpack)(c, class_8, panel, b, end_block, v, &s);
            FN(shared_wide_tiles)(a, &s, row, end, total);
            break;
          case class_float8:
            FN(shared_unpack)(c, class_float8, panel, b, end_block, v, &s);
            FN(shared_float_tiles)(a, &s, row, end, total);
            break;
        }
      }
    }
    for (int64_t r = row; r < end; r++) {
      vf total[4];
      for (int v = 0; v < 4; v++) total[v] = FN(load)(totals[r - row] + 16 * v);
      FN(codes_store)(a, 1, total, panel, r);
    }
  }
}

#endif

// MARK: Quantisation

// Codes of numbers at a scale: linear codes around `offset`, kept within 0...most.
APUS_INLINE vi FN(linear_codes)(vf x, float inverse, float offset, float most) {
  vf q = FN(round)(x * inverse) + offset;
  q = q < 0.0f ? (vf)0.0f : q;
  q = q > most ? (vf)most : q;
  return __builtin_convertvector(q, vi);
}

// Codes of a group of numbers (a multiple of 16, zeros at the end); returns the scale, already rounded to its type.
static float FN(quantize_group)(const apus_code_layout *layout, const float *x, int64_t count, uint8_t *codes) {
  vf highest = x[0], lowest = x[0];
  for (int64_t i = 0; i < count; i += 16) {
    vf v = FN(load)(x + i);
    highest = FN(max)(v, highest);
    lowest = v < lowest ? v : lowest;
  }
  float most = FN(largest)(highest), least = -FN(largest)(-lowest);
  float offset = (float)layout->offset;
  float extreme = most > -least ? most : least;
  int is_float8 = layout->levels == APUS_LEVELS_E4M3;
  float range = is_float8 ? 448.0f : (float)layout->offset - (layout->bits == 8 ? 1.0f : 0.0f);
  // Linear codes reach one step further down than up: the largest magnitude goes there.
  float scale = layout->bits == 8 ? fabsf(extreme) / range : -extreme / range;
  if (!is_float8 && layout->bits < 8 && extreme != 0) {
    float best = -1;
    for (int i = -4; i <= 8; i++) {
      float inverse = (range - 0.125f * (float)i) / -extreme;
      vf products = 0, squares = 0;
      for (int64_t k = 0; k < count; k += 16) {
        vf v = FN(load)(x + k);
        vf q = __builtin_convertvector(FN(linear_codes)(v, inverse, offset, 2 * offset - 1), vf) - offset;
        products += v * q;
        squares += q * q;
      }
      // With the best scale for these codes, products / squares, the squared error is that much below the sum of x^2.
      float product = FN(sum)(products), square = FN(sum)(squares);
      float gain = square > 0 ? product * product / square : 0;
      if (gain > best && square > 0) {
        best = gain;
        scale = product / square;
      }
    }
  }
  uint8_t bytes[4];
  store_number(bytes, layout->scale_dtype, scale);
  scale = load_number(bytes, layout->scale_dtype);
  float inverse = scale != 0 ? 1.0f / scale : 0;
  if (!(fabsf(inverse) <= 3.0e38f)) inverse = scale = 0;
  for (int64_t i = 0; i < count; i += 16) {
    vf v = FN(load)(x + i);
    vi q = is_float8 ? (vi)FN(float8_bits)(v * inverse) : FN(linear_codes)(v, inverse, offset, 2 * offset - 1);
    typedef uint8_t vb __attribute__((ext_vector_type(16)));
    vb b = __builtin_convertvector(q, vb);
    memcpy(codes + i, &b, 16);
  }
  return scale;
}

static void FN(quantize_panel)(const quantize_call *a, int64_t panel) {
  apus_codes *c = a->codes;
  int64_t groups = apus_ceil_div(c->inputs, c->layout.group), padded = apus_round_up(c->inputs, 16);
  float *numbers = malloc((size_t)padded * 4);
  uint8_t *row_codes = malloc((size_t)(padded + codes_panel * c->inputs));
  float *scales = malloc((size_t)(codes_panel * groups) * 4 + 4);
  if (!numbers || !row_codes || !scales) abort();
  uint8_t *codes = row_codes + padded;
  int64_t outputs = apus_min(codes_panel, c->outputs - panel * codes_panel);
  for (int64_t o = 0; o < outputs; o++) {
    int64_t row = panel * codes_panel + o;
    int s = 0;
    while (row >= a->sources[s].rows) row -= a->sources[s++].rows;
    apus_dtype dtype = a->sources[s].dtype;
    const char *from =
        (const char *)a->sources[s].address + (size_t)row * (size_t)c->inputs * apus_dtype_bytes(dtype);
    for (int64_t k = 0; k < padded; k += 16) {
      int64_t n = apus_min(16, c->inputs - k);
      FN(store)(numbers + k, n == 16 ? FN(load_as)(from, dtype, k) : FN(load_some_as)(from, dtype, k, n));
    }
    for (int64_t g = 0; g < groups; g++) {
      int64_t begin = g * c->layout.group, end = apus_min(padded, begin + c->layout.group);
      scales[o * groups + g] = FN(quantize_group)(&c->layout, numbers + begin, end - begin, row_codes + begin);
    }
    memcpy(codes + o * c->inputs, row_codes, (size_t)c->inputs);
  }
  apus_code_rows rows = {codes, scales, NULL, NULL, NULL};
  apus_codes_pack_panel(c, panel, &rows);
  free(numbers);
  free(row_codes);
  free(scales);
}

#endif
