// The inner loop of linear layers and of attention, at one level: a tile of rows by vectors of outputs.
//
// Weights (and K/V pages) are made of units: 32 bits that hold one float32, two 16-bit numbers or four int8 numbers
// which are neighbours along the summed dimension. Sixteen units, one for each of sixteen outputs, are a vector; a
// step multiplies them with the row's unit, broadcast, and adds the products to sixteen sums. There are no
// horizontal sums, and a sum's order is that of the units, whatever the tile's shape.
//
// float16 is stored as sixteen first halves and then sixteen second halves of the units, because the conversion
// reads sixteen neighbours.

// Registers bound the tile: rows at most, and vectors for one row and for several.
#undef APUS_TILE_ROWS
#undef APUS_TILE_VECTORS
#if APUS_LEVEL >= 2
#define APUS_TILE_ROWS 6
#define APUS_TILE_VECTORS(ROWS) 4
#elif APUS_LEVEL == 1
// Eight sums keep the multipliers busy. Twelve would too, but six rows and a vector of weights beside them are more than
// the nearest cache holds.
#define APUS_TILE_ROWS 4
#define APUS_TILE_VECTORS(ROWS) ((ROWS) == 1 ? 4 : 1)
#elif defined(__aarch64__)
// 32 registers of a quarter of a vector.
#define APUS_TILE_ROWS 6
#define APUS_TILE_VECTORS(ROWS) ((ROWS) == 1 ? 4 : 1)
#else
#define APUS_TILE_ROWS 2
#define APUS_TILE_VECTORS(ROWS) ((ROWS) == 1 ? 2 : 1)
#endif

// Words of x for a unit of bfloat16 and of int8. Instructions for them take a unit as it is, and so does AVX2 with int8.
// Others want its numbers ready to be broadcast from memory, which costs no arithmetic unit: as two float32, and as two
// pairs of 16 bits, inputs 0 and 2 and inputs 1 and 3.
#undef APUS_WIDE_WORDS
#if APUS_LEVEL >= 3
#define APUS_WIDE_WORDS 1
#else
#define APUS_WIDE_WORDS 2
#endif
#undef APUS_INT8_WORDS
#if APUS_NEON || APUS_LEVEL == 1
#define APUS_INT8_WORDS 1
#else
#define APUS_INT8_WORDS APUS_WIDE_WORDS
#endif
// Whether numbers of x in int8 stay signed, -127 to 127. Otherwise they are biased by 128.
#undef APUS_INT8_SIGNED
#define APUS_INT8_SIGNED (APUS_NEON || APUS_LEVEL == 1)

APUS_INLINE vf FN(step_float32)(vf sum, const uint32_t *x, vu w) {
  float value;
  memcpy(&value, x, 4);
  return FN(fma)((vf)value, __builtin_bit_cast(vf, w), sum);
}

APUS_INLINE vf FN(step_float16)(vf sum, const uint32_t *x, vu w) {
  float value[2];
  memcpy(value, x, 8);
  typedef uint16_t halves __attribute__((ext_vector_type(32)));
  halves both = __builtin_bit_cast(halves, w);
  sum = FN(fma)((vf)value[0], FN(from_f16)(both.lo), sum);
  return FN(fma)((vf)value[1], FN(from_f16)(both.hi), sum);
}

APUS_INLINE vf FN(step_bfloat16)(vf sum, const uint32_t *x, vu w) {
#if APUS_LEVEL >= 3
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)*x), (__m512bh)w);
#else
  float value[2];
  memcpy(value, x, 8);
  sum = FN(fma)((vf)value[1], __builtin_bit_cast(vf, w & 0xffff0000u), sum);
  return FN(fma)((vf)value[0], __builtin_bit_cast(vf, w << 16), sum);
#endif
}

#if APUS_NEON
// A vector's registers.
typedef struct {
  int32x4_t part[4];
} FN(quarters);
#endif

// w is signed, x is signed or biased by 128 (APUS_INT8_SIGNED).
APUS_INLINE vi FN(step_int8)(vi sum, const uint32_t *x, vu w) {
#if APUS_LEVEL >= 3
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)*x), (__m512i)w);
#elif APUS_NEON
  FN(quarters) s = __builtin_bit_cast(FN(quarters), sum), numbers = __builtin_bit_cast(FN(quarters), w);
  int8x16_t value = vreinterpretq_s8_u32(vdupq_n_u32(*x));
  APUS_UNROLL
  for (int p = 0; p < 4; p++) s.part[p] = vdotq_s32(s.part[p], vreinterpretq_s8_s32(numbers.part[p]), value);
  return __builtin_bit_cast(vi, s);
