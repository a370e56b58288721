// Shared by all operators: vector types, the context, run-time choice among levels.

#ifndef APUS_INTERNAL_H
#define APUS_INTERNAL_H

#include "CKernels.h"

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Vectors wider than a level's registers are passed only to functions that are always inlined, so there is no ABI
// to change.
#pragma clang diagnostic ignored "-Wpsabi"

// Results must not depend on what the compiler contracts: fused operations are asked for by name.
#pragma STDC FP_CONTRACT OFF

// Sixteen lanes at every level: one register of AVX-512, two of AVX2, four of SSE or NEON. Equal lanes mean equal
// orders of summation, so levels differ only in fused operations and dot products.
typedef float vf __attribute__((ext_vector_type(16)));
typedef int32_t vi __attribute__((ext_vector_type(16)));
typedef uint32_t vu __attribute__((ext_vector_type(16)));
typedef uint16_t vh __attribute__((ext_vector_type(16)));
typedef uint64_t vq __attribute__((ext_vector_type(16)));
typedef float vf_at __attribute__((ext_vector_type(16), aligned(4), may_alias));
typedef float vf_any __attribute__((ext_vector_type(16), aligned(1), may_alias));
typedef uint32_t vu_at __attribute__((ext_vector_type(16), aligned(1), may_alias));
typedef uint16_t vh_at __attribute__((ext_vector_type(16), aligned(1), may_alias));

#define APUS_INLINE static inline __attribute__((always_inline, unused))

#define APUS_CONCATENATE_(a, b) a##b
#define APUS_CONCATENATE(a, b) APUS_CONCATENATE_(a, b)
// The name of a function at the level being compiled.
#define FN(name) APUS_CONCATENATE(name, APUS_SUFFIX)

// A function at every level, to be indexed by apus_isa.
#if defined(__x86_64__)
#define APUS_LEVELS(name) {name##_portable, name##_avx2, name##_avx512, name##_avx512_bf16}
#elif defined(__aarch64__)
#define APUS_LEVELS(name) \
  {name##_portable, name##_portable, name##_portable, name##_portable, name##_neon_dot, name##_neon_i8mm}
#else
#define APUS_LEVELS(name) {name##_portable}
#endif

// Whether a level's instructions take four int8 numbers of a row of x, or two bfloat16 ones, as they are.
APUS_INLINE int apus_has_int8_units(apus_isa isa) { return isa >= APUS_ISA_AVX512_BF16; }
// Whether linear layers keep four int8 numbers of a row of x in a word; otherwise they are two pairs of 16 bits.
APUS_INLINE int apus_keeps_int8_rows(apus_isa isa) { return isa == APUS_ISA_AVX2 || apus_has_int8_units(isa); }
APUS_INLINE int apus_has_bfloat16_units(apus_isa isa) { return isa == APUS_ISA_AVX512_BF16; }

typedef struct apus_pool apus_pool;

// Memory that only grows.
typedef struct {
  void *data;
  size_t bytes;
} apus_scratch;

struct apus_context {
  apus_isa isa;
  int threads;
  apus_pool *pool;
  // For the call as a whole.
  apus_scratch shared[3];
  // One for each thread.
  apus_scratch *local;
};

// At least `bytes` bytes, aligned to 64; what they held is lost. Ends the process with a message when memory is out:
// a step cannot be completed then and nothing would be safe to do.
void *apus_scratch_reserve(apus_scratch *scratch, size_t bytes);

// Large zeroed memory with huge pages, or NULL.
void *apus_allocate(size_t bytes);
void apus_release(void *address, size_t bytes);

apus_pool *apus_pool_create(int threads, const int32_t *processors);
void apus_pool_free(apus_pool *pool);
void apus_pool_run(apus_pool *pool, int chunks, apus_task task, void *argument);

APUS_INLINE int64_t apus_min(int64_t a, int64_t b) { return a < b ? a : b; }
APUS_INLINE int64_t apus_max(int64_t a, int64_t b) { return a > b ? a : b; }
APUS_INLINE int64_t apus_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
APUS_INLINE int64_t apus_round_up(int64_t a, int64_t b) { return apus_ceil_div(a, b) * b; }

// How to cut `count` equal items of `bytes_each` work into chunks: so many that threads of unequal speed, as they are where
// a core's other hyperthread is somebody else's, end together, none so small that claiming it costs more than doing it.
// Returns items in a chunk.
APUS_INLINE int64_t apus_grain(const apus_context *context, int64_t count, int64_t bytes_each) {
  if (context->threads == 1) return count;
  int64_t least = apus_ceil_div(32768, bytes_each > 0 ? bytes_each : 1);
  int64_t balanced = apus_ceil_div(count, (int64_t)context->threads * 16);
  return apus_max(1, apus_max(least, balanced));
}

// Fully unrolls the loop that follows: its counters are constants once the function is inlined. Checks that care for
// the time of compilation define APUS_COMPACT.
#ifdef APUS_COMPACT
#define APUS_UNROLL _Pragma("clang loop unroll(disable)")
#else
#define APUS_UNROLL _Pragma("clang loop unroll(full)")
#endif

APUS_INLINE size_t apus_dtype_bytes(apus_dtype dtype) {
  return dtype == APUS_FLOAT32 ? 4 : dtype == APUS_INT8 || dtype == APUS_FLOAT8 ? 1 : 2;
}

#endif
