// From logits to tokens: penalties, draws, log-sum-exp, the largest entries.
//
// Passes over a row work on blocks of fixed size whose results are combined in order, so they can be shared by
// threads without changing anything. A full sort is never needed: candidates are found with a lower bound that the
// row's own blocks give, and the boundary among them by counting bits of the numbers from the top (a radix
// selection).

#ifndef APUS_LEVEL

#include "internal.h"

enum {
  // Columns that a chunk of a region treats.
  block_columns = 8192,
  // Columns whose sum is kept, for walking.
  sum_columns = 1024,
  // Columns whose maximum is kept, for bounds.
  max_columns = 64,
};

#define APUS_FILE "sampling.c"
#include "each_level.h"

// The largest of x; *bad is set where one is not a number.
typedef float largest_function(const float *x, int64_t count, int *bad);
// x becomes exp((x - most) * factor); fills sums and maxima of the pieces.
typedef void exponentials_function(
    float *x, int64_t count, float most, float factor, double *sums, float *maxima);
typedef double sum_of_exponentials_function(const float *x, int64_t count, float most);
typedef int64_t find_function(const float *x, int64_t count, float value);
typedef void maxima_function(const float *x, int64_t count, float *maxima);

static largest_function *const largest_of[] = APUS_LEVELS(largest_of);
static exponentials_function *const exponentials[] = APUS_LEVELS(exponentials);
static sum_of_exponentials_function *const sum_of_exponentials[] = APUS_LEVELS(sum_of_exponentials);
static find_function *const find[] = APUS_LEVELS(find);
static maxima_function *const maxima_of[] = APUS_LEVELS(maxima_of);

// MARK: Penalties

void apus_apply_penalties(
    float *logits, int64_t columns, const int32_t *tokens, const int32_t *counts, int64_t count, float repetition,
    float frequency, float presence) {
  for (int64_t i = 0; i < count; i++) {
    int32_t token = tokens[i];
    if (token < 0 || token >= columns) continue;
    float x = logits[token];
    if (repetition != 1) x = x > 0 ? x / repetition : x * repetition;
    if (counts[i] > 0) x = x - frequency * (float)counts[i] - presence;
    logits[token] = x;
  }
}

// MARK: Masks

void apus_mask_logits(float *logits, int64_t columns, const uint32_t *mask, int64_t words) {
  for (int64_t w = 0; w * 32 < columns; w++) {
    uint32_t bits = w < words ? mask[w] : 0;
    if (bits == 0xffffffffu) continue;
    float *x = logits + w * 32;
    if (columns - w * 32 >= 32) {
      // Without branches, so that the compiler makes vectors of it.
      for (int i = 0; i < 32; i++) x[i] = bits >> i & 1 ? x[i] : -INFINITY;
    } else {
      for (int64_t i = 0; i < columns - w * 32; i++) x[i] = bits >> i & 1 ? x[i] : -INFINITY;
    }
  }
}

// MARK: Selection

// A boundary in a multiset of keys: keys above `key` are in, and of those equal to it the first `ties` met.
typedef struct {
  uint32_t key;
  int64_t ties;
} boundary;

typedef struct {
  uint32_t counts[2048];
  double masses[2048];
} histogram;