#elif APUS_LEVEL == 2
  __m512i even = _mm512_set1_epi32((int)x[0]);
  __m512i odd = _mm512_set1_epi32((int)x[1]);
  __m512i w_even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8);
  __m512i w_odd = _mm512_srai_epi16((__m512i)w, 8);
  return sum + (vi)_mm512_madd_epi16(even, w_even) + (vi)_mm512_madd_epi16(odd, w_odd);
#elif APUS_LEVEL == 1
  // The magnitude of w times x with w's sign. Two such products are at most 2 * 128 * 127, which 16 bits hold.
  __m256i value = _mm256_set1_epi32((int)*x);
  __m256i parts[2];
  memcpy(parts, &w, 64);
  APUS_UNROLL
  for (int i = 0; i < 2; i++) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(parts[i]), _mm256_sign_epi8(value, parts[i]));
    parts[i] = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  vi products;
  memcpy(&products, parts, 64);
  return sum + products;
#elif defined(__SSE2__)
  __m128i even = _mm_set1_epi32((int)x[0]);
  __m128i odd = _mm_set1_epi32((int)x[1]);
  __m128i parts[4];
  memcpy(parts, &w, 64);
  APUS_UNROLL
  for (int i = 0; i < 4; i++) {
    __m128i w_even = _mm_srai_epi16(_mm_slli_epi16(parts[i], 8), 8);
    __m128i w_odd = _mm_srai_epi16(parts[i], 8);
    parts[i] = _mm_add_epi32(_mm_madd_epi16(even, w_even), _mm_madd_epi16(odd, w_odd));
  }
  vi products;
  memcpy(&products, parts, 64);
  return sum + products;
#else
  vi s = __builtin_bit_cast(vi, w);
  sum += (vi)(int32_t)(x[0] & 0xffffu) * (s << 24 >> 24);
  sum += (vi)(int32_t)(x[1] & 0xffffu) * (s << 16 >> 24);
  sum += (vi)(int32_t)(x[0] >> 16) * (s << 8 >> 24);
  return sum + (vi)(int32_t)(x[1] >> 16) * (s >> 24);
#endif
}

// sums[i][v] += x[i] . w[v] over `units` units. A row of x is WORDS 32-bit words for each unit and rows lie
// `x_stride` words apart; vector v of unit u lies at w[v] + u * w_stride. Meanwhile the cache is asked for what lies at
// ahead[v] + u * ahead_stride. `rows`, `vectors` and `ahead_vectors` must be constants.
#undef APUS_TILE
#define APUS_TILE(FORMAT, SUM, WORDS)                                                                               \
  APUS_INLINE void FN(tile_##FORMAT)(                                                                               \
      int rows, int vectors, SUM (*sums)[4], const uint32_t *x, int64_t x_stride, const uint32_t *const *w,         \
      int64_t w_stride, int64_t units, int ahead_vectors, const uint32_t *const *ahead, int64_t ahead_stride) {     \
    SUM s[6][4];                                                                                                    \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) s[i][v] = sums[i][v];                                           \
    }                                                                                                               \
    const uint32_t *next[4];                                                                                        \
    APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) next[v] = ahead[v];                                         \
    _Pragma("clang loop unroll(disable) vectorize(disable)") for (int64_t u = 0; u < units; u++) {                  \
      vu b[4];                                                                                                      \
      APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) {                                                         \
        __builtin_prefetch(next[v], 0, 2);                                                                          \
        next[v] += ahead_stride;                                                                                    \
      }                                                                                                             \
      APUS_UNROLL for (int v = 0; v < vectors; v++) b[v] = FN(load_units)(w[v] + u * w_stride);                     \
      APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                  \
        APUS_UNROLL for (int v = 0; v < vectors; v++) {                                                             \
          s[i][v] = FN(step_##FORMAT)(s[i][v], x + i * x_stride + u * WORDS, b[v]);                                 \
        }                                                                                                           \
      }                                                                                                             \
    }                                                                                                               \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = s[i][v];                                           \
    }                                                                                                               \
  }

#if APUS_LEVEL == 1
// Pairs of numbers on AVX2: all rows meet the second numbers of the pairs, then the first ones. Products and their order
// are those of the steps above, but fewer registers are needed at a time.
APUS_INLINE vf FN(half_float16)(const uint32_t *w, int second) {
  return FN(load_f16)((const uint16_t *)(const void *)(w + 8 * second));
}
APUS_INLINE vf FN(half_bfloat16)(const uint32_t *w, int second) {
  vu units = FN(load_units)(w);
  return __builtin_bit_cast(vf, second ? units & 0xffff0000u : units << 16);
}

