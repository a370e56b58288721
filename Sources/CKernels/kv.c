// K/V pages: making, writing, reading and copying them.

#ifndef APUS_LEVEL

#include "kv.h"

#include <stdlib.h>

typedef struct {
  apus_kv *kv;
  const float *k;
  int64_t k_stride;
  const float *v;
  int64_t v_stride;
  int64_t rows;
  const int32_t *slots;
} write_arguments;

#define APUS_FILE "kv.c"
#include "each_level.h"

typedef void write_function(const write_arguments *, int64_t, int64_t);

static write_function *const write_rows[] = APUS_LEVELS(write_rows);

// Pages of K/V heads, or latent ones where values are shorter than keys and have no place of their own.
static apus_kv *create(
    int64_t pages, int kv_heads, int head_dimension, int value_dimension, int latent, apus_dtype dtype) {
  if (pages < 0 || kv_heads <= 0 || head_dimension <= 0) return NULL;
  apus_kv *kv = calloc(1, sizeof *kv);
  if (!kv) return NULL;
  int64_t numbers = dtype == APUS_FLOAT32 ? 1 : 2;
  kv->pages = pages;
  kv->kv_heads = kv_heads;
  kv->head_dimension = head_dimension;
  kv->value_dimension = value_dimension;
  kv->latent = latent;
  kv->dtype = dtype;
  kv->narrow = dtype == APUS_INT8 || dtype == APUS_FLOAT8;
  kv->compute = kv->narrow ? APUS_BFLOAT16 : dtype;
  kv->key_units = apus_ceil_div(head_dimension, numbers);
  kv->value_units = APUS_KV_PAGE_SIZE / numbers;
  kv->value_columns = apus_round_up(value_dimension, 16);
  kv->head_words = kv->key_units * APUS_KV_PAGE_SIZE + (latent ? 0 : kv->value_units * kv->value_columns);
  if (kv->narrow) kv->head_words = kv->head_words / 2 + 2 * APUS_KV_PAGE_SIZE;
  kv->head_stride = latent ? 0 : kv->head_words;
  kv->page_words = kv->head_words * kv_heads;
  if (pages > INT64_MAX / 8 / kv->page_words) {
    free(kv);
    return NULL;
  }
  kv->bytes = (size_t)(pages * kv->page_words) * 4;
  kv->data = apus_allocate(kv->bytes);
  if (!kv->data) {
    free(kv);
    return NULL;
  }
  return kv;
}

apus_kv *apus_kv_create(int64_t pages, int kv_heads, int head_dimension, apus_dtype dtype) {
  return create(pages, kv_heads, head_dimension, head_dimension, 0, dtype);
}

apus_kv *apus_kv_create_latent(int64_t pages, int key_dimension, int value_dimension, apus_dtype dtype) {
  if (value_dimension <= 0 || value_dimension > key_dimension || apus_dtype_bytes(dtype) == 1) return NULL;
  return create(pages, 1, key_dimension, value_dimension, 1, dtype);
}

void apus_kv_free(apus_kv *kv) {
  if (!kv) return;
  apus_release(kv->data, kv->bytes);
  free(kv);
}

size_t apus_kv_bytes(const apus_kv *kv) { return kv->bytes; }

size_t apus_kv_page_bytes(const apus_kv *kv) { return (size_t)kv->page_words * 4; }

void *apus_kv_data(const apus_kv *kv) { return kv->data; }

typedef struct {
  write_function *function;
  write_arguments arguments;
  int64_t grain;
} write_region;

static void write_task(void *argument, int chunk, int thread) {
  (void)thread;
  const write_region *region = argument;
  int64_t first = chunk * region->grain;
  region->function(&region->arguments, first, apus_min(region->arguments.rows, first + region->grain));
}

void apus_kv_write(
    apus_context *context, apus_kv *kv, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
    int64_t rows, const int32_t *slots) {
  if (rows <= 0) return;
  write_region region = {write_rows[context->isa], {kv, k, k_stride, v, v_stride, rows, slots}, 0};
  region.grain = apus_grain(context, rows, (int64_t)kv->kv_heads * kv->head_dimension * 16);
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.grain), write_task, &region);
}

