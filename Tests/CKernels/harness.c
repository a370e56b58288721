// Runs the kernels at every level that this machine (or its emulation, see Scripts/asan_kernels.sh) can run, over odd
// sizes, strides and addresses, in memory of exactly the size that they may touch, so that a sanitizer sees every byte
// beyond. Checks that a row's bits do not depend on its company or on the number of threads, that levels agree, and that
// results are those of plain loops in double precision. Prints the seed and fails with status 1.

#include "CKernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;
static int failures;

#define EXPECT(condition, ...)               \
  do {                                       \
    if (!(condition)) {                      \
      failures++;                            \
      if (failures <= 30) {                  \
        printf("%s:%d: ", __FILE__, __LINE__); \
        printf(__VA_ARGS__);                 \
        printf("\n");                        \
      }                                      \
    }                                        \
  } while (0)

static uint64_t next(void) { return apus_splitmix64(state += 0x9E3779B97F4A7C15u); }
static float number(float scale) { return ((float)(next() >> 40) / 8388608.0f - 1) * scale; }

// Memory of exactly so many bytes at an address that is odd where `shift` is: nothing may be touched around it.
static void *exactly(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory) abort();
  return memory;
}

static float *numbers(size_t count, float scale) {
  float *memory = exactly(count * 4);
  for (size_t i = 0; i < count; i++) memory[i] = number(scale);
  return memory;
}

static int levels(int *isas) {
  int count = 0;
  for (int isa = APUS_ISA_PORTABLE; isa <= APUS_ISA_AVX512_BF16; isa++) {
    if (apus_isa_supported((apus_isa)isa)) isas[count++] = isa;
  }
  return count;
}

// MARK: Linear layers

// A row's bits alone, in batches at other addresses, and on other numbers of threads.
static float *run_all_ways(int isa, const apus_linear *weight, int rows, int outputs, int inputs, const float *x) {
  float *alone = exactly((size_t)rows * outputs * 4);
  apus_context *context = apus_context_create(1, (apus_isa)isa, NULL);
  for (int r = 0; r < rows; r++) {
    float *copy = exactly((size_t)inputs * 4), *out = exactly((size_t)outputs * 4);
    memcpy(copy, x + (size_t)r * inputs, (size_t)inputs * 4);
    apus_linear_run(context, weight, copy, inputs, 1, NULL, out, outputs);
    memcpy(alone + (size_t)r * outputs, out, (size_t)outputs * 4);
    free(copy);
    free(out);
  }
  apus_context_free(context);
  static const int threads[] = {1, 2, 7};
  static const int counts[] = {2, 3, 4, 5, 6, 7, 13, 29, 61};
  for (int t = 0; t < 3; t++) {
    context = apus_context_create(threads[t], (apus_isa)isa, NULL);
    for (int c = 0; c < 9; c++) {
      int count = counts[c];
      if (count > rows) continue;
      int first = (int)(next() % (uint64_t)(rows - count + 1)), stride = inputs + (int)(next() % 5);
      int out_stride = outputs + (int)(next() % 5);
      // The last row ends where the memory ends.
      float *copy = exactly(((size_t)(count - 1) * stride + inputs) * 4);
      float *out = exactly(((size_t)(count - 1) * out_stride + outputs) * 4);
      for (int r = 0; r < count; r++) {
        memcpy(copy + (size_t)r * stride, x + (size_t)(first + r) * inputs, (size_t)inputs * 4);
      }
      apus_linear_run(context, weight, copy, stride, count, NULL, out, out_stride);
      int same = 1;
      for (int r = 0; r < count; r++) {
        same &= memcmp(out + (size_t)r * out_stride, alone + (size_t)(first + r) * outputs, (size_t)outputs * 4) == 0;
      }
      EXPECT(same, "level %d, %d threads, %d rows of %dx%d differ from single rows", isa, threads[t], count, outputs, inputs);
      free(copy);
      free(out);
    }
    apus_context_free(context);
  }
  return alone;
}

