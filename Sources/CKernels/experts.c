// Mixtures of experts: the choice of experts, products in which each expert has rows of its own, their activation, and
// weighted sums of the results.
//
// A product over all experts is one region: a chunk is some panels of one expert by some of its rows. So all threads work
// whether one expert has many rows or many experts have one row each. A chunk is run as a linear layer of its own, on a
// context of its thread alone, which rounds the rows of x again for each chunk: a few percent of the products' work.

#ifndef APUS_LEVEL

#include "internal.h"

#include <stdlib.h>

typedef struct {
  const float *gate_up;
  int64_t stride;
  int64_t width;
  float *out;
  int64_t out_stride;
  apus_gate gate;
} gate_arguments;

typedef struct {
  const float *results;
  int64_t results_stride;
  const int32_t *places;
  const float *weights;
  int per_row;
  const float *shared_gate;
  int64_t shared_gate_stride;
  int adds;
  float *out;
  int64_t out_stride;
  int64_t rows;
  int64_t columns;
  int64_t pieces;
  int64_t grain;
} combine_arguments;

enum { piece_columns = 1024 };

#define APUS_FILE "experts.c"
#include "each_level.h"

typedef void gate_function(const gate_arguments *, int64_t row);
typedef void combine_function(const combine_arguments *, int64_t row, int64_t begin, int64_t end);

static gate_function *const gate_row[] = APUS_LEVELS(gate_row);
static combine_function *const combine_row[] = APUS_LEVELS(combine_row);

// MARK: Routing

typedef struct {
  const apus_routing *routing;
  const float *logits;
  int64_t stride;
  int64_t rows;
  int64_t grain;
  int32_t *chosen;
  float *weights;
  apus_context *context;
} route_region;

// Takes experts of all but the best groups out of the choice: their ranks become NaN. `groups` is scratch.
static void keep_best_groups(const apus_routing *r, float *ranks, float *groups) {
  int size = r->experts / r->groups;
  for (int g = 0; g < r->groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; e++) {
      if (ranks[e] > first) {
        second = first;
        first = ranks[e];
      } else if (ranks[e] > second) {
        second = ranks[e];
      }
    }
    groups[g] = r->experts_in_group_score == 2 ? first + second : first;
  }
  for (int i = r->groups_per_row; i < r->groups; i++) {
    // The worst group that is left; of equal ones the last, so that the first are kept.
    int worst = -1;
    for (int g = 0; g < r->groups; g++) {
      if (groups[g] == groups[g] && (worst < 0 || groups[g] <= groups[worst])) worst = g;
    }
    if (worst < 0) return;
    groups[worst] = NAN;
    for (int e = worst * size; e < (worst + 1) * size; e++) ranks[e] = NAN;
  }
}

static void route_row(const apus_routing *r, const float *logits, float *scratch, int32_t *chosen, float *weights) {
  int count = r->experts, per_row = r->per_row;
  float *scores = scratch, *ranks = scratch + count;
  if (r->score == APUS_SCORE_SIGMOID) {
    for (int e = 0; e < count; e++) scores[e] = 1 / (1 + expf(-logits[e]));
  } else if (r->score == APUS_SCORE_SOFTMAX) {
    float largest = -INFINITY, sum = 0;
    for (int e = 0; e < count; e++) largest = logits[e] > largest ? logits[e] : largest;
    for (int e = 0; e < count; e++) {
      scores[e] = expf(logits[e] - largest);
      sum += scores[e];
    }
    for (int e = 0; e < count; e++) scores[e] /= sum;
  } else {
    memcpy(scores, logits, (size_t)count * 4);
  }
  // What experts are chosen by; the weights come from the scores themselves.
  for (int e = 0; e < count; e++) ranks[e] = scores[e] + (r->correction ? r->correction[e] : 0);
  if (r->groups_per_row < r->groups) keep_best_groups(r, ranks, ranks + count);
  for (int place = 0; place < per_row; place++) {
    // Ties go to the smaller number. NaN compares with nothing.
    int best = -1;
    float most = -INFINITY;
    for (int e = 0; e < count; e++) {
      if (ranks[e] > most || (best < 0 && ranks[e] == most)) {
        best = e;
        most = ranks[e];
      }
    }
    if (best < 0) {
      // Without finite logits any expert that is not chosen yet will do: the row's result is not finite either way.
      for (best = 0;; best++) {
        int i = 0;
        while (i < place && chosen[i] != best) i++;
        if (i == place) break;
      }
    }
    chosen[place] = best;
    ranks[best] = NAN;
  }
  // In the order of their numbers, in which their results are added.
  for (int i = 1; i < per_row; i++) {
    int32_t expert = chosen[i];
    int j = i;
    for (; j > 0 && chosen[j - 1] > expert; j--) chosen[j] = chosen[j - 1];
    chosen[j] = expert;
  }
  float sum = 0;
  if (r->score == APUS_SCORE_SOFTMAX_OF_CHOSEN) {
    float largest = -INFINITY;
    for (int i = 0; i < per_row; i++) largest = scores[chosen[i]] > largest ? scores[chosen[i]] : largest;
    for (int i = 0; i < per_row; i++) weights[i] = expf(scores[chosen[i]] - largest);
  } else {
    for (int i = 0; i < per_row; i++) weights[i] = scores[chosen[i]];
  }
  for (int i = 0; i < per_row; i++) sum += weights[i];
  // Sigmoids of very negative logits can all be zero; the addend is lost beside any other sum.
  float factor = r->normalizes ? r->scale / (sum + 1e-20f) : r->scale;
  for (int i = 0; i < per_row; i++) weights[i] *= factor;
}

