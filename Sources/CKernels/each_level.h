// Includes APUS_FILE once for each level of instructions, with APUS_LEVEL and APUS_SUFFIX set and the vector
// helpers of that level defined. An operator's file includes this header, and so itself; no other place chooses
// instructions.
//
// On aarch64 every level is the portable form, which the compiler lowers to NEON, but for products of bytes: APUS_NEON is 1
// where there are dot products and 2 where there are products of matrices too.

#if defined(__x86_64__)

#define APUS_NEON 0

#define APUS_LEVEL 0
#define APUS_SUFFIX _portable
#include "vector.h"
#include APUS_FILE
#undef APUS_LEVEL
#undef APUS_SUFFIX

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#define APUS_LEVEL 1
#define APUS_SUFFIX _avx2
#include "vector.h"
#include APUS_FILE
#undef APUS_LEVEL
#undef APUS_SUFFIX
#pragma clang attribute pop

#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512cd"))), \
    apply_to = function)
#define APUS_LEVEL 2
#define APUS_SUFFIX _avx512
#include "vector.h"
#include APUS_FILE
#undef APUS_LEVEL
#undef APUS_SUFFIX
#pragma clang attribute pop

#pragma clang attribute push( \
    __attribute__((target( \
        "avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx512bf16,avx512vnni"))), \
    apply_to = function)
#define APUS_LEVEL 3
#define APUS_SUFFIX _avx512_bf16
#include "vector.h"
#include APUS_FILE
#undef APUS_LEVEL
#undef APUS_SUFFIX
#pragma clang attribute pop

#else

#define APUS_LEVEL 0
#define APUS_NEON 0
#define APUS_SUFFIX _portable
#include "vector.h"
#include APUS_FILE
#undef APUS_SUFFIX

#if defined(__aarch64__)

#undef APUS_NEON
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#define APUS_NEON 1
#define APUS_SUFFIX _neon_dot
#include "vector.h"
#include APUS_FILE
#undef APUS_NEON
#undef APUS_SUFFIX
#pragma clang attribute pop

#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#define APUS_NEON 2
#define APUS_SUFFIX _neon_i8mm
#include "vector.h"
#include APUS_FILE
#undef APUS_SUFFIX
#pragma clang attribute pop

#endif

#undef APUS_LEVEL

#endif

#undef APUS_NEON
#undef APUS_FILE