// A view over copies of a weight's memory gives the weight's bits, and sizes that are wrong are refused.
static void check_view(
    apus_linear *weight, const apus_code_layout *layout, apus_dtype format, int rows, int outputs, int inputs,
    const float *x) {
  apus_region regions[APUS_REGIONS];
  int count = apus_linear_regions(weight, regions);
  for (int i = 0; i < count; i++) {
    void *copy = NULL;
    if (posix_memalign(&copy, 64, regions[i].bytes ? regions[i].bytes : 1) != 0) abort();
    memcpy(copy, regions[i].address, regions[i].bytes);
    regions[i].address = copy;
  }
  apus_context *context = apus_context_create(2, apus_isa_best(), NULL);
  apus_linear *view = layout ? apus_linear_view_codes(outputs, inputs, layout, regions, count)
                             : apus_linear_view(outputs, inputs, format, regions, count);
  EXPECT(view, "no view of %dx%d", outputs, inputs);
  if (view) {
    float *wanted = exactly((size_t)rows * outputs * 4), *found = exactly((size_t)rows * outputs * 4);
    apus_linear_run(context, weight, x, inputs, rows, NULL, wanted, outputs);
    apus_linear_run(context, view, x, inputs, rows, NULL, found, outputs);
    EXPECT(memcmp(wanted, found, (size_t)rows * outputs * 4) == 0, "a view of %dx%d differs", outputs, inputs);
    free(wanted);
    free(found);
    apus_linear_free(view);
  }
  uint64_t sum = apus_checksum(context, regions[0].address, regions[0].bytes);
  if (regions[0].bytes > 0) {
    uint8_t *byte = (uint8_t *)regions[0].address + next() % regions[0].bytes;
    *byte ^= (uint8_t)(1u << next() % 8);
    EXPECT(apus_checksum(context, regions[0].address, regions[0].bytes) != sum, "a changed bit keeps the checksum");
  }
  regions[0].bytes += 64;
  view = layout ? apus_linear_view_codes(outputs, inputs, layout, regions, count)
                : apus_linear_view(outputs, inputs, format, regions, count);
  EXPECT(!view, "a view of another size was taken");
  for (int i = 0; i < count; i++) free(regions[i].address);
  apus_context_free(context);
}

static void check_dense(apus_dtype format, int rows, int outputs, int inputs) {
  int isas[4], count = levels(isas);
  float *x = numbers((size_t)rows * inputs, 2), *w = numbers((size_t)outputs * inputs, 1);
  for (int l = 0; l < count; l++) {
    apus_context *context = apus_context_create(3, (apus_isa)isas[l], NULL);
    apus_linear *weight = apus_linear_create(outputs, inputs, format);
    // At an odd address.
    char *bytes = exactly((size_t)outputs * inputs * 4 + 1);
    memcpy(bytes + 1, w, (size_t)outputs * inputs * 4);
    int first = outputs / 3;
    apus_weight_rows sources[2] = {
        {bytes + 1, APUS_FLOAT32, first, NULL},
        {bytes + 1 + (size_t)first * inputs * 4, APUS_FLOAT32, outputs - first, NULL}};
    apus_linear_pack(context, weight, sources, 2);
    if (format == APUS_INT8) {
      double error = apus_linear_int8_error(context, weight, sources, 2);
      EXPECT(error >= 0 && error < 0.01, "int8 error %g", error);
    }
    free(bytes);
    float *got = run_all_ways(isas[l], weight, rows, outputs, inputs, x);
    float tolerance = format == APUS_INT8 ? 2e-2f : format == APUS_BFLOAT16 ? 8e-3f : format == APUS_FLOAT16 ? 1e-3f : 1e-6f;
    for (int r = 0; r < rows; r++) {
      for (int n = 0; n < outputs; n++) {
        double sum = 0, magnitude = 0.1;
        for (int k = 0; k < inputs; k++) {
          double product = (double)x[r * inputs + k] * w[n * inputs + k];
          sum += product;
          magnitude += fabs(product);
        }
        EXPECT(
            fabs(got[r * outputs + n] - sum) <= tolerance * magnitude, "level %d, type %d, %dx%d: %g, not %g", isas[l],
            format, outputs, inputs, got[r * outputs + n], sum);
      }
    }
    free(got);
    if (isas[l] == (int)apus_isa_best()) check_view(weight, NULL, format, rows, outputs, inputs, x);
    apus_linear_free(weight);
    apus_context_free(context);
  }
  free(x);
  free(w);
}

