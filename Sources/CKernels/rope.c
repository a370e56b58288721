// Rotary position embedding in the half-split and in the interleaved form.

#ifndef APUS_LEVEL

#include "internal.h"

typedef struct {
  float *x;
  int64_t x_stride;
  int64_t rows;
  int heads;
  int head_dimension;
  const int32_t *positions;
  const float *table;
  int64_t table_stride;
  int half;
  int64_t grain;
} rope_arguments;

#define APUS_FILE "rope.c"
#include "each_level.h"

typedef void rope_function(const rope_arguments *, int64_t, int64_t);

static rope_function *const rope_rows[] = APUS_LEVELS(rope_rows);

typedef struct {
  rope_function *function;
  rope_arguments arguments;
} rope_region;

static void rope_task(void *argument, int chunk, int thread) {
  (void)thread;
  const rope_region *region = argument;
  int64_t first = chunk * region->arguments.grain;
  region->function(&region->arguments, first, apus_min(region->arguments.rows, first + region->arguments.grain));
}

void apus_rope(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension,
    const int32_t *positions, const float *table, int64_t table_stride, int half) {
  if (rows <= 0) return;
  rope_region region = {
      rope_rows[context->isa],
      {x, x_stride, rows, heads, head_dimension, positions, table, table_stride, half,
       apus_grain(context, rows, (int64_t)heads * half * 16)}};
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.arguments.grain), rope_task, &region);
}

typedef struct {
  rope_arguments arguments;
  int offset;
} interleaved_region;

// No vectors: few numbers of each head are rotated this way, and what lies interleaved would have to be shuffled.
static void interleaved_task(void *argument, int chunk, int thread) {
  (void)thread;
  const interleaved_region *region = argument;
  const rope_arguments *a = &region->arguments;
  int64_t first = chunk * a->grain, last = apus_min(a->rows, first + a->grain);
  for (int64_t r = first; r < last; r++) {
    const float *cosines = a->table + a->positions[r] * a->table_stride;
    const float *sines = cosines + a->half;
    for (int h = 0; h < a->heads; h++) {
      float *x = a->x + r * a->x_stride + (int64_t)h * a->head_dimension + region->offset;
      for (int i = 0; i < a->half; i++) {
        float p = x[2 * i], q = x[2 * i + 1];
        x[2 * i] = p * cosines[i] - q * sines[i];
        x[2 * i + 1] = q * cosines[i] + p * sines[i];
      }
    }
  }
}

void apus_rope_interleaved(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension, int offset,
    const int32_t *positions, const float *table, int64_t table_stride, int half) {
  if (rows <= 0) return;
  interleaved_region region = {
      {x, x_stride, rows, heads, head_dimension, positions, table, table_stride, half,
       apus_grain(context, rows, (int64_t)heads * half * 16)},
      offset};
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.arguments.grain), interleaved_task, &region);
}

#else

static void FN(rope_rows)(const rope_arguments *a, int64_t first, int64_t last) {
  int half = a->half;
  for (int64_t r = first; r < last; r++) {
    const float *cosines = a->table + a->positions[r] * a->table_stride;
    const float *sines = cosines + half;
    for (int h = 0; h < a->heads; h++) {
      float *low = a->x + r * a->x_stride + (int64_t)h * a->head_dimension;
      float *high = low + half;
      for (int i = 0; i < half; i += 16) {
        int count = half - i < 16 ? half - i : 16;
        vf c, s, p, q;
        if (count == 16) {
          c = FN(load)(cosines + i), s = FN(load)(sines + i), p = FN(load)(low + i), q = FN(load)(high + i);
        } else {
          c = FN(load_some)(cosines + i, count), s = FN(load_some)(sines + i, count);
          p = FN(load_some)(low + i, count), q = FN(load_some)(high + i, count);
        }
        vf rotated_low = p * c - q * s;
        vf rotated_high = q * c + p * s;
        FN(store_some)(low + i, rotated_low, count);
        FN(store_some)(high + i, rotated_high, count);
      }
    }
  }
}

#endif
