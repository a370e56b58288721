// What the machine can do at best, for benchmarks: how fast memory is read and how many products are made in registers.

#ifndef APUS_LEVEL

#include "internal.h"

enum { read_piece = 1 << 20 };

#define APUS_FILE "ceilings.c"
#include "each_level.h"

typedef uint64_t read_function(const char *, size_t);
typedef double product_function(apus_product, int64_t);

static read_function *const read_bytes[] = APUS_LEVELS(read_bytes);
static product_function *const products[] = APUS_LEVELS(products);

typedef struct {
  read_function *read;
  const char *memory;
  size_t bytes;
  _Atomic uint64_t sum;
} read_call;

static void read_task(void *argument, int chunk, int thread) {
  (void)thread;
  read_call *call = argument;
  size_t first = (size_t)chunk * read_piece;
  size_t count = call->bytes - first < read_piece ? call->bytes - first : read_piece;
  atomic_fetch_xor(&call->sum, call->read(call->memory + first, count));
}

uint64_t apus_read_memory(apus_context *context, const void *memory, size_t bytes) {
  read_call call = {read_bytes[context->isa], memory, bytes, 0};
  int64_t pieces = apus_ceil_div((int64_t)bytes, read_piece);
  apus_pool_run(context->pool, (int)apus_min(pieces, 1000000), read_task, &call);
  return call.sum;
}

typedef struct {
  product_function *function;
  apus_product product;
  int64_t rounds;
  double *counts;
} product_call;

static void product_task(void *argument, int chunk, int thread) {
  (void)thread;
  product_call *call = argument;
  call->counts[chunk] = call->function(call->product, call->rounds);
}

double apus_do_products(apus_context *context, apus_product product, int64_t rounds) {
  // Several pieces for each thread, so that a thread that comes late costs little.
  int pieces = 4 * context->threads;
  double *counts = apus_scratch_reserve(&context->shared[0], (size_t)pieces * sizeof(double));
  product_call call = {products[context->isa], product, rounds / 4, counts};
  apus_pool_run(context->pool, pieces, product_task, &call);
  double total = 0;
  for (int i = 0; i < pieces; i++) total += counts[i];
  return total;
}

#else

static uint64_t FN(read_bytes)(const char *from, size_t count) {
  vu a = 0, b = 0, c = 0, d = 0;
  size_t i = 0;
  for (; i + 256 <= count; i += 256) {
    a ^= *(const vu_at *)(const void *)(from + i);
    b ^= *(const vu_at *)(const void *)(from + i + 64);
    c ^= *(const vu_at *)(const void *)(from + i + 128);
    d ^= *(const vu_at *)(const void *)(from + i + 192);
  }
  uint32_t lanes[16];
  a ^= b ^ c ^ d;
  memcpy(lanes, &a, 64);
  uint64_t sum = 0;
  for (int l = 0; l < 16; l++) sum = sum * 31 + lanes[l];
  for (; i < count; i++) sum = sum * 31 + (uint8_t)from[i];
  return sum;
}

// The compiler must not see that a value stays the same, nor take products out of the loop.
#undef APUS_HIDE
#define APUS_HIDE(x) __asm__ volatile("" : "+x"(x))