static void check_codes(const apus_code_layout *layout, int rows, int outputs, int inputs, int is_ordered) {
  int isas[4], count = levels(isas);
  int groups = (inputs + layout->group - 1) / layout->group, blocks = (inputs + layout->block - 1) / layout->block;
  int tops = layout->has_factors ? blocks : groups;
  int32_t *order = NULL;
  if (is_ordered) {
    order = exactly((size_t)inputs * 4);
    for (int i = 0; i < inputs; i++) order[i] = i;
    for (int i = inputs - 1; i > 0; i--) {
      int j = (int)(next() % (uint64_t)(i + 1)), t = order[i];
      order[i] = order[j];
      order[j] = t;
    }
  }
  apus_linear *weight = apus_linear_create_codes(outputs, inputs, layout, order);
  EXPECT(weight, "no weight for bits %d, group %d, block %d", layout->bits, layout->group, layout->block);
  if (!weight) return;
  for (int panel = 0; panel * APUS_CODES_PANEL < outputs; panel++) {
    int n = outputs - panel * APUS_CODES_PANEL < APUS_CODES_PANEL ? outputs - panel * APUS_CODES_PANEL : APUS_CODES_PANEL;
    uint8_t *codes = exactly((size_t)n * inputs), *minimum_factors = exactly((size_t)n * groups);
    int8_t *factors = exactly((size_t)n * groups);
    float *scales = numbers((size_t)n * tops, 0.01f), *minimums = numbers((size_t)n * tops, 0.05f);
    for (int i = 0; i < n * inputs; i++) {
      codes[i] = (uint8_t)(next() & ((1u << layout->bits) - 1));
      if (layout->levels == APUS_LEVELS_E4M3 && (codes[i] & 127) == 127) codes[i] ^= 1;
    }
    for (int i = 0; i < n * groups; i++) {
      factors[i] = (int8_t)next();
      minimum_factors[i] = (uint8_t)(next() & 63);
    }
    apus_code_rows strip = {codes, scales, factors, minimums, minimum_factors};
    apus_linear_pack_codes(weight, panel, &strip);
    free(codes);
    free(scales);
    free(minimums);
    free(factors);
    free(minimum_factors);
  }
  float *w = exactly((size_t)outputs * inputs * 4), *x = numbers((size_t)rows * inputs, 1), *first = NULL;
  for (int n = 0; n < outputs; n++) apus_linear_read_codes(weight, n, w + (size_t)n * inputs);
  // A row of zeros, and outliers.
  for (int k = 0; k < inputs; k++) x[k] = 0;
  for (int i = inputs; i < rows * inputs; i += 37) x[i] *= 30;
  for (int l = 0; l < count; l++) {
    float *got = run_all_ways(isas[l], weight, rows, outputs, inputs, x);
    if (first) {
      for (int i = 0; i < rows * outputs; i++) {
        int same = layout->levels == APUS_LEVELS_E4M3 ? fabsf(got[i] - first[i]) <= 1e-4f * (1 + fabsf(first[i]))
                                                      : memcmp(&got[i], &first[i], 4) == 0;
        EXPECT(same, "level %d, bits %d, group %d: %g, not %g", isas[l], layout->bits, layout->group, got[i], first[i]);
      }
      free(got);
      continue;
    }
    first = got;
    for (int r = 0; r < rows; r++) {
      double *rounded = exactly((size_t)inputs * 8);
      for (int i = 0; i < inputs; i++) {
        float value = x[r * inputs + i];
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
        memcpy(&value, &bits, 4);
        rounded[i] = value;
      }
      for (int b = 0; b < blocks && layout->levels != APUS_LEVELS_E4M3; b++) {
        float most = 0;
        int end = (b + 1) * layout->block < inputs ? (b + 1) * layout->block : inputs;
        for (int i = b * layout->block; i < end; i++) most = fmaxf(most, fabsf(x[r * inputs + (order ? order[i] : i)]));
        for (int i = b * layout->block; i < end; i++) {
          int k = order ? order[i] : i;
          rounded[k] = most > 0 ? (double)nearbyintf(x[r * inputs + k] * (127.0f / most)) * (most / 127.0f) : 0;
        }
      }
      for (int n = 0; n < outputs; n++) {
        double sum = 0, magnitude = 1e-6;
        for (int k = 0; k < inputs; k++) {
          double product = rounded[k] * w[(size_t)n * inputs + k];
          sum += product;
          magnitude += fabs(product);
        }
        EXPECT(
            fabs(got[r * outputs + n] - sum) <= 1e-5 * magnitude, "bits %d, levels %d, group %d, %dx%d: %g, not %g",
            layout->bits, layout->levels, layout->group, outputs, inputs, got[r * outputs + n], sum);
      }
      free(rounded);
    }
  }
  check_view(weight, layout, APUS_FLOAT32, rows, outputs, inputs, x);
  free(first);
  free(w);
  free(x);
  free(order);
  apus_linear_free(weight);
}

