// Checksums of packed weights.

#include "internal.h"

#include <string.h>

enum { piece_bytes = 256 << 10 };

// Odd, so that multiplying is a bijection of words.
static const uint64_t factor = 0x9E3779B97F4A7C15u;

static uint64_t rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

static uint64_t checksum_piece(const uint8_t *bytes, size_t count) {
  uint64_t lanes[8];
  for (int i = 0; i < 8; i++) lanes[i] = apus_splitmix64((uint64_t)i + 1);
  size_t at = 0;
  for (; at + 64 <= count; at += 64) {
    uint64_t words[8];
    memcpy(words, bytes + at, 64);
    APUS_UNROLL
    for (int i = 0; i < 8; i++) lanes[i] = rotate((lanes[i] ^ words[i]) * factor, 29);
  }
  if (at < count) {
    uint64_t words[8] = {0};
    memcpy(words, bytes + at, count - at);
    for (int i = 0; i < 8; i++) lanes[i] = rotate((lanes[i] ^ words[i]) * factor, 29);
  }
  uint64_t sum = apus_splitmix64(count);
  for (int i = 0; i < 8; i++) sum = apus_splitmix64(sum ^ lanes[i]) * factor;
  return sum;
}

typedef struct {
  const uint8_t *bytes;
  size_t count;
  uint64_t *sums;
} checksum_region;

static void checksum_task(void *argument, int chunk, int thread) {
  (void)thread;
  const checksum_region *region = argument;
  size_t at = (size_t)chunk * piece_bytes;
  size_t count = region->count - at < piece_bytes ? region->count - at : piece_bytes;
  region->sums[chunk] = checksum_piece(region->bytes + at, count);
}

uint64_t apus_checksum(apus_context *context, const void *memory, size_t bytes) {
  int64_t chunks = apus_ceil_div((int64_t)bytes, piece_bytes);
  checksum_region region = {memory, bytes, apus_scratch_reserve(&context->shared[0], (size_t)chunks * 8 + 8)};
  // A region takes at most 2^20 chunks: 256 GiB.
  if (chunks > 1048575) {
    for (int64_t chunk = 0; chunk < chunks; chunk++) checksum_task(&region, (int)chunk, 0);
  } else if (chunks > 0) {
    apus_pool_run(context->pool, (int)chunks, checksum_task, &region);
  }
  uint64_t sum = apus_splitmix64(bytes);
  for (int64_t chunk = 0; chunk < chunks; chunk++) sum = apus_splitmix64(sum ^ region.sums[chunk]) * factor;
  return sum;
}
