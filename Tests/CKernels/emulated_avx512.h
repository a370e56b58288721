// The AVX-512 intrinsics that the kernels use, in plain C, so that their AVX-512 forms can be run and checked on a
// machine without these instructions. The semantics are those of Intel's intrinsics guide; bfloat16 dot products are
// summed as hardware does: pair by pair, the upper product first, each step rounded, subnormal inputs and results
// counted as zero.

#ifndef EMULATED_AVX512_H
#define EMULATED_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EMU \
  static __attribute__((noinline, unused, no_sanitize("address", "undefined"), target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")))

EMU __m512i emu_set1_epi32(int value) {
  int32_t r[16];
  for (int i = 0; i < 16; i++) r[i] = value;
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512i emu_set1_epi16(short value) {
  int16_t r[32];
  for (int i = 0; i < 32; i++) r[i] = value;
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512i emu_load_si512(const void *from) {
  if ((uintptr_t)from % 64 != 0) __builtin_trap();
  __m512i out;
  memcpy(&out, from, 64);
  return out;
}

#define EMU_MAP_16(NAME, EXPRESSION)                \
  EMU __m512i emu_##NAME(__m512i x, __m512i y) {    \
    int16_t a[32], b[32], r[32];                    \
    memcpy(a, &x, 64);                              \
    memcpy(b, &y, 64);                              \
    for (int i = 0; i < 32; i++) r[i] = EXPRESSION; \
    __m512i out;                                    \
    memcpy(&out, r, 64);                            \
    return out;                                     \
  }
EMU_MAP_16(add_epi16, (int16_t)(a[i] + b[i]))

EMU __m512i emu_and_si512(__m512i x, __m512i y) {
  uint64_t a[8], b[8];
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 8; i++) a[i] &= b[i];
  __m512i out;
  memcpy(&out, a, 64);
  return out;
}

EMU __m512i emu_slli_epi16(__m512i x, unsigned count) {
  uint16_t a[32];
  memcpy(a, &x, 64);
  for (int i = 0; i < 32; i++) a[i] = (uint16_t)(a[i] << count);
  __m512i out;
  memcpy(&out, a, 64);
  return out;
}

EMU __m512i emu_srai_epi16(__m512i x, unsigned count) {
  int16_t a[32];
  memcpy(a, &x, 64);
  for (int i = 0; i < 32; i++) a[i] = (int16_t)(a[i] >> count);
  __m512i out;
  memcpy(&out, a, 64);
  return out;
}

EMU __m512i emu_madd_epi16(__m512i x, __m512i y) {
  int16_t a[32], b[32];
  int32_t r[16];
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 16; i++) r[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512i emu_maddubs_epi16(__m512i x, __m512i y) {
  uint8_t a[64];
  int8_t b[64];
  int16_t r[32];
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 32; i++) {
    int sum = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    r[i] = (int16_t)(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512i emu_dpbusd_epi32(__m512i sum, __m512i x, __m512i y) {
  int32_t r[16];
  uint8_t a[64];
  int8_t b[64];
  memcpy(r, &sum, 64);
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 4; j++) r[i] += a[4 * i + j] * b[4 * i + j];
  }
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512i emu_shuffle_epi8(__m512i x, __m512i y) {
  uint8_t a[64], b[64], r[64];
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 64; i++) r[i] = b[i] & 128 ? 0 : a[i / 16 * 16 + (b[i] & 15)];
  __m512i out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m256i emu_castsi512_si256(__m512i x) {
  __m256i out;
  memcpy(&out, &x, 32);
  return out;
}

EMU __m256i emu_extracti64x4_epi64(__m512i x, int high) {
  __m256i out;
  memcpy(&out, (const char *)&x + 32 * high, 32);
  return out;
}

EMU __m512 emu_cvtph_ps(__m256i x) {
  __m256 parts[2] = {
      _mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  __m512 out;
  memcpy(&out, parts, 64);
  return out;
}

EMU __m256i emu_cvtps_ph(__m512 x) {
  __m256 parts[2];
  memcpy(parts, &x, 64);
  __m128i halves[2] = {
      _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i out;
  memcpy(&out, halves, 32);
  return out;
}

EMU uint16_t emu_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
  if ((bits & 0x7f800000u) == 0) return (uint16_t)(bits >> 16 & 0x8000u);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

EMU __m256i emu_cvtneps_pbh(__m512 x) {
  float a[16];
  uint16_t r[16];
  memcpy(a, &x, 64);
  for (int i = 0; i < 16; i++) r[i] = emu_bf16(a[i]);
  __m256i out;
  memcpy(&out, r, 32);
  return out;
}

EMU __m512i emu_cvtne2ps_pbh(__m512 high, __m512 low) {
  __m256i parts[2] = {emu_cvtneps_pbh(low), emu_cvtneps_pbh(high)};
  __m512i out;
  memcpy(&out, parts, 64);
  return out;
}

EMU float emu_flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

EMU __m512 emu_dpbf16_ps(__m512 sum, __m512i x, __m512i y) {
  float r[16];
  uint32_t a[16], b[16];
  memcpy(r, &sum, 64);
  memcpy(a, &x, 64);
  memcpy(b, &y, 64);
  for (int i = 0; i < 16; i++) {
    float f[4];
    uint32_t bits[4] = {a[i] & 0xffff0000u, b[i] & 0xffff0000u, a[i] << 16, b[i] << 16};
    memcpy(f, bits, 16);
    for (int j = 0; j < 4; j++) f[j] = emu_flush(f[j]);
    r[i] = emu_flush(fmaf(f[0], f[1], emu_flush(r[i])));
    r[i] = emu_flush(fmaf(f[2], f[3], r[i]));
  }
  __m512 out;
  memcpy(&out, r, 64);
  return out;
}

EMU __m512 emu_maskz_loadu_ps(uint16_t mask, const void *from) {
  float r[16];
  for (int i = 0; i < 16; i++) {
    r[i] = 0;
    if (mask >> i & 1) memcpy(&r[i], (const char *)from + 4 * i, 4);
  }
  __m512 out;
  memcpy(&out, r, 64);
  return out;
}

EMU void emu_mask_storeu_ps(void *to, uint16_t mask, __m512 x) {
  float a[16];
  memcpy(a, &x, 64);
  for (int i = 0; i < 16; i++) {
    if (mask >> i & 1) memcpy((char *)to + 4 * i, &a[i], 4);
  }
}

#define _mm512_add_epi16 emu_add_epi16
#define _mm512_and_si512 emu_and_si512
#define _mm512_castsi512_si256 emu_castsi512_si256
#define _mm512_cvtne2ps_pbh emu_cvtne2ps_pbh
#define _mm512_cvtneps_pbh emu_cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emu_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emu_cvtps_ph(x)
#define _mm512_dpbf16_ps(s, a, b) emu_dpbf16_ps(s, (__m512i)(a), (__m512i)(b))
#define _mm512_dpbusd_epi32 emu_dpbusd_epi32
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emu_extracti64x4_epi64
#define _mm512_load_si512 emu_load_si512
#define _mm512_madd_epi16 emu_madd_epi16
#define _mm512_maddubs_epi16 emu_maddubs_epi16
#define _mm512_mask_storeu_ps emu_mask_storeu_ps
#define _mm512_maskz_loadu_ps emu_maskz_loadu_ps
#define _mm512_set1_epi16 emu_set1_epi16
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_shuffle_epi8 emu_shuffle_epi8
#define _mm512_slli_epi16 emu_slli_epi16
#define _mm512_srai_epi16 emu_srai_epi16

#endif