static void check_rounding(const apus_code_layout *layout, int outputs, int inputs, double bound) {
  int isas[4], count = levels(isas);
  float *w = exactly((size_t)outputs * inputs * 4), *first = NULL;
  for (int i = 0; i < outputs * inputs; i++) {
    w[i] = 0;
    for (int j = 0; j < 6; j++) w[i] += number(0.02f);
  }
  for (int l = 0; l < count; l++) {
    apus_context *context = apus_context_create(2, (apus_isa)isas[l], NULL);
    apus_linear *weight = apus_linear_create_codes(outputs, inputs, layout, NULL);
    apus_weight_rows source = {w, APUS_FLOAT32, outputs, NULL};
    apus_linear_quantize(context, weight, &source, 1);
    float *got = exactly((size_t)outputs * inputs * 4);
    double error = 0, total = 0;
    for (int n = 0; n < outputs; n++) apus_linear_read_codes(weight, n, got + (size_t)n * inputs);
    for (int i = 0; i < outputs * inputs; i++) {
      error += ((double)got[i] - w[i]) * ((double)got[i] - w[i]);
      total += (double)w[i] * w[i];
    }
    EXPECT(sqrt(error / total) < bound, "bits %d, group %d: error %g", layout->bits, layout->group, sqrt(error / total));
    if (first) {
      EXPECT(memcmp(first, got, (size_t)outputs * inputs * 4) == 0, "level %d rounds otherwise", isas[l]);
      free(got);
    } else {
      first = got;
    }
    apus_linear_free(weight);
    apus_context_free(context);
  }
  free(first);
  free(w);
}

// MARK: Attention

