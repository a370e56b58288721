// Causal attention over paged K/V.
//
// A row is one query head of one token. Its positions are cut at multiples of APUS_KV_SPLIT. Within a piece: all
// scores, their maximum, exponentials and their sum (in sixteen lanes by position within the page), then the
// weighted sum of values, position by position. Pieces are then joined in rising order. Nothing in this depends on
// which other rows share the work, so a row has the same bits alone (decode), in a chunk of a prompt, and however
// the pieces were distributed over threads. Positions a row may not see have an exponential of exactly zero, which
// changes no sum.
//
// Rows that share K/V (the query heads of a K/V head, for several tokens) form a tile, which passes over the pages
// once. Sequences of few rows whose page tables begin alike share whole pieces too: their rows form a tile for each such
// piece, and what they have for themselves goes on as before ("cascade" attention; Juravsky et al.: Hydragen, 2024).
//
// Latent pages have one block for all query heads. The query heads are cut into groups that take the place of K/V heads, so
// that a token's heads can go to several threads and a tile stays small. A piece's values are put together from its keys
// in the tile's memory.

#ifndef APUS_LEVEL

#include "kv.h"

enum {
  // Rows of a tile, unless one token alone has more query heads for a K/V head.
  tile_rows = 48,
  pages_in_split = APUS_KV_SPLIT / APUS_KV_PAGE_SIZE,
};

// Tokens of a sequence, one K/V head, a run of pieces. Where pieces go apart, an item has one piece.
typedef struct attention_item {
  int32_t sequence;
  int32_t head;
  int32_t token;
  int32_t tokens;
  int32_t first_split;
  int32_t last_split;
  // Where the piece's result goes until it is joined with the others, counted in rows; negative when the item has
  // all.
  int64_t partial;
  // The sequences that share the piece, this one first; 0 for this one alone.
  int32_t members;
  const struct attention_item *member;
} attention_item;

// Rows of an item whose pieces were done apart.
typedef struct {
  attention_item item;
  int32_t splits;
} join_item;

typedef struct {
  const apus_kv *kv;
  const float *q;
  int64_t q_stride;
  float *out;
  int64_t out_stride;
  const apus_attention_arguments *batch;
  // Query heads of a K/V head, and heads as items count them: K/V heads, or groups of query heads over latent pages.
  int group;
  int heads;
  const attention_item *items;
  const join_item *joins;
  // [rows][2 + value_columns]: maximum, sum, weighted sum of values; rows begin at cache lines.
  float *partials;
  int64_t partial_stride;
} attention_call;

// A tile's working memory. Strides in numbers (words for q and weights).
typedef struct {
  int64_t rows;
  uint32_t *q;
  int64_t q_stride;
  float *scores;
  int64_t score_stride;
  uint32_t *weights;
  int64_t weight_stride;
  float *part;
  float *state;
  uint32_t *masked;
  // For each row: positions seen, maximum and sum of the piece and of the pieces so far (sum 0: none yet).
  int32_t *low;
  int32_t *high;
  float *part_max;
  float *part_sum;
  // Where the row's part goes until it is joined, counted in rows.
  int32_t *place;
  float *state_max;
  float *state_sum;
  // K/V of 8 bits: the keys of four pages and the values of a piece as bfloat16, and the piece's scales of both. Latent
  // pages: the values of a piece.
  uint32_t *keys;
  uint32_t *values;
  float *key_scales;
  float *value_scales;
} tile_memory;

static int64_t odd_lines(int64_t words) {
  int64_t rounded = apus_round_up(words, 16);
  return rounded / 16 % 2 == 0 ? rounded + 16 : rounded;
}

// Lays a tile's memory out in `base`; only sizes it when `base` is NULL. Returns the bytes needed.
static size_t lay_out(tile_memory *m, const apus_kv *kv, int64_t rows, char *base) {
  size_t used = 0;
#define APUS_TAKE(field, count)                                                                                     \
  m->field = base ? (void *)(base + used) : NULL;                                                                   \
  used += (size_t)apus_round_up((int64_t)(count) * 4, 64)
  m->rows = rows;
  m->q_stride = odd_lines(kv->compute == APUS_FLOAT32 ? kv->key_units : 2 * kv->key_units);
  m->score_stride = odd_lines(APUS_KV_SPLIT);
  m->weight_stride = odd_lines(APUS_KV_SPLIT);
  APUS_TAKE(q, rows * m->q_stride);
  APUS_TAKE(scores, rows * m->score_stride);
  APUS_TAKE(weights, rows * m->weight_stride);
  APUS_TAKE(part, rows * kv->value_columns);
  APUS_TAKE(state, rows * kv->value_columns);
  APUS_TAKE(masked, kv->value_columns);
  APUS_TAKE(low, rows);
  APUS_TAKE(high, rows);
  APUS_TAKE(part_max, rows);
  APUS_TAKE(part_sum, rows);
  APUS_TAKE(place, rows);
  APUS_TAKE(state_max, rows);
  APUS_TAKE(state_sum, rows);
  if (kv->narrow || kv->latent) {
    APUS_TAKE(values, pages_in_split * kv->value_units * kv->value_columns);
  }
  if (kv->narrow) {
    APUS_TAKE(keys, 4 * kv->key_units * APUS_KV_PAGE_SIZE);
    APUS_TAKE(key_scales, APUS_KV_SPLIT);
    APUS_TAKE(value_scales, APUS_KV_SPLIT);
  }
#undef APUS_TAKE
  return used;
}

// Positions low..<high are what a row at `position` sees.
APUS_INLINE int32_t lowest_position(const apus_attention_arguments *batch, int32_t position) {
  return batch->window > 0 && position + 1 > batch->window ? position + 1 - batch->window : 0;
}

#define APUS_FILE "attention.c"
#include "each_level.h"

