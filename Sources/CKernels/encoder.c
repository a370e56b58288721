// Operators of bidirectional encoders: layer norm, activation functions, attention over whole sequences.

#ifndef APUS_LEVEL

#include "internal.h"

typedef struct {
  const float *x;
  int64_t x_stride;
  // Added to x before it is normalised; NULL for nothing.
  const float *y;
  int64_t y_stride;
  int64_t rows;
  int64_t columns;
  const float *weight;
  const float *bias;
  float epsilon;
  apus_activation activation;
  float *out;
  int64_t out_stride;
  int64_t grain;
} encoder_rows;

// Rows whose attention is computed together.
enum { rows_together = 4 };

// Rows of one sequence that attend to all rows of the sequence.
typedef struct {
  int32_t first;
  int32_t last;
  int32_t sequence_first;
  int32_t sequence_last;
} encoder_block;

typedef struct {
  apus_context *context;
  const float *q;
  const float *k;
  const float *v;
  int64_t stride;
  float *out;
  int64_t out_stride;
  const encoder_block *blocks;
  int heads;
  int head_dimension;
  float scale;
} encoder_attention;

#define APUS_FILE "encoder.c"
#include "each_level.h"

typedef void encoder_rows_function(const encoder_rows *, int64_t first, int64_t last);
typedef void encoder_attention_function(const encoder_attention *, const encoder_block *, int head, float *scratch);

static encoder_rows_function *const layer_norm_rows[] = APUS_LEVELS(layer_norm_rows);
static encoder_rows_function *const activate_rows[] = APUS_LEVELS(activate_rows);
static encoder_attention_function *const attend_block[] = APUS_LEVELS(attend_block);

typedef struct {
  encoder_rows_function *function;
  encoder_rows arguments;
} encoder_region;

static void encoder_task(void *argument, int chunk, int thread) {
  (void)thread;
  const encoder_region *region = argument;
  int64_t first = chunk * region->arguments.grain;
  region->function(&region->arguments, first, apus_min(region->arguments.rows, first + region->arguments.grain));
}

static void run(apus_context *context, encoder_rows_function *function, encoder_rows arguments) {
  if (arguments.rows <= 0 || arguments.columns <= 0) return;
  encoder_region region = {function, arguments};
  int64_t grain = apus_grain(context, arguments.rows, arguments.columns * 8);
  // A region has at most 2^20 - 1 chunks.
  while (apus_ceil_div(arguments.rows, grain) > 1000000) grain *= 2;
  region.arguments.grain = grain;
  apus_pool_run(context->pool, (int)apus_ceil_div(arguments.rows, grain), encoder_task, &region);
}

void apus_layer_norm(
    apus_context *context, const float *x, int64_t x_stride, const float *y, int64_t y_stride, int64_t rows,
    int64_t columns, const float *weight, const float *bias, float epsilon, float *out, int64_t out_stride) {
  run(context, layer_norm_rows[context->isa],
      (encoder_rows){
          .x = x, .x_stride = x_stride, .y = y, .y_stride = y_stride, .rows = rows, .columns = columns,
          .weight = weight, .bias = bias, .epsilon = epsilon, .out = out, .out_stride = out_stride});
}

void apus_activate(
    apus_context *context, float *x, int64_t stride, int64_t rows, int64_t columns, apus_activation activation) {
  run(context, activate_rows[context->isa],
      (encoder_rows){
          .rows = rows, .columns = columns, .activation = activation, .out = x, .out_stride = stride});
}

static void attention_task(void *argument, int chunk, int thread) {
  const encoder_attention *a = argument;
  const encoder_block *block = a->blocks + chunk / a->heads;
  int64_t width = apus_round_up(block->sequence_last - block->sequence_first, 16);
  // Keys with positions side by side, then the scores of some rows.
  float *scratch = apus_scratch_reserve(
      &a->context->local[thread], (size_t)(width * (a->head_dimension + rows_together)) * sizeof(float));
  attend_block[a->context->isa](a, block, chunk % a->heads, scratch);
}