// Eight numbers of a vector's first or second half (`high`), the first or the second ones of their pairs.
APUS_INLINE __m256 FN(eight_float16)(const char *w, int high, int second) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(w + 32 * second + 16 * high)));
}
APUS_INLINE __m256 FN(eight_bfloat16)(const char *w, int high, int second) {
  __m256i units = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * high));
  return _mm256_castsi256_ps(
      second ? _mm256_blend_epi16(_mm256_setzero_si256(), units, 0xaa) : _mm256_slli_epi32(units, 16));
}

#undef APUS_TILE_HALVES
#define APUS_TILE_HALVES(FORMAT, FIRST)                                                                             \
  /* Three rows by two vectors: the six sums of three rows by one would wait for themselves. Twelve leave registers \
     for a value of each row and eight weights. The compiler by itself loads more at once and keeps sums in memory; \
     a statement that claims to change the pointer holds loads back until the weights before are used up. */        \
  APUS_INLINE void FN(three_by_two_##FORMAT)(                                                                       \
      vf (*sums)[4], const uint32_t *x, int64_t x_stride, const uint32_t *const *w, int64_t w_stride, int64_t units,\
      int ahead_vectors, const uint32_t *const *ahead, int64_t ahead_stride) {                                      \
    __m256 s[3][4];                                                                                                 \
    APUS_UNROLL for (int i = 0; i < 3; i++) memcpy(s[i], sums[i], sizeof s[i]);                                     \
    const char *from = (const char *)w[0];                                                                          \
    ptrdiff_t apart = (const char *)w[1] - from;                                                                    \
    _Pragma("clang loop unroll(disable) vectorize(disable)") for (int64_t u = 0; u < units; u++) {                  \
      APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) __builtin_prefetch(ahead[v] + u * ahead_stride, 0, 2);    \
      APUS_UNROLL for (int n = 0; n < 2; n++) {                                                                     \
        int half = n ^ FIRST;                                                                                       \
        __m256 values[3];                                                                                           \
        APUS_UNROLL for (int i = 0; i < 3; i++) {                                                                   \
          values[i] = _mm256_broadcast_ss((const float *)(const void *)(x + i * x_stride + 2 * u + half));          \
        }                                                                                                           \
        APUS_UNROLL for (int v = 0; v < 4; v++) {                                                                   \
          __m256 b = FN(eight_##FORMAT)(from + (v < 2 ? 0 : apart), v % 2, half);                                   \
          APUS_UNROLL for (int i = 0; i < 3; i++) s[i][v] = _mm256_fmadd_ps(values[i], b, s[i][v]);                 \
          __asm__("" : "+r"(from), "+x"(s[0][v]), "+x"(s[1][v]), "+x"(s[2][v]));                                    \
        }                                                                                                           \
      }                                                                                                             \
      from += w_stride * 4;                                                                                         \
    }                                                                                                               \
    APUS_UNROLL for (int i = 0; i < 3; i++) memcpy(sums[i], s[i], sizeof s[i]);                                     \
  }                                                                                                                 \
                                                                                                                    \
  APUS_INLINE void FN(tile_##FORMAT)(                                                                               \
      int rows, int vectors, vf (*sums)[4], const uint32_t *x, int64_t x_stride, const uint32_t *const *w,          \
      int64_t w_stride, int64_t units, int ahead_vectors, const uint32_t *const *ahead, int64_t ahead_stride) {     \
    if (rows == 3 && vectors == 2) {                                                                                \
      FN(three_by_two_##FORMAT)(sums, x, x_stride, w, w_stride, units, ahead_vectors, ahead, ahead_stride);         \
      return;                                                                                                       \
    }                                                                                                               \
    vf s[6][4];                                                                                                     \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) s[i][v] = sums[i][v];                                           \
    }                                                                                                               \
    const uint32_t *next[4];                                                                                        \
    APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) next[v] = ahead[v];                                         \
    _Pragma("clang loop unroll(disable) vectorize(disable)") for (int64_t u = 0; u < units; u++) {                  \
      APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) {                                                         \
        __builtin_prefetch(next[v], 0, 2);                                                                          \
        next[v] += ahead_stride;                                                                                    \
      }                                                                                                             \
      APUS_UNROLL for (int n = 0; n < 2; n++) {                                                                     \
        int half = n ^ FIRST;                                                                                       \
        vf b[4];                                                                                                    \
        APUS_UNROLL for (int v = 0; v < vectors; v++) b[v] = FN(half_##FORMAT)(w[v] + u * w_stride, half);          \
        APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                \
          float value;                                                                                              \
          memcpy(&value, x + i * x_stride + 2 * u + half, 4);                                                       \
          APUS_UNROLL for (int v = 0; v < vectors; v++) s[i][v] = FN(fma)((vf)value, b[v], s[i][v]);                \
        }                                                                                                           \
      }                                                                                                             \
    }                                                                                                               \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = s[i][v];                                           \
    }                                                                                                               \
  }
