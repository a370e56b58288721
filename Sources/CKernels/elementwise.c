// Operators that treat each number, or move whole rows: SiLU and multiply, add, gather, embed, convert.

#ifndef APUS_LEVEL

#include "internal.h"

typedef struct {
  const void *x;
  int64_t x_stride;
  apus_dtype x_dtype;
  const float *y;
  int64_t y_stride;
  void *out;
  int64_t out_stride;
  apus_dtype out_dtype;
  const int32_t *indices;
  int64_t rows;
  int64_t columns;
  // Rows wider than this are cut, so that a single row can be shared by the threads.
  int64_t piece;
  int64_t pieces;
  int64_t grain;
} row_arguments;

#define APUS_FILE "elementwise.c"
#include "each_level.h"

// Works on columns begin..<end of a row.
typedef void row_function(const row_arguments *, int64_t row, int64_t begin, int64_t end);

static row_function *const silu_mul_row[] = APUS_LEVELS(silu_mul_row);
static row_function *const add_row[] = APUS_LEVELS(add_row);
static row_function *const take_row[] = APUS_LEVELS(take_row);
static row_function *const convert_row[] = APUS_LEVELS(convert_row);

typedef struct {
  row_function *function;
  row_arguments arguments;
} row_region;

static void row_task(void *argument, int chunk, int thread) {
  (void)thread;
  const row_region *region = argument;
  const row_arguments *a = &region->arguments;
  int64_t last = apus_min(a->rows * a->pieces, (chunk + 1) * a->grain);
  for (int64_t i = chunk * a->grain; i < last; i++) {
    int64_t begin = i % a->pieces * a->piece;
    region->function(a, i / a->pieces, begin, apus_min(a->columns, begin + a->piece));
  }
}

static void run(apus_context *context, row_function *function, row_arguments arguments) {
  if (arguments.rows <= 0 || arguments.columns <= 0) return;
  row_region region = {function, arguments};
  region.arguments.piece = 16384;
  region.arguments.pieces = apus_ceil_div(arguments.columns, 16384);
  int64_t count = arguments.rows * region.arguments.pieces;
  int64_t grain = apus_grain(context, count, apus_min(arguments.columns, 16384) * 8);
  // A region has at most 2^20 - 1 chunks.
  while (apus_ceil_div(count, grain) > 1000000) grain *= 2;
  region.arguments.grain = grain;
  apus_pool_run(context->pool, (int)apus_ceil_div(count, grain), row_task, &region);
}

void apus_silu_mul(
    apus_context *context, const float *gate_up, int64_t gate_up_stride, int64_t rows, int64_t columns, float *out,
    int64_t out_stride) {
  run(context, silu_mul_row[context->isa],
      (row_arguments){
          .x = gate_up, .x_stride = gate_up_stride, .out = out, .out_stride = out_stride, .rows = rows,
          .columns = columns});
}

void apus_add(
    apus_context *context, float *x, int64_t x_stride, const float *y, int64_t y_stride, int64_t rows,
    int64_t columns) {
  run(context, add_row[context->isa],
      (row_arguments){
          .x = x, .x_stride = x_stride, .y = y, .y_stride = y_stride, .out = x, .out_stride = x_stride, .rows = rows,
          .columns = columns});
}

void apus_gather(
    apus_context *context, const float *x, int64_t x_stride, const int32_t *rows, int64_t count, int64_t columns,
    float *out, int64_t out_stride) {
  run(context, take_row[context->isa],
      (row_arguments){
          .x = x, .x_stride = x_stride, .x_dtype = APUS_FLOAT32, .out = out, .out_stride = out_stride,
          .indices = rows, .rows = count, .columns = columns});
}

void apus_embed(
    apus_context *context, const void *table, apus_dtype dtype, int64_t table_stride, const int32_t *tokens,
    int64_t count, int64_t columns, float *out, int64_t out_stride) {
  run(context, take_row[context->isa],
      (row_arguments){
          .x = table, .x_stride = table_stride, .x_dtype = dtype, .out = out, .out_stride = out_stride,
          .indices = tokens, .rows = count, .columns = columns});
}

void apus_convert(
    apus_context *context, const void *from, apus_dtype from_dtype, void *to, apus_dtype to_dtype, size_t count) {
  run(context, convert_row[context->isa],
      (row_arguments){
          .x = from, .x_dtype = from_dtype, .out = to, .out_dtype = to_dtype, .rows = 1, .columns = (int64_t)count});
}

#else

static void FN(silu_mul_row)(const row_arguments *a, int64_t row, int64_t begin, int64_t end) {
  const float *gate = (const float *)a->x + row * a->x_stride;
  const float *up = gate + a->columns;
  float *out = (float *)a->out + row * a->out_stride;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    vf g = FN(load)(gate + i);
    FN(store)(out + i, g / (1.0f + FN(exp)(-g)) * FN(load)(up + i));
  }
  if (i < end) {
    vf g = FN(load_some)(gate + i, end - i);
    FN(store_some)(out + i, g / (1.0f + FN(exp)(-g)) * FN(load_some)(up + i, end - i), end - i);
  }
}

static void FN(add_row)(const row_arguments *a, int64_t row, int64_t begin, int64_t end) {
  float *x = (float *)a->out + row * a->out_stride;
  const float *y = a->y + row * a->y_stride;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) FN(store)(x + i, FN(load)(x + i) + FN(load)(y + i));
  for (; i < end; i++) x[i] += y[i];
}

static void FN(take_row)(const row_arguments *a, int64_t row, int64_t begin, int64_t end) {
  const char *x = (const char *)a->x + a->indices[row] * a->x_stride * (int64_t)apus_dtype_bytes(a->x_dtype);
  float *out = (float *)a->out + row * a->out_stride;
  if (a->x_dtype == APUS_FLOAT32) {
    memcpy(out + begin, x + begin * 4, (size_t)(end - begin) * 4);
    return;
  }
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) FN(store)(out + i, FN(load_as)(x, a->x_dtype, i));
  if (i < end) FN(store_some)(out + i, FN(load_some_as)(x, a->x_dtype, i, end - i), end - i);
}

static void FN(convert_row)(const row_arguments *a, int64_t row, int64_t begin, int64_t end) {
  (void)row;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) FN(store_as)(a->out, a->out_dtype, i, FN(load_as)(a->x, a->x_dtype, i), 16);
  if (i < end) {
    FN(store_as)(a->out, a->out_dtype, i, FN(load_some_as)(a->x, a->x_dtype, i, end - i), end - i);
  }
}

#endif