static void check_attention(apus_dtype dtype, int query_heads, int kv_heads, int d, int window, int has_sinks) {
  enum { sequences = 5, shared = 512 };
  // The last three begin with the same pages.
  static const int lengths[sequences] = {1, 45, 530, 600, 513};
  int isas[4], count = levels(isas), most = 0, offsets[sequences], total = 0;
  for (int s = 0; s < sequences; s++) {
    offsets[s] = total;
    total += (lengths[s] + 15) / 16;
    if (lengths[s] > most) most = lengths[s];
  }
  int32_t *table = exactly((size_t)total * 4);
  for (int i = 0; i < total; i++) table[i] = total - i;
  for (int s = 3; s < sequences; s++) memcpy(table + offsets[s], table + offsets[2], shared / 16 * 4);
  int columns = kv_heads * d, width = query_heads * d, pages = total + 2;
  float *k = numbers((size_t)sequences * most * columns, 2), *v = numbers((size_t)sequences * most * columns, 2);
  for (int s = 3; s < sequences; s++) {
    memcpy(k + (size_t)s * most * columns, k + (size_t)2 * most * columns, (size_t)shared * columns * 4);
    memcpy(v + (size_t)s * most * columns, v + (size_t)2 * most * columns, (size_t)shared * columns * 4);
  }
  float *q = numbers((size_t)sequences * 3 * width, 2), *sinks = numbers((size_t)query_heads, 3), *first = NULL;
  float *poison = exactly((size_t)columns * 4);
  for (int i = 0; i < columns; i++) poison[i] = NAN;
  for (int l = 0; l < count; l++) {
    static const int threads[] = {1, 2, 7};
    float *alone = exactly((size_t)sequences * 3 * width * 4);
    for (int t = 0; t < 3; t++) {
      apus_context *context = apus_context_create(threads[t], (apus_isa)isas[l], NULL);
      apus_kv *kv = apus_kv_create(pages, kv_heads, d, dtype);
      for (int32_t slot = 0; slot < pages * 16; slot++) {
        apus_kv_write(context, kv, poison, columns, poison, columns, 1, &slot);
      }
      for (int s = 0; s < sequences; s++) {
        int32_t *slots = exactly((size_t)lengths[s] * 4);
        for (int i = 0; i < lengths[s]; i++) slots[i] = table[offsets[s] + i / 16] * 16 + i % 16;
        apus_kv_write(
            context, kv, k + (size_t)s * most * columns, columns, v + (size_t)s * most * columns, columns, lengths[s],
            slots);
        free(slots);
      }
      // Up to three last positions of each sequence: one by one, then all at once.
      int32_t row_start[sequences + 1] = {0}, start[sequences], page_offset[sequences];
      for (int s = 0; s < sequences; s++) {
        int rows = lengths[s] < 3 ? lengths[s] : 3;
        row_start[s + 1] = row_start[s] + rows;
        start[s] = lengths[s] - rows;
        page_offset[s] = offsets[s];
        for (int r = 0; r < rows && t == 0; r++) {
          int32_t ends[2] = {0, 1}, position = start[s] + r, offset = offsets[s];
          apus_attention_arguments one = {1, ends, &position, &offset, table, query_heads, 0.2f, window, 0,
                                          has_sinks ? sinks : NULL, 0};
          float *row = exactly((size_t)width * 4), *out = exactly((size_t)width * 4);
          memcpy(row, q + (size_t)(row_start[s] + r) * width, (size_t)width * 4);
          apus_attention(context, kv, row, width, out, width, &one);
          memcpy(alone + (size_t)(row_start[s] + r) * width, out, (size_t)width * 4);
          for (int h = 0; h < query_heads && l == 0; h++) {
            // The plain sum, from K and V as the pages hold them.
            double scores[1024], largest = has_sinks ? sinks[h] : -1e30, sum = 0, result[256] = {0};
            int low = window > 0 && position + 1 > window ? position + 1 - window : 0;
            float *keys = exactly((size_t)columns * 4), *values = exactly((size_t)columns * 4);
            for (int i = low; i <= position; i++) {
              apus_kv_read(kv, table[offsets[s] + i / 16] * 16 + i % 16, keys, values);
              scores[i] = 0;
              for (int j = 0; j < d; j++) scores[i] += (double)row[h * d + j] * keys[h / (query_heads / kv_heads) * d + j];
              scores[i] *= 0.2;
              largest = fmax(largest, scores[i]);
            }
            for (int i = low; i <= position; i++) {
              apus_kv_read(kv, table[offsets[s] + i / 16] * 16 + i % 16, keys, values);
              double weight = exp(scores[i] - largest);
              sum += weight;
              for (int j = 0; j < d; j++) result[j] += weight * values[h / (query_heads / kv_heads) * d + j];
            }
            if (has_sinks) sum += exp(sinks[h] - largest);
            double tolerance = dtype == APUS_FLOAT32 || dtype == APUS_FLOAT16 ? 1e-4 : 3e-2;
            for (int j = 0; j < d; j++) {
              EXPECT(
                  fabs(out[h * d + j] - result[j] / sum) <= tolerance, "type %d, head of %d, sequence %d: %g, not %g",
                  dtype, d, s, out[h * d + j], result[j] / sum);
            }
            free(keys);
            free(values);
          }
          free(row);
          free(out);
        }
      }
      int rows = row_start[sequences];
      apus_attention_arguments all = {sequences, row_start, start, page_offset, table, query_heads, 0.2f, window, 0,
                                      has_sinks ? sinks : NULL, 0};
      float *in = exactly((size_t)rows * width * 4), *out = exactly((size_t)rows * width * 4);
      memcpy(in, q, (size_t)rows * width * 4);
      apus_attention(context, kv, in, width, out, width, &all);
      EXPECT(
          memcmp(out, alone, (size_t)rows * width * 4) == 0, "level %d, type %d, %d threads: together otherwise than alone",
          isas[l], dtype, threads[t]);
      all.is_plain = 1;
      apus_attention(context, kv, in, width, out, width, &all);
      EXPECT(memcmp(out, alone, (size_t)rows * width * 4) == 0, "level %d, type %d: the plain form", isas[l], dtype);
      free(in);
      free(out);
      apus_kv_free(kv);
      apus_context_free(context);
    }
    if (first) {
      double worst = 0;
      for (int i = 0; i < 13 * width; i++) worst = fmax(worst, fabs((double)first[i] - alone[i]));
      EXPECT(worst <= (dtype <= APUS_FLOAT16 ? 1e-4 : 2e-2), "level %d, type %d: off by %g", isas[l], dtype, worst);
      free(alone);
    } else {
      first = alone;
    }
  }
  free(first);
  free(k);
  free(v);
  free(q);
  free(sinks);
  free(poison);
  free(table);
}

