// Measures the kernels on one thread beside ceilings measured in turns with them. Times are of the processor, not of the
// clock on the wall, so that a machine that is shared disturbs less. `Scripts/bench_c_kernels.sh` compiles and runs it in
// a minute; `apus bench kernels` measures the same through the engine's backend, on all threads.

#include "CKernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { samples = 5 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static double median(double *values) {
  qsort(values, samples, sizeof *values, compare);
  return values[samples / 2];
}

static uint64_t state = 1;
static uint64_t next(void) { return apus_splitmix64(state += 0x9E3779B97F4A7C15u); }
static float number(float scale) { return ((float)(next() >> 40) / 8388608.0f - 1) * scale; }

typedef struct {
  const char *name;
  // A dense type, or codes: rounded, or random where the layout has factors or minimums.
  int is_codes;
  apus_dtype dtype;
  apus_code_layout layout;
  apus_product product;
} format;

static const format formats[] = {
    {"float32", 0, APUS_FLOAT32, {0}, APUS_PRODUCT_FLOAT32},
    {"float16", 0, APUS_FLOAT16, {0}, APUS_PRODUCT_FLOAT32},
    {"bfloat16", 0, APUS_BFLOAT16, {0}, APUS_PRODUCT_BFLOAT16},
    {"int8", 0, APUS_INT8, {0}, APUS_PRODUCT_INT8},
    {"int8-group", 1, 0, {8, APUS_LEVELS_LINEAR, 128, 32, 128, APUS_FLOAT16, 0, 0}, APUS_PRODUCT_INT8},
    {"int4", 1, 0, {4, APUS_LEVELS_LINEAR, 8, 32, 128, APUS_FLOAT16, 0, 0}, APUS_PRODUCT_CODES},
    {"int4 g128", 1, 0, {4, APUS_LEVELS_LINEAR, 8, 128, 128, APUS_FLOAT16, 0, 0}, APUS_PRODUCT_CODES},
    {"awq g128", 2, 0, {4, APUS_LEVELS_LINEAR, 0, 128, 128, APUS_FLOAT16, 0, 2}, APUS_PRODUCT_CODES},
    {"q4_K", 2, 0, {4, APUS_LEVELS_LINEAR, 0, 32, 256, APUS_FLOAT16, 1, 1}, APUS_PRODUCT_CODES},
    {"q5_K", 2, 0, {5, APUS_LEVELS_LINEAR, 0, 32, 256, APUS_FLOAT16, 1, 1}, APUS_PRODUCT_CODES},
    {"q6_K", 2, 0, {6, APUS_LEVELS_LINEAR, 32, 16, 256, APUS_FLOAT16, 1, 0}, APUS_PRODUCT_CODES},
    {"q5_0", 2, 0, {5, APUS_LEVELS_LINEAR, 16, 32, 128, APUS_FLOAT16, 0, 0}, APUS_PRODUCT_CODES},
    {"mxfp4", 2, 0, {4, APUS_LEVELS_E2M1, 0, 32, 128, APUS_BFLOAT16, 0, 0}, APUS_PRODUCT_CODES},
    {"fp8", 1, 0, {8, APUS_LEVELS_E4M3, 0, 128, 128, APUS_FLOAT32, 0, 0}, APUS_PRODUCT_BFLOAT16},
};

static apus_linear *make(apus_context *context, const format *f, int outputs, int inputs, const float *w) {
  apus_weight_rows source = {w, APUS_FLOAT32, outputs, NULL};
  if (!f->is_codes) {
    apus_linear *weight = apus_linear_create(outputs, inputs, f->dtype);
    apus_linear_pack(context, weight, &source, 1);
    return weight;
  }
  apus_linear *weight = apus_linear_create_codes(outputs, inputs, &f->layout, NULL);
  if (!weight) return NULL;
  if (f->is_codes == 1) {
    apus_linear_quantize(context, weight, &source, 1);
    return weight;
  }
  int groups = (inputs + f->layout.group - 1) / f->layout.group;
  uint8_t *codes = malloc((size_t)64 * inputs), *minimum_factors = malloc((size_t)64 * groups);
  int8_t *factors = malloc((size_t)64 * groups);
  float *scales = malloc((size_t)64 * groups * 4);
  for (int i = 0; i < 64 * inputs; i++) codes[i] = (uint8_t)(next() & ((1u << f->layout.bits) - 1));
  for (int i = 0; i < 64 * groups; i++) {
    scales[i] = 0.01f;
    factors[i] = 5;
    minimum_factors[i] = 3;
  }
  apus_code_rows rows = {codes, scales, factors, scales, minimum_factors};
  for (int panel = 0; panel < outputs / 64; panel++) apus_linear_pack_codes(weight, panel, &rows);
  free(codes);
  free(minimum_factors);
  free(factors);
  free(scales);
  return weight;
}

