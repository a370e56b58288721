// Vector helpers of one level; included by each_level.h, once for each.

// a * b + c, fused where the level has fused operations.
APUS_INLINE vf FN(fma)(vf a, vf b, vf c) {
#if APUS_LEVEL > 0 || defined(__aarch64__)
  return __builtin_elementwise_fma(a, b, c);
#else
  return a * b + c;
#endif
}

APUS_INLINE vf FN(load)(const float *from) { return *(const vf_at *)from; }
APUS_INLINE void FN(store)(float *to, vf value) { *(vf_at *)to = value; }
APUS_INLINE vu FN(load_units)(const uint32_t *from) { return *(const vu_at *)from; }

// The first `count` (0..16) numbers; zero in the other lanes.
APUS_INLINE vf FN(load_some)(const float *from, int64_t count) {
#if APUS_LEVEL >= 2
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  float whole[16] = {0};
  memcpy(whole, from, (size_t)count * 4);
  return FN(load)(whole);
#endif
}

APUS_INLINE void FN(store_some)(float *to, vf value, int64_t count) {
#if APUS_LEVEL >= 2
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
#else
  float whole[16];
  FN(store)(whole, value);
  memcpy(to, whole, (size_t)count * 4);
#endif
}

// The larger; b where a is not a number.
APUS_INLINE vf FN(max)(vf a, vf b) { return a > b ? a : b; }

// Sum of the lanes, always in the same order.
APUS_INLINE float FN(sum)(vf v) {
  __attribute__((ext_vector_type(8))) float a = v.lo + v.hi;
  __attribute__((ext_vector_type(4))) float b = a.lo + a.hi;
  __attribute__((ext_vector_type(2))) float c = b.lo + b.hi;
  return c.x + c.y;
}

APUS_INLINE float FN(largest)(vf v) {
  __attribute__((ext_vector_type(8))) float a = v.lo > v.hi ? v.lo : v.hi;
  __attribute__((ext_vector_type(4))) float b = a.lo > a.hi ? a.lo : a.hi;
  __attribute__((ext_vector_type(2))) float c = b.lo > b.hi ? b.lo : b.hi;
  return c.x > c.y ? c.x : c.y;
}

// Whether any lane of a comparison holds.
APUS_INLINE int FN(any)(vi condition) {
  __attribute__((ext_vector_type(8))) int32_t a = condition.lo | condition.hi;
  __attribute__((ext_vector_type(4))) int32_t b = a.lo | a.hi;
  __attribute__((ext_vector_type(2))) int32_t c = b.lo | b.hi;
  return (c.x | c.y) != 0;
}

