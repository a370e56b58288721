// Runs the kernels at every level that this machine (or its emulation, see Scripts/asan_kernels.sh) can run, over odd
// sizes, strides and addresses, in memory of exactly the size that they may touch, so that a sanitizer sees every byte
// beyond. Checks that a row's bits do not depend on its company or on the number of threads, that levels agree, and that
// results are those of plain loops in double precision. Prints the seed and fails with status 1.
//
// Arguments: the seed, then the families to check, all of them by default. Compiled with CHECK_PRODUCTS, CHECK_ATTENTION or
// CHECK_ROWS, it needs only the files of those families.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "CKernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if !defined(CHECK_PRODUCTS) && !defined(CHECK_ATTENTION) && !defined(CHECK_ROWS)
#define CHECK_PRODUCTS
#define CHECK_ATTENTION
#define CHECK_ROWS
#endif

// Levels that there are on any processor.
enum { most_levels = APUS_ISAS };

#if defined(__aarch64__)
enum { is_aarch64 = 1 };
#else
enum { is_aarch64 = 0 };
#endif

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
  for (int isa = APUS_ISA_PORTABLE; isa < most_levels; isa++) {
    if (apus_isa_supported((apus_isa)isa)) isas[count++] = isa;
  }
  return count;
}

#ifdef CHECK_PRODUCTS

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
  int isas[most_levels], count = levels(isas);
  float *x = numbers((size_t)rows * inputs, 2), *w = numbers((size_t)outputs * inputs, 1);
  float *lowest = NULL;
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
    // Integer sums are exact, and on aarch64 levels differ in nothing else.
    if (lowest && (format == APUS_INT8 || is_aarch64)) {
      EXPECT(
          memcmp(got, lowest, (size_t)rows * outputs * 4) == 0, "level %d, type %d, %dx%d: other bits than level %d",
          isas[l], format, outputs, inputs, isas[0]);
    }
    if (lowest) {
      free(got);
    } else {
      lowest = got;
    }
    if (isas[l] == (int)apus_isa_best()) check_view(weight, NULL, format, rows, outputs, inputs, x);
    apus_linear_free(weight);
    apus_context_free(context);
  }
  free(lowest);
  free(x);
  free(w);
}

