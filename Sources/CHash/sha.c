#include "CHash.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

static inline uint32_t load_big(const uint8_t *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

static inline void store_big(uint8_t *p, uint32_t v) {
  p[0] = (uint8_t)(v >> 24);
  p[1] = (uint8_t)(v >> 16);
  p[2] = (uint8_t)(v >> 8);
  p[3] = (uint8_t)v;
}

static inline uint32_t right(uint32_t x, int n) { return x >> n | x << (32 - n); }
static inline uint32_t left(uint32_t x, int n) { return x << n | x >> (32 - n); }

// SHA-256

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2).
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void sha256_portable(uint32_t state[8], const uint8_t *bytes, size_t blocks) {
  for (; blocks > 0; blocks--, bytes += 64) {
    uint32_t w[64];
    for (int t = 0; t < 16; t++) w[t] = load_big(bytes + 4 * t);
    for (int t = 16; t < 64; t++) {
      uint32_t s0 = right(w[t - 15], 7) ^ right(w[t - 15], 18) ^ w[t - 15] >> 3;
      uint32_t s1 = right(w[t - 2], 17) ^ right(w[t - 2], 19) ^ w[t - 2] >> 10;
      w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int t = 0; t < 64; t++) {
      uint32_t t1 = h + (right(e, 6) ^ right(e, 11) ^ right(e, 25)) + ((e & f) ^ (~e & g)) + K[t] + w[t];
      uint32_t t2 = (right(a, 2) ^ right(a, 13) ^ right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
  }
}

#if defined(__x86_64__)
// Two rounds an instruction. The instructions want the state as (a, b, e, f) and (c, d, g, h).
__attribute__((target("sha,sse4.1,ssse3"))) static void sha256_accelerated(
    uint32_t state[8], const uint8_t *bytes, size_t blocks) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  __m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
  __m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
  __m128i abef = _mm_alignr_epi8(low, high, 8);
  __m128i cdgh = _mm_blend_epi16(high, low, 0xF0);
  for (; blocks > 0; blocks--, bytes += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i m[4];
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i++) {
      if (i < 4) {
        m[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(bytes + 16 * i)), swap);
      } else {
        __m128i next = _mm_sha256msg1_epu32(m[i & 3], m[(i + 1) & 3]);
        next = _mm_add_epi32(next, _mm_alignr_epi8(m[(i + 3) & 3], m[(i + 2) & 3], 4));
        m[i & 3] = _mm_sha256msg2_epu32(next, m[(i + 3) & 3]);
      }
      __m128i wk = _mm_add_epi32(m[i & 3], _mm_loadu_si128((const __m128i *)(K + 4 * i)));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
  __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

static _Atomic int portable_only = 0;

void apus_sha256_set_portable(int is_portable) { atomic_store(&portable_only, is_portable); }

int apus_sha256_is_accelerated(void) {
#if defined(__x86_64__)
  static _Atomic int known = 0;  // 0 unknown, 1 no, 2 yes
  int state = atomic_load_explicit(&known, memory_order_relaxed);
  if (state == 0) {
    unsigned a, b = 0, c = 0, d;
    int has_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
    int has_sse41 = __get_cpuid(1, &a, &b, &c, &d) && (c >> 19 & 1);
    state = has_sha && has_sse41 ? 2 : 1;
    atomic_store_explicit(&known, state, memory_order_relaxed);
  }
  return state == 2;
#else
  return 0;
#endif
}

static void sha256_blocks(uint32_t state[8], const uint8_t *bytes, size_t blocks) {
#if defined(__x86_64__)
  if (apus_sha256_is_accelerated() && !atomic_load_explicit(&portable_only, memory_order_relaxed)) {
    sha256_accelerated(state, bytes, blocks);
    return;
  }
#endif
  sha256_portable(state, bytes, blocks);
}

void apus_sha256_begin(apus_sha256 *hash) {
  static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  memcpy(hash->state, initial, sizeof initial);
  hash->length = 0;
}

// SHA-1

static void sha1_blocks(uint32_t state[5], const uint8_t *bytes, size_t blocks) {
  for (; blocks > 0; blocks--, bytes += 64) {
    uint32_t w[80];
    for (int t = 0; t < 16; t++) w[t] = load_big(bytes + 4 * t);
    for (int t = 16; t < 80; t++) w[t] = left(w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16], 1);
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
    for (int t = 0; t < 80; t++) {
      uint32_t f, k;
      if (t < 20) f = (b & c) | (~b & d), k = 0x5a827999;
      else if (t < 40) f = b ^ c ^ d, k = 0x6ed9eba1;
      else if (t < 60) f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
      else f = b ^ c ^ d, k = 0xca62c1d6;
      uint32_t next = left(a, 5) + f + e + k + w[t];
      e = d, d = c, c = left(b, 30), b = a, a = next;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d, state[4] += e;
  }
}

void apus_sha1_begin(apus_sha1 *hash) {
  static const uint32_t initial[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
  memcpy(hash->state, initial, sizeof initial);
  hash->length = 0;
}

// Both gather blocks of 64 bytes and end with a one bit, zeros, and the length in bits.

typedef void (*block_function)(uint32_t *state, const uint8_t *bytes, size_t blocks);

static void update(
    uint32_t *state, uint64_t *length, uint8_t pending[64], const void *source, size_t count, block_function blocks) {
  const uint8_t *bytes = source;
  size_t held = *length % 64;
  *length += count;
  if (held > 0) {
    size_t taken = count < 64 - held ? count : 64 - held;
    if (taken > 0) memcpy(pending + held, bytes, taken);
    bytes += taken;
    count -= taken;
    if (held + taken < 64) return;
    blocks(state, pending, 1);
  }
  if (count >= 64) blocks(state, bytes, count / 64);
  if (count % 64 > 0) memcpy(pending, bytes + count / 64 * 64, count % 64);
}

static void end(
    uint32_t *state, uint64_t *length, uint8_t pending[64], uint8_t *digest, int words, block_function blocks) {
  static const uint8_t padding[64] = {0x80};
  uint64_t bits = *length * 8;
  size_t held = *length % 64;
  update(state, length, pending, padding, held < 56 ? 56 - held : 120 - held, blocks);
  uint8_t tail[8];
  store_big(tail, (uint32_t)(bits >> 32));
  store_big(tail + 4, (uint32_t)bits);
  update(state, length, pending, tail, 8, blocks);
  for (int i = 0; i < words; i++) store_big(digest + 4 * i, state[i]);
}

void apus_sha256_update(apus_sha256 *hash, const void *bytes, size_t count) {
  update(hash->state, &hash->length, hash->pending, bytes, count, sha256_blocks);
}

void apus_sha256_end(apus_sha256 *hash, uint8_t digest[32]) {
  end(hash->state, &hash->length, hash->pending, digest, 8, sha256_blocks);
}

void apus_sha1_update(apus_sha1 *hash, const void *bytes, size_t count) {
  update(hash->state, &hash->length, hash->pending, bytes, count, sha1_blocks);
}

void apus_sha1_end(apus_sha1 *hash, uint8_t digest[20]) {
  end(hash->state, &hash->length, hash->pending, digest, 5, sha1_blocks);
}