static void route_task(void *argument, int chunk, int thread) {
  const route_region *region = argument;
  const apus_routing *r = region->routing;
  float *scratch = apus_scratch_reserve(
      &region->context->local[thread], (size_t)(2 * r->experts + r->groups) * 4);
  int64_t last = apus_min(region->rows, (chunk + 1) * region->grain);
  for (int64_t row = chunk * region->grain; row < last; row++) {
    route_row(
        r, region->logits + row * region->stride, scratch, region->chosen + row * r->per_row,
        region->weights + row * r->per_row);
  }
}

void apus_route(
    apus_context *context, const apus_routing *routing, const float *logits, int64_t stride, int64_t rows,
    int32_t *chosen, float *weights) {
  if (rows <= 0) return;
  int64_t grain = apus_grain(context, rows, (int64_t)routing->experts * (routing->per_row + 8) * 4);
  route_region region = {routing, logits, stride, rows, grain, chosen, weights, context};
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, grain), route_task, &region);
}

// MARK: Products

struct apus_groups {
  int threads;
  // A context of one thread for each thread of the pool.
  apus_context **serial;
  apus_scratch plan;
};

apus_groups *apus_groups_create(const apus_context *context) {
  apus_groups *groups = calloc(1, sizeof *groups);
  if (!groups) return NULL;
  groups->serial = calloc((size_t)context->threads, sizeof *groups->serial);
  for (int i = 0; groups->serial && i < context->threads; i++) {
    groups->threads = i + 1;
    groups->serial[i] = apus_context_create(1, context->isa, NULL);
    if (!groups->serial[i]) {
      apus_groups_free(groups);
      return NULL;
    }
  }
  if (!groups->serial) {
    free(groups);
    return NULL;
  }
  return groups;
}

void apus_groups_free(apus_groups *groups) {
  if (!groups) return;
  for (int i = 0; i < groups->threads; i++) apus_context_free(groups->serial[i]);
  apus_release(groups->plan.data, groups->plan.bytes);
  free(groups->serial);
  free(groups);
}

size_t apus_groups_scratch_bytes(const apus_groups *groups) {
  size_t total = groups->plan.bytes;
  for (int i = 0; i < groups->threads; i++) total += apus_context_scratch_bytes(groups->serial[i]);
  return total;
}

typedef struct {
  const apus_groups *groups;
  const apus_group_part *parts;
  int count;
  // NULL where every group has the same `rows` rows, in columns of its own that begin `x_step` numbers after its neighbour's.
  const int32_t *starts;
  const int32_t *counts;
  int64_t rows;
  const float *x;
  int64_t x_stride;
  int64_t x_step;
  float *out;
  int64_t out_stride;
  int64_t out_step;
  // [count + 1]: the first chunk of each part.
  int64_t *first;
  // [count]: panels of a chunk.
  int64_t *panels;
} grouped_region;

// Rows that a chunk has at most: a panel is then read from memory once for many products, and the rounded rows stay in
// the cache.
enum { chunk_rows = 128 };

static int64_t rows_of(const grouped_region *region, int group) {
  return region->counts ? region->counts[group] : region->rows;
}