static void check_codes(const apus_code_layout *layout, int rows, int outputs, int inputs, int is_ordered) {
  int isas[most_levels], count = levels(isas);
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
        int same = layout->levels == APUS_LEVELS_E4M3 && !is_aarch64
            ? fabsf(got[i] - first[i]) <= 1e-4f * (1 + fabsf(first[i]))
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
  int isas[most_levels], count = levels(isas);
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

// MARK: Mixtures of experts

// A weight over copies of another one's memory, as a mapped file gives it. What it lies in is written to `regions`.
static apus_linear *view_of(
    const apus_linear *weight, const apus_code_layout *layout, apus_dtype format, int outputs, int inputs,
    apus_region regions[APUS_REGIONS], int *count) {
  *count = apus_linear_regions(weight, regions);
  for (int i = 0; i < *count; i++) {
    void *copy = NULL;
    if (posix_memalign(&copy, 64, regions[i].bytes ? regions[i].bytes : 1) != 0) abort();
    memcpy(copy, regions[i].address, regions[i].bytes);
    regions[i].address = copy;
  }
  return layout ? apus_linear_view_codes(outputs, inputs, layout, regions, *count)
                : apus_linear_view(outputs, inputs, format, regions, *count);
}

// Products of several weights at once have the bits of single layers, over weights and over views of them; rows of no
// group stay as they are. With `layout`, weights stay quantised.
static void check_experts(apus_dtype format, const apus_code_layout *layout, int outputs, int inputs) {
  enum { groups = 5 };
  static const int32_t counts[groups] = {3, 0, 131, 1, 9};
  int32_t starts[groups];
  int rows = 1;
  for (int g = 0; g < groups; g++) {
    starts[g] = rows;
    rows += counts[g];
  }
  int isas[most_levels], count = levels(isas);
  float *x = numbers((size_t)rows * inputs, 2), *bias = numbers((size_t)outputs, 1);
  for (int l = 0; l < count; l++) {
    apus_linear *weights[groups], *views[groups];
    apus_region regions[groups][APUS_REGIONS];
    int region_counts[groups];
    apus_group_part parts[2 * groups];
    apus_context *alone = apus_context_create(1, (apus_isa)isas[l], NULL);
    // Two parts side by side: a weight's outputs, and those of the next group's view.
    int width = 2 * outputs + 1;
    float *wanted = exactly((size_t)rows * width * 4);
    memset(wanted, 0, (size_t)rows * width * 4);
    for (int g = 0; g < groups; g++) {
      float *w = numbers((size_t)outputs * inputs, 1);
      apus_weight_rows source = {w, APUS_FLOAT32, outputs, NULL};
      if (layout) {
        weights[g] = apus_linear_create_codes(outputs, inputs, layout, NULL);
        apus_linear_quantize(alone, weights[g], &source, 1);
      } else {
        weights[g] = apus_linear_create(outputs, inputs, format);
        apus_linear_pack(alone, weights[g], &source, 1);
      }
      free(w);
      views[g] = view_of(weights[g], layout, format, outputs, inputs, regions[g], &region_counts[g]);
      EXPECT(views[g], "no view of %dx%d", outputs, inputs);
      if (!views[g]) exit(1);
    }
    for (int g = 0; g < groups; g++) {
      parts[2 * g] = (apus_group_part){weights[g], bias, 0, g};
      parts[2 * g + 1] = (apus_group_part){views[(g + 1) % groups], NULL, outputs + 1, g};
      for (int p = 0; p < 2; p++) {
        apus_linear_run(
            alone, parts[2 * g + p].weight, x + (size_t)starts[g] * inputs, inputs, counts[g], parts[2 * g + p].bias,
            wanted + (size_t)starts[g] * width + parts[2 * g + p].column, width);
      }
    }
    for (int threads = 1; threads <= 5; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      apus_groups *memory = apus_groups_create(context);
      float *out = exactly((size_t)rows * width * 4);
      memset(out, 0, (size_t)rows * width * 4);
      apus_grouped_run(context, memory, parts, 2 * groups, starts, counts, x, inputs, out, width);
      EXPECT(
          memcmp(out, wanted, (size_t)rows * width * 4) == 0, "level %d, type %d, %d threads: experts of %dx%d differ",
          isas[l], format, threads, outputs, inputs);
      free(out);
      // All rows for every group, in columns of its own, through views.
      enum { columns_rows = 11 };
      apus_group_part columns[groups];
      int x_width = groups * inputs, out_width = groups * (outputs + 1) - 1;
      float *wide = numbers((size_t)columns_rows * x_width, 1), *single = exactly((size_t)columns_rows * outputs * 4);
      float *sums = exactly((size_t)columns_rows * out_width * 4);
      for (int g = 0; g < groups; g++) columns[g] = (apus_group_part){views[g], bias, 0, g};
      memset(sums, 0, (size_t)columns_rows * out_width * 4);
      apus_columns_run(
          context, memory, columns, groups, wide, x_width, inputs, columns_rows, sums, out_width, outputs + 1);
      for (int g = 0; g < groups; g++) {
        apus_linear_run(alone, weights[g], wide + g * inputs, x_width, columns_rows, bias, single, outputs);
        int same = 1;
        for (int r = 0; r < columns_rows; r++) {
          const float *row = sums + (size_t)r * out_width + g * (outputs + 1);
          same &= memcmp(row, single + (size_t)r * outputs, (size_t)outputs * 4) == 0;
          if (g + 1 < groups) same &= row[outputs] == 0;
        }
        EXPECT(
            same, "level %d, type %d, %d threads: columns of %dx%d differ", isas[l], format, threads, outputs, inputs);
      }
      free(wide);
      free(single);
      free(sums);
      apus_groups_free(memory);
      apus_context_free(context);
    }
    for (int g = 0; g < groups; g++) {
      apus_linear_free(views[g]);
      apus_linear_free(weights[g]);
      for (int i = 0; i < region_counts[g]; i++) free(regions[g][i].address);
    }
    free(wanted);
    apus_context_free(alone);
  }
  free(x);
  free(bias);
}

// The choice of experts, their activation and the sum of their results.
static void check_routing(int experts, int per_row, int width) {
  enum { rows = 7, groups = 3 };
  int isas[most_levels], count = levels(isas);
  float *logits = numbers((size_t)rows * experts, 3), *correction = numbers((size_t)experts, 0.2f);
  float *halves = numbers((size_t)rows * 2 * width, 9);
  for (int i = 0; i < experts; i++) logits[2 * experts + i] = NAN;
  static const int32_t starts[groups] = {0, 4, 4}, counts[groups] = {4, 0, 3};
  for (int l = 0; l < count; l++) {
    for (int threads = 1; threads <= 3; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      for (int score = APUS_SCORE_SOFTMAX; score <= APUS_SCORE_SOFTMAX_OF_CHOSEN; score++) {
        int split = experts % 4 == 0 && per_row <= experts / 2 ? 4 : 1;
        apus_routing routing = {experts, per_row, (apus_score)score, split, split > 1 ? 2 : 1, 1 + (split > 1), 1, 2.5f,
                                score == APUS_SCORE_SIGMOID ? correction : NULL};
        int32_t *chosen = exactly((size_t)rows * per_row * 4);
        float *weights = exactly((size_t)rows * per_row * 4), *out = exactly((size_t)rows * width * 4);
        float *sums = numbers((size_t)rows * width, 1), *before = exactly((size_t)rows * width * 4);
        apus_route(context, &routing, logits, experts, rows, chosen, weights);
        for (int r = 0; r < rows; r++) {
          double total = 0;
          for (int i = 0; i < per_row; i++) {
            int32_t expert = chosen[r * per_row + i];
            EXPECT(expert >= 0 && expert < experts, "expert %d of %d", expert, experts);
            EXPECT(i == 0 || expert > chosen[r * per_row + i - 1], "experts out of order");
            total += weights[r * per_row + i];
          }
          EXPECT(r == 2 || fabs(total - 2.5) < 1e-4, "weights of a row sum to %g", total);
        }
        apus_gate gate = {score == 0 ? 0 : 7, 1.702f};
        apus_grouped_gate(context, starts, counts, groups, gate, halves, 2 * width, width, out, width);
        for (int r = 0; r < rows; r++) {
          for (int i = 0; i < width; i++) {
            double g = halves[(size_t)r * 2 * width + i], u = halves[(size_t)r * 2 * width + width + i];
            double joined = g / (1 + exp(-g)) * u;
            if (score != 0) {
              g = fmin(g, 7);
              joined = g / (1 + exp(-1.702 * g)) * (fmax(-7, fmin(7, u)) + 1);
            }
            EXPECT(
                fabs(out[r * width + i] - joined) < 1e-4 * (1 + fabs(joined)), "joined halves: %g, not %g",
                out[r * width + i], joined);
          }
        }
        memcpy(before, sums, (size_t)rows * width * 4);
        for (int i = 0; i < rows * per_row; i++) chosen[i] = (int32_t)(next() % (uint64_t)rows);
        for (int i = 0; i < rows * per_row; i++) weights[i] = number(1);
        const float *shared_gate = score == 2 ? correction : NULL;
        apus_combine(
            context, out, width, chosen, weights, per_row, score != 1, shared_gate, 0, rows, width, sums, width);
        for (int r = 0; r < rows; r++) {
          for (int i = 0; i < width; i++) {
            double sum = 0;
            for (int k = 0; k < per_row; k++) {
              sum += (double)weights[r * per_row + k] * out[chosen[r * per_row + k] * width + i];
            }
            double factor = shared_gate ? 1 / (1 + exp(-(double)shared_gate[0])) : 1;
            if (score != 1) sum += before[r * width + i] * factor;
            EXPECT(
                fabs(sums[r * width + i] - sum) < 1e-3 * (1 + fabs(sum)), "combined: %g, not %g", sums[r * width + i],
                sum);
          }
        }
        free(chosen);
        free(weights);
        free(out);
        free(sums);
        free(before);
      }
      apus_context_free(context);
    }
  }
  free(halves);
  free(correction);
  free(logits);
}

// MARK: Checksums

static void files_family(void) {
  static const size_t sizes[] = {0, 1, 7, 8, 63, 64, 65, 4097, 262143, 262144, 262145, 600001};
  for (int i = 0; i < 12; i++) {
    uint64_t wanted = 0;
    for (int shift = 0; shift < 9; shift += 8) {
      // Mapped memory begins at cache lines; anything else has the same sum.
      uint8_t *memory = exactly(sizes[i] + (size_t)shift);
      for (size_t k = 0; k < sizes[i]; k++) memory[(size_t)shift + k] = (uint8_t)(k * 31 + k / 255);
      for (int threads = 1; threads <= 7; threads += 3) {
        apus_context *context = apus_context_create(threads, apus_isa_best(), NULL);
        uint64_t sum = apus_checksum(context, memory + shift, sizes[i]);
        if (threads == 1 && shift == 0) wanted = sum;
        EXPECT(sum == wanted, "%zu bytes, %d threads, shift %d: another sum", sizes[i], threads, shift);
        for (int change = 0; change < 5 && sizes[i] > 0; change++) {
          size_t at = change == 0 ? 0 : change == 1 ? sizes[i] - 1 : (size_t)(next() % sizes[i]);
          uint8_t bit = (uint8_t)(1u << next() % 8);
          memory[(size_t)shift + at] ^= bit;
          EXPECT(apus_checksum(context, memory + shift, sizes[i]) != wanted, "a changed bit of byte %zu", at);
          memory[(size_t)shift + at] ^= bit;
        }
        if (sizes[i] > 1) {
          EXPECT(apus_checksum(context, memory + shift, sizes[i] - 1) != wanted, "a byte less has the same sum");
        }
        apus_context_free(context);
      }
      free(memory);
    }
  }
}

static void dense_family(void) {
  static const int sizes[][3] = {{1, 1, 1}, {7, 65, 33}, {29, 70, 130}};
  for (int format = APUS_FLOAT32; format <= APUS_INT8; format++) {
    for (int i = 0; i < 3; i++) check_dense((apus_dtype)format, sizes[i][0], sizes[i][1], sizes[i][2]);
  }
  // More inputs than a block, and more rows than share one.
  check_dense(APUS_FLOAT32, 7, 70, 531);
  check_dense(APUS_BFLOAT16, 61, 70, 1200);
  check_dense(APUS_INT8, 61, 70, 2200);
}

static const apus_code_layout int4 = {4, APUS_LEVELS_LINEAR, 8, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
static const apus_code_layout int8 = {8, APUS_LEVELS_LINEAR, 128, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
static const apus_code_layout float8 = {8, APUS_LEVELS_E4M3, 0, 128, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE};
static const apus_code_layout mxfp4 = {4, APUS_LEVELS_E2M1, 0, 32, 128, APUS_BFLOAT16, 0, APUS_MINIMUM_NONE};
static const apus_code_layout iq4_nl = {4, APUS_LEVELS_IQ4_NL, 0, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
static const apus_code_layout q4_k = {4, APUS_LEVELS_LINEAR, 0, 32, 256, APUS_FLOAT16, 1, APUS_MINIMUM_OWN};
static const apus_code_layout q5_0 = {5, APUS_LEVELS_LINEAR, 16, 32, 128, APUS_FLOAT16, 0, APUS_MINIMUM_NONE};
static const apus_code_layout q6_k = {6, APUS_LEVELS_LINEAR, 32, 16, 256, APUS_FLOAT16, 1, APUS_MINIMUM_NONE};

static void codes_family(void) {
  static const int sizes[][3] = {{1, 1, 1}, {13, 65, 33}, {9, 70, 331}};
  for (int i = 0; i < 3; i++) {
    int rows = sizes[i][0], outputs = sizes[i][1], inputs = sizes[i][2];
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
        mxfp4, iq4_nl, {4, APUS_LEVELS_LINEAR, 8, 96, 32, APUS_FLOAT16, 0, APUS_MINIMUM_NONE}, float8,
        {8, APUS_LEVELS_E4M3, 0, 1024, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE},
        {8, APUS_LEVELS_E4M3, 0, 32, 128, APUS_FLOAT32, 0, APUS_MINIMUM_NONE}};
    for (int m = 0; m < 6; m++) check_codes(&more[m], rows, outputs, inputs, 0);
  }
  // More inputs than are unpacked or kept in the cache at once, and more rows than share them.
  const apus_code_layout *layouts[] = {&int4, &int8, &float8, &q4_k, &mxfp4, &iq4_nl, &q5_0, &q6_k};
  for (int l = 0; l < 8; l++) check_codes(layouts[l], l < 4 ? 53 : 13, l < 4 ? 70 : 33, 1200, l == 1);
}

static void rounding_family(void) {
  check_rounding(&int4, 70, 291, 0.085);
  check_rounding(&int8, 70, 291, 0.0056);
  check_rounding(&float8, 70, 291, 0.028);
}

static void experts_family(void) {
  for (int format = APUS_FLOAT32; format <= APUS_INT8; format++) {
    check_experts((apus_dtype)format, NULL, 1, 1);
    check_experts((apus_dtype)format, NULL, 70, 33);
    if (format >= APUS_BFLOAT16) check_experts((apus_dtype)format, NULL, 37, 130);
  }
  check_experts(APUS_FLOAT32, &int4, 70, 131);
  check_experts(APUS_FLOAT32, &int8, 130, 33);
  check_experts(APUS_FLOAT32, &float8, 33, 70);
  check_routing(2, 1, 1);
  check_routing(12, 3, 37);
  check_routing(64, 6, 1100);
}

#endif

#ifdef CHECK_ATTENTION

// MARK: Attention

// An attention call: K/V heads of `d` numbers, or one latent head of which `value_d` numbers are the value.
typedef struct {
  apus_dtype dtype;
  int query_heads;
  int kv_heads;
  int d;
  // 0 for K/V heads.
  int value_d;
  int window;
  float soft_cap;
  int has_sinks;
  // The last rows of each sequence that attend at once: a chunk of a prompt, or a token and what was drafted after it.
  int rows;
} attention_case;

enum { sequences = 5, shared = 512 };

// The last three sequences begin with the same pages.
static const int lengths[sequences] = {1, 45, 530, 600, 513};

// The plain softmax of one row over keys and values that lie [positions][columns].
static void attend_plainly(
    const attention_case *a, const float *q, const float *keys, const float *values, const float *sinks, int position,
    int first_row, const float *out) {
  int kv_heads = a->value_d ? 1 : a->kv_heads, vd = a->value_d ? a->value_d : a->d;
  int columns = kv_heads * a->d, value_columns = a->value_d ? columns : kv_heads * vd;
  for (int h = 0; h < a->query_heads; h++) {
    double *scores = exactly((size_t)(position + 1) * 8), *result = exactly((size_t)vd * 8);
    double largest = a->has_sinks ? sinks[h] : -1e30, sum = 0;
    int low = a->window > 0 && position + 1 > a->window ? position + 1 - a->window : 0;
    int head = h / (a->query_heads / kv_heads);
    for (int j = 0; j < vd; j++) result[j] = 0;
    for (int i = low; i <= position; i++) {
      scores[i] = 0;
      for (int j = 0; j < a->d; j++) scores[i] += (double)q[h * a->d + j] * keys[i * columns + head * a->d + j];
      scores[i] *= 0.2;
      if (a->soft_cap > 0) scores[i] = a->soft_cap * tanh(scores[i] / a->soft_cap);
      largest = fmax(largest, scores[i]);
    }
    for (int i = low; i <= position; i++) {
      double weight = exp(scores[i] - largest);
      sum += weight;
      for (int j = 0; j < vd; j++) result[j] += weight * values[i * value_columns + head * vd + j];
    }
    if (a->has_sinks) sum += exp(sinks[h] - largest);
    double tolerance = a->dtype == APUS_FLOAT32 || a->dtype == APUS_FLOAT16 ? 1e-4 : 3e-2;
    for (int j = 0; j < vd; j++) {
      EXPECT(
          fabs(out[h * vd + j] - result[j] / sum) <= tolerance,
          "type %d, head of %d (latent %d), row %d at %d: %g, not %g", a->dtype, a->d, a->value_d, first_row, position,
          out[h * vd + j], result[j] / sum);
    }
    free(scores);
    free(result);
  }
}

static apus_kv *pages_of(const attention_case *a, int pages) {
  return a->value_d ? apus_kv_create_latent(pages, a->d, a->value_d, a->dtype)
                    : apus_kv_create(pages, a->kv_heads, a->d, a->dtype);
}

static void check_attention(attention_case a) {
  int isas[most_levels], count = levels(isas), most = 0, offsets[sequences], total = 0, rows = 0;
  for (int s = 0; s < sequences; s++) {
    offsets[s] = total;
    total += (lengths[s] + 15) / 16;
    if (lengths[s] > most) most = lengths[s];
    rows += lengths[s] < a.rows ? lengths[s] : a.rows;
  }
  int32_t *table = exactly((size_t)total * 4);
  for (int i = 0; i < total; i++) table[i] = total - i;
  for (int s = 3; s < sequences; s++) memcpy(table + offsets[s], table + offsets[2], shared / 16 * 4);
  int columns = (a.value_d ? 1 : a.kv_heads) * a.d, width = a.query_heads * a.d, pages = total + 2;
  int out_width = a.query_heads * (a.value_d ? a.value_d : a.d);
  float *k = numbers((size_t)sequences * most * columns, 2), *v = numbers((size_t)sequences * most * columns, 2);
  for (int s = 3; s < sequences; s++) {
    memcpy(k + (size_t)s * most * columns, k + (size_t)2 * most * columns, (size_t)shared * columns * 4);
    memcpy(v + (size_t)s * most * columns, v + (size_t)2 * most * columns, (size_t)shared * columns * 4);
  }
  float *q = numbers((size_t)rows * width, 2), *sinks = numbers((size_t)a.query_heads, 3), *first = NULL;
  float *poison = exactly((size_t)columns * 4);
  for (int i = 0; i < columns; i++) poison[i] = NAN;
  for (int l = 0; l < count; l++) {
    static const int threads[] = {1, 2, 7};
    float *alone = exactly((size_t)rows * out_width * 4);
    for (int t = 0; t < 3; t++) {
      apus_context *context = apus_context_create(threads[t], (apus_isa)isas[l], NULL);
      apus_kv *kv = pages_of(&a, pages);
      for (int32_t slot = 0; slot < pages * 16; slot++) {
        apus_kv_write(context, kv, poison, columns, a.value_d ? NULL : poison, columns, 1, &slot);
      }
      for (int s = 0; s < sequences; s++) {
        int32_t *slots = exactly((size_t)lengths[s] * 4);
        for (int i = 0; i < lengths[s]; i++) slots[i] = table[offsets[s] + i / 16] * 16 + i % 16;
        apus_kv_write(
            context, kv, k + (size_t)s * most * columns, columns,
            a.value_d ? NULL : v + (size_t)s * most * columns, columns, lengths[s], slots);
        free(slots);
      }
      // The last positions of each sequence: one by one, then all at once.
      int32_t row_start[sequences + 1] = {0}, start[sequences], page_offset[sequences];
      for (int s = 0; s < sequences; s++) {
        int own = lengths[s] < a.rows ? lengths[s] : a.rows;
        row_start[s + 1] = row_start[s] + own;
        start[s] = lengths[s] - own;
        page_offset[s] = offsets[s];
        if (t > 0) continue;
        // K and V as the pages hold them.
        float *keys = exactly((size_t)lengths[s] * columns * 4), *values = exactly((size_t)lengths[s] * columns * 4);
        for (int i = 0; i < lengths[s] && l == 0; i++) {
          apus_kv_read(
              kv, table[offsets[s] + i / 16] * 16 + i % 16, keys + (size_t)i * columns,
              a.value_d ? NULL : values + (size_t)i * columns);
        }
        for (int r = 0; r < own; r++) {
          int32_t ends[2] = {0, 1}, position = start[s] + r, offset = offsets[s];
          apus_attention_arguments one = {1, ends, &position, &offset, table, a.query_heads, 0.2f, a.window, a.soft_cap,
                                          a.has_sinks ? sinks : NULL, 0};
          float *row = exactly((size_t)width * 4), *out = exactly((size_t)out_width * 4);
          memcpy(row, q + (size_t)(row_start[s] + r) * width, (size_t)width * 4);
          apus_attention(context, kv, row, width, out, out_width, &one);
          memcpy(alone + (size_t)(row_start[s] + r) * out_width, out, (size_t)out_width * 4);
          if (l == 0 && (r < 3 || r == own - 1)) {
            attend_plainly(&a, row, keys, a.value_d ? keys : values, sinks, position, row_start[s] + r, out);
          }
          free(row);
          free(out);
        }
        free(keys);
        free(values);
      }
      apus_attention_arguments all = {sequences, row_start, start, page_offset, table, a.query_heads, 0.2f, a.window,
                                      a.soft_cap, a.has_sinks ? sinks : NULL, 0};
      int stride = width + 3, out_stride = out_width + 5;
      float *in = exactly(((size_t)(rows - 1) * stride + width) * 4);
      float *out = exactly(((size_t)(rows - 1) * out_stride + out_width) * 4);
      for (int r = 0; r < rows; r++) memcpy(in + (size_t)r * stride, q + (size_t)r * width, (size_t)width * 4);
      for (int plain = 0; plain < 2; plain++) {
        all.is_plain = plain;
        apus_attention(context, kv, in, stride, out, out_stride, &all);
        int same = 1;
        for (int r = 0; r < rows; r++) {
          same &= memcmp(out + (size_t)r * out_stride, alone + (size_t)r * out_width, (size_t)out_width * 4) == 0;
        }
        EXPECT(
            same, "level %d, type %d, head of %d (latent %d), %d rows, %d threads: together%s otherwise than alone",
            isas[l], a.dtype, a.d, a.value_d, a.rows, threads[t], plain ? " in the plain form" : "");
      }
      free(in);
      free(out);
      apus_kv_free(kv);
      apus_context_free(context);
    }
    if (first) {
      double worst = 0;
      for (int i = 0; i < rows * out_width; i++) worst = fmax(worst, fabs((double)first[i] - alone[i]));
      EXPECT(
          worst <= (a.dtype <= APUS_FLOAT16 ? 1e-4 : 2e-2), "level %d, type %d, head of %d (latent %d): off by %g",
          isas[l], a.dtype, a.d, a.value_d, worst);
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

// MARK: K/V pages

// What is written is read back, rounded; levels write the same bytes; copies are exact; what is not finite stays in its
// token and head.
static void check_pages(apus_dtype dtype, int kv_heads, int d, int value_d) {
  enum { pages = 3, tokens = 37 };
  attention_case a = {dtype, 1, kv_heads, d, value_d, 0, 0, 0, 1};
  int isas[most_levels], count = levels(isas), columns = (value_d ? 1 : kv_heads) * d, stride = columns + 3;
  size_t size = ((size_t)(tokens - 1) * stride + columns) * 4;
  float *k = numbers(size / 4, 3), *v = numbers(size / 4, 3);
  k[5 * stride] = NAN;
  v[5 * stride + columns - 1] = INFINITY;
  for (int i = 0; i < columns; i++) k[7 * stride + i] = v[7 * stride + i] = 0;
  int32_t slots[tokens];
  for (int i = 0; i < tokens; i++) slots[i] = i % 7 == 6 && i != 6 ? -1 : i + 4;
  char *first = NULL;
  for (int l = 0; l < count; l++) {
    for (int threads = 1; threads <= 3; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      apus_kv *kv = pages_of(&a, pages), *other = pages_of(&a, pages + 1);
      size_t page = apus_kv_page_bytes(kv);
      apus_kv_write(context, kv, k, stride, value_d ? NULL : v, stride, tokens, slots);
      float *key = exactly((size_t)columns * 4), *value = exactly((size_t)columns * 4);
      for (int t = 0; t < tokens && threads == 1; t++) {
        if (slots[t] < 0) continue;
        apus_kv_read(kv, slots[t], key, value_d ? NULL : value);
        for (int h = 0; h < columns / d; h++) {
          for (int is_value = 0; is_value <= (value_d ? 0 : 1); is_value++) {
            const float *from = (is_value ? v : k) + (size_t)t * stride + h * d, *got = (is_value ? value : key) + h * d;
            float largest = 0;
            int finite = 1;
            for (int i = 0; i < d; i++) {
              finite &= isfinite(from[i]) != 0;
              largest = fmaxf(largest, fabsf(from[i]));
            }
            for (int i = 0; i < d; i++) {
              float bound = dtype == APUS_FLOAT32 ? 0 : dtype == APUS_FLOAT16 ? fabsf(from[i]) / 2048 + 1e-7f
                  : dtype == APUS_BFLOAT16 ? fabsf(from[i]) / 256 : dtype == APUS_INT8 ? largest / 253
                                           : fabsf(from[i]) / 15.9f + largest / 400000;
              int ok = finite || (dtype <= APUS_BFLOAT16 && isfinite(from[i])) ? fabsf(got[i] - from[i]) <= bound
                                                                            : !isfinite(got[i]);
              EXPECT(ok, "type %d, head of %d, token %d: %g, not %g", dtype, d, t, got[i], from[i]);
            }
          }
        }
      }
      free(key);
      free(value);
      char *bytes = apus_kv_data(kv);
      if (!first) {
        first = exactly(page * pages);
        memcpy(first, bytes, page * pages);
      }
      // A number that is not one may have any of its bits.
      for (size_t i = 0; i < page * pages && dtype != APUS_FLOAT16 && dtype != APUS_BFLOAT16; i++) {
        if (first[i] != bytes[i]) {
          EXPECT(0, "level %d, type %d, %d threads: byte %zu of the pages differs", isas[l], dtype, threads, i);
          break;
        }
      }
      int32_t from[2] = {2, 0}, to[2] = {0, 3};
      apus_kv_copy_between(context, kv, other, from, to, 2);
      char *copy = apus_kv_data(other);
      EXPECT(memcmp(copy, bytes + 2 * page, page) == 0, "a copy of a page differs");
      EXPECT(memcmp(copy + 3 * page, bytes, page) == 0, "a copy of a page differs");
      int32_t chain_from[2] = {0, 1}, chain_to[2] = {1, 2};
      apus_kv_copy(context, kv, chain_from, chain_to, 2);
      EXPECT(memcmp(bytes, bytes + page, page) == 0 && memcmp(bytes, bytes + 2 * page, page) == 0, "copies in order");
      apus_kv_free(kv);
      apus_kv_free(other);
      apus_context_free(context);
    }
  }
  free(first);
  free(k);
  free(v);
}

static void attention_family(void) {
  for (int dtype = APUS_FLOAT32; dtype <= APUS_FLOAT8; dtype++) {
    if (dtype == APUS_INT8 || dtype == APUS_FLOAT8) continue;
    check_attention((attention_case){(apus_dtype)dtype, 4, 2, 64, 0, 0, 0, 0, 3});
    check_attention((attention_case){(apus_dtype)dtype, 7, 1, 80, 0, 0, 0, 1, 2});
    check_attention((attention_case){(apus_dtype)dtype, 3, 3, 33, 0, 270, 5, 0, 3});
  }
}

static void narrow_family(void) {
  for (int dtype = APUS_INT8; dtype <= APUS_FLOAT8; dtype++) {
    check_attention((attention_case){(apus_dtype)dtype, 4, 2, 64, 0, 0, 0, 0, 3});
    check_attention((attention_case){(apus_dtype)dtype, 7, 1, 33, 0, 270, 0, 1, 2});
  }
}

static void drafts_family(void) {
  // More rows than a tile of tokens has, with one query head for each K/V head and with several.
  check_attention((attention_case){APUS_BFLOAT16, 2, 2, 17, 0, 0, 0, 0, 53});
  check_attention((attention_case){APUS_BFLOAT16, 7, 1, 32, 0, 0, 0, 0, 9});
  check_attention((attention_case){APUS_FLOAT32, 6, 2, 16, 0, 40, 0, 1, 20});
  check_attention((attention_case){APUS_INT8, 6, 2, 16, 0, 0, 0, 0, 9});
}

static void latent_family(void) {
  for (int dtype = APUS_FLOAT32; dtype <= APUS_BFLOAT16; dtype++) {
    check_attention((attention_case){(apus_dtype)dtype, 5, 1, 41, 33, 0, 0, 0, 3});
    check_attention((attention_case){(apus_dtype)dtype, 16, 1, 36, 32, 0, 0, 0, 2});
    check_attention((attention_case){(apus_dtype)dtype, 3, 1, 17, 17, 270, 5, 1, 7});
  }
}

static void pages_family(void) {
  for (int dtype = APUS_FLOAT32; dtype <= APUS_FLOAT8; dtype++) {
    check_pages((apus_dtype)dtype, 1, 1, 0);
    check_pages((apus_dtype)dtype, 3, 33, 0);
    check_pages((apus_dtype)dtype, 2, 300, 0);
    if (dtype <= APUS_BFLOAT16) check_pages((apus_dtype)dtype, 1, 41, 33);
  }
}

#endif

#ifdef CHECK_ROWS

// MARK: Rows

static float bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

static void check_norms(apus_context *context, int rows, int columns) {
  int stride = columns + 3;
  size_t size = (size_t)(rows - 1) * stride + columns;
  float *x = numbers(size, 2), *delta = numbers(size, 1), *residual = exactly(size * 4), *out = exactly(size * 4);
  float *weight = numbers((size_t)columns, 1), *bias = numbers((size_t)columns, 1);
  uint16_t *narrow = exactly((size_t)columns * 2);
  apus_convert(context, weight, APUS_FLOAT32, narrow, APUS_BFLOAT16, (size_t)columns);
  for (int i = 0; i < columns; i++) {
    uint32_t bits = (uint32_t)narrow[i] << 16;
    memcpy(&weight[i], &bits, 4);
  }
  for (int kind = 0; kind < 4; kind++) {
    memcpy(residual, x, size * 4);
    const void *w = kind % 2 ? (const void *)narrow : weight;
    apus_dtype type = kind % 2 ? APUS_BFLOAT16 : APUS_FLOAT32;
    if (kind < 2) {
      apus_rms_norm(context, x, stride, rows, columns, w, type, 1e-6f, out, stride);
    } else if (kind == 2) {
      apus_add_rms_norm(context, residual, stride, delta, stride, rows, columns, w, type, 1e-6f, out, stride);
    } else {
      apus_layer_norm(context, x, stride, delta, stride, rows, columns, weight, bias, 1e-6f, out, stride);
    }
    for (int r = 0; r < rows; r++) {
      double squares = 0, mean = 0, variance = 0;
      for (int i = 0; i < columns; i++) {
        double z = (double)x[r * stride + i] + (kind >= 2 ? delta[r * stride + i] : 0);
        squares += z * z;
        mean += z / columns;
      }
      for (int i = 0; i < columns; i++) {
        double z = (double)x[r * stride + i] + delta[r * stride + i];
        variance += (z - mean) * (z - mean) / columns;
      }
      for (int i = 0; i < columns; i++) {
        double z = (double)x[r * stride + i] + (kind >= 2 ? delta[r * stride + i] : 0);
        double wanted = kind == 3 ? (z - mean) / sqrt(variance + 1e-6) * weight[i] + bias[i]
                                  : z / sqrt(squares / columns + 1e-6) * weight[i];
        // A single column's variance is zero, and what it is divided by as small as can be.
        double tolerance = kind == 3 && columns < 3 ? 1e-2 : 1e-4;
        EXPECT(
            fabs(out[r * stride + i] - wanted) < tolerance, "norm %d of %d: %g, not %g", kind, columns,
            out[r * stride + i], wanted);
      }
    }
  }
  free(narrow);
  free(bias);
  free(weight);
  free(out);
  free(residual);
  free(delta);
  free(x);
}

static double activated(int kind, double x) {
  switch (kind) {
    case APUS_GELU:
      return x * 0.5 * (1 + erf(x / sqrt(2)));
    case APUS_GELU_TANH:
      return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case APUS_RELU:
      return x > 0 ? x : 0;
    default:
      return x / (1 + exp(-x));
  }
}

static void check_elements(apus_context *context, int rows, int columns) {
  int stride = 2 * columns + 1;
  size_t size = (size_t)(rows - 1) * stride + 2 * columns;
  float *x = numbers(size, 6), *copy = exactly(size * 4), *out = exactly((size_t)rows * columns * 4);
  apus_silu_mul(context, x, stride, rows, columns, out, columns);
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < columns; i++) {
      double wanted = activated(APUS_SILU, x[r * stride + i]) * x[r * stride + columns + i];
      EXPECT(
          fabs(out[r * columns + i] - wanted) < 1e-5 * (1 + fabs(wanted)), "silu: %g, not %g", out[r * columns + i],
          wanted);
    }
  }
  for (int kind = APUS_GELU; kind <= APUS_SILU; kind++) {
    memcpy(copy, x, size * 4);
    apus_activate(context, copy, stride, rows, 2 * columns, (apus_activation)kind);
    for (int r = 0; r < rows; r++) {
      for (int i = 0; i < 2 * columns; i++) {
        double wanted = activated(kind, x[r * stride + i]);
        EXPECT(
            fabs(copy[r * stride + i] - wanted) < 1e-5 * (1 + fabs(wanted)), "activation %d: %g, not %g", kind,
            copy[r * stride + i], wanted);
      }
    }
  }
  memcpy(copy, x, size * 4);
  apus_add(context, copy, stride, out, columns, rows, columns);
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < columns; i++) {
      EXPECT(copy[r * stride + i] == x[r * stride + i] + out[r * columns + i], "addition");
    }
  }
  int32_t taken[5] = {0, rows - 1, rows / 2, 0, rows - 1};
  float *gathered = exactly((size_t)5 * columns * 4), *embedded = exactly((size_t)5 * columns * 4);
  apus_gather(context, x, stride, taken, 5, columns, gathered, columns);
  for (int type = APUS_FLOAT32; type <= APUS_BFLOAT16; type++) {
    // The table ends where its memory ends.
    size_t width = type == APUS_FLOAT32 ? 4 : 2;
    char *table = exactly((size_t)rows * columns * width);
    for (int r = 0; r < rows; r++) {
      apus_convert(
          context, x + r * stride, APUS_FLOAT32, table + (size_t)r * columns * width, (apus_dtype)type, (size_t)columns);
    }
    apus_embed(context, table, (apus_dtype)type, columns, taken, 5, columns, embedded, columns);
    for (int i = 0; i < 5 * columns; i++) {
      float wanted = x[taken[i / columns] * stride + i % columns];
      EXPECT(gathered[i] == wanted, "gathered %g, not %g", gathered[i], wanted);
      float bound = type == APUS_FLOAT32 ? 0 : fabsf(wanted) / (type == APUS_FLOAT16 ? 2048 : 256);
      EXPECT(fabsf(embedded[i] - wanted) <= bound, "type %d: embedded %g, not %g", type, embedded[i], wanted);
      if (type == APUS_BFLOAT16) EXPECT(embedded[i] == bf16(wanted), "bfloat16 of %g: %g", wanted, embedded[i]);
    }
    free(table);
  }
  free(embedded);
  free(gathered);
  free(out);
  free(copy);
  free(x);
}

static void check_rotation(apus_context *context, int heads, int d, int half) {
  enum { rows = 3, positions = 11 };
  int stride = heads * d + 2, table_stride = 2 * half + 1;
  size_t size = (size_t)(rows - 1) * stride + heads * d;
  float *table = numbers((size_t)(positions - 1) * table_stride + 2 * half, 1);
  float *x = numbers(size, 2), *turned = exactly(size * 4), *weight = numbers((size_t)d, 1);
  int32_t at[rows] = {0, positions - 1, 4};
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    int offset = interleaved ? d - 2 * half : 0;
    memcpy(turned, x, size * 4);
    if (interleaved) {
      apus_rope_interleaved(context, turned, stride, rows, heads, d, offset, at, table, table_stride, half);
    } else {
      apus_rope(context, turned, stride, rows, heads, d, at, table, table_stride, half);
    }
    for (int r = 0; r < rows; r++) {
      for (int h = 0; h < heads; h++) {
        const float *from = x + r * stride + h * d, *to = turned + r * stride + h * d;
        for (int i = 0; i < d; i++) {
          double wanted = from[i];
          int inside = i - offset;
          if (inside >= 0 && inside < 2 * half) {
            int pair = interleaved ? inside / 2 : inside % half, second = interleaved ? inside % 2 : inside / half;
            double c = table[at[r] * table_stride + pair], s = table[at[r] * table_stride + half + pair];
            double a = from[interleaved ? offset + 2 * pair : pair];
            double b = from[interleaved ? offset + 2 * pair + 1 : pair + half];
            wanted = second ? b * c + a * s : a * c - b * s;
          }
          EXPECT(fabs(to[i] - wanted) < 1e-5, "rotation %d of %d in %d: %g, not %g", interleaved, half, d, to[i], wanted);
        }
      }
    }
  }
  memcpy(turned, x, size * 4);
  apus_head_rms_norm(context, turned, stride, rows, heads, d, weight, APUS_FLOAT32, 1e-6f);
  for (int r = 0; r < rows; r++) {
    for (int h = 0; h < heads; h++) {
      double squares = 0;
      for (int i = 0; i < d; i++) squares += (double)x[r * stride + h * d + i] * x[r * stride + h * d + i];
      for (int i = 0; i < d; i++) {
        double wanted = x[r * stride + h * d + i] / sqrt(squares / d + 1e-6) * weight[i];
        EXPECT(fabs(turned[r * stride + h * d + i] - wanted) < 1e-4, "norm of heads of %d", d);
      }
    }
  }
  free(weight);
  free(turned);
  free(x);
  free(table);
}

// Attention of all rows to all rows, in two sequences.
static void check_encoder(apus_context *context, int heads, int d, int long_one) {
  int32_t starts[3] = {0, 1, 1 + long_one};
  int rows = 1 + long_one, width = heads * d, stride = 3 * width + 1;
  size_t size = (size_t)(rows - 1) * stride + 3 * width;
  float *qkv = numbers(size, 2), *out = exactly((size_t)rows * width * 4);
  apus_attend_all(context, qkv, qkv + width, qkv + 2 * width, stride, starts, 2, heads, d, 0.3f, out, width);
  double *weights = exactly((size_t)rows * 8);
  for (int r = 0; r < rows; r++) {
    int first = r == 0 ? 0 : 1, last = r == 0 ? 1 : rows;
    for (int h = 0; h < heads; h++) {
      double most = -1e30, sum = 0;
      for (int i = first; i < last; i++) {
        weights[i] = 0;
        for (int j = 0; j < d; j++) {
          weights[i] += 0.3 * (double)qkv[(size_t)r * stride + h * d + j] * qkv[(size_t)i * stride + width + h * d + j];
        }
        most = fmax(most, weights[i]);
      }
      for (int i = first; i < last; i++) sum += weights[i] = exp(weights[i] - most);
      for (int j = 0; j < d; j++) {
        double wanted = 0;
        for (int i = first; i < last; i++) {
          wanted += weights[i] / sum * qkv[(size_t)i * stride + 2 * width + h * d + j];
        }
        EXPECT(fabs(out[r * width + h * d + j] - wanted) < 1e-4, "encoder, heads of %d", d);
      }
    }
  }
  free(weights);
  free(out);
  free(qkv);
}

static void check_conversions(apus_context *context, int count) {
  float *x = numbers((size_t)count, 70000), *back = exactly((size_t)count * 4);
  if (count > 3) {
    x[0] = NAN;
    x[1] = -INFINITY;
    x[2] = 1e-7f;
    x[3] = -0.0f;
  }
  for (int type = APUS_FLOAT32; type <= APUS_BFLOAT16; type++) {
    char *narrow = exactly((size_t)count * (type == APUS_FLOAT32 ? 4 : 2));
    apus_convert(context, x, APUS_FLOAT32, narrow, (apus_dtype)type, (size_t)count);
    apus_convert(context, narrow, (apus_dtype)type, back, APUS_FLOAT32, (size_t)count);
    for (int i = 0; i < count; i++) {
      float bound = type == APUS_FLOAT32 ? 0 : type == APUS_BFLOAT16 ? fabsf(x[i]) / 256 : fabsf(x[i]) / 2048 + 3e-8f;
      int large = type == APUS_FLOAT16 && fabsf(x[i]) >= 65520;
      EXPECT(
          isnan(x[i]) ? isnan(back[i]) : large || isinf(x[i]) ? isinf(back[i]) && signbit(back[i]) == signbit(x[i])
                                                              : fabsf(back[i] - x[i]) <= bound,
          "type %d: %g becomes %g", type, x[i], back[i]);
    }
    free(narrow);
  }
  float *filled = exactly((size_t)count * 4);
  apus_fill_uniform(context, filled, APUS_FLOAT32, (size_t)count, 7, 0.5f, 1);
  for (int i = 0; i < count; i++) {
    double u = (double)(apus_splitmix64(7 + (uint64_t)i * 0x9E3779B97F4A7C15u) >> 40) / 16777216;
    EXPECT(fabs(filled[i] - (1 + 0.5 * (2 * u - 1))) < 1e-6, "dummy weight %d: %g", i, filled[i]);
  }
  free(filled);
  free(back);
  free(x);
}

static void rows_family(void) {
  int isas[most_levels], count = levels(isas);
  for (int l = 0; l < count; l++) {
    for (int threads = 1; threads <= 3; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      static const int columns[] = {1, 15, 37, 400, 2100};
      for (int i = 0; i < 5; i++) {
        check_norms(context, i + 1, columns[i]);
        check_elements(context, i + 1, columns[i]);
        check_conversions(context, columns[i] + 1);
      }
      check_rotation(context, 1, 2, 1);
      check_rotation(context, 3, 40, 11);
      check_rotation(context, 2, 64, 32);
      check_encoder(context, 1, 1, 1);
      check_encoder(context, 3, 33, 71);
      check_encoder(context, 2, 64, 18);
      apus_context_free(context);
    }
  }
}

// MARK: Sampling

// Probabilities of a row by a sort in double precision; less what the parameters cut off, and how sure that is.
typedef struct {
  double probability;
  int32_t token;
} candidate;

static int by_probability(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->probability != y->probability) return x->probability > y->probability ? -1 : 1;
  return x->token < y->token ? -1 : 1;
}