// MARK: Rows

static void check_rows(int rows, int columns) {
  int isas[4], count = levels(isas);
  for (int l = 0; l < count; l++) {
    apus_context *context = apus_context_create(2, (apus_isa)isas[l], NULL);
    float *x = numbers((size_t)rows * columns * 2, 2), *weight = numbers((size_t)columns, 1);
    float *out = exactly((size_t)rows * columns * 4), *delta = numbers((size_t)rows * columns, 1);
    apus_rms_norm(context, x, columns, rows, columns, weight, APUS_FLOAT32, 1e-6f, out, columns);
    for (int r = 0; r < rows; r++) {
      double squares = 0;
      for (int i = 0; i < columns; i++) squares += (double)x[r * columns + i] * x[r * columns + i];
      for (int i = 0; i < columns; i++) {
        double wanted = x[r * columns + i] / sqrt(squares / columns + 1e-6) * weight[i];
        EXPECT(fabs(out[r * columns + i] - wanted) < 1e-4, "norm of %d: %g, not %g", columns, out[r * columns + i], wanted);
      }
    }
    apus_add_rms_norm(
        context, x, columns, delta, columns, rows, columns, weight, APUS_FLOAT32, 1e-6f, out, columns);
    apus_silu_mul(context, x, 2 * columns, rows, columns, out, columns);
    apus_add(context, x, columns, delta, columns, rows, columns);
    int32_t tokens[4] = {0, rows - 1, rows / 2, 0};
    float *gathered = exactly((size_t)4 * columns * 4);
    apus_gather(context, x, columns, tokens, 4, columns, gathered, columns);
    apus_embed(context, x, APUS_FLOAT32, columns, tokens, 4, columns, gathered, columns);
    apus_sampling_row parameters[2] = {{0, -1, 1, 0, 0.5f}, {0.8f, 5, 0.9f, 0.01f, 0.5f}};
    int32_t drawn[2];
    apus_sample(context, gathered, columns, 2, columns, parameters, drawn);
    EXPECT(drawn[0] >= 0 && drawn[0] < columns && drawn[1] >= 0 && drawn[1] < columns, "draws of %d", columns);
    int32_t best[3];
    float values[3];
    apus_top_k(context, gathered + 2 * columns, columns, 3, best, values);
    (void)apus_log_sum_exp(context, gathered + 2 * columns, columns);
    free(gathered);
    free(x);
    free(weight);
    free(out);
    free(delta);
    apus_context_free(context);
  }
}