static float number(const uint32_t *block, apus_dtype dtype, int64_t index) {
  float value;
  if (dtype == APUS_FLOAT32) {
    memcpy(&value, block + index, 4);
    return value;
  }
  if (dtype == APUS_INT8) return ((const int8_t *)block)[index];
  if (dtype == APUS_FLOAT8) {
    float values[16];
    store_portable(values, from_float8_portable((vu)(uint32_t)((const uint8_t *)block)[index]));
    return values[0];
  }
  uint16_t half;
  memcpy(&half, (const char *)block + index * 2, 2);
  if (dtype == APUS_BFLOAT16) {
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
  }
  uint16_t halves[16] = {half};
  float values[16];
  store_portable(values, load_f16_portable(halves));
  return values[0];
}

void apus_kv_read(const apus_kv *kv, int32_t slot, float *k, float *v) {
  int64_t page = slot / APUS_KV_PAGE_SIZE, token = slot % APUS_KV_PAGE_SIZE;
  for (int head = 0; head < kv->kv_heads; head++) {
    const uint32_t *keys = apus_kv_keys(kv, page, head);
    const uint32_t *values = apus_kv_values(kv, page, head);
    for (int i = 0; i < kv->head_dimension; i++) {
      int64_t column = (int64_t)head * kv->head_dimension + i;
      k[column] = number(keys, kv->dtype, apus_key_index(kv->dtype, i, token));
      if (kv->latent) continue;
      v[column] = number(values, kv->dtype, apus_value_index(kv->dtype, kv->value_columns, i, token));
      if (kv->narrow) {
        const float *scales = apus_kv_scales(kv, page, head);
        k[column] *= scales[token];
        v[column] *= scales[APUS_KV_PAGE_SIZE + token];
      }
    }
  }
}

typedef struct {
  const apus_kv *source;
  apus_kv *target;
  const int32_t *from;
  const int32_t *to;
  int count;
  int pieces;
  int64_t piece_words;
} copy_region;

// A chunk copies one piece of every page, so that pages are copied in order even where one is source and target.
static void copy_task(void *argument, int chunk, int thread) {
  (void)thread;
  const copy_region *region = argument;
  int64_t page_words = region->target->page_words;
  int64_t first = chunk * region->piece_words;
  int64_t words = apus_min(region->piece_words, page_words - first);
  for (int i = 0; i < region->count; i++) {
    uint32_t *to = region->target->data + region->to[i] * page_words + first;
    const uint32_t *from = region->source->data + region->from[i] * page_words + first;
    if (to != from) memcpy(to, from, (size_t)words * 4);
  }
}

void apus_kv_copy_between(
    apus_context *context, const apus_kv *source, apus_kv *target, const int32_t *from, const int32_t *to,
    int count) {
  if (count <= 0) return;
  copy_region region = {source, target, from, to, count, 1, target->page_words};
  if ((int64_t)count * target->page_words > 65536) {
    region.pieces = (int)apus_min(context->threads, apus_ceil_div(target->page_words, 64));
    region.piece_words = apus_round_up(apus_ceil_div(target->page_words, region.pieces), 16);
    region.pieces = (int)apus_ceil_div(target->page_words, region.piece_words);
  }
  apus_pool_run(context->pool, region.pieces, copy_task, &region);
}

void apus_kv_copy(apus_context *context, apus_kv *kv, const int32_t *from, const int32_t *to, int count) {
  apus_kv_copy_between(context, kv, kv, from, to, count);
}

#else

// Rounds one head of one row to the pages' type.
APUS_INLINE void FN(round_head)(const float *from, int64_t count, apus_dtype dtype, uint16_t *halves) {
  for (int64_t i = 0; i < count; i += 16) {
    vf x = FN(load_some)(from + i, apus_min(16, count - i));
    if (dtype == APUS_BFLOAT16) {
      FN(store_bf16)(halves + i, x);
    } else {
      FN(store_f16)(halves + i, x);
    }
  }
}