static void check_draw(const float *logits, int columns, const apus_sampling_row *p, int32_t token) {
  float most = -INFINITY;
  for (int i = 0; i < columns; i++) most = fmaxf(most, logits[i]);
  if (p->temperature < 1e-6f) {
    int first = 0;
    while (logits[first] != most) first++;
    EXPECT(token == first, "greedy: %d, not %d", token, first);
    return;
  }
  candidate *all = exactly((size_t)columns * sizeof *all);
  for (int i = 0; i < columns; i++) all[i] = (candidate){exp(((double)logits[i] - most) / p->temperature), i};
  qsort(all, (size_t)columns, sizeof *all, by_probability);
  int kept = p->top_k > 0 && p->top_k < columns ? p->top_k : columns;
  double sum = 0, passed = 0;
  for (int i = 0; i < kept; i++) sum += all[i].probability;
  // Where sums of float32 differ from these, a cut may come one token earlier or later: both are accepted.
  double slack = 1e-4;
  int most_kept = kept;
  for (int i = 0; i < kept && p->top_p < 1; i++) {
    passed += all[i].probability / sum;
    if (passed >= p->top_p + slack) {
      most_kept = i + 1;
      break;
    }
  }
  while (most_kept > 1 && all[most_kept - 1].probability < p->min_p * (1 - slack)) most_kept--;
  int place = 0;
  while (place < columns && all[place].token != token) place++;
  EXPECT(place < most_kept, "token %d is the one at place %d of %d that are kept", token, place, most_kept);
  // The draw, where nothing is cut off.
  if (most_kept == columns) {
    double before = 0;
    for (int i = 0; i < columns; i++) {
      if (all[i].token < token) before += all[i].probability / sum;
    }
    double own = place < columns ? all[place].probability / sum : 0;
    EXPECT(
        p->uniform >= before - slack && p->uniform <= before + own + slack, "%g draws token %d of [%g, %g]", p->uniform,
        token, before, before + own);
  }
  free(all);
}