typedef void attend_function(const attention_call *, const attention_item *, tile_memory *);
typedef void join_function(const attention_call *, const join_item *, tile_memory *);

static attend_function *const attend_float32[] = APUS_LEVELS(attend_float32);
static attend_function *const attend_float16[] = APUS_LEVELS(attend_float16);
static attend_function *const attend_bfloat16[] = APUS_LEVELS(attend_bfloat16);
static attend_function *const *const attend_of_dtype[] = {attend_float32, attend_float16, attend_bfloat16};
static join_function *const join[] = APUS_LEVELS(join);

typedef struct {
  apus_context *context;
  attend_function *attend;
  join_function *join;
  attention_call call;
  int64_t rows;
} attention_region;

static tile_memory memory_of(const attention_region *region, int thread) {
  tile_memory m;
  size_t bytes = lay_out(&m, region->call.kv, region->rows, NULL);
  lay_out(&m, region->call.kv, region->rows, apus_scratch_reserve(&region->context->local[thread], bytes));
  return m;
}

static void attend_task(void *argument, int chunk, int thread) {
  const attention_region *region = argument;
  tile_memory m = memory_of(region, thread);
  region->attend(&region->call, &region->call.items[chunk], &m);
}

static void join_task(void *argument, int chunk, int thread) {
  const attention_region *region = argument;
  tile_memory m = memory_of(region, thread);
  region->join(&region->call, &region->call.joins[chunk], &m);
}

// Which pieces a sequence of few rows shares with others.
typedef struct {
  // Sequences with equal leaders share pieces; the first of them is the leader.
  int32_t leader;
  // The next sequence of the same leader, or -1; for a leader also the last one.
  int32_t next;
  int32_t last;
  // Pieces at the beginning that are shared; a leader has the most that any of its followers has.
  int32_t shared;
} sharing;

// Finds sequences whose page tables begin with the same whole pieces, all positions of which each of their rows sees.
// Returns how many sequences share pieces.
static int32_t find_sharing(
    apus_context *context, const apus_attention_arguments *a, int32_t tile_tokens, sharing **found) {
  enum { slots = 1024 };
  *found = NULL;
  if (a->is_plain || a->window > 0 || a->sequences < 2) return 0;
  sharing *list = apus_scratch_reserve(
      &context->shared[2], (size_t)a->sequences * sizeof(sharing) + slots * sizeof(int32_t));
  int32_t *heads = (int32_t *)(void *)(list + a->sequences);
  memset(heads, 0xff, slots * sizeof(int32_t));
  int32_t sharers = 0;
  for (int32_t s = 0; s < a->sequences; s++) {
    list[s] = (sharing){-1, -1, s, 0};
    int32_t tokens = a->row_start[s + 1] - a->row_start[s];
    int32_t whole = (a->start[s] + 1) / APUS_KV_SPLIT;
    // More rows fill tiles of their own.
    if (tokens <= 0 || tokens > apus_max(1, tile_tokens / 2) || whole == 0) continue;
    const int32_t *pages = a->pages + a->page_offset[s];
    // A slot may be taken by another beginning: then this one goes its own way.
    int32_t *head = &heads[(uint32_t)pages[0] * 2654435761u >> 22];
    if (*head < 0) *head = s;
    list[s].leader = *head;
    if (*head == s) continue;
    sharing *leader = &list[*head];
    int32_t most = (int32_t)apus_min(whole, (a->start[*head] + 1) / APUS_KV_SPLIT), n = 0;
    const int32_t *first = a->pages + a->page_offset[*head];
    while (n < most && memcmp(pages + n * pages_in_split, first + n * pages_in_split, pages_in_split * 4) == 0) n++;
    if (n == 0) {
      list[s].leader = -1;
      continue;
    }
    sharers += leader->shared == 0 ? 2 : 1;
    list[s].shared = n;
    leader->shared = (int32_t)apus_max(leader->shared, n);
    list[leader->last].next = s;
    leader->last = s;
  }
  *found = list;
  return sharers;
}

// Query heads of a tile over latent pages: as many as divide their number and fit, or all of them where that number has
// no divisors to speak of. Rows do not depend on it.
static int latent_group(int query_heads) {
  int most = (int)apus_min(query_heads, tile_rows);
  for (int group = most; group >= apus_min(8, query_heads); group--) {
    if (query_heads % group == 0) return group;
  }
  return query_heads;
}