// `product` is a constant, so that no loop asks for it.
APUS_INLINE double FN(products_of)(apus_product product, int64_t rounds) {
#if APUS_LEVEL >= 2
  enum { chains = 12 };
  if (APUS_LEVEL >= 3 && product != APUS_PRODUCT_FLOAT32) {
#if APUS_LEVEL >= 3
    __m512i sums[chains], x = _mm512_set1_epi32(1), w = _mm512_set1_epi32(2);
    for (int i = 0; i < chains; i++) sums[i] = x;
    for (int64_t r = 0; r < rounds; r++) {
      APUS_UNROLL for (int i = 0; i < chains; i++) {
        sums[i] = product == APUS_PRODUCT_BFLOAT16
            ? (__m512i)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)x, (__m512bh)w)
            : _mm512_dpbusd_epi32(sums[i], x, w);
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
    return (double)rounds * chains * (product == APUS_PRODUCT_BFLOAT16 ? 64 : 128);
#endif
  }
  if (product == APUS_PRODUCT_FLOAT32 || product == APUS_PRODUCT_BFLOAT16) {
    __m512 sums[chains], x = (__m512)(vf)1.0f, w = (__m512)(vf)0.5f;
    for (int i = 0; i < chains; i++) sums[i] = x;
    for (int64_t r = 0; r < rounds; r++) {
      APUS_UNROLL for (int i = 0; i < chains; i++) {
        sums[i] = (__m512)FN(fma)((vf)sums[i], (vf)w, (vf)x);
        __asm__ volatile("" : "+v"(sums[i]));
      }
    }
    return (double)rounds * chains * 32;
  }
  __m512i sums[chains], x = _mm512_set1_epi32(1), w = _mm512_set1_epi32(2);
  for (int i = 0; i < chains; i++) sums[i] = x;
  for (int64_t r = 0; r < rounds; r++) {
    APUS_UNROLL for (int i = 0; i < chains; i++) {
      __asm__ volatile("" : "+v"(x));
      sums[i] = product == APUS_PRODUCT_CODES ? _mm512_add_epi16(sums[i], _mm512_maddubs_epi16(x, w))
                                              : (__m512i)((vi)sums[i] + (vi)_mm512_madd_epi16(x, w));
      __asm__ volatile("" : "+v"(sums[i]));
    }
  }
  return (double)rounds * chains * (product == APUS_PRODUCT_CODES ? 128 : 64);
#elif APUS_LEVEL == 1
  enum { chains = 12 };
  if (product == APUS_PRODUCT_FLOAT32 || product == APUS_PRODUCT_BFLOAT16) {
    __m256 sums[chains], x = _mm256_set1_ps(1.0f), w = _mm256_set1_ps(0.5f);
    for (int i = 0; i < chains; i++) sums[i] = x;
    for (int64_t r = 0; r < rounds; r++) {
      APUS_UNROLL for (int i = 0; i < chains; i++) {
        sums[i] = _mm256_fmadd_ps(sums[i], w, x);
        APUS_HIDE(sums[i]);
      }
    }
    return (double)rounds * chains * 16;
  }
  __m256i sums[chains], x = _mm256_set1_epi32(1), w = _mm256_set1_epi32(2);
  for (int i = 0; i < chains; i++) sums[i] = x;
  for (int64_t r = 0; r < rounds; r++) {
    APUS_UNROLL for (int i = 0; i < chains; i++) {
      APUS_HIDE(x);
      sums[i] = product == APUS_PRODUCT_CODES ? _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(x, w))
                                              : _mm256_add_epi32(sums[i], _mm256_madd_epi16(x, w));
      APUS_HIDE(sums[i]);
    }
  }
  return (double)rounds * chains * (product == APUS_PRODUCT_CODES ? 64 : 32);
#elif defined(__aarch64__)
  enum { chains = 16 };
  if (APUS_NEON && product != APUS_PRODUCT_FLOAT32 && product != APUS_PRODUCT_BFLOAT16) {
#if APUS_NEON
    int32x4_t sums[chains];
    int8x16_t x = vdupq_n_s8(1), w = vdupq_n_s8(2);
    for (int i = 0; i < chains; i++) sums[i] = vdupq_n_s32(1);
    for (int64_t r = 0; r < rounds; r++) {
      APUS_UNROLL for (int i = 0; i < chains; i++) {
#if APUS_NEON == 2
        sums[i] = vmmlaq_s32(sums[i], x, w);
#else
        sums[i] = vdotq_s32(sums[i], x, w);
#endif
        __asm__ volatile("" : "+w"(sums[i]));
      }
    }
    return (double)rounds * chains * (APUS_NEON == 2 ? 64 : 32);
#endif
  }
  float32x4_t sums[chains], x = vdupq_n_f32(1), w = vdupq_n_f32(0.5f);
  for (int i = 0; i < chains; i++) sums[i] = x;
  for (int64_t r = 0; r < rounds; r++) {
    APUS_UNROLL for (int i = 0; i < chains; i++) {
      sums[i] = vfmaq_f32(x, sums[i], w);
      __asm__ volatile("" : "+w"(sums[i]));
    }
  }
  return (double)rounds * chains * 8;
#else
  // Products of the portable form are what the compiler makes of them; four chains of sixteen lanes.
  enum { chains = 4 };
  (void)product;
  vf sums[chains];
  for (int i = 0; i < chains; i++) sums[i] = 1.0f;
  volatile float factor = 0.5f;
  vf w = factor;
  for (int64_t r = 0; r < rounds; r++) {
    for (int i = 0; i < chains; i++) sums[i] = sums[i] * w + 1.0f;
  }
  volatile float kept = FN(sum)(sums[0] + sums[1] + sums[2] + sums[3]);
  (void)kept;
  return (double)rounds * chains * 32;
#endif
}

static double FN(products)(apus_product product, int64_t rounds) {
  switch (product) {
    case APUS_PRODUCT_FLOAT32: return FN(products_of)(APUS_PRODUCT_FLOAT32, rounds);
    case APUS_PRODUCT_BFLOAT16: return FN(products_of)(APUS_PRODUCT_BFLOAT16, rounds);
    case APUS_PRODUCT_INT8: return FN(products_of)(APUS_PRODUCT_INT8, rounds);
    case APUS_PRODUCT_CODES: return FN(products_of)(APUS_PRODUCT_CODES, rounds);
  }
  return 0;
}

#endif