static void check_sampling(apus_context *context, int columns) {
  enum { rows = 9 };
  static const apus_sampling_row kinds[rows] = {
      {0, -1, 1, 0, 0.5f},     {1, -1, 1, 0, 0.3f},          {0.7f, -1, 1, 0, 0.999f}, {0.8f, 5, 0.9f, 0.01f, 0.5f},
      {1, 40, 1, 0, 0.9f},     {1.5f, -1, 0.6f, 0, 0.99f},   {1, -1, 1, 0.2f, 0.99f},  {0, 3, 0.5f, 0.5f, 0},
      {1, -1, 1, 0, 0}};
  int stride = columns + 3;
  size_t size = (size_t)(rows - 1) * stride + columns;
  float *logits = numbers(size, 8), *copy = exactly(size * 4);
  // Ties, and tokens that cannot be.
  for (size_t i = 0; i < size; i += 3) logits[i] = roundf(logits[i]);
  for (size_t i = 5; i < size; i += 11) logits[i] = -INFINITY;
  for (int r = 0; r < rows; r++) logits[r * stride] = 0.5f;
  memcpy(copy, logits, size * 4);
  int32_t tokens[rows];
  apus_sample(context, copy, stride, rows, columns, kinds, tokens);
  for (int r = 0; r < rows; r++) {
    EXPECT(tokens[r] >= 0 && tokens[r] < columns, "token %d of %d", tokens[r], columns);
    if (tokens[r] >= 0 && tokens[r] < columns) check_draw(logits + r * stride, columns, &kinds[r], tokens[r]);
    float *row = exactly((size_t)columns * 4);
    int32_t alone;
    memcpy(row, logits + r * stride, (size_t)columns * 4);
    apus_sample(context, row, columns, 1, columns, &kinds[r], &alone);
    EXPECT(alone == tokens[r], "a row alone draws %d, not %d", alone, tokens[r]);
    memcpy(row, logits + r * stride, (size_t)columns * 4);
    // The largest entries and the sum of exponentials.
    double most = -INFINITY, sum = 0;
    for (int i = 0; i < columns; i++) most = fmax(most, row[i]);
    for (int i = 0; i < columns; i++) sum += exp(row[i] - most);
    float found = apus_log_sum_exp(context, row, columns);
    EXPECT(fabs(found - (most + log(sum))) < 1e-5 * (1 + fabs(most)), "log-sum-exp %g, not %g", found, most + log(sum));
    int counts[3] = {1, 20, columns + 2};
    for (int k = 0; k < 3; k++) {
      int32_t *best = exactly((size_t)counts[k] * 4);
      float *values = exactly((size_t)counts[k] * 4);
      apus_top_k(context, row, columns, counts[k], best, values);
      for (int i = 0; i < counts[k]; i++) {
        if (i >= columns) {
          EXPECT(best[i] == -1 && values[i] == -INFINITY, "entry %d of %d", i, columns);
          continue;
        }
        EXPECT(best[i] >= 0 && best[i] < columns && values[i] == row[best[i]], "entry %d of %d", i, columns);
        EXPECT(
            i == 0 || values[i] < values[i - 1] || (values[i] == values[i - 1] && best[i] > best[i - 1]),
            "entries of %d are out of order", columns);
      }
      if (counts[k] == 1) EXPECT(values[0] == (float)most, "the largest entry is %g, not %g", values[0], most);
      free(best);
      free(values);
    }
    if (r == 0) {
      row[columns / 2] = NAN;
      apus_sample(context, row, columns, 1, columns, &kinds[1], &alone);
      EXPECT(alone == -1, "a row with NaN draws %d", alone);
    }
    free(row);
  }
  // Masks and penalties.
  int words = (columns + 31) / 32;
  uint32_t *mask = exactly((size_t)words * 4);
  for (int i = 0; i < words; i++) mask[i] = i % 5 == 4 ? 0xffffffffu : (uint32_t)next();
  float *row = exactly((size_t)columns * 4);
  memcpy(row, logits, (size_t)columns * 4);
  apus_mask_logits(row, columns, mask, words > 1 ? words - 1 : words);
  for (int i = 0; i < columns; i++) {
    int stays = (words == 1 || i / 32 < words - 1) && (mask[i / 32] >> i % 32 & 1);
    EXPECT(stays ? row[i] == logits[i] : row[i] == -INFINITY, "mask of token %d", i);
  }
  memcpy(row, logits, (size_t)columns * 4);
  int32_t seen[5] = {0, columns - 1, columns / 2, -1, columns}, times[5] = {2, 0, 1, 1, 1};
  int count = columns > 2 ? 5 : 1;
  float *before = exactly((size_t)columns * 4);
  memcpy(before, row, (size_t)columns * 4);
  apus_apply_penalties(row, columns, seen, times, count, 1.25f, 0.5f, 0.25f);
  for (int i = 0; i < columns; i++) {
    float wanted = before[i];
    for (int k = 0; k < count; k++) {
      if (seen[k] != i) continue;
      wanted = wanted > 0 ? wanted / 1.25f : wanted * 1.25f;
      if (times[k] > 0) wanted -= 0.5f * (float)times[k] + 0.25f;
    }
    EXPECT(
        row[i] == wanted || fabsf(row[i] - wanted) < 1e-5f, "token %d penalised to %g, not %g", i, row[i], wanted);
  }
  free(before);
  free(row);
  free(mask);
  free(copy);
  free(logits);
}