#endif

APUS_TILE(float32, vf, 1)
#if APUS_LEVEL == 1
APUS_TILE_HALVES(float16, 0)
APUS_TILE_HALVES(bfloat16, 1)
#else
APUS_TILE(float16, vf, 2)
APUS_TILE(bfloat16, vf, APUS_WIDE_WORDS)
#endif
#if APUS_NEON == 2
// Pairs of rows by pairs of outputs, eight inputs at a time: two units side by side. A pair's sums are zipped until the end:
// those of the first eight outputs in the first row's place, those of the others in the second row's. A row without a
// partner takes dot products. Sums are exact, so none of this is seen.
APUS_INLINE void FN(tile_int8)(
    int rows, int vectors, vi (*sums)[4], const uint32_t *x, int64_t x_stride, const uint32_t *const *w,
    int64_t w_stride, int64_t units, int ahead_vectors, const uint32_t *const *ahead, int64_t ahead_stride) {
  FN(quarters) s[6][4];
  APUS_UNROLL for (int i = 0; i < rows; i++) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) s[i][v] = __builtin_bit_cast(FN(quarters), sums[i][v]);
  }
  APUS_UNROLL for (int i = 0; i + 1 < rows; i += 2) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) {
      APUS_UNROLL for (int p = 0; p < 4; p++) {
        int32x4_t a = s[i][v].part[p], b = s[i + 1][v].part[p];
        s[i][v].part[p] = vzip1q_s32(a, b);
        s[i + 1][v].part[p] = vzip2q_s32(a, b);
      }
    }
  }
  _Pragma("clang loop unroll(disable) vectorize(disable)") for (int64_t u = 0; u < units; u += 2) {
    // Beyond the last unit weights count as zero; rows of x have memory there.
    int alone = u + 1 == units;
    APUS_UNROLL for (int v = 0; v < ahead_vectors; v++) {
      __builtin_prefetch(ahead[v] + u * ahead_stride, 0, 2);
      __builtin_prefetch(ahead[v] + (u + 1) * ahead_stride, 0, 2);
    }
    APUS_UNROLL for (int v = 0; v < vectors; v++) {
      APUS_UNROLL for (int p = 0; p < 4; p++) {
        uint32x4_t first = vld1q_u32(w[v] + u * w_stride + 4 * p);
        uint32x4_t second = alone ? vdupq_n_u32(0) : vld1q_u32(w[v] + (u + 1) * w_stride + 4 * p);
        int8x16_t low = vreinterpretq_s8_u32(vzip1q_u32(first, second));
        int8x16_t high = vreinterpretq_s8_u32(vzip2q_u32(first, second));
        APUS_UNROLL for (int i = 0; i + 1 < rows; i += 2) {
          int8x16_t value = vreinterpretq_s8_u32(
              vcombine_u32(vld1_u32(x + i * x_stride + u), vld1_u32(x + (i + 1) * x_stride + u)));
          s[i][v].part[p] = vmmlaq_s32(s[i][v].part[p], low, value);
          s[i + 1][v].part[p] = vmmlaq_s32(s[i + 1][v].part[p], high, value);
        }
        if (rows % 2 != 0) {
          int8x8_t value = vreinterpret_s8_u32(vld1_u32(x + (rows - 1) * x_stride + u));
          int32x4_t sum = vdotq_lane_s32(s[rows - 1][v].part[p], vreinterpretq_s8_u32(first), value, 0);
          s[rows - 1][v].part[p] = vdotq_lane_s32(sum, vreinterpretq_s8_u32(second), value, 1);
        }
      }
    }
  }
  APUS_UNROLL for (int i = 0; i + 1 < rows; i += 2) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) {
      APUS_UNROLL for (int p = 0; p < 4; p++) {
        int32x4_t a = s[i][v].part[p], b = s[i + 1][v].part[p];
        s[i][v].part[p] = vuzp1q_s32(a, b);
        s[i + 1][v].part[p] = vuzp2q_s32(a, b);
      }
    }
  }
  APUS_UNROLL for (int i = 0; i < rows; i++) {
    APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = __builtin_bit_cast(vi, s[i][v]);
  }
}
#else
APUS_TILE(int8, vi, APUS_INT8_WORDS)
#endif