// Rounds one head of one row to 8 bits, writes them to places that `index` gives, and returns their scale.
APUS_INLINE float FN(write_narrow)(
    const apus_kv *kv, const float *from, uint8_t *to, int is_value, int64_t t) {
  int64_t d = kv->head_dimension;
  vf most = 0;
  vi odd = 0;
  for (int64_t i = 0; i < d; i += 16) {
    vf x = __builtin_elementwise_abs(FN(load_some)(from + i, apus_min(16, d - i)));
    most = FN(max)(x, most);
    odd |= !(x <= 3.0e38f);
  }
  float largest = FN(largest)(most), range = kv->dtype == APUS_INT8 ? 127.0f : 448.0f;
  float factor = largest > 0 ? range / largest : 0;
  if (!(factor <= 3.0e38f)) factor = 0;
  float scale = factor > 0 ? largest / range : 0;
  // Infinities and NaN make all of the head NaN, by its scale.
  int not_finite = FN(any)(odd);
  if (not_finite) scale = NAN;
  for (int64_t i = 0; i < d; i += 16) {
    int64_t count = apus_min(16, d - i);
    vf x = FN(load_some)(from + i, count) * factor;
    if (not_finite) x = 0;
    vu codes;
    if (kv->dtype == APUS_INT8) {
      x = x > 127.0f ? (vf)127.0f : x;
      x = x < -127.0f ? (vf)-127.0f : x;
      codes = __builtin_bit_cast(vu, x + 12582912.0f);
    } else {
      codes = FN(float8_bits)(x);
    }
    uint32_t lanes[16];
    memcpy(lanes, &codes, 64);
    for (int64_t j = 0; j < count; j++) {
      int64_t index = is_value ? apus_value_index(APUS_BFLOAT16, kv->value_columns, i + j, t)
                               : apus_key_index(APUS_BFLOAT16, i + j, t);
      to[index] = (uint8_t)lanes[j];
    }
  }
  return scale;
}

static void FN(write_rows)(const write_arguments *a, int64_t first, int64_t last) {
  const apus_kv *kv = a->kv;
  int64_t d = kv->head_dimension;
  int64_t columns = kv->value_columns;
  for (int64_t r = first; r < last; r++) {
    if (a->slots[r] < 0) continue;
    int64_t page = a->slots[r] / APUS_KV_PAGE_SIZE, t = a->slots[r] % APUS_KV_PAGE_SIZE;
    for (int head = 0; head < kv->kv_heads; head++) {
      const float *k = a->k + r * a->k_stride + head * d;
      const float *v = kv->latent ? NULL : a->v + r * a->v_stride + head * d;
      uint32_t *keys = apus_kv_keys(kv, page, head);
      uint32_t *values = apus_kv_values(kv, page, head);
      if (kv->narrow) {
        float *scales = apus_kv_scales(kv, page, head);
        scales[t] = FN(write_narrow)(kv, k, (uint8_t *)keys, 0, t);
        scales[APUS_KV_PAGE_SIZE + t] = FN(write_narrow)(kv, v, (uint8_t *)values, 1, t);
        continue;
      }
      if (kv->dtype == APUS_FLOAT32) {
        for (int64_t i = 0; i < d; i++) memcpy(keys + i * 16 + t, k + i, 4);
        if (!kv->latent) memcpy(values + t * columns, v, (size_t)d * 4);
        continue;
      }
      uint16_t *key_halves = (uint16_t *)(void *)keys;
      uint16_t *value_halves = (uint16_t *)(void *)values;
      // Pieces of the head that fit a small buffer.
      for (int64_t begin = 0; begin < d; begin += 256) {
        uint16_t halves[256];
        int64_t count = apus_min(256, d - begin);
        FN(round_head)(k + begin, count, kv->dtype, halves);
        if (kv->dtype == APUS_BFLOAT16) {
          for (int64_t i = 0; i < count; i++) key_halves[(begin + i) / 2 * 32 + t * 2 + i % 2] = halves[i];
        } else {
          for (int64_t i = 0; i < count; i++) key_halves[(begin + i) / 2 * 32 + i % 2 * 16 + t] = halves[i];
        }
        if (kv->latent) continue;
        FN(round_head)(v + begin, count, kv->dtype, halves);
        for (int64_t i = 0; i < count; i++) {
          value_halves[apus_value_index(kv->dtype, columns, begin + i, t)] = halves[i];
        }
      }
    }
  }
}

#endif