static void sampling_family(void) {
  int isas[most_levels], count = levels(isas);
  for (int l = 0; l < count; l++) {
    for (int threads = 1; threads <= 3; threads += 2) {
      apus_context *context = apus_context_create(threads, (apus_isa)isas[l], NULL);
      static const int columns[] = {1, 63, 129, 1025, 8193, 20011};
      for (int i = 0; i < 6; i++) check_sampling(context, columns[i]);
      apus_context_free(context);
    }
  }
}

#endif

// MARK: Families

static const struct {
  const char *name;
  void (*run)(void);
} families[] = {
#ifdef CHECK_PRODUCTS
    {"dense", dense_family},     {"codes", codes_family}, {"rounding", rounding_family}, {"experts", experts_family},
    {"files", files_family},
#endif
#ifdef CHECK_ATTENTION
    {"attention", attention_family}, {"narrow", narrow_family}, {"drafts", drafts_family}, {"latent", latent_family},
    {"pages", pages_family},
#endif
#ifdef CHECK_ROWS
    {"rows", rows_family},       {"sampling", sampling_family},
#endif
};

int main(int count, char **arguments) {
  uint64_t seed = count > 1 ? strtoull(arguments[1], NULL, 10) : 1;
  int isas[most_levels], known = levels(isas);
  printf("seed %llu, levels", (unsigned long long)seed);
  for (int l = 0; l < known; l++) printf(" %d", isas[l]);
  printf("\n");
  for (size_t f = 0; f < sizeof families / sizeof families[0]; f++) {
    int wanted = count <= 2;
    for (int i = 2; i < count; i++) wanted |= strcmp(arguments[i], families[f].name) == 0;
    if (!wanted) continue;
    // A family's numbers do not depend on which others run.
    state = seed + f * 1000003;
    int before = failures;
    struct timespec begin, end;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
    families[f].run();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    double seconds = (double)(end.tv_sec - begin.tv_sec) + (double)(end.tv_nsec - begin.tv_nsec) * 1e-9;
    printf("%-10s %d failures, %.1f s\n", families[f].name, failures - before, seconds);
    fflush(stdout);
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