int main(int count, char **arguments) {
  int outputs = count > 2 ? atoi(arguments[1]) / 64 * 64 : 4864, inputs = count > 2 ? atoi(arguments[2]) : 896;
  apus_context *context = apus_context_create(1, apus_isa_best(), NULL);
  size_t bytes = (size_t)64 << 20;
  char *memory = malloc(bytes);
  memset(memory, 1, bytes);
  float *w = malloc((size_t)outputs * inputs * 4);
  for (int i = 0; i < outputs * inputs; i++) w[i] = number(0.05f);
  float *x = malloc((size_t)512 * inputs * 4), *out = malloc((size_t)512 * outputs * 4);
  for (int i = 0; i < 512 * inputs; i++) x[i] = number(1);
  printf("%dx%d, level %d, one thread, medians of %d\n", outputs, inputs, apus_context_isa(context), samples);
  for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
    apus_linear *weights[64];
    int copies = 0;
    do {
      weights[copies] = make(context, &formats[f], outputs, inputs, w);
      if (!weights[copies]) return 1;
      copies++;
    } while (copies < 64 && copies * apus_linear_bytes(weights[0]) < (size_t)96 << 20);
    double size = (double)apus_linear_bytes(weights[0]);
    printf("%-11s %5.2f bits", formats[f].name, size * 8 / outputs / inputs);
    static const int rows[] = {1, 8, 32, 128, 512};
    int turn = 0;
    for (int r = 0; r < 5; r++) {
      double shares[samples], values[samples];
      for (int s = 0; s < samples; s++) {
        double start = now(), seconds;
        int calls = 0;
        do {
          apus_linear_run(context, weights[turn++ % copies], x, inputs, rows[r], NULL, out, outputs);
          calls++;
          seconds = now() - start;
        } while (seconds < 0.04);
        double value = (rows[r] <= 8 ? size : 2.0 * rows[r] * outputs * inputs) * calls / seconds;
        start = now();
        double work = 0, elapsed;
        do {
          work += rows[r] <= 8 ? ((void)apus_read_memory(context, memory, bytes), (double)bytes)
                               : apus_do_products(context, formats[f].product, 400000);
          elapsed = now() - start;
        } while (elapsed < 0.04);
        shares[s] = value / (work / elapsed);
        values[s] = value * 1e-9;
      }
      printf(
          " | %d: %.1f %s %.0f%%", rows[r], median(values), rows[r] <= 8 ? "GB/s" : "G/s", median(shares) * 100);
    }
    printf("\n");
    fflush(stdout);
    for (int i = 0; i < copies; i++) apus_linear_free(weights[i]);
  }
  // Decoding: 32 sequences that hold 2,048 tokens in common and 64 of their own, or all for themselves.
  static const int shapes[][3] = {{14, 2, 64}, {32, 8, 64}, {16, 16, 128}};
  static const char *types[] = {"float32", "float16", "bfloat16", "int8", "float8"};
  for (int g = 0; g < 3; g++) {
    for (int dtype = APUS_BFLOAT16; dtype <= APUS_FLOAT8; dtype++) {
      enum { sequences = 32, shared = 2048 / 16, own = 64 / 16, each = shared + own };
      int width = shapes[g][0] * shapes[g][2];
      int32_t *together = malloc(sequences * each * 4), *apart = malloc(sequences * each * 4);
      int32_t offsets[sequences], row_start[sequences + 1], start[sequences], page = 0;
      for (int s = 0; s < sequences; s++) {
        offsets[s] = s * each;
        row_start[s] = s;
        start[s] = each * 16 - 1;
        for (int p = 0; p < each; p++) {
          apart[s * each + p] = page++;
          together[s * each + p] = p < shared ? p : apart[s * each + p];
        }
      }
      row_start[sequences] = sequences;
      apus_kv *kv = apus_kv_create(page, shapes[g][1], shapes[g][2], (apus_dtype)dtype);
      memset(apus_kv_data(kv), 0x11, apus_kv_bytes(kv));
      double seconds[3][samples], reads[samples];
      for (int s = 0; s < samples; s++) {
        for (int form = 0; form < 3; form++) {
          apus_attention_arguments a = {
              sequences, row_start, start, offsets, form == 2 ? apart : together, shapes[g][0], 0.125f, 0, 0, NULL,
              form > 0};
          double begin = now();
          apus_attention(context, kv, x, width, out, width, &a);
          seconds[form][s] = now() - begin;
        }
        double begin = now();
        (void)apus_read_memory(context, memory, bytes);
        reads[s] = (double)apus_kv_bytes(kv) / seconds[2][s] / ((double)bytes / (now() - begin));
      }
      double cascade = median(seconds[0]), plain = median(seconds[1]), distinct = median(seconds[2]);
      printf(
          "decode %d/%d heads of %d, %s: cascade %.1f ms, plain %.1f ms (%.1fx); distinct pages %.1f ms, %.1f GB/s, %.0f%%\n",
          shapes[g][0], shapes[g][1], shapes[g][2], types[dtype], cascade * 1e3, plain * 1e3, plain / cascade,
          distinct * 1e3, (double)apus_kv_bytes(kv) / distinct * 1e-9, median(reads) * 100);
      fflush(stdout);
      apus_kv_free(kv);
      free(together);
      free(apart);
    }
  }
  return 0;
}