// MARK: Mixtures of experts

// Products of several weights at once have the bits of single layers; rows of no group stay as they are.
static void check_experts(apus_dtype format, int outputs, int inputs) {
  enum { groups = 5, per_row = 2 };
  static const int32_t counts[groups] = {3, 0, 131, 1, 9};
  int32_t starts[groups];
  int rows = 1;
  for (int g = 0; g < groups; g++) {
    starts[g] = rows;
    rows += counts[g];
  }
  int isas[4], count = levels(isas);
  float *x = numbers((size_t)rows * inputs, 2), *bias = numbers((size_t)outputs, 1);
  for (int l = 0; l < count; l++) {
    apus_linear *weights[groups];
    apus_group_part parts[groups];
    apus_context *alone = apus_context_create(1, (apus_isa)isas[l], NULL);
    float *wanted = exactly((size_t)rows * outputs * 4);
    memset(wanted, 0, (size_t)rows * outputs * 4);
    for (int g = 0; g < groups; g++) {
      float *w = numbers((size_t)outputs * inputs, 1);
      apus_weight_rows source = {w, APUS_FLOAT32, outputs, NULL};
      weights[g] = apus_linear_create(outputs, inputs, format);
      apus_linear_pack(alone, weights[g], &source, 1);
      free(w);
      parts[g] = (apus_group_part){weights[g], bias, 0, g};
      apus_linear_run(
          alone, weights[g], x + (size_t)starts[g] * inputs, inputs, counts[g], bias,
          wanted + (size_t)starts[g] * outputs, outputs);
    }
    for (int threads = 1; threads <= 5; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      apus_groups *memory = apus_groups_create(context);
      float *out = exactly((size_t)rows * outputs * 4);
      memset(out, 0, (size_t)rows * outputs * 4);
      apus_grouped_run(context, memory, parts, groups, starts, counts, x, inputs, out, outputs);
      EXPECT(
          memcmp(out, wanted, (size_t)rows * outputs * 4) == 0, "level %d, type %d, %d threads: experts of %dx%d differ",
          isas[l], format, threads, outputs, inputs);
      // Rows choose among the groups' outputs, whose halves are joined first.
      int32_t chosen[7 * per_row];
      float factors[7 * per_row], *sums = numbers((size_t)7 * outputs, 1), *halves = numbers((size_t)rows * 2 * outputs, 9);
      apus_routing routing = {outputs, per_row, APUS_SCORE_SIGMOID, 1, 1, 1, 1, 2.5f, bias};
      if (outputs >= per_row) {
        apus_route(context, &routing, x, inputs < outputs ? 0 : inputs, inputs < outputs ? 0 : 7, chosen, factors);
        for (int i = 0; i < 7 * per_row; i++) {
          EXPECT(
              inputs < outputs || (chosen[i] >= 0 && chosen[i] < outputs && (i % 2 == 0 || chosen[i] > chosen[i - 1])),
              "expert %d of %d", chosen[i], outputs);
        }
      }
      for (int i = 0; i < 7 * per_row; i++) chosen[i] = (int32_t)(next() % (uint64_t)rows);
      for (int i = 0; i < 7 * per_row; i++) factors[i] = number(1);
      apus_grouped_gate(context, starts, counts, groups, (apus_gate){7, 1.702f}, halves, 2 * outputs, outputs, out, outputs);
      apus_combine(context, out, outputs, chosen, factors, per_row, 1, bias, 0, 7, outputs, sums, outputs);
      free(sums);
      free(halves);
      free(out);
      apus_groups_free(memory);
      apus_context_free(context);
    }
    for (int g = 0; g < groups; g++) apus_linear_free(weights[g]);
    free(wanted);
    apus_context_free(alone);
  }
  free(x);
  free(bias);
}

