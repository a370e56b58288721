// Counter-based random numbers: draws for sampling and dummy weights.

#ifndef APUS_LEVEL

#include "internal.h"

typedef struct {
  void *to;
  apus_dtype dtype;
  int64_t count;
  uint64_t key;
  float scale;
  float offset;
  int64_t grain;
} fill_arguments;

#define APUS_FILE "random.c"
#include "each_level.h"

typedef void fill_function(const fill_arguments *, int64_t, int64_t);

static fill_function *const fill[] = APUS_LEVELS(fill);

typedef struct {
  fill_function *function;
  fill_arguments arguments;
} fill_region;

static void fill_task(void *argument, int chunk, int thread) {
  (void)thread;
  const fill_region *region = argument;
  int64_t first = chunk * region->arguments.grain;
  region->function(&region->arguments, first, apus_min(region->arguments.count, first + region->arguments.grain));
}

void apus_fill_uniform(
    apus_context *context, void *to, apus_dtype dtype, size_t count, uint64_t key, float scale, float offset) {
  if (count == 0) return;
  int64_t grain = apus_round_up(apus_max(65536, apus_ceil_div((int64_t)count, 1000000)), 16);
  fill_region region = {fill[context->isa], {to, dtype, (int64_t)count, key, scale, offset, grain}};
  apus_pool_run(context->pool, (int)apus_ceil_div((int64_t)count, grain), fill_task, &region);
}

uint64_t apus_splitmix64(uint64_t z) {
  z ^= z >> 30;
  z *= 0xBF58476D1CE4E5B9u;
  z ^= z >> 27;
  z *= 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

float apus_uniform(uint64_t seed, uint64_t position) {
  uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * counter[0];
    uint64_t b = (uint64_t)0xCD9E8D57u * counter[2];
    uint32_t next[4] = {
        (uint32_t)(b >> 32) ^ counter[1] ^ key[0], (uint32_t)b, (uint32_t)(a >> 32) ^ counter[3] ^ key[1], (uint32_t)a};
    memcpy(counter, next, sizeof counter);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return (float)(counter[0] >> 8) * 0x1p-24f;
}

#else

static void FN(fill)(const fill_arguments *a, int64_t first, int64_t last) {
  const vq lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = first; i < last; i += 16) {
    vq z = (lanes + (uint64_t)i) * 0x9E3779B97F4A7C15u + a->key;
    z ^= z >> 30;
    z *= 0xBF58476D1CE4E5B9u;
    z ^= z >> 27;
    z *= 0x94D049BB133111EBu;
    z ^= z >> 31;
    // 24 bits fit a float32 exactly, and so do u, 2 u and 2 u - 1.
    vf u = __builtin_convertvector(__builtin_convertvector(z >> 40, vi), vf) * 0x1p-24f;
    vf value = a->scale * (2.0f * u - 1.0f);
    value = a->offset + value;
    FN(store_as)(a->to, a->dtype, i, value, apus_min(16, last - i));
  }
}

#endif