// Rounds |x| < 2^22 to the nearest integer, ties to even.
APUS_INLINE vf FN(round)(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// exp(x) with a relative error below 2e-7; 0 below -87.3; about 2.4e38 above 88.3; exp(0) is 1; NaN stays NaN.
//
// x = n ln 2 + r, |r| <= ln 2 / 2; exp(r) by a polynomial of degree 6 (Taylor coefficients suffice at this
// precision: the first term left out is r^7 / 5040 < 1.3e-7 relative, and the seventh is added).
APUS_INLINE vf FN(exp)(vf x) {
  vf bounded = x < -87.3f ? (vf)-87.3f : x;
  bounded = bounded > 88.3f ? (vf)88.3f : bounded;
  vf n = FN(round)(bounded * 1.44269504f);
  vf r = FN(fma)(n, (vf)-0.693359375f, bounded);
  r = FN(fma)(n, (vf)2.12194440e-4f, r);
  vf p = (vf)1.98412698e-4f;
  p = FN(fma)(p, r, (vf)1.38888889e-3f);
  p = FN(fma)(p, r, (vf)8.33333333e-3f);
  p = FN(fma)(p, r, (vf)4.16666667e-2f);
  p = FN(fma)(p, r, (vf)1.66666667e-1f);
  p = FN(fma)(p, r, (vf)0.5f);
  p = FN(fma)(p, r, (vf)1.0f);
  p = FN(fma)(p, r, (vf)1.0f);
  // n is an integer in -126...127, or NaN: adding 1.5 * 2^23 leaves it in the low bits without a conversion that
  // would be undefined for NaN.
  vu bits = __builtin_bit_cast(vu, n + 12582912.0f);
  vf power = __builtin_bit_cast(vf, (bits + 127u) << 23);
  vf result = p * power;
  return x < -87.3f ? (vf)0.0f : result;
}

// tanh with an absolute error below 3e-7.
APUS_INLINE vf FN(tanh)(vf x) {
  vf e = FN(exp)(x + x);
  return 1.0f - 2.0f / (e + 1.0f);
}

// bfloat16 in the low half of each lane, rounded to nearest even; NaN stays NaN.
APUS_INLINE vu FN(bf16_bits)(vf x) {
  vu bits = __builtin_bit_cast(vu, x);
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vu nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

APUS_INLINE void FN(store_bf16)(uint16_t *to, vf x) {
  *(vh_at *)to = __builtin_convertvector(FN(bf16_bits)(x), vh);
}

// Activations to bfloat16 as the dot product instructions read them: numbers below the smallest normal one count as
// zero.
APUS_INLINE void FN(store_bf16_activations)(uint16_t *to, vf x) {
#if APUS_LEVEL >= 3
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  vu bits = __builtin_bit_cast(vu, x);
  vu kept = (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits;
  FN(store_bf16)(to, __builtin_bit_cast(vf, kept));
#endif
}

// Codes of float8 e4m3, rounded to nearest even; beyond 448 that number.
APUS_INLINE vu FN(float8_bits)(vf x) {
  vu bits = __builtin_bit_cast(vu, x);
  vu sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  vu normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  vu small = __builtin_bit_cast(vu, __builtin_bit_cast(vf, bits) * 512.0f + 8388608.0f) & 0xffu;
  vu code = bits < (121u << 23) ? small : normal;
  code = code > 0x7eu ? (vu)0x7eu : code;
  return code | sign;
}

APUS_INLINE vf FN(from_float8)(vu codes) {
  vi bits = ((vi)(codes << 24) >> 4) & (vi)0x87f00000u;
  return __builtin_bit_cast(vf, bits) * 0x1p120f;
}

APUS_INLINE vf FN(load_bf16)(const uint16_t *from) {
  vu wide = __builtin_convertvector(*(const vh_at *)from, vu);
  return __builtin_bit_cast(vf, wide << 16);
}

// Activations as `store_bf16_activations` rounds them, as float32.
APUS_INLINE vf FN(bf16_activations)(vf x) {
  vu bits = __builtin_bit_cast(vu, x);
  vu kept = (bits & 0x7f800000u) == 0u ? bits & 0x80000000u : bits;
  return __builtin_bit_cast(vf, FN(bf16_bits)(__builtin_bit_cast(vf, kept)) << 16);
}

APUS_INLINE vf FN(from_f16)(vh half) {
#if APUS_LEVEL >= 2
  return (vf)_mm512_cvtph_ps(__builtin_bit_cast(__m256i, half));
#elif APUS_LEVEL == 1
  __m256i bits = __builtin_bit_cast(__m256i, half);
  __m256 parts[2] = {
      _mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
  return __builtin_bit_cast(vf, parts);
#elif defined(__aarch64__)
  typedef __fp16 halves __attribute__((ext_vector_type(16)));
  return __builtin_convertvector(__builtin_bit_cast(halves, half), vf);
#else
  vu bits = __builtin_convertvector(half, vu);
  vu sign = (bits & 0x8000u) << 16;
  vu magnitude = (bits & 0x7fffu) << 13;
  // Normal numbers: move the exponent's bias from 15 to 127. Subnormal ones: let a subtraction normalise.
  vu normal = magnitude + (112u << 23);
  vu infinite = magnitude + (224u << 23);
  vf small = __builtin_bit_cast(vf, magnitude + (113u << 23)) - __builtin_bit_cast(vf, (vu)(113u << 23));
  vu result = magnitude >= (31u << 23) ? infinite : normal;
  result = magnitude < (1u << 23) ? __builtin_bit_cast(vu, small) : result;
  return __builtin_bit_cast(vf, result | sign);
#endif
}

APUS_INLINE vf FN(load_f16)(const uint16_t *from) { return FN(from_f16)(*(const vh_at *)from); }

APUS_INLINE void FN(store_f16)(uint16_t *to, vf x) {
#if APUS_LEVEL >= 2
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif APUS_LEVEL == 1
  __m256 parts[2];
  memcpy(parts, &x, 64);
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(to + 8), _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  typedef __fp16 halves __attribute__((ext_vector_type(16)));
  *(vh_at *)to = __builtin_bit_cast(vh, __builtin_convertvector(x, halves));
#else
  vu bits = __builtin_bit_cast(vu, x);
  vu sign = (bits >> 16) & 0x8000u;
  vu magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, then round to nearest even on the 13 bits that go.
  vu normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 aligns the bits that stay at the end of the significand and rounds.
  vf aligned = __builtin_bit_cast(vf, magnitude) + 0.5f;
  vu small = __builtin_bit_cast(vu, aligned) - (126u << 23);
  vu result = magnitude < (113u << 23) ? small : normal;
  result = magnitude >= 0x477ff000u ? (vu)0x7c00u : result;
  vu nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  result = magnitude > 0x7f800000u ? nan : result;
  *(vh_at *)to = __builtin_convertvector(result | sign, vh);
#endif
}

// Sixteen numbers of a type, starting with number `index`.
APUS_INLINE vf FN(load_as)(const void *from, apus_dtype dtype, int64_t index) {
  if (dtype == APUS_FLOAT32) return *(const vf_any *)((const char *)from + index * 4);
  const uint16_t *halves = (const uint16_t *)((const char *)from + index * 2);
  return dtype == APUS_BFLOAT16 ? FN(load_bf16)(halves) : FN(load_f16)(halves);
}

// The first `count` of them; zero in the other lanes.
APUS_INLINE vf FN(load_some_as)(const void *from, apus_dtype dtype, int64_t index, int64_t count) {
  size_t bytes = apus_dtype_bytes(dtype);
  char whole[64] = {0};
  memcpy(whole, (const char *)from + (size_t)index * bytes, (size_t)count * bytes);
  return FN(load_as)(whole, dtype, 0);
}

// Stores the first `count` (1..16) lanes as numbers of a type, starting with number `index`.
APUS_INLINE void FN(store_as)(void *to, apus_dtype dtype, int64_t index, vf value, int64_t count) {
  size_t bytes = apus_dtype_bytes(dtype);
  char whole[64];
  if (dtype == APUS_FLOAT32) {
    FN(store)((float *)(void *)whole, value);
  } else if (dtype == APUS_BFLOAT16) {
    FN(store_bf16)((uint16_t *)(void *)whole, value);
  } else {
    FN(store_f16)((uint16_t *)(void *)whole, value);
  }
  memcpy((char *)to + (size_t)index * bytes, whole, (size_t)count * bytes);
}