// The order of floats as that of unsigned integers; negative zero equals zero, NaN is the least.
static uint32_t key_of(float x) {
  if (x != x) return 0;
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float value_of(uint32_t key) {
  uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The boundary that keeps the largest keys until `count` are kept, or, where `masses` is not NULL, until their
// masses reach `mass`; at least one. Everything is kept where there is not enough.
static boundary select_largest(
    histogram *h, const uint32_t *keys, const float *masses, int64_t n, int64_t count, double mass) {
  static const int shifts[3] = {21, 10, 0};
  static const int widths[3] = {11, 11, 10};
  uint32_t prefix = 0, prefix_mask = 0;
  int64_t kept = 0;
  double kept_mass = 0;
  for (int level = 0; level < 3; level++) {
    uint32_t buckets = 1u << widths[level];
    memset(h->counts, 0, buckets * sizeof h->counts[0]);
    if (masses) memset(h->masses, 0, buckets * sizeof h->masses[0]);
    for (int64_t i = 0; i < n; i++) {
      if ((keys[i] & prefix_mask) != prefix) continue;
      uint32_t bucket = keys[i] >> shifts[level] & (buckets - 1);
      h->counts[bucket]++;
      if (masses) h->masses[bucket] += masses[i];
    }
    int64_t found = -1;
    for (int64_t b = buckets - 1; b >= 0; b--) {
      if (h->counts[b] == 0) continue;
      int enough = masses ? kept_mass + h->masses[b] >= mass : kept + h->counts[b] >= count;
      if (enough) {
        found = b;
        break;
      }
      kept += h->counts[b];
      if (masses) kept_mass += h->masses[b];
    }
    // Only at the first level can there be too little; later, sums in another order may fall short by a rounding,
    // and then the whole bucket is kept.
    if (found < 0) return (boundary){level == 0 ? 0 : prefix, INT64_MAX};
    prefix |= (uint32_t)found << shifts[level];
    prefix_mask |= (buckets - 1) << shifts[level];
    if (level < 2) continue;
    int64_t ties = h->counts[found];
    if (masses) {
      double each = h->masses[found] / (double)ties;
      double needed = each > 0 ? ceil((mass - kept_mass) / each) : 1;
      return (boundary){prefix, needed < 1 ? 1 : needed < (double)ties ? (int64_t)needed : ties};
    }
    return (boundary){prefix, apus_max(1, count - kept)};
  }
  return (boundary){prefix, INT64_MAX};
}

// MARK: Passes over rows

typedef struct {
  apus_isa isa;
  float *logits;
  int64_t stride;
  int64_t columns;
  int64_t blocks;
  const apus_sampling_row *parameters;
  int32_t *tokens;
  apus_context *context;
  // [rows][blocks]
  float *block_max;
  int32_t *block_bad;
  // [rows]
  float *row_max;
  int32_t *draws;
  // [rows][sums_per_row], [rows][maxima_per_row]
  double *sums;
  int64_t sums_per_row;
  float *maxima;
  int64_t maxima_per_row;
} sample_call;

static int is_greedy(const apus_sampling_row *row) { return !(row->temperature >= 1e-6f); }

static void max_task(void *argument, int chunk, int thread) {
  (void)thread;
  const sample_call *c = argument;
  int64_t row = chunk / c->blocks, block = chunk % c->blocks, first = block * block_columns;
  int bad = 0;
  c->block_max[chunk] = largest_of[c->isa](
      c->logits + row * c->stride + first, apus_min(block_columns, c->columns - first), &bad);
  c->block_bad[chunk] = bad;
}

static void exponentials_task(void *argument, int chunk, int thread) {
  (void)thread;
  const sample_call *c = argument;
  int64_t row = chunk / c->blocks, block = chunk % c->blocks, first = block * block_columns;
  if (!c->draws[row]) return;
  exponentials[c->isa](
      c->logits + row * c->stride + first, apus_min(block_columns, c->columns - first), c->row_max[row],
      1.0f / c->parameters[row].temperature, c->sums + row * c->sums_per_row + first / sum_columns,
      c->maxima + row * c->maxima_per_row + first / max_columns);
}

// The token at which the sum of all weights before it and its own passes `target`; the last that has weight
// otherwise.
static int32_t walk_row(const float *weights, int64_t columns, const double *sums, int64_t sum_count, double target) {
  double passed = 0;
  int64_t last = 0;
  for (int64_t s = 0; s < sum_count; s++) {
    if (sums[s] <= 0) continue;
    last = s;
    if (passed + sums[s] > target) break;
    passed += sums[s];
  }
  int32_t token = -1;
  for (int64_t i = last * sum_columns; i < apus_min(columns, (last + 1) * sum_columns); i++) {
    if (weights[i] <= 0) continue;
    token = (int32_t)i;
    passed += weights[i];
    if (passed > target) break;
  }
  return token;
}

static int64_t keep(
    boundary limit, uint32_t *keys, float *weights, int32_t *ids, int64_t count, double *mass) {
  int64_t kept = 0;
  *mass = 0;
  for (int64_t i = 0; i < count; i++) {
    if (keys[i] < limit.key || (keys[i] == limit.key && limit.ties-- <= 0)) continue;
    keys[kept] = keys[i];
    weights[kept] = weights[i];
    ids[kept] = ids[i];
    *mass += weights[i];
    kept++;
  }
  return kept;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static void finish_task(void *argument, int chunk, int thread) {
  const sample_call *c = argument;
  if (!c->draws[chunk]) return;
  const apus_sampling_row *row = &c->parameters[chunk];
  const float *weights = c->logits + chunk * c->stride;
  const double *sums = c->sums + chunk * c->sums_per_row;
  const float *maxima = c->maxima + chunk * c->maxima_per_row;
  double total = 0;
  for (int64_t i = 0; i < c->sums_per_row; i++) total += sums[i];
  double uniform = row->uniform;
  int has_top_k = row->top_k >= 1 && row->top_k < c->columns;
  int has_top_p = row->top_p < 1;
  int has_min_p = row->min_p > 0;
  if (!has_top_k && !has_top_p && !has_min_p) {
    c->tokens[chunk] = walk_row(weights, c->columns, sums, c->sums_per_row, uniform * total);
    return;
  }
  // Working memory: keys, weights and ids of candidates, and keys of the maxima.
  size_t columns = (size_t)c->columns;
  char *memory = apus_scratch_reserve(
      &c->context->local[thread], sizeof(histogram) + (columns * 3 + (size_t)c->maxima_per_row) * 4);
  histogram *h = (histogram *)(void *)memory;
  uint32_t *keys = (uint32_t *)(void *)(memory + sizeof *h);
  float *kept_weights = (float *)(void *)(keys + columns);
  int32_t *ids = (int32_t *)(void *)(kept_weights + columns);
  uint32_t *max_keys = (uint32_t *)(void *)(ids + columns);
  // A weight below `least` cannot be kept. Weights are positive, so their bits are in their order.
  float least = 0;
  if (has_top_k) {
    if (row->top_k <= c->maxima_per_row) {
      // Each of the k largest maxima is a weight, so the k-th largest weight is no less than the k-th largest
      // maximum.
      for (int64_t i = 0; i < c->maxima_per_row; i++) max_keys[i] = bits_of(maxima[i]);
      uint32_t key = select_largest(h, max_keys, NULL, c->maxima_per_row, row->top_k, 0).key;
      memcpy(&least, &key, 4);
    }
  } else if (has_top_p) {
    // All weights below this together have less than the share that may be left out.
    double bound = (1.0 - (double)row->top_p) * total / (double)c->columns;
    least = (float)(bound * 0.5);
  } else {
    least = row->min_p;
  }
  int64_t count = 0;
  double mass = 0;
  for (int64_t m = 0; m < c->maxima_per_row; m++) {
    if (!(maxima[m] >= least) || maxima[m] <= 0) continue;
    for (int64_t i = m * max_columns; i < apus_min(c->columns, (m + 1) * max_columns); i++) {
      // Written always, counted when wanted: no branch to mispredict.
      keys[count] = bits_of(weights[i]);
      kept_weights[count] = weights[i];
      ids[count] = (int32_t)i;
      int wanted = weights[i] >= least && weights[i] > 0;
      mass += wanted ? weights[i] : 0;
      count += wanted;
    }
  }
  if (has_top_k && count > row->top_k) {
    boundary limit = select_largest(h, keys, NULL, count, row->top_k, 0);
    count = keep(limit, keys, kept_weights, ids, count, &mass);
  }
  if (has_top_p) {
    double whole = has_top_k ? mass : total;
    float top_p = row->top_p > 0 ? row->top_p : 0;
    boundary limit = select_largest(h, keys, kept_weights, count, 0, (double)top_p * whole);
    count = keep(limit, keys, kept_weights, ids, count, &mass);
  }
  if (has_min_p) {
    // The largest weight is exp(0), which is 1; it always stays.
    float floor = row->min_p < 1 ? row->min_p : 1;
    count = keep((boundary){bits_of(floor), INT64_MAX}, keys, kept_weights, ids, count, &mass);
  }
  double target = uniform * mass, passed = 0;
  int32_t token = -1;
  for (int64_t i = 0; i < count; i++) {
    token = ids[i];
    passed += kept_weights[i];
    if (passed > target) break;
  }
  c->tokens[chunk] = token;
}

void apus_sample(
    apus_context *context, float *logits, int64_t stride, int64_t rows, int64_t columns,
    const apus_sampling_row *parameters, int32_t *tokens) {
  // Chunks of a region are numbered in 20 bits; batches beyond that are done in parts.
  int64_t blocks = apus_max(1, apus_ceil_div(columns, block_columns));
  int64_t most_rows = apus_max(1, 1000000 / blocks);
  for (; rows > most_rows; rows -= most_rows) {
    apus_sample(context, logits, stride, most_rows, columns, parameters, tokens);
    logits += most_rows * stride;
    parameters += most_rows;
    tokens += most_rows;
  }
  if (rows <= 0) return;
  sample_call c = {
      .isa = context->isa, .logits = logits, .stride = stride, .columns = columns, .blocks = blocks,
      .parameters = parameters, .tokens = tokens, .context = context,
      .sums_per_row = apus_ceil_div(columns, sum_columns), .maxima_per_row = apus_ceil_div(columns, max_columns)};
  size_t doubles = (size_t)(rows * c.sums_per_row);
  size_t words = (size_t)(rows * (2 * blocks + 2 + c.maxima_per_row));
  char *memory = apus_scratch_reserve(&context->shared[0], doubles * 8 + words * 4);
  c.sums = (double *)(void *)memory;
  c.block_max = (float *)(void *)(c.sums + doubles);
  c.block_bad = (int32_t *)(void *)(c.block_max + rows * blocks);
  c.row_max = (float *)(void *)(c.block_bad + rows * blocks);
  c.draws = (int32_t *)(void *)(c.row_max + rows);
  c.maxima = (float *)(void *)(c.draws + rows);
  apus_pool_run(context->pool, (int)(rows * blocks), max_task, &c);
  int any_draws = 0;
  for (int64_t r = 0; r < rows; r++) {
    float most = -INFINITY;
    int bad = 0;
    int64_t best = 0;
    for (int64_t b = 0; b < blocks; b++) {
      bad |= c.block_bad[r * blocks + b];
      if (c.block_max[r * blocks + b] > most) {
        most = c.block_max[r * blocks + b];
        best = b;
      }
    }
    c.row_max[r] = most;
    c.draws[r] = 0;
    if (bad || most == INFINITY || most == -INFINITY) {
      tokens[r] = -1;
    } else if (is_greedy(&parameters[r])) {
      int64_t first = best * block_columns;
      int64_t at = find[context->isa](logits + r * stride + first, apus_min(block_columns, columns - first), most);
      tokens[r] = (int32_t)(first + at);
    } else {
      c.draws[r] = any_draws = 1;
    }
  }
  if (!any_draws) return;
  apus_pool_run(context->pool, (int)(rows * blocks), exponentials_task, &c);
  apus_pool_run(context->pool, (int)rows, finish_task, &c);
}

// MARK: Log-sum-exp and the largest entries

typedef struct {
  apus_isa isa;
  const float *logits;
  int64_t columns;
  float *block_max;
  double *block_sum;
  float most;
} log_sum_call;

static void log_max_task(void *argument, int chunk, int thread) {
  (void)thread;
  const log_sum_call *c = argument;
  int64_t first = (int64_t)chunk * block_columns;
  int bad = 0;
  float most = largest_of[c->isa](c->logits + first, apus_min(block_columns, c->columns - first), &bad);
  c->block_max[chunk] = bad ? NAN : most;
}

static void log_sum_task(void *argument, int chunk, int thread) {
  (void)thread;
  const log_sum_call *c = argument;
  int64_t first = (int64_t)chunk * block_columns;
  c->block_sum[chunk] =
      sum_of_exponentials[c->isa](c->logits + first, apus_min(block_columns, c->columns - first), c->most);
}

float apus_log_sum_exp(apus_context *context, const float *logits, int64_t columns) {
  int64_t blocks = apus_ceil_div(columns, block_columns);
  if (blocks <= 0) return -INFINITY;
  char *memory = apus_scratch_reserve(&context->shared[0], (size_t)blocks * 12);
  log_sum_call c = {context->isa, logits, columns, (float *)(void *)(memory + blocks * 8), (double *)(void *)memory, 0};
  apus_pool_run(context->pool, (int)blocks, log_max_task, &c);
  float most = -INFINITY;
  for (int64_t b = 0; b < blocks; b++) {
    if (c.block_max[b] != c.block_max[b]) return NAN;
    if (c.block_max[b] > most) most = c.block_max[b];
  }
  if (most == INFINITY || most == -INFINITY) return most;
  c.most = most;
  apus_pool_run(context->pool, (int)blocks, log_sum_task, &c);
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++) sum += c.block_sum[b];
  return (float)((double)most + log(sum));
}

// Whether entry a comes before entry b.
static int precedes(const uint32_t *keys, const int32_t *ids, int64_t a, int64_t b) {
  return keys[a] != keys[b] ? keys[a] > keys[b] : ids[a] < ids[b];
}

static void sift(uint32_t *keys, int32_t *ids, int64_t root, int64_t count) {
  for (;;) {
    int64_t last = root, child = 2 * root + 1;
    // The heap's root is the entry that comes last.
    if (child < count && precedes(keys, ids, last, child)) last = child;
    if (child + 1 < count && precedes(keys, ids, last, child + 1)) last = child + 1;
    if (last == root) return;
    uint32_t key = keys[root];
    int32_t id = ids[root];
    keys[root] = keys[last], ids[root] = ids[last];
    keys[last] = key, ids[last] = id;
    root = last;
  }
}

static void sort(uint32_t *keys, int32_t *ids, int64_t count) {
  for (int64_t i = count / 2 - 1; i >= 0; i--) sift(keys, ids, i, count);
  for (int64_t i = count - 1; i > 0; i--) {
    uint32_t key = keys[0];
    int32_t id = ids[0];
    keys[0] = keys[i], ids[0] = ids[i];
    keys[i] = key, ids[i] = id;
    sift(keys, ids, 0, i);
  }
}

typedef struct {
  apus_isa isa;
  const float *logits;
  int64_t columns;
  float *maxima;
} maxima_call;

static void maxima_task(void *argument, int chunk, int thread) {
  (void)thread;
  const maxima_call *c = argument;
  int64_t first = (int64_t)chunk * block_columns;
  maxima_of[c->isa](
      c->logits + first, apus_min(block_columns, c->columns - first), c->maxima + first / max_columns);
}

void apus_top_k(
    apus_context *context, const float *logits, int64_t columns, int k, int32_t *tokens, float *values) {
  if (k <= 0) return;
  int64_t wanted = apus_min(k, columns);
  int64_t maxima_count = apus_ceil_div(columns, max_columns);
  char *memory = apus_scratch_reserve(
      &context->shared[0], sizeof(histogram) + ((size_t)columns * 2 + (size_t)maxima_count * 2) * 4);
  histogram *h = (histogram *)(void *)memory;
  uint32_t *keys = (uint32_t *)(void *)(memory + sizeof *h);
  int32_t *ids = (int32_t *)(void *)(keys + columns);
  float *maxima = (float *)(void *)(ids + columns);
  uint32_t *max_keys = (uint32_t *)(void *)(maxima + maxima_count);
  maxima_call c = {context->isa, logits, columns, maxima};
  apus_pool_run(context->pool, (int)apus_ceil_div(columns, block_columns), maxima_task, &c);
  uint32_t least = 0;
  for (int64_t i = 0; i < maxima_count; i++) max_keys[i] = key_of(maxima[i]);
  if (wanted <= maxima_count) least = select_largest(h, max_keys, NULL, maxima_count, wanted, 0).key;
  int64_t count = 0;
  for (int64_t m = 0; m < maxima_count; m++) {
    if (max_keys[m] < least) continue;
    for (int64_t i = m * max_columns; i < apus_min(columns, (m + 1) * max_columns); i++) {
      uint32_t key = key_of(logits[i]);
      if (key < least) continue;
      keys[count] = key;
      ids[count] = (int32_t)i;
      count++;
    }
  }
  if (count > wanted) {
    boundary limit = select_largest(h, keys, NULL, count, wanted, 0);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
      if (keys[i] < limit.key || (keys[i] == limit.key && limit.ties-- <= 0)) continue;
      keys[kept] = keys[i];
      ids[kept] = ids[i];
      kept++;
    }
    count = kept;
  }
  sort(keys, ids, count);
  for (int64_t i = 0; i < k; i++) {
    tokens[i] = i < count ? ids[i] : -1;
    values[i] = i < count && keys[i] != 0 ? value_of(keys[i]) : -INFINITY;
  }
}

#else

static float FN(largest_of)(const float *x, int64_t count, int *bad) {
  vf most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  vi odd = 0;
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int j = 0; j < 4; j++) {
      vf v = FN(load)(x + i + 16 * j);
      odd |= v != v;
      most[j] = FN(max)(v, most[j]);
    }
  }
  float largest = FN(largest)(FN(max)(FN(max)(most[0], most[1]), FN(max)(most[2], most[3])));
  for (; i < count; i++) {
    *bad |= x[i] != x[i];
    largest = x[i] > largest ? x[i] : largest;
  }
  *bad |= FN(any)(odd);
  return largest;
}