void apus_attend_all(
    apus_context *context, const float *q, const float *k, const float *v, int64_t stride, const int32_t *row_start,
    int sequences, int heads, int head_dimension, float scale, float *out, int64_t out_stride) {
  enum { rows_per_block = 64 };
  int64_t count = 0;
  for (int i = 0; i < sequences; i++) count += apus_ceil_div(row_start[i + 1] - row_start[i], rows_per_block);
  if (count == 0 || heads == 0) return;
  encoder_block *blocks = apus_scratch_reserve(&context->shared[0], (size_t)count * sizeof(encoder_block));
  int64_t next = 0;
  for (int i = 0; i < sequences; i++) {
    int32_t end = row_start[i + 1];
    for (int32_t row = row_start[i]; row < end; row += rows_per_block) {
      blocks[next++] =
          (encoder_block){row, (int32_t)apus_min(end, (int64_t)row + rows_per_block), row_start[i], end};
    }
  }
  encoder_attention arguments = {
      context, q, k, v, stride, out, out_stride, blocks, heads, head_dimension, scale};
  apus_pool_run(context->pool, (int)(count * heads), attention_task, &arguments);
}

#else

// Sums run in 64 lanes whatever the row, so their order is a function of `columns` alone. The variance is that of the
// differences from the mean, which loses nothing where the mean is large.
static void FN(layer_norm_rows)(const encoder_rows *a, int64_t first, int64_t last) {
  int64_t columns = a->columns;
  for (int64_t r = first; r < last; r++) {
    const float *x = a->x + r * a->x_stride;
    const float *y = a->y ? a->y + r * a->y_stride : NULL;
    float *out = a->out + r * a->out_stride;
    vf sums[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < columns; i += 16) {
      int64_t count = apus_min(16, columns - i);
      vf v = FN(load_some)(x + i, count);
      if (y) v += FN(load_some)(y + i, count);
      FN(store_some)(out + i, v, count);
      sums[i / 16 % 4] += v;
    }
    float mean = FN(sum)((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)columns;
    vf squares[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < columns; i += 16) {
      int64_t count = apus_min(16, columns - i);
      vf v = FN(load_some)(out + i, count) - mean;
      FN(store_some)(out + i, v, count);
      if (count < 16) v = FN(load_some)(out + i, count);
      squares[i / 16 % 4] = FN(fma)(v, v, squares[i / 16 % 4]);
    }
    float variance = FN(sum)((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)columns;
    float factor = 1.0f / sqrtf(variance + a->epsilon);
    for (int64_t i = 0; i < columns; i += 16) {
      int64_t count = apus_min(16, columns - i);
      vf v = FN(load_some)(out + i, count) * factor;
      vf scaled = FN(fma)(v, FN(load_some)(a->weight + i, count), FN(load_some)(a->bias + i, count));
      FN(store_some)(out + i, scaled, count);
    }
  }
}

// erf with an absolute error below 2e-7 in exact arithmetic (Abramowitz and Stegun: Handbook of mathematical functions,
// formula 7.1.26).
APUS_INLINE vf FN(erf)(vf x) {
  vf size = x < 0.0f ? -x : x;
  vf t = 1.0f / FN(fma)((vf)0.3275911f, size, (vf)1.0f);
  vf p = (vf)1.061405429f;
  p = FN(fma)(p, t, (vf)-1.453152027f);
  p = FN(fma)(p, t, (vf)1.421413741f);
  p = FN(fma)(p, t, (vf)-0.284496736f);
  p = FN(fma)(p, t, (vf)0.254829592f);
  vf result = 1.0f - p * t * FN(exp)(-size * size);
  return x < 0.0f ? -result : result;
}

APUS_INLINE vf FN(activated)(vf x, apus_activation activation) {
  switch (activation) {
  case APUS_GELU: return 0.5f * x * (1.0f + FN(erf)(x * 0.70710678f));
  case APUS_GELU_TANH: {
    vf inner = 0.79788456f * FN(fma)(x * x * x, (vf)0.044715f, x);
    // Far out the exponential inside tanh overflows its bounds; the result is x or 0 there anyway.
    return 0.5f * x * (1.0f + FN(tanh)(inner));
  }
  case APUS_RELU: return FN(max)(x, (vf)0.0f);
  case APUS_SILU: return x / (1.0f + FN(exp)(-x));
  }
  return x;
}

static void FN(activate_rows)(const encoder_rows *a, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++) {
    float *x = a->out + r * a->out_stride;
    int64_t i = 0;
    for (; i + 16 <= a->columns; i += 16) FN(store)(x + i, FN(activated)(FN(load)(x + i), a->activation));
    if (i < a->columns) {
      int64_t count = a->columns - i;
      FN(store_some)(x + i, FN(activated)(FN(load_some)(x + i, count), a->activation), count);
    }
  }
}

// Each row's scores, weights and sums are computed by themselves, in orders that depend on the sequence's length alone.
static void FN(attend_block)(const encoder_attention *a, const encoder_block *block, int head, float *scratch) {
  int d = a->head_dimension;
  int64_t offset = (int64_t)head * d;
  int64_t length = block->sequence_last - block->sequence_first;
  int64_t width = apus_round_up(length, 16);
  float *keys = scratch;
  float *scores = scratch + width * d;
  const float *k = a->k + block->sequence_first * a->stride + offset;
  const float *v = a->v + block->sequence_first * a->stride + offset;
  for (int64_t j = 0; j < length; j++) {
    for (int c = 0; c < d; c++) keys[c * width + j] = k[j * a->stride + c];
  }
  for (int64_t j = length; j < width; j++) {
    for (int c = 0; c < d; c++) keys[c * width + j] = 0;
  }
  // Keys and values are read once for some rows together.
  for (int64_t row = block->first; row < block->last; row += rows_together) {
    const float *q[rows_together];
    vf greatest[rows_together];
    // A group that is not full computes its last row again.
    APUS_UNROLL for (int i = 0; i < rows_together; i++) {
      q[i] = a->q + apus_min(row + i, block->last - 1) * a->stride + offset;
      greatest[i] = (vf)-INFINITY;
    }
    for (int64_t j = 0; j < width; j += 16) {
      vf score[rows_together];
      APUS_UNROLL for (int i = 0; i < rows_together; i++) score[i] = 0;
      for (int c = 0; c < d; c++) {
        vf key = FN(load)(keys + c * width + j);
        APUS_UNROLL for (int i = 0; i < rows_together; i++) score[i] = FN(fma)((vf)q[i][c], key, score[i]);
      }
      APUS_UNROLL for (int i = 0; i < rows_together; i++) {
        float *to = scores + i * width + j;
        score[i] *= a->scale;
        FN(store)(to, score[i]);
        if (j + 16 > length) {
          for (int64_t lane = length - j; lane < 16; lane++) to[lane] = -INFINITY;
          score[i] = FN(load)(to);
        }
        greatest[i] = FN(max)(score[i], greatest[i]);
      }
    }
    float factor[rows_together];
    for (int i = 0; i < rows_together; i++) {
      float most = FN(largest)(greatest[i]);
      vf total = 0;
      for (int64_t j = 0; j < width; j += 16) {
        vf weight = FN(exp)(FN(load)(scores + i * width + j) - most);
        FN(store)(scores + i * width + j, weight);
        total += weight;
      }
      factor[i] = 1.0f / FN(sum)(total);
    }
    int count = (int)apus_min(rows_together, block->last - row);
    for (int c = 0; c < d; c += 16) {
      int64_t columns = apus_min(16, d - c);
      vf sum[rows_together];
      APUS_UNROLL for (int i = 0; i < rows_together; i++) sum[i] = 0;
      for (int64_t j = 0; j < length; j++) {
        const float *from = v + j * a->stride + c;
        vf value = columns == 16 ? FN(load)(from) : FN(load_some)(from, columns);
        APUS_UNROLL for (int i = 0; i < rows_together; i++) {
          sum[i] = FN(fma)((vf)scores[i * width + j], value, sum[i]);
        }
      }
      for (int i = 0; i < count; i++) {
        FN(store_some)(a->out + (row + i) * a->out_stride + offset + c, sum[i] * factor[i], columns);
      }
    }
  }
}

#endif