int main(int count, char **arguments) {
  uint64_t seed = count > 1 ? strtoull(arguments[1], NULL, 10) : 1;
  state = seed;
  int isas[4], known = levels(isas);
  printf("seed %llu, levels up to %d\n", (unsigned long long)seed, isas[known - 1]);
  static const int sizes[][3] = {{1, 1, 1}, {7, 65, 33}, {29, 70, 130}, {13, 130, 515}};
  for (int i = 0; i < 4; i++) {
    int rows = sizes[i][0], outputs = sizes[i][1], inputs = sizes[i][2];
    for (int format = APUS_FLOAT32; format <= APUS_INT8; format++) check_dense((apus_dtype)format, rows, outputs, inputs);
    static const int bits[] = {4, 5, 6, 8}, groups[] = {16, 32, 128, 1024};
    static const apus_dtype types[] = {APUS_FLOAT16, APUS_BFLOAT16, APUS_FLOAT32};
    for (int b = 0; b < 4; b++) {
      for (int g = 0; g < 4; g++) {
        for (int m = APUS_MINIMUM_NONE; m <= APUS_MINIMUM_ZERO_POINT; m++) {
          for (int f = 0; f < 2; f++) {
            if ((groups[g] == 16 && bits[b] != 4 && bits[b] != 6) || (f && groups[g] > 256) || (f && m == 2)) continue;
            apus_code_layout layout = {
                bits[b], APUS_LEVELS_LINEAR, m == APUS_MINIMUM_ZERO_POINT ? 0 : 1 << (bits[b] - 1), groups[g],
                f ? 256 : 128, types[(g + m) % 3], f, (apus_minimum)m};
            check_codes(&layout, rows, outputs, inputs, g == 1 && m == 0);
          }
        }
      }
    }
    apus_code_layout more[] = {
        {4, APUS_LEVELS_E2M1, 0, 32, 128, APUS_BFLOAT16, 0, APUS_MINIMUM_NONE},
        {4, APUS_LEVELS_IQ4_NL, 0, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE},
        {4, APUS_LEVELS_LINEAR, 8, 96, 32, APUS_FLOAT16, 0, APUS_MINIMUM_NONE},
        {8, APUS_LEVELS_E4M3, 0, 128, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE},
        {8, APUS_LEVELS_E4M3, 0, 1024, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE},
        {8, APUS_LEVELS_E4M3, 0, 32, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE},
    };
    for (int m = 0; m < 6; m++) check_codes(&more[m], rows, outputs, inputs, 0);
  }
  apus_code_layout int4 = {4, APUS_LEVELS_LINEAR, 8, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
  apus_code_layout int8 = {8, APUS_LEVELS_LINEAR, 128, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
  apus_code_layout float8 = {8, APUS_LEVELS_E4M3, 0, 128, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE};
  // More inputs than are unpacked or kept in the cache at once, and more rows than share them.
  apus_code_layout q4_k = {4, APUS_LEVELS_LINEAR, 0, 32, 256, APUS_FLOAT16, 1, APUS_MINIMUM_OWN};
  apus_code_layout *layouts[] = {&int4, &int8, &float8, &q4_k};
  for (int l = 0; l < 4; l++) check_codes(layouts[l], 61, 70, 1200, 0);
  check_dense(APUS_BFLOAT16, 61, 70, 1200);
  check_dense(APUS_INT8, 61, 70, 2200);
  check_rounding(&int4, 70, 291, 0.085);
  check_rounding(&int8, 70, 291, 0.0056);
  check_rounding(&float8, 70, 291, 0.028);
  for (int dtype = APUS_FLOAT32; dtype <= APUS_FLOAT8; dtype++) {
    check_attention((apus_dtype)dtype, 4, 2, 64, 0, 0);
    check_attention((apus_dtype)dtype, 7, 1, 80, 0, 1);
    check_attention((apus_dtype)dtype, 3, 3, 33, 270, 0);
  }
  for (int format = APUS_FLOAT32; format <= APUS_INT8; format++) {
    check_experts((apus_dtype)format, 1, 1);
    check_experts((apus_dtype)format, 70, 33);
    check_experts((apus_dtype)format, 37, 130);
  }
  check_rows(1, 1);
  check_rows(5, 37);
  check_rows(3, 400);
  printf("%d failures\n", failures);
  return failures != 0;
}