static void grouped_task(void *argument, int chunk, int thread) {
  const grouped_region *region = argument;
  // The last part whose first chunk is not beyond this one: parts without rows have no chunks.
  int low = 0, high = region->count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (region->first[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const apus_group_part *part = &region->parts[low];
  int64_t local = chunk - region->first[low];
  int64_t count = rows_of(region, part->group), blocks = apus_ceil_div(count, chunk_rows);
  int64_t block = local % blocks, panel = local / blocks * region->panels[low];
  int64_t row = count * block / blocks, rows = count * (block + 1) / blocks - row;
  if (region->starts) row += region->starts[part->group];
  apus_linear_run_panels(
      region->groups->serial[thread], part->weight, panel,
      apus_min(apus_linear_panels(part->weight), panel + region->panels[low]),
      region->x + row * region->x_stride + part->group * region->x_step, region->x_stride, rows, part->bias,
      region->out + row * region->out_stride + part->group * region->out_step + part->column, region->out_stride);
}

// Shares the products of `region`, whose plan is not made yet, among threads.
static void run_region(apus_context *context, apus_groups *groups, grouped_region region) {
  const apus_group_part *parts = region.parts;
  int count = region.count;
  if (count <= 0) return;
  int64_t *plan = apus_scratch_reserve(&groups->plan, (size_t)(2 * count + 1) * 8);
  region.first = plan;
  region.panels = plan + count + 1;
  // Bytes to stream, or their like in arithmetic, decide how many chunks are worth their claim.
  int64_t total = 0;
  for (int i = 0; i < count; i++) {
    int64_t rows = rows_of(&region, parts[i].group);
    if (rows > 0) total += (int64_t)apus_linear_bytes(parts[i].weight) * apus_max(1, rows / 8);
  }
  int64_t target = apus_max(65536, total / (context->threads * 8));
  int64_t chunks = 0;
  for (int i = 0; i < count; i++) {
    region.first[i] = chunks;
    region.panels[i] = 1;
    int64_t rows = rows_of(&region, parts[i].group), panels = apus_linear_panels(parts[i].weight);
    if (rows <= 0 || panels == 0) continue;
    int64_t work = (int64_t)apus_linear_bytes(parts[i].weight) * apus_max(1, apus_min(rows, chunk_rows) / 8) / panels;
    int64_t pieces = context->threads == 1 ? 1 : apus_ceil_div(panels * apus_max(1, work), target);
    region.panels[i] = apus_ceil_div(panels, apus_max(1, apus_min(pieces, panels)));
    chunks += apus_ceil_div(panels, region.panels[i]) * apus_ceil_div(rows, chunk_rows);
  }
  region.first[count] = chunks;
  // A region has at most 2^20 - 1 chunks; so many rows no pass has.
  if (chunks > 1000000) abort();
  apus_pool_run(context->pool, (int)chunks, grouped_task, &region);
}

void apus_grouped_run(
    apus_context *context, apus_groups *groups, const apus_group_part *parts, int count, const int32_t *starts,
    const int32_t *counts, const float *x, int64_t x_stride, float *out, int64_t out_stride) {
  run_region(
      context, groups,
      (grouped_region){
          .groups = groups, .parts = parts, .count = count, .starts = starts, .counts = counts, .x = x,
          .x_stride = x_stride, .out = out, .out_stride = out_stride});
}

void apus_columns_run(
    apus_context *context, apus_groups *groups, const apus_group_part *parts, int count, const float *x,
    int64_t x_stride, int64_t x_step, int64_t rows, float *out, int64_t out_stride, int64_t out_step) {
  run_region(
      context, groups,
      (grouped_region){
          .groups = groups, .parts = parts, .count = count, .rows = rows, .x = x, .x_stride = x_stride,
          .x_step = x_step, .out = out, .out_stride = out_stride, .out_step = out_step});
}

// MARK: Activation

typedef struct {
  gate_function *function;
  gate_arguments arguments;
  const int32_t *starts;
  const int32_t *counts;
  int groups;
  int64_t rows;
  int64_t grain;
} gate_region;

static void gate_task(void *argument, int chunk, int thread) {
  (void)thread;
  const gate_region *region = argument;
  int64_t skip = chunk * region->grain, left = apus_min(region->grain, region->rows - skip);
  for (int g = 0; g < region->groups && left > 0; g++) {
    int64_t count = region->counts[g];
    if (skip >= count) {
      skip -= count;
      continue;
    }
    int64_t end = apus_min(count, skip + left);
    for (int64_t i = skip; i < end; i++) region->function(&region->arguments, region->starts[g] + i);
    left -= end - skip;
    skip = 0;
  }
}

void apus_grouped_gate(
    apus_context *context, const int32_t *starts, const int32_t *counts, int groups, apus_gate gate,
    const float *gate_up, int64_t stride, int64_t width, float *out, int64_t out_stride) {
  int64_t rows = 0;
  for (int g = 0; g < groups; g++) rows += counts[g];
  if (rows <= 0 || width <= 0) return;
  gate_region region = {
      gate_row[context->isa], {gate_up, stride, width, out, out_stride, gate}, starts, counts, groups, rows,
      apus_grain(context, rows, width * 16)};
  apus_pool_run(context->pool, (int)apus_ceil_div(rows, region.grain), gate_task, &region);
}

// MARK: Sums

typedef struct {
  combine_function *function;
  combine_arguments arguments;
} combine_region;

static void combine_task(void *argument, int chunk, int thread) {
  (void)thread;
  const combine_region *region = argument;
  const combine_arguments *a = &region->arguments;
  int64_t last = apus_min(a->rows * a->pieces, (chunk + 1) * a->grain);
  for (int64_t i = chunk * a->grain; i < last; i++) {
    int64_t begin = i % a->pieces * piece_columns;
    region->function(a, i / a->pieces, begin, apus_min(a->columns, begin + piece_columns));
  }
}

void apus_combine(
    apus_context *context, const float *results, int64_t results_stride, const int32_t *places, const float *weights,
    int per_row, int adds, const float *shared_gate, int64_t shared_gate_stride, int64_t rows, int64_t columns,
    float *out, int64_t out_stride) {
  if (rows <= 0 || columns <= 0) return;
  combine_region region = {
      combine_row[context->isa],
      {results, results_stride, places, weights, per_row, shared_gate, shared_gate_stride, adds, out, out_stride, rows,
       columns, apus_ceil_div(columns, piece_columns), 0}};
  int64_t items = rows * region.arguments.pieces;
  region.arguments.grain = apus_grain(context, items, apus_min(columns, piece_columns) * 4 * (per_row + 1));
  apus_pool_run(context->pool, (int)apus_ceil_div(items, region.arguments.grain), combine_task, &region);
}

#else

APUS_INLINE vf FN(gated)(const apus_gate *gate, vf g, vf up) {
  if (gate->limit <= 0) return g / (1.0f + FN(exp)(-g)) * up;
  vf limit = (vf)gate->limit;
  g = g > limit ? limit : g;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return g / (1.0f + FN(exp)(-(g * gate->alpha))) * (up + 1.0f);
}

static void FN(gate_row)(const gate_arguments *a, int64_t row) {
  const float *gate = a->gate_up + row * a->stride, *up = gate + a->width;
  float *out = a->out + row * a->out_stride;
  int64_t i = 0;
  for (; i + 16 <= a->width; i += 16) FN(store)(out + i, FN(gated)(&a->gate, FN(load)(gate + i), FN(load)(up + i)));
  if (i < a->width) {
    int64_t rest = a->width - i;
    FN(store_some)(
        out + i, FN(gated)(&a->gate, FN(load_some)(gate + i, rest), FN(load_some)(up + i, rest)), rest);
  }
}

static void FN(combine_row)(const combine_arguments *a, int64_t row, int64_t begin, int64_t end) {
  const int32_t *places = a->places + row * a->per_row;
  const float *weights = a->weights + row * a->per_row;
  float *out = a->out + row * a->out_stride;
  float factor = 1;
  if (a->shared_gate) factor = 1 / (1 + expf(-a->shared_gate[row * a->shared_gate_stride]));
  for (int64_t i = begin; i < end; i += 16) {
    int64_t count = apus_min(16, end - i);
    vf sum = FN(load_some)(a->results + places[0] * a->results_stride + i, count) * weights[0];
    for (int k = 1; k < a->per_row; k++) {
      sum += FN(load_some)(a->results + places[k] * a->results_stride + i, count) * weights[k];
    }
    if (a->shared_gate) {
      sum += FN(load_some)(out + i, count) * factor;
    } else if (a->adds) {
      sum += FN(load_some)(out + i, count);
    }
    FN(store_some)(out + i, sum, count);
  }
}

#endif