static int64_t FN(find)(const float *x, int64_t count, float value) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    if (FN(any)(FN(load)(x + i) == value)) break;
  }
  for (; i < count; i++) {
    if (x[i] == value) return i;
  }
  return 0;
}

static void FN(maxima_of)(const float *x, int64_t count, float *maxima) {
  for (int64_t i = 0; i < count; i += max_columns) {
    int bad = 0;
    maxima[i / max_columns] = FN(largest_of)(x + i, apus_min(max_columns, count - i), &bad);
  }
}

static void FN(exponentials)(
    float *x, int64_t count, float most, float factor, double *sums, float *maxima) {
  for (int64_t begin = 0; begin < count; begin += sum_columns) {
    int64_t end = apus_min(count, begin + sum_columns);
    vf total[4] = {0, 0, 0, 0};
    for (int64_t i = begin; i < end; i += max_columns) {
      vf largest = 0;
      for (int j = 0; j < 4; j++) {
        int64_t n = apus_max(0, apus_min(16, end - i - 16 * j));
        vf v;
        if (n == 16) {
          v = FN(exp)((FN(load)(x + i + 16 * j) - most) * factor);
          FN(store)(x + i + 16 * j, v);
        } else if (n > 0) {
          const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
          v = FN(exp)((FN(load_some)(x + i + 16 * j, n) - most) * factor);
          v = lanes < (int32_t)n ? v : (vf)0;
          FN(store_some)(x + i + 16 * j, v, n);
        } else {
          break;
        }
        total[j] += v;
        largest = FN(max)(v, largest);
      }
      maxima[i / max_columns] = FN(largest)(largest);
    }
    sums[begin / sum_columns] = FN(sum)((total[0] + total[1]) + (total[2] + total[3]));
  }
}

static double FN(sum_of_exponentials)(const float *x, int64_t count, float most) {
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += sum_columns) {
    int64_t end = apus_min(count, begin + sum_columns);
    vf total[4] = {0, 0, 0, 0};
    int64_t i = begin;
    for (; i + 64 <= end; i += 64) {
      for (int j = 0; j < 4; j++) total[j] += FN(exp)(FN(load)(x + i + 16 * j) - most);
    }
    for (int j = 0; i < end; i += 16, j++) {
      const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      int64_t n = apus_min(16, end - i);
      vf v = FN(exp)(FN(load_some)(x + i, n) - most);
      total[j] += lanes < (int32_t)n ? v : (vf)0;
    }
    sum += FN(sum)((total[0] + total[1]) + (total[2] + total[3]));
  }
  return sum;
}

#endif