void apus_attention(
    apus_context *context, const apus_kv *kv, const float *q, int64_t q_stride, float *out, int64_t out_stride,
    const apus_attention_arguments *arguments) {
  int group = kv->latent ? latent_group(arguments->query_heads) : arguments->query_heads / kv->kv_heads;
  int heads = arguments->query_heads / group;
  int32_t tile_tokens = (int32_t)apus_max(1, tile_rows / group);
  // How many tiles there are, and how many pieces if all were apart.
  int64_t tiles = 0, pieces = 0, partial_rows = 0;
  for (int32_t s = 0; s < arguments->sequences; s++) {
    int32_t tokens = arguments->row_start[s + 1] - arguments->row_start[s];
    for (int32_t token = 0; token < tokens; token += tile_tokens) {
      int32_t count = (int32_t)apus_min(tile_tokens, tokens - token);
      int32_t position = arguments->start[s] + token;
      int32_t first = lowest_position(arguments, position) / APUS_KV_SPLIT;
      int32_t splits = (position + count - 1) / APUS_KV_SPLIT - first + 1;
      tiles += heads;
      pieces += (int64_t)splits * heads;
      partial_rows += (int64_t)splits * heads * count * group;
    }
  }
  if (tiles == 0) return;
  int64_t partial_stride = apus_round_up(2 + kv->value_columns, 16);
  // Pieces go apart where tiles are too few to share evenly, within reason for memory.
  int apart = context->threads > 1 && tiles < 8 * context->threads && pieces > tiles
      && partial_rows * partial_stride < ((int64_t)16 << 20);
  sharing *list = NULL;
  int cascades = partial_rows * partial_stride < ((int64_t)16 << 20)
      && find_sharing(context, arguments, tile_tokens, &list) > 0;
  // Items, then joins, then members of items.
  int64_t count = apart || cascades ? pieces : tiles;
  size_t item_bytes = (size_t)count * sizeof(attention_item), join_bytes = (size_t)tiles * sizeof(join_item);
  char *plan = apus_scratch_reserve(
      &context->shared[0], item_bytes + join_bytes + (cascades ? (size_t)pieces * sizeof(attention_item) : 0));
  attention_item *items = (attention_item *)(void *)plan;
  join_item *joins = (join_item *)(void *)(plan + item_bytes);
  attention_item *members = (attention_item *)(void *)(plan + item_bytes + join_bytes);
  int64_t item_count = 0, join_count = 0, row = 0;
  // What sequences share, and where each one's parts go: [heads][pieces][rows].
  for (int32_t s = 0; cascades && s < arguments->sequences; s++) {
    if (list[s].leader != s || list[s].shared == 0) continue;
    for (int32_t own = s; own >= 0; own = list[own].next) {
      int32_t tokens = arguments->row_start[own + 1] - arguments->row_start[own];
      int32_t splits = (arguments->start[own] + tokens - 1) / APUS_KV_SPLIT + 1;
      list[own].last = (int32_t)row;
      row += (int64_t)heads * splits * tokens * group;
    }
    for (int32_t head = 0; head < heads; head++) {
      for (int32_t split = 0; split < list[s].shared; split++) {
        attention_item *item = NULL;
        int64_t rows = 0;
        for (int32_t own = s; own >= 0; own = list[own].next) {
          if (list[own].shared <= split) continue;
          int32_t tokens = arguments->row_start[own + 1] - arguments->row_start[own];
          int32_t splits = (arguments->start[own] + tokens - 1) / APUS_KV_SPLIT + 1;
          int64_t place = list[own].last + ((int64_t)head * splits + split) * tokens * group;
          if (!item || rows + (int64_t)tokens * group > apus_max(tile_rows, group)) {
            item = &items[item_count++];
            *item = (attention_item){own, head, 0, tokens, split, split, place, 0, members};
            rows = 0;
          }
          *members++ = (attention_item){own, head, 0, tokens, split, split, place, 0, NULL};
          item->members++;
          rows += (int64_t)tokens * group;
        }
      }
    }
  }
  for (int32_t s = 0; s < arguments->sequences; s++) {
    int32_t tokens = arguments->row_start[s + 1] - arguments->row_start[s];
    if (tokens <= 0) continue;
    if (cascades && list[s].shared > 0) {
      // What the sequence has for itself.
      int32_t splits = (arguments->start[s] + tokens - 1) / APUS_KV_SPLIT + 1;
      for (int32_t head = 0; head < heads; head++) {
        int64_t place = list[s].last + (int64_t)head * splits * tokens * group;
        attention_item item = {s, head, 0, tokens, 0, splits - 1, place, 0, NULL};
        joins[join_count++] = (join_item){item, splits};
        for (int32_t split = list[s].shared; split < splits; split++) {
          item.first_split = item.last_split = split;
          item.partial = place + (int64_t)split * tokens * group;
          items[item_count++] = item;
        }
      }
      continue;
    }
    // The last tile sees most and comes first.
    for (int32_t token = (tokens - 1) / tile_tokens * tile_tokens; token >= 0; token -= tile_tokens) {
      int32_t here = (int32_t)apus_min(tile_tokens, tokens - token);
      int32_t position = arguments->start[s] + token;
      int32_t first = lowest_position(arguments, position) / APUS_KV_SPLIT;
      int32_t last = (position + here - 1) / APUS_KV_SPLIT;
      for (int32_t head = 0; head < heads; head++) {
        attention_item item = {s, head, token, here, first, last, -1, 0, NULL};
        if (!apart || first == last) {
          items[item_count++] = item;
          continue;
        }
        item.partial = row;
        joins[join_count++] = (join_item){item, last - first + 1};
        for (int32_t split = first; split <= last; split++) {
          item.first_split = item.last_split = split;
          item.partial = row;
          items[item_count++] = item;
          row += (int64_t)here * group;
        }
      }
    }
  }
  attention_region region = {
      .context = context,
      .attend = attend_of_dtype[kv->compute][context->isa],
      .join = join[context->isa],
      .call = {kv, q, q_stride, out, out_stride, arguments, group, heads, items, joins, NULL, partial_stride},
      .rows = apus_max(tile_rows, group)};
  if (row > 0) region.call.partials = apus_scratch_reserve(&context->shared[1], (size_t)(row * partial_stride) * 4);
  // A region has at most 2^20 - 1 chunks.
  for (int64_t done = 0; done < item_count; done += 1000000) {
    region.call.items = items + done;
    apus_pool_run(context->pool, (int)apus_min(1000000, item_count - done), attend_task, &region);
  }
  apus_pool_run(context->pool, (int)join_count, join_task, &region);
}

#else

#include "tile.h"

// MARK: Joining pieces

// Joins a piece to the pieces before it: weighted sums of values under maxima of their own.
APUS_INLINE void FN(fold)(
    float *state_max, float *state_sum, float *state, float part_max, float part_sum, const float *part,
    int64_t columns) {
  if (part_sum == 0) return;
  if (*state_sum == 0) {
    *state_max = part_max;
    *state_sum = part_sum;
    memcpy(state, part, (size_t)columns * 4);
    return;
  }
  float most = part_max > *state_max ? part_max : *state_max;
  // Not numbers stay so: the factors below become NaN.
  vf differences = 0;
  differences.s0 = *state_max - most;
  differences.s1 = part_max - most;
  vf factors = FN(exp)(differences);
  float old = factors.s0, new = factors.s1;
  *state_max = most;
  *state_sum = *state_sum * old + part_sum * new;
  for (int64_t i = 0; i < columns; i += 16) {
    FN(store)(state + i, FN(fma)(FN(load)(part + i), (vf)new, FN(load)(state + i) * old));
  }
}

