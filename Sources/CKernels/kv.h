// The layout of K/V pages, shared by writing and attention.
//
// A page holds for each K/V head a block of keys and then one of values, in units (see tile.h). Keys: [units of the
// head's numbers][16 tokens], so that lanes are tokens. Values: [units of tokens][numbers, padded to 16], so that
// lanes are numbers. With 16-bit types a unit is a pair: two numbers of a key, or two tokens of a value. Numbers of 8
// bits lie in the order of bfloat16 ones; the scales of the 16 keys and those of the 16 values follow them.
//
// Latent pages hold one block of keys that all query heads share and no values: the value of a token is the beginning
// of its key. Attention puts the values of a piece together from its keys.

#ifndef APUS_KV_H
#define APUS_KV_H

#include "internal.h"

struct apus_kv {
  int64_t pages;
  int kv_heads;
  int head_dimension;
  apus_dtype dtype;
  // What attention computes with: bfloat16 for numbers of 8 bits.
  apus_dtype compute;
  int narrow;
  // Latent pages: `kv_heads` is 1 and every head's block is the same one.
  int latent;
  // Numbers of a value; those of a key for K/V heads, fewer in latent pages.
  int value_dimension;
  // Units of a key, and of a page's tokens.
  int64_t key_units;
  int64_t value_units;
  // Numbers of a value, rounded up to whole vectors.
  int64_t value_columns;
  // Sizes in 32-bit words.
  int64_t head_words;
  // Words from a head's block to the next head's: none in latent pages.
  int64_t head_stride;
  int64_t page_words;
  uint32_t *data;
  size_t bytes;
};

APUS_INLINE uint32_t *apus_kv_keys(const apus_kv *kv, int64_t page, int head) {
  return kv->data + page * kv->page_words + head * kv->head_stride;
}

APUS_INLINE uint32_t *apus_kv_values(const apus_kv *kv, int64_t page, int head) {
  return apus_kv_keys(kv, page, head) + kv->key_units * APUS_KV_PAGE_SIZE / (kv->narrow ? 2 : 1);
}

// 16 scales of keys, then 16 of values.
APUS_INLINE float *apus_kv_scales(const apus_kv *kv, int64_t page, int head) {
  return (float *)apus_kv_keys(kv, page, head) + kv->head_words - 2 * APUS_KV_PAGE_SIZE;
}

// Where number `i` of token `t`'s key lies in a block, counted in numbers.
APUS_INLINE int64_t apus_key_index(apus_dtype dtype, int64_t i, int64_t t) {
  switch (dtype) {
    case APUS_FLOAT32:
      return i * 16 + t;
    case APUS_FLOAT16:
      return i / 2 * 32 + i % 2 * 16 + t;
    default:
      return i / 2 * 32 + t * 2 + i % 2;
  }
}

APUS_INLINE int64_t apus_value_index(apus_dtype dtype, int64_t columns, int64_t i, int64_t t) {
  switch (dtype) {
    case APUS_FLOAT32:
      return t * columns + i;
    case APUS_FLOAT16:
      return t / 2 * columns * 2 + i / 16 * 32 + t % 2 * 16 + i % 16;
    default:
      return t / 2 * columns * 2 + i * 2 + t % 2;
  }
}

#endif
