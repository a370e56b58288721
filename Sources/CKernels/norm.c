// RMS norm: of rows, of rows after adding to the residual, and of the heads of rows.

#ifndef APUS_LEVEL

#include "internal.h"

typedef struct {
  // Rows, or heads of rows.
  float *residual;
  int64_t residual_stride;
  const float *x;
  int64_t x_stride;
  int64_t columns;
  const void *weight;
  apus_dtype weight_dtype;
  float epsilon;
  float *out;
  int64_t out_stride;
  int heads;
} norm_arguments;

#define APUS_FILE "norm.c"
#include "each_level.h"

typedef void norm_rows_function(const norm_arguments *, int64_t, int64_t);

static norm_rows_function *const norm_rows[] = APUS_LEVELS(norm_rows);

typedef struct {
  norm_rows_function *function;
  const norm_arguments *arguments;
  int64_t rows;
  int64_t grain;
} norm_region;

static void norm_task(void *argument, int chunk, int thread) {
  (void)thread;
  const norm_region *region = argument;
  int64_t first = chunk * region->grain;
  region->function(region->arguments, first, apus_min(region->rows, first + region->grain));
}

static void run(apus_context *context, const norm_arguments *arguments, int64_t rows) {
  if (rows <= 0) return;
  norm_region region = {norm_rows[context->isa], arguments, rows, 0};
  region.grain = apus_grain(context, rows, arguments->columns * arguments->heads * 8);
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.grain), norm_task, &region);
}

void apus_rms_norm(
    apus_context *context, const float *x, int64_t x_stride, int64_t rows, int64_t columns, const void *weight,
    apus_dtype weight_dtype, float epsilon, float *out, int64_t out_stride) {
  norm_arguments arguments = {
      .x = x, .x_stride = x_stride, .columns = columns, .weight = weight, .weight_dtype = weight_dtype,
      .epsilon = epsilon, .out = out, .out_stride = out_stride, .heads = 1};
  run(context, &arguments, rows);
}

void apus_add_rms_norm(
    apus_context *context, float *residual, int64_t residual_stride, const float *delta, int64_t delta_stride,
    int64_t rows, int64_t columns, const void *weight, apus_dtype weight_dtype, float epsilon, float *out,
    int64_t out_stride) {
  norm_arguments arguments = {
      .residual = residual, .residual_stride = residual_stride, .x = delta, .x_stride = delta_stride,
      .columns = columns, .weight = weight, .weight_dtype = weight_dtype, .epsilon = epsilon, .out = out,
      .out_stride = out_stride, .heads = 1};
  run(context, &arguments, rows);
}

void apus_head_rms_norm(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension, const void *weight,
    apus_dtype weight_dtype, float epsilon) {
  norm_arguments arguments = {
      .x = x, .x_stride = x_stride, .columns = head_dimension, .weight = weight, .weight_dtype = weight_dtype,
      .epsilon = epsilon, .out = x, .out_stride = x_stride, .heads = heads};
  run(context, &arguments, rows);
}

#else

// The sum of squares runs in 64 lanes whatever the row, so its order is a function of `columns` alone.
APUS_INLINE float FN(sum_of_squares)(const float *x, int64_t columns) {
  vf sums[4] = {0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    for (int j = 0; j < 4; j++) {
      vf v = FN(load)(x + i + 16 * j);
      sums[j] = FN(fma)(v, v, sums[j]);
    }
  }
  for (int j = 0; i < columns; i += 16, j++) {
    vf v = FN(load_some)(x + i, apus_min(16, columns - i));
    sums[j] = FN(fma)(v, v, sums[j]);
  }
  return FN(sum)((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static void FN(norm_one)(const norm_arguments *a, const float *x, float *out) {
  float mean = FN(sum_of_squares)(x, a->columns) / (float)a->columns;
  float factor = 1.0f / sqrtf(mean + a->epsilon);
  int64_t i = 0;
  if (a->weight_dtype == APUS_FLOAT32) {
    const float *weight = a->weight;
    for (; i + 16 <= a->columns; i += 16) {
      FN(store)(out + i, FN(load)(x + i) * factor * FN(load)(weight + i));
    }
  }
  for (; i < a->columns; i += 16) {
    int64_t count = apus_min(16, a->columns - i);
    vf w = count == 16 ? FN(load_as)(a->weight, a->weight_dtype, i)
                       : FN(load_some_as)(a->weight, a->weight_dtype, i, count);
    vf y = FN(load_some)(x + i, count) * factor * w;
    FN(store_some)(out + i, y, count);
  }
}

static void FN(norm_rows)(const norm_arguments *a, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; r++) {
    const float *x = a->x + r * a->x_stride;
    float *out = a->out + r * a->out_stride;
    if (a->residual) {
      float *residual = a->residual + r * a->residual_stride;
      int64_t i = 0;
      for (; i + 16 <= a->columns; i += 16) FN(store)(residual + i, FN(load)(residual + i) + FN(load)(x + i));
      for (; i < a->columns; i++) residual[i] += x[i];
      FN(norm_one)(a, residual, out);
    } else {
      for (int h = 0; h < a->heads; h++) FN(norm_one)(a, x + h * a->columns, out + h * a->columns);
    }
  }
}

#endif