// Divides by the sum of weights, a sink's among them. Adding zero makes a negative zero positive: whether one arises
// depends on how many zero terms a tile added.
APUS_INLINE void FN(finish)(
    const attention_call *c, const attention_item *item, int64_t r, const float *state, float most, float sum) {
  int64_t d = c->kv->value_dimension;
  int64_t row = c->batch->row_start[item->sequence] + item->token + r / c->group;
  int64_t head = (int64_t)item->head * c->group + r % c->group;
  float *out = c->out + row * c->out_stride + head * d;
  float factor = 1;
  if (c->batch->sinks) {
    float sink = c->batch->sinks[head];
    float larger = sink > most ? sink : most;
    vf differences = 0;
    differences.s0 = most - larger;
    differences.s1 = sink - larger;
    vf weights = FN(exp)(differences);
    factor = weights.s0;
    sum = sum * factor + weights.s1;
  }
  for (int64_t i = 0; i < d; i += 16) {
    vf value = FN(load)(state + i) * factor / sum + 0.0f;
    FN(store_some)(out + i, value, apus_min(16, d - i));
  }
}

static void FN(join)(const attention_call *c, const join_item *join, tile_memory *m) {
  int64_t rows = (int64_t)join->item.tokens * c->group;
  for (int64_t r = 0; r < rows; r++) {
    float most = 0, sum = 0;
    for (int32_t s = 0; s < join->splits; s++) {
      const float *partial = c->partials + (join->item.partial + s * rows + r) * c->partial_stride;
      FN(fold)(&most, &sum, m->state, partial[0], partial[1], partial + 2, c->kv->value_columns);
    }
    FN(finish)(c, &join->item, r, m->state, most, sum);
  }
}

// MARK: Exponentials

// exp(x) of x <= 0 for weights that are rounded to bfloat16: a relative error below 7e-6, where rounding may do 4e-3.
// Exactly 1 at 0 and 0 below -87.3; NaN stays NaN.
//
// As `exp`, with a polynomial of degree 4, fitted for the least relative error (5.4e-6) under p(0) = p'(0) = 1, and with
// one number for ln 2, whose error times at most 126 is 3e-7.
APUS_INLINE vf FN(exp_weight)(vf x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 more make it a power of two's exponent.
  vf shifted = FN(fma)(x, (vf)1.44269504f, (vf)12583039.0f);
  vf r = FN(fma)(shifted - 12583039.0f, (vf)-0.693147181f, x);
  vf p = (vf)4.12777342e-2f;
  p = FN(fma)(p, r, (vf)1.67535186e-1f);
  p = FN(fma)(p, r, (vf)5.00051141e-1f);
  p = FN(fma)(p, r, (vf)1.0f);
  p = FN(fma)(p, r, (vf)1.0f);
  vf power = __builtin_bit_cast(vf, __builtin_bit_cast(vu, shifted) << 23);
  return x < -87.3f ? (vf)0.0f : p * power;
}

// A weight as `bf16_activations` rounds it: weights are normal or zero, and what is not a number here has nothing in the
// bits that go, since it comes from bfloat16 numbers.
APUS_INLINE vf FN(bf16_weight)(vf p) {
  vu bits = __builtin_bit_cast(vu, p);
  return __builtin_bit_cast(vf, (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// Scores of one row for pages first..<last of the sequence become weights; `first_page` is where the arrays begin.
// Rows that see nothing here have sum 0 and weights 0.
APUS_INLINE void FN(weigh)(
    const attention_call *c, tile_memory *m, int64_t r, int64_t first_page, int64_t last_page) {
  float *scores = m->scores + r * m->score_stride;
  const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int32_t low = m->low[r], high = m->high[r];
  float cap = c->batch->soft_cap;
  vf most = -INFINITY;
  for (int64_t page = first_page; page < last_page; page++) {
    int32_t position = (int32_t)page * APUS_KV_PAGE_SIZE;
    vf s = FN(load)(scores + (page - first_page) * 16) * c->batch->scale;
    if (c->kv->narrow) s *= FN(load)(m->key_scales + (page - first_page) * 16);
    if (cap > 0) s = FN(tanh)(s / cap) * cap;
    if (position < low || position + APUS_KV_PAGE_SIZE > high) {
      vi positions = lanes + position;
      s = ((positions < low) | (positions >= high)) ? (vf)-INFINITY : s;
    }
    most = FN(max)(s, most);
    FN(store)(scores + (page - first_page) * 16, s);
  }
  int32_t begin = (int32_t)first_page * APUS_KV_PAGE_SIZE, end = (int32_t)last_page * APUS_KV_PAGE_SIZE;
  int sees = low < end && high > begin;
  float largest = FN(largest)(most);
  vf sum = 0;
  for (int64_t page = 0; page < last_page - first_page; page++) {
    uint32_t *weights = m->weights + r * m->weight_stride;
    vf s = FN(load)(scores + page * 16) - largest;
    if (!sees) {
      FN(store)((float *)(void *)weights + page * 16, (vf)0);
      continue;
    }
    if (c->kv->compute != APUS_BFLOAT16) {
      vf p = FN(exp)(s);
      FN(store)((float *)(void *)weights + page * 16, p);
      sum += p;
      continue;
    }
    vf p = FN(exp_weight)(s);
#if APUS_LEVEL >= 3
    uint16_t *halves = (uint16_t *)(void *)weights + page * 16;
#endif
    if (c->kv->narrow) {
      // Positions that are not seen may have any scale, even NaN.
      vf scaled = p * FN(load)(m->value_scales + page * 16);
      vf weight = p == 0.0f ? p : scaled;
#if APUS_LEVEL >= 3
      FN(store_bf16_activations)(halves, weight);
#else
      FN(store)((float *)(void *)weights + page * 16, FN(bf16_activations)(weight));
#endif
    } else {
#if APUS_LEVEL >= 3
      FN(store_bf16_activations)(halves, p);
      p = FN(load_bf16)(halves);
#else
      p = FN(bf16_weight)(p);
      FN(store)((float *)(void *)weights + page * 16, p);
#endif
    }
    sum += p;
  }
  m->part_max[r] = largest;
  m->part_sum[r] = sees ? FN(sum)(sum) : 0;
}

// MARK: Tiles

// Asks for memory to be brought near.
APUS_INLINE void FN(fetch)(const uint32_t *from, int64_t words) {
  for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// Numbers of 8 bits as bfloat16, which holds them exactly; `count` is a multiple of 16.
APUS_INLINE void FN(widen)(apus_dtype dtype, const uint32_t *from, uint32_t *to, int64_t count) {
  typedef int8_t vb __attribute__((ext_vector_type(16), aligned(1), may_alias));
  const char *bytes = (const char *)from;
  uint16_t *halves = (uint16_t *)(void *)to;
  if (dtype == APUS_INT8) {
    for (int64_t i = 0; i < count; i += 16) {
      vf x = __builtin_convertvector(__builtin_convertvector(*(const vb *)(const void *)(bytes + i), vi), vf);
      *(vh_at *)(halves + i) = __builtin_convertvector(__builtin_bit_cast(vu, x) >> 16, vh);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += 16) {
    vi codes = __builtin_convertvector(*(const vb *)(const void *)(bytes + i), vi);
    vf x = FN(from_float8)((vu)codes);
    *(vh_at *)(halves + i) = __builtin_convertvector(__builtin_bit_cast(vu, x) >> 16, vh);
  }
}

// One row's q at the pages' precision, zero in the last unit beyond the head.
APUS_INLINE void FN(take_q)(const attention_call *c, const float *q, uint32_t *to) {
  int64_t d = c->kv->head_dimension;
  if (c->kv->compute != APUS_BFLOAT16) {
    memcpy(to, q, (size_t)d * 4);
    if (c->kv->compute == APUS_FLOAT16 && d % 2 != 0) to[d] = 0;
    return;
  }
  // The row's memory is padded to whole vectors.
  for (int64_t i = 0; i < d; i += 16) {
    vf x = FN(load_some)(q + i, apus_min(16, d - i));
#if APUS_LEVEL >= 3
    FN(store_bf16_activations)((uint16_t *)(void *)to + i, x);
#else
    FN(store)((float *)(void *)to + i, FN(bf16_activations)(x));
#endif
  }
}

// The values of a latent page: the beginning of each token's key, in the order of values. Columns beyond the value are
// whatever the key holds there, or zero, and are not stored.
APUS_INLINE void FN(turn)(const apus_kv *kv, const uint32_t *keys, uint32_t *values) {
  int64_t columns = kv->value_columns;
  if (kv->dtype == APUS_FLOAT32) {
    for (int64_t i = 0; i < columns; i += 16) {
      int64_t count = apus_min(16, kv->key_units - i);
      for (int64_t t = 0; t < APUS_KV_PAGE_SIZE; t++) {
        uint32_t lanes[16] = {0};
        for (int64_t j = 0; j < count; j++) lanes[j] = keys[(i + j) * 16 + t];
        memcpy(values + t * columns + i, lanes, 64);
      }
    }
    return;
  }
  int64_t units = apus_min(columns / 2, kv->key_units);
  if (2 * units < columns) memset(values, 0, (size_t)(kv->value_units * columns) * 4);
  if (kv->dtype == APUS_BFLOAT16) {
    // Pairs of numbers of two tokens become pairs of tokens of two numbers.
    for (int64_t t = 0; t < APUS_KV_PAGE_SIZE / 2; t++) {
      uint32_t *to = values + t * columns;
      for (int64_t u = 0; u < units; u++) {
        uint32_t a = keys[u * 16 + 2 * t], b = keys[u * 16 + 2 * t + 1];
        to[2 * u] = (a & 0xffffu) | b << 16;
        to[2 * u + 1] = a >> 16 | (b & 0xffff0000u);
      }
    }
    return;
  }
  const uint16_t *from = (const uint16_t *)(const void *)keys;
  uint16_t *to = (uint16_t *)(void *)values;
  for (int64_t i = 0; i < 2 * units; i++) {
    for (int64_t t = 0; t < APUS_KV_PAGE_SIZE; t++) {
      to[apus_value_index(kv->dtype, columns, i, t)] = from[apus_key_index(kv->dtype, i, t)];
    }
  }
}

// The values of a piece's page, as the inner loop takes them.
APUS_INLINE const uint32_t *FN(page_values)(
    const attention_call *c, const tile_memory *m, const int32_t *pages, int64_t p, int head) {
  if (c->kv->narrow || c->kv->latent) return m->values + p * c->kv->value_units * c->kv->value_columns;
  return apus_kv_values(c->kv, pages[p], head);
}

#undef APUS_ATTEND
#define APUS_ATTEND(FORMAT, WORDS)                                                                                  \
  APUS_INLINE void FN(score_##FORMAT)(                                                                              \
      int rows, int vectors, int ahead_vectors, tile_memory *m, int64_t row, const uint32_t *const *pages,          \
      const uint32_t *const *ahead, int64_t index, int count, int64_t units) {                                      \
    vf sums[6][4];                                                                                                  \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = 0;                                                 \
    }                                                                                                               \
    FN(tile_##FORMAT)(                                                                                              \
        rows, vectors, sums, m->q + row * m->q_stride, m->q_stride, pages, 16, units, ahead_vectors, ahead, 16);    \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      float *scores = m->scores + (row + i) * m->score_stride + index * 16;                                         \
      APUS_UNROLL for (int v = 0; v < vectors; v++) {                                                               \
        if (v < count) FN(store)(scores + v * 16, sums[i][v]);                                                      \
      }                                                                                                             \
    }                                                                                                               \
  }                                                                                                                 \
                                                                                                                    \
  /* `tail` units of the last page count; where `half` is set, the last of them only with its first token. */       \
  APUS_INLINE void FN(values_##FORMAT)(                                                                             \
      int rows, int vectors, int ahead_vectors, const apus_kv *kv, tile_memory *m, int64_t row,                     \
      const uint32_t *const *pages, int64_t count, int64_t column, int64_t tail, int half) {                        \
    vf sums[6][4];                                                                                                  \
    const uint32_t *columns[4], *ahead[4];                                                                          \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      APUS_UNROLL for (int v = 0; v < vectors; v++) sums[i][v] = 0;                                                 \
    }                                                                                                               \
    const uint32_t *weights = m->weights + row * m->weight_stride;                                                  \
    for (int64_t p = 0; p < count; p++) {                                                                           \
      const uint32_t *values = pages[p] + column, *next = pages[p + 1 < count ? p + 1 : p] + column;                \
      int64_t units = p == count - 1 ? tail - half : kv->value_units;                                               \
      APUS_UNROLL for (int v = 0; v < vectors; v++) {                                                               \
        columns[v] = values + 16 * v;                                                                               \
        ahead[v] = next + 16 * v;                                                                                   \
      }                                                                                                             \
      FN(tile_##FORMAT)(                                                                                            \
          rows, vectors, sums, weights + p * kv->value_units * WORDS, m->weight_stride, columns,                    \
          kv->value_columns, units, ahead_vectors, ahead, kv->value_columns);                                       \
    }                                                                                                               \
    if (half) {                                                                                                     \
      APUS_UNROLL for (int v = 0; v < vectors; v++) columns[v] = m->masked + column + 16 * v;                       \
      FN(tile_##FORMAT)(                                                                                            \
          rows, vectors, sums, weights + ((count - 1) * kv->value_units + tail - 1) * WORDS, m->weight_stride,      \
          columns, kv->value_columns, 1, 0, columns, 0);                                                            \
    }                                                                                                               \
    APUS_UNROLL for (int i = 0; i < rows; i++) {                                                                    \
      float *part = m->part + (row + i) * kv->value_columns + column;                                               \
      APUS_UNROLL for (int v = 0; v < vectors; v++) FN(store)(part + 16 * v, sums[i][v]);                           \
    }                                                                                                               \
  }                                                                                                                 \
                                                                                                                    \
  static void FN(score_rows_##FORMAT)(                                                                              \
      int rows, int fetches, tile_memory *m, int64_t row, const uint32_t *const *pages,                             \
      const uint32_t *const *ahead, int64_t index, int count, int64_t units) {                                      \
    if (fetches) {                                                                                                  \
      switch (rows) { APUS_EACH_ROWS(APUS_SCORE_CASE_FETCH, FORMAT) }                                               \
    } else {                                                                                                        \
      switch (rows) { APUS_EACH_ROWS(APUS_SCORE_CASE, FORMAT) }                                                     \
    }                                                                                                               \
  }                                                                                                                 \
                                                                                                                    \
  static void FN(value_rows_##FORMAT)(                                                                              \
      int rows, int vectors, int fetches, const apus_kv *kv, tile_memory *m, int64_t row,                           \
      const uint32_t *const *pages, int64_t count, int64_t column, int64_t tail, int half) {                        \
    if (vectors == 1) {                                                                                             \
      switch (rows) { APUS_EACH_ROWS(APUS_VALUE_CASE_1, FORMAT) }                                                   \
    } else if (fetches) {                                                                                           \
      switch (rows) { APUS_EACH_ROWS(APUS_VALUE_CASE_FETCH, FORMAT) }                                               \
    } else {                                                                                                        \
      switch (rows) { APUS_EACH_ROWS(APUS_VALUE_CASE_N, FORMAT) }                                                   \
    }                                                                                                               \
  }                                                                                                                 \
                                                                                                                    \
  static void FN(attend_##FORMAT)(const attention_call *c, const attention_item *item, tile_memory *m) {            \
    const apus_kv *kv = c->kv;                                                                                      \
    const apus_attention_arguments *batch = c->batch;                                                               \
    const int32_t *table = batch->pages + batch->page_offset[item->sequence];                                       \
    int64_t rows = 0;                                                                                               \
    int32_t end_position = 0;                                                                                       \
    const attention_item *members = item->members > 0 ? item->member : item;                                        \
    for (int32_t i = 0; i < (item->members > 0 ? item->members : 1); i++) {                                         \
      const attention_item *own = &members[i];                                                                      \
      int32_t first_position = batch->start[own->sequence] + own->token;                                            \
      end_position = (int32_t)apus_max(end_position, first_position + own->tokens);                                 \
      for (int64_t n = 0; n < (int64_t)own->tokens * c->group; n++, rows++) {                                       \
        int64_t token = batch->row_start[own->sequence] + own->token + n / c->group;                                \
        int64_t head = (int64_t)own->head * c->group + n % c->group;                                                \
        FN(take_q)(c, c->q + token * c->q_stride + head * kv->head_dimension, m->q + rows * m->q_stride);           \
        int32_t position = first_position + (int32_t)(n / c->group);                                                \
        m->low[rows] = lowest_position(batch, position);                                                            \
        m->high[rows] = position + 1;                                                                               \
        m->place[rows] = (int32_t)(own->partial + n);                                                               \
        m->state_sum[rows] = 0;                                                                                     \
      }                                                                                                             \
    }                                                                                                               \
    int64_t row_tiles = apus_ceil_div(rows, APUS_TILE_ROWS);                                                        \
    /* Few rows wait for memory: they ask for the pages that follow. Many rows compute longer than that takes. */   \
    int fetches = row_tiles <= 2;                                                                                   \
    for (int32_t split = item->first_split; split <= item->last_split; split++) {                                   \
      int64_t begin = apus_max((int64_t)split * APUS_KV_SPLIT, m->low[0]);                                          \
      int64_t end = apus_min((int64_t)(split + 1) * APUS_KV_SPLIT, end_position);                                   \
      int64_t first_page = begin / APUS_KV_PAGE_SIZE;                                                               \
      int64_t last_page = apus_ceil_div(end, APUS_KV_PAGE_SIZE);                                                    \
      int64_t pages = last_page - first_page;                                                                       \
      for (int64_t p = 0; p < pages;) {                                                                             \
        /* Rows in the inner loop: the pages' keys stay in the nearest cache. */                                    \
        const uint32_t *keys[4], *ahead[4];                                                                         \
        int count = (int)apus_min(APUS_PAGES_AT_ONCE, pages - p);                                                   \
        for (int v = 0; v < 4; v++) {                                                                               \
          int64_t page = first_page + p + (v < count ? v : count - 1);                                              \
          keys[v] = apus_kv_keys(kv, table[page], item->head);                                                      \
          ahead[v] = apus_kv_keys(kv, table[apus_min(page + count, last_page - 1)], item->head);                    \
          if (kv->narrow) {                                                                                         \
            uint32_t *wide = m->keys + v * kv->key_units * APUS_KV_PAGE_SIZE;                                       \
            if (v < count) {                                                                                        \
              const float *scales = apus_kv_scales(kv, table[page], item->head);                                    \
              if (fetches) FN(fetch)(ahead[v], kv->head_words);                                                     \
              FN(widen)(kv->dtype, keys[v], wide, kv->key_units * 2 * APUS_KV_PAGE_SIZE);                           \
              memcpy(m->key_scales + (p + v) * 16, scales, 64);                                                     \
              memcpy(m->value_scales + (p + v) * 16, scales + 16, 64);                                              \
            }                                                                                                       \
            keys[v] = v < count ? wide : keys[v - 1];                                                               \
          }                                                                                                         \
        }                                                                                                           \
        for (int64_t t = 0; t < row_tiles; t++) {                                                                   \
          int64_t row = rows * t / row_tiles;                                                                       \
          FN(score_rows_##FORMAT)(                                                                                  \
              (int)(rows * (t + 1) / row_tiles - row), fetches && t == 0 && !kv->narrow, m, row, keys, ahead, p, count, \
              kv->key_units);                                                                                       \
        }                                                                                                           \
        p += count;                                                                                                 \
      }                                                                                                             \
      for (int64_t p = 0; kv->narrow && p < pages; p++) {                                                           \
        FN(widen)(                                                                                                  \
            kv->dtype, apus_kv_values(kv, table[first_page + p], item->head),                                       \
            m->values + p * kv->value_units * kv->value_columns, kv->value_units * kv->value_columns * 2);          \
      }                                                                                                             \
      for (int64_t p = 0; kv->latent && p < pages; p++) {                                                           \
        FN(turn)(                                                                                                   \
            kv, apus_kv_keys(kv, table[first_page + p], 0), m->values + p * kv->value_units * kv->value_columns);   \
      }                                                                                                             \
      for (int64_t p = first_page;                                                                                  \
           fetches && !kv->narrow && !kv->latent && p < apus_min(last_page, first_page + 2); p++) {                 \
        FN(fetch)(apus_kv_values(kv, table[p], item->head), kv->value_units * kv->value_columns);                   \
      }                                                                                                             \
      for (int64_t r = 0; r < rows; r++) FN(weigh)(c, m, r, first_page, last_page);                                 \
      /* What lies behind the last position of its page may be anything, even NaN: it must not be multiplied. */    \
      int64_t tokens = end - (last_page - 1) * APUS_KV_PAGE_SIZE;                                                   \
      int64_t in_unit = APUS_KV_PAGE_SIZE / kv->value_units;                                                        \
      int64_t tail = apus_ceil_div(tokens, in_unit);                                                                \
      int half = tokens % in_unit != 0;                                                                             \
      const uint32_t *values[pages_in_split];                                                                       \
      for (int64_t p = 0; p < pages; p++) values[p] = FN(page_values)(c, m, table + first_page, p, item->head);     \
      if (half) {                                                                                                   \
        const uint32_t *last = values[pages - 1] + (tail - 1) * kv->value_columns;                                  \
        for (int64_t i = 0; i < kv->value_columns; i++) {                                                           \
          if (kv->compute == APUS_BFLOAT16) {                                                                       \
            m->masked[i] = last[i] & 0xffffu;                                                                       \
          } else {                                                                                                  \
            m->masked[i] = i % 16 < 8 ? last[i] : 0;                                                                \
          }                                                                                                         \
        }                                                                                                           \
      }                                                                                                             \
      for (int64_t p = last_page; fetches && split < item->last_split && p < last_page + 2; p++) {                  \
        int64_t page = apus_min(p, (end_position - 1) / APUS_KV_PAGE_SIZE);                                         \
        FN(fetch)(apus_kv_keys(kv, table[page], item->head), kv->key_units * APUS_KV_PAGE_SIZE);                    \
      }                                                                                                             \
      for (int64_t column = 0; column < kv->value_columns;) {                                                       \
        int vectors = rows == 1 ? APUS_VECTORS(1, APUS_VALUE_VECTORS) : APUS_VALUE_BLOCK;                           \
        if (kv->value_columns - column < 16 * vectors) vectors = 1;                                                 \
        for (int64_t t = 0; t < row_tiles; t++) {                                                                   \
          int64_t row = rows * t / row_tiles;                                                                       \
          int here = (int)(rows * (t + 1) / row_tiles - row);                                                       \
          int step = vectors == 1 ? 1 : APUS_VECTORS(here, APUS_VALUE_VECTORS);                                     \
          for (int v = 0; v < vectors; v += step) {                                                                 \
            FN(value_rows_##FORMAT)(                                                                                \
                here, step, fetches && t == 0, kv, m, row, values, pages, column + 16 * v, tail, half);             \
          }                                                                                                         \
        }                                                                                                           \
        column += 16 * vectors;                                                                                     \
      }                                                                                                             \
      for (int64_t r = 0; r < rows; r++) {                                                                          \
        const float *part = m->part + r * kv->value_columns;                                                        \
        if (item->partial >= 0) {                                                                                   \
          float *partial = c->partials + m->place[r] * c->partial_stride;                                           \
          partial[0] = m->part_max[r];                                                                              \
          partial[1] = m->part_sum[r];                                                                              \
          memcpy(partial + 2, part, (size_t)kv->value_columns * 4);                                                 \
        } else {                                                                                                    \
          FN(fold)(                                                                                                 \
              &m->state_max[r], &m->state_sum[r], m->state + r * kv->value_columns, m->part_max[r],                 \
              m->part_sum[r], part, kv->value_columns);                                                             \
        }                                                                                                           \
      }                                                                                                             \
    }                                                                                                               \
    if (item->partial >= 0) return;                                                                                 \
    for (int64_t r = 0; r < rows; r++) {                                                                            \
      FN(finish)(c, item, r, m->state + r * kv->value_columns, m->state_max[r], m->state_sum[r]);                   \
    }                                                                                                               \
  }

// Tiles of one row and of several may have different numbers of vectors; scores of up to four pages are made at once.
#undef APUS_PAGES_AT_ONCE
#undef APUS_SCORE_VECTORS
#undef APUS_VALUE_VECTORS
#undef APUS_VALUE_BLOCK
#define APUS_PAGES_AT_ONCE 4
#if APUS_LEVEL >= 2
#define APUS_SCORE_VECTORS 4
#define APUS_VALUE_VECTORS 4
#define APUS_VALUE_BLOCK 4
#else
#define APUS_VALUE_BLOCK (APUS_LEVEL == 1 ? 2 : 1)
#define APUS_SCORE_VECTORS 1
#define APUS_VALUE_VECTORS 1
#endif

#undef APUS_SCORES
#define APUS_SCORES(FORMAT, N, FETCHES)                                                                             \
  case N:                                                                                                           \
    for (int v = 0; v < count; v += APUS_VECTORS(N, APUS_SCORE_VECTORS)) {                                          \
      FN(score_##FORMAT)(                                                                                           \
          N, APUS_VECTORS(N, APUS_SCORE_VECTORS), FETCHES ? APUS_VECTORS(N, APUS_SCORE_VECTORS) : 0, m, row,        \
          pages + v, ahead + v, index + v, count - v, units);                                                       \
    }                                                                                                               \
    break;
// One row alone has few sums; several vectors keep the multipliers busy while a sum waits for itself.
#undef APUS_VECTORS
#define APUS_VECTORS(N, MANY) ((N) == 1 && APUS_TILE_VECTORS(1) == 4 ? 4 : (N) == 3 && APUS_LEVEL == 1 ? 2 : MANY)
#undef APUS_SCORE_CASE
#define APUS_SCORE_CASE(FORMAT, N) APUS_SCORES(FORMAT, N, 0)
#undef APUS_SCORE_CASE_FETCH
#define APUS_SCORE_CASE_FETCH(FORMAT, N) APUS_SCORES(FORMAT, N, 1)
#undef APUS_VALUES
#define APUS_VALUES(FORMAT, N, VECTORS, AHEAD)                                                                      \
  case N:                                                                                                           \
    FN(values_##FORMAT)(N, VECTORS, AHEAD, kv, m, row, pages, count, column, tail, half);                           \
    break;
#undef APUS_VALUE_CASE_1
#define APUS_VALUE_CASE_1(FORMAT, N) APUS_VALUES(FORMAT, N, 1, 0)
#undef APUS_VALUE_CASE_N
#define APUS_VALUE_CASE_N(FORMAT, N) APUS_VALUES(FORMAT, N, APUS_VECTORS(N, APUS_VALUE_VECTORS), 0)
#undef APUS_VALUE_CASE_FETCH
#define APUS_VALUE_CASE_FETCH(FORMAT, N)                                                                            \
  APUS_VALUES(FORMAT, N, APUS_VECTORS(N, APUS_VALUE_VECTORS), APUS_VECTORS(N, APUS_VALUE_VECTORS))
#undef APUS_EACH_ROWS
#if APUS_TILE_ROWS == 6
#define APUS_EACH_ROWS(CASE, FORMAT)                                                                                \
  CASE(FORMAT, 1) CASE(FORMAT, 2) CASE(FORMAT, 3) CASE(FORMAT, 4) CASE(FORMAT, 5) CASE(FORMAT, 6)
#elif APUS_TILE_ROWS == 4
#define APUS_EACH_ROWS(CASE, FORMAT) CASE(FORMAT, 1) CASE(FORMAT, 2) CASE(FORMAT, 3) CASE(FORMAT, 4)
#else
#define APUS_EACH_ROWS(CASE, FORMAT) CASE(FORMAT, 1) CASE(FORMAT, 2)
#endif

APUS_ATTEND(float32, 1)
APUS_ATTEND(float16, 2)
APUS_ATTEND(bfloat16, APUS_WIDE_WORDS)

#endif
