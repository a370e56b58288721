// The CPU backend's inner loops.
//
// Conventions. A matrix is an address, a number of rows and a stride: how many *numbers* lie between the starts of
// two rows. The numbers of a row are adjacent and need no alignment. Activations are float32. Every function
// returns when its work is done; it uses the threads of the context it is given. A context serves one call at a
// time: the caller sees to that. Nothing is allocated in steady state: scratch memory grows to what the largest
// call needed and stays.
//
// Law. Each row of a result is a function of that row's inputs alone: the number of rows, the other rows, the
// number of threads and how work is cut into pieces never change a bit of it. Another instruction set may (see
// `apus_isa`).
//
// Functions check nothing that the caller can know: shapes and indices must be right.

#ifndef CKERNELS_H
#define CKERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// MARK: Context

/// Levels of instruction sets, each containing those before it that its architecture has.
typedef enum {
  /// What every processor of the architecture has; vectors as the compiler lowers them (NEON on aarch64).
  APUS_ISA_PORTABLE = 0,
  /// AVX2, FMA and F16C.
  APUS_ISA_AVX2 = 1,
  /// AVX-512 F, BW, VL, DQ and CD.
  APUS_ISA_AVX512 = 2,
  /// AVX-512 with the dot products of bfloat16 (BF16) and int8 (VNNI).
  APUS_ISA_AVX512_BF16 = 3,
  /// aarch64: NEON with dot products of int8 (FEAT_DotProd).
  APUS_ISA_NEON_DOT = 4,
  /// aarch64: with products of int8 matrices and of unsigned with signed bytes too (FEAT_I8MM).
  APUS_ISA_NEON_I8MM = 5,
} apus_isa;

/// How many levels are numbered.
enum { APUS_ISAS = 6 };

/// How numbers are stored. In a linear layer, `APUS_INT8` stands for W8A8: int8 with a scale for each output. In K/V
/// pages, `APUS_INT8` and `APUS_FLOAT8` (e4m3) have a scale for each token and head. Nothing else takes these two.
typedef enum {
  APUS_FLOAT32 = 0,
  APUS_FLOAT16 = 1,
  APUS_BFLOAT16 = 2,
  APUS_INT8 = 3,
  APUS_FLOAT8 = 4,
} apus_dtype;

/// Threads, scratch memory and the level of instructions that a call uses.
typedef struct apus_context apus_context;

/// Whether this processor and its operating system can run a level.
int apus_isa_supported(apus_isa isa);

/// The highest level that this processor can run.
apus_isa apus_isa_best(void);

/// Makes a context of `threads` threads, the caller included (so `threads - 1` workers are started, named
/// "apus-cpu-1" and on). Where `processors` is not NULL it holds one processor number for each thread; worker i is
/// pinned to processors[i], and the caller is left where it is. Returns NULL when memory or threads cannot be had.
/// The level must be supported.
apus_context *apus_context_create(int threads, apus_isa isa, const int32_t *processors);

/// Ends the workers and frees the context. No call may be running.
void apus_context_free(apus_context *context);

/// Threads of a context, the caller included.
int apus_context_threads(const apus_context *context);

/// Level of a context.
apus_isa apus_context_isa(const apus_context *context);

/// Bytes of scratch memory that the context holds.
size_t apus_context_scratch_bytes(const apus_context *context);

/// A piece of a parallel region: `chunk` of the chunks, run by thread `thread` of the pool.
typedef void (*apus_task)(void *argument, int chunk, int thread);

/// Runs `task` once for each chunk in 0..<chunks, on the caller and the workers, and returns when all have finished.
/// Which thread runs which chunk is not determined. At most 1,048,575 chunks. A task must not start another region.
void apus_parallel(apus_context *context, int chunks, apus_task task, void *argument);

// MARK: Conversions and random numbers

/// Converts `count` numbers between float32, float16 and bfloat16, rounding to nearest even. The areas do not
/// overlap.
void apus_convert(
    apus_context *context, const void *from, apus_dtype from_dtype, void *to, apus_dtype to_dtype, size_t count);

/// The standard finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
uint64_t apus_splitmix64(uint64_t z);

/// A number in [0, 1), a multiple of 2^-24, that is a function of the seed and the position alone: the first word
/// of Philox4x32-10 (Salmon et al.: Parallel random numbers: as easy as 1, 2, 3, 2011) with the position as counter
/// and the seed as key, shifted right by 8.
float apus_uniform(uint64_t seed, uint64_t position);

/// Dummy weights: number i is offset + scale * (2 u - 1) in float32, rounded to nearest even to float16 or
/// bfloat16, where u = (splitmix64(key + i * 0x9E3779B97F4A7C15) >> 40) / 2^24.
void apus_fill_uniform(
    apus_context *context, void *to, apus_dtype dtype, size_t count, uint64_t key, float scale, float offset);

// MARK: Linear layers

/// The weights of a linear layer, packed.
typedef struct apus_linear apus_linear;

/// Rows of weights before packing: row-major, `columns` numbers a row, at any address.
typedef struct {
  const void *address;
  apus_dtype dtype;
  int64_t rows;
  /// [rows]: what an integer of each row stands for; for `APUS_INT8` alone, else NULL.
  const float *scales;
} apus_weight_rows;

/// Room for `outputs` x `inputs` weights. Returns NULL when there is no memory.
apus_linear *apus_linear_create(int64_t outputs, int64_t inputs, apus_dtype format);

/// Frees packed weights.
void apus_linear_free(apus_linear *weight);

/// Packs the rows of the sources, stacked in order; together they have as many rows as the weight has outputs. For
/// `APUS_INT8`, each output's scale is its largest magnitude / 127 and its numbers are rounded to nearest even; sources of
/// that type keep their integers and scales, and go into that format alone.
void apus_linear_pack(apus_context *context, apus_linear *weight, const apus_weight_rows *sources, int count);

/// How far int8 weights are from the rows that they were packed from: the root of the summed squared differences,
/// divided by that of the rows.
double apus_linear_int8_error(
    apus_context *context, const apus_linear *weight, const apus_weight_rows *sources, int count);

/// Bytes of packed weights, scales included.
size_t apus_linear_bytes(const apus_linear *weight);

/// What the codes of quantised weights stand for.
typedef enum {
  /// The code itself.
  APUS_LEVELS_LINEAR = 0,
  /// 4 bits: twice an e2m1 number (0, 1, 2, 3, 4, 6, 8, 12 and their negatives), as in MXFP4.
  APUS_LEVELS_E2M1 = 1,
  /// 4 bits: the levels of GGUF's IQ4_NL.
  APUS_LEVELS_IQ4_NL = 2,
  /// 8 bits: a float8 number, e4m3 (without infinities; the two codes for NaN count as 480 and -480).
  APUS_LEVELS_E4M3 = 3,
} apus_levels;

/// Where the minimums of groups come from.
typedef enum {
  APUS_MINIMUM_NONE = 0,
  /// A number for each group, or where scales have factors for each block, times an unsigned factor for each group.
  APUS_MINIMUM_OWN = 1,
  /// The group's scale times an unsigned factor, a zero point.
  APUS_MINIMUM_ZERO_POINT = 2,
} apus_minimum;

/// How weights are stored as codes in groups: weight = (level(code) - offset) * scale - minimum.
typedef struct {
  /// Bits of a code: 4, 5, 6 or 8.
  int32_t bits;
  apus_levels levels;
  int32_t offset;
  /// Neighbouring inputs of an output that share a scale: a multiple of 32, or 16 with linear codes of 4 or 6 bits; a
  /// divisor or a multiple of `block`.
  int32_t group;
  /// Neighbouring inputs of a row of x that share a scale when x is rounded to int8: 32, 64, 128 or 256.
  int32_t block;
  /// How scales and minimums are stored.
  apus_dtype scale_dtype;
  /// Whether there is one scale for each block, multiplied with a signed factor of 8 bits for each group.
  int32_t has_factors;
  apus_minimum minimum;
} apus_code_layout;

/// Rows of codes to pack, each array row by row without gaps. G is inputs / group and B inputs / block, rounded up.
typedef struct {
  /// [rows][inputs].
  const uint8_t *codes;
  /// [rows][G], with factors [rows][B].
  const float *scales;
  /// [rows][G], or NULL.
  const int8_t *factors;
  /// As scales, or NULL.
  const float *minimums;
  /// [rows][G], or NULL.
  const uint8_t *minimum_factors;
} apus_code_rows;

/// Outputs that are packed together.
enum { APUS_CODES_PANEL = 64 };

/// Room for weights that stay quantised. `order` is NULL, or holds for each place of the packed weights' inputs the
/// number of x that belongs there. Returns NULL when there is no memory or no such layout.
apus_linear *apus_linear_create_codes(
    int64_t outputs, int64_t inputs, const apus_code_layout *layout, const int32_t *order);

/// Packs the outputs of one panel (APUS_CODES_PANEL of them, the last panel has fewer), on the calling thread. Panels
/// may be packed at the same time by several threads. Scales are rounded to their type.
void apus_linear_pack_codes(apus_linear *weight, int64_t panel, const apus_code_rows *rows);

/// Rounds weights of a float type to the codes of `weight`, whose layout has no factors, minimums or order. Of the
/// scales that are tried for a group, the one with the least squared error is kept.
void apus_linear_quantize(apus_context *context, apus_linear *weight, const apus_weight_rows *sources, int count);

/// The numbers that an output of quantised weights stands for: [inputs], in the order of x. For tests.
void apus_linear_read_codes(const apus_linear *weight, int64_t output, float *numbers);

/// out[r, n] = sum over k of x[r, k] * weight[n, k], plus bias[n] where `bias` is not NULL. `out` may not overlap
/// `x`.
///
/// float32 and float16 weights: products and sums in float32, k in rising order. bfloat16 weights: x is rounded to
/// bfloat16 (nearest even), products are exact and sums are float32, k in rising order (in pairs). int8 weights:
/// each row of x is scaled by 127 / its largest magnitude and rounded to nearest even, sums are exact integers.
/// Codes: each block of each row of x is scaled by 127 / its largest magnitude and rounded to nearest even; sums within
/// a group are exact integers, multiplied with the scale and added in rising order, then multiplied with the block's
/// scale and added in rising order, all without fused operations: the same bits at every level. float8 codes: as
/// bfloat16, each group's sum multiplied with its scale.
void apus_linear_run(
    apus_context *context, const apus_linear *weight, const float *x, int64_t x_stride, int64_t rows, const float *bias,
    float *out, int64_t out_stride);

/// A piece of memory.
typedef struct {
  void *address;
  size_t bytes;
} apus_region;

/// Pieces of memory that a weight is made of, at most.
enum { APUS_REGIONS = 3 };

/// What identifies how packed weights lie in memory. To be raised with every change of a layout, of codes or of panels, so
/// that files of packed weights that an earlier version wrote are not taken.
enum { APUS_PACKED_LAYOUT = 1 };

/// The memory that a packed weight is made of. Returns how many pieces.
int apus_linear_regions(const apus_linear *weight, apus_region regions[APUS_REGIONS]);

/// A packed weight over memory that holds what `apus_linear_regions` gave for an equal one, aligned to 64 bytes. It is only
/// read, and must live longer than the weight. Returns NULL if the sizes are not those of such a weight or when there is no
/// memory.
apus_linear *apus_linear_view(
    int64_t outputs, int64_t inputs, apus_dtype format, const apus_region regions[APUS_REGIONS], int count);

/// The same for weights that stay quantised.
apus_linear *apus_linear_view_codes(
    int64_t outputs, int64_t inputs, const apus_code_layout *layout, const apus_region regions[APUS_REGIONS],
    int count);

/// A checksum of 64 bits of memory, computed on all threads, against damage and not against attackers. Pieces of 256 KiB are
/// summed by themselves in eight lanes of 8 bytes; each word is mixed in by a bijection, so that a change of a single word
/// always changes the sum.
uint64_t apus_checksum(apus_context *context, const void *memory, size_t bytes);

/// Outputs of a weight that are packed together: panels of 64.
int64_t apus_linear_panels(const apus_linear *weight);

/// Computes the outputs of panels first..<last alone: as `apus_linear_run`, whose `bias` and `out` begin with the weight's
/// first output.
void apus_linear_run_panels(
    apus_context *context, const apus_linear *weight, int64_t first, int64_t last, const float *x, int64_t x_stride,
    int64_t rows, const float *bias, float *out, int64_t out_stride);

// MARK: Mixtures of experts

/// How a row's logits become scores.
typedef enum {
  APUS_SCORE_SOFTMAX = 0,
  APUS_SCORE_SIGMOID = 1,
  /// The logits choose, and the weights are the softmax of those that are chosen.
  APUS_SCORE_SOFTMAX_OF_CHOSEN = 2,
} apus_score;

/// How rows choose experts.
typedef struct {
  int32_t experts;
  /// Experts of a row, at most `experts`.
  int32_t per_row;
  apus_score score;
  /// Neighbouring experts form `groups` groups of equal size; only experts of the best `groups_per_row` are chosen.
  int32_t groups;
  int32_t groups_per_row;
  /// A group counts as much as its best expert (1) or its two best together (2).
  int32_t experts_in_group_score;
  /// Whether a row's weights are divided by their sum.
  int32_t normalizes;
  /// Multiplies the weights.
  float scale;
  /// [experts]: added to scores for the choice alone; NULL for none.
  const float *correction;
} apus_routing;

/// Chooses experts: chosen[r] and weights[r] are [per_row], in rising order of the experts' numbers. Ties go to the smaller
/// number, of experts and of groups. Where logits are not finite, the experts are different ones that exist.
void apus_route(
    apus_context *context, const apus_routing *routing, const float *logits, int64_t stride, int64_t rows,
    int32_t *chosen, float *weights);

/// What products of many weights at once need of each thread.
typedef struct apus_groups apus_groups;

/// For the threads of a context. Returns NULL when there is no memory.
apus_groups *apus_groups_create(const apus_context *context);
void apus_groups_free(apus_groups *groups);
size_t apus_groups_scratch_bytes(const apus_groups *groups);

/// The weight of a group, or a part of it where a group's weight is several side by side.
typedef struct {
  const apus_linear *weight;
  /// [outputs] or NULL.
  const float *bias;
  /// The column of `out` where its outputs begin.
  int64_t column;
  int32_t group;
} apus_group_part;

/// Linear layers with rows of their own: rows starts[g]..<starts[g] + counts[g] of `out` are those of `x` times the weights
/// of group g. The bits are those of `apus_linear_run`.
void apus_grouped_run(
    apus_context *context, apus_groups *groups, const apus_group_part *parts, int count, const int32_t *starts,
    const int32_t *counts, const float *x, int64_t x_stride, float *out, int64_t out_stride);

/// The same for groups that have all rows in columns of their own: group g's rows begin `g * x_step` numbers into those of
/// x and `g * out_step` into those of out. As heads have theirs.
void apus_columns_run(
    apus_context *context, apus_groups *groups, const apus_group_part *parts, int count, const float *x,
    int64_t x_stride, int64_t x_step, int64_t rows, float *out, int64_t out_stride, int64_t out_step);

/// What joins the two halves of a feed-forward layer.
typedef struct {
  /// 0: silu(gate) * up. Else gate is at most `limit` and up within +-limit, and the result is
  /// gate * sigmoid(alpha * gate) * (up + 1).
  float limit;
  float alpha;
} apus_gate;

/// out[r, i] = gate_up[r, i] and gate_up[r, width + i], joined, for the rows of all groups. `out` may be the gate's half.
void apus_grouped_gate(
    apus_context *context, const int32_t *starts, const int32_t *counts, int groups, apus_gate gate,
    const float *gate_up, int64_t stride, int64_t width, float *out, int64_t out_stride);

/// out[r] = sum over k of weights[r, k] * results[places[r, k]], in rising order of k, where places and weights are
/// [rows, per_row]. Where `adds` is not 0, what `out` holds is added last; with `shared_gate` ([rows], `shared_gate_stride`
/// numbers apart) times its sigmoid.
void apus_combine(
    apus_context *context, const float *results, int64_t results_stride, const int32_t *places, const float *weights,
    int per_row, int adds, const float *shared_gate, int64_t shared_gate_stride, int64_t rows, int64_t columns,
    float *out, int64_t out_stride);

// MARK: Ceilings

/// Products that a machine's peak is measured with.
typedef enum {
  /// float32 fused multiply-add.
  APUS_PRODUCT_FLOAT32 = 0,
  /// Pairs of bfloat16 numbers; where there are no instructions for them, as float32.
  APUS_PRODUCT_BFLOAT16 = 1,
  /// int8: four at a time (VNNI), else as 16-bit pairs.
  APUS_PRODUCT_INT8 = 2,
  /// Codes of up to 6 bits times int8: as int8 with VNNI, else pairs summed in 16 bits.
  APUS_PRODUCT_CODES = 3,
} apus_product;

/// Reads memory front to back on all threads, with plain vector loads, each thread pieces of 1 MiB. Returns something
/// that depends on what was read.
uint64_t apus_read_memory(apus_context *context, const void *memory, size_t bytes);

/// Does independent products in registers on all threads: `rounds` rounds on each. Returns the arithmetic operations
/// done, a product and a sum being two.
double apus_do_products(apus_context *context, apus_product product, int64_t rounds);

// MARK: K/V pages and attention

/// Tokens in a K/V page.
enum { APUS_KV_PAGE_SIZE = 16 };

/// Tokens in a piece of the fixed division of a row's positions in attention.
enum { APUS_KV_SPLIT = 256 };

/// One layer's K/V pages.
typedef struct apus_kv apus_kv;

/// Zeroed pages of any type. Returns NULL when there is no memory.
apus_kv *apus_kv_create(int64_t pages, int kv_heads, int head_dimension, apus_dtype dtype);

/// Zeroed latent pages, as multi-head latent attention has them: for each token one key of `key_dimension` numbers that
/// all query heads share, the first `value_dimension` of which are its value as well. Of any float type; NULL for
/// others, for impossible dimensions, and when there is no memory.
apus_kv *apus_kv_create_latent(int64_t pages, int key_dimension, int value_dimension, apus_dtype dtype);

/// Frees pages.
void apus_kv_free(apus_kv *kv);

/// Bytes of all the pages.
size_t apus_kv_bytes(const apus_kv *kv);

/// Bytes of one page with all its heads. A page's bytes are contiguous: page p begins at p * apus_kv_page_bytes.
size_t apus_kv_page_bytes(const apus_kv *kv);

/// The first byte of page 0.
void *apus_kv_data(const apus_kv *kv);

/// Writes `rows` rows of k and v ([rows, kv_heads * head_dimension]) to slots = page * APUS_KV_PAGE_SIZE + position
/// in the page, rounding to nearest even; with 8 bits after a division by largest magnitude / 127 (float8: / 448) of the
/// token's head. Rows with a negative slot are skipped. For latent pages k is [rows, key_dimension] and v is NULL.
void apus_kv_write(
    apus_context *context, apus_kv *kv, const float *k, int64_t k_stride, const float *v, int64_t v_stride,
    int64_t rows, const int32_t *slots);

/// Reads one token's K and V of all heads back ([kv_heads * head_dimension] each), for tests and transfers. Latent pages
/// have no V of their own; `v` may be NULL.
void apus_kv_read(const apus_kv *kv, int32_t slot, float *k, float *v);

/// Copies whole pages, from[i] to to[i], in rising order of i.
void apus_kv_copy(apus_context *context, apus_kv *kv, const int32_t *from, const int32_t *to, int count);

/// Copies pages between layers of equal heads, dimension and dtype.
void apus_kv_copy_between(
    apus_context *context, const apus_kv *source, apus_kv *target, const int32_t *from, const int32_t *to, int count);

/// The sequences and constants of an attention call; see ApusTensors.AttentionBatch and AttentionShape.
typedef struct {
  int32_t sequences;
  const int32_t *row_start;
  const int32_t *start;
  const int32_t *page_offset;
  const int32_t *pages;
  int32_t query_heads;
  float scale;
  /// Positions that a row attends to, its own included; 0 for all.
  int32_t window;
  /// 0 for none.
  float soft_cap;
  /// [query_heads]: a logit for each query head that competes with the positions and has no value, so that a head may
  /// attend to nothing; NULL for none.
  const float *sinks;
  /// Not 0: pages that sequences share are read once for each of them, the plain form. The bits are the same.
  int32_t is_plain;
} apus_attention_arguments;

/// Causal attention over paged K/V. Row i of sequence s (rows row_start[s] + i of q and out) is at position
/// start[s] + i. q and out are [rows, query_heads * head_dimension]; query head h uses K/V head h / (query_heads /
/// kv_heads). With latent pages q is [rows, query_heads * key_dimension] and out [rows, query_heads * value_dimension].
///
/// With 16-bit K/V, q and the exponentials are rounded to that precision for bfloat16 and kept in float32 for
/// float16; sums are float32. K/V of 8 bits count as bfloat16, which holds them exactly; scores are multiplied with the
/// key's scale and exponentials with the value's before they are rounded. Positions are divided into pieces of APUS_KV_SPLIT; each piece has a maximum and sums
/// of its own and pieces are joined in rising order.
void apus_attention(
    apus_context *context, const apus_kv *kv, const float *q, int64_t q_stride, float *out, int64_t out_stride,
    const apus_attention_arguments *arguments);

// MARK: Row operators

/// out[i] = table[tokens[i]]; `table` is [*, columns] of any float type.
void apus_embed(
    apus_context *context, const void *table, apus_dtype dtype, int64_t table_stride, const int32_t *tokens,
    int64_t count, int64_t columns, float *out, int64_t out_stride);

/// out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight. `x` may be `out`.
void apus_rms_norm(
    apus_context *context, const float *x, int64_t x_stride, int64_t rows, int64_t columns, const void *weight,
    apus_dtype weight_dtype, float epsilon, float *out, int64_t out_stride);

/// residual += delta, then out = rms_norm(residual). `out` may be `delta`.
void apus_add_rms_norm(
    apus_context *context, float *residual, int64_t residual_stride, const float *delta, int64_t delta_stride,
    int64_t rows, int64_t columns, const void *weight, apus_dtype weight_dtype, float epsilon, float *out,
    int64_t out_stride);

/// Normalises each head of each row in place.
void apus_head_rms_norm(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension, const void *weight,
    apus_dtype weight_dtype, float epsilon);

/// Rotates the first 2 * half numbers of each head, in place, in the half-split form: (a, b) = (x[i], x[i + half])
/// becomes (a cos - b sin, b cos + a sin). Row r uses table[positions[r]]: half cosines, then half sines.
void apus_rope(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension,
    const int32_t *positions, const float *table, int64_t table_stride, int half);

/// Rotates `2 * half` numbers of each head that begin at number `offset` of it, in place, in the interleaved form: (a, b) =
/// (x[2 i], x[2 i + 1]) becomes (a cos - b sin, b cos + a sin). The table is that of `apus_rope`.
void apus_rope_interleaved(
    apus_context *context, float *x, int64_t x_stride, int64_t rows, int heads, int head_dimension, int offset,
    const int32_t *positions, const float *table, int64_t table_stride, int half);

/// out[r, i] = silu(gate_up[r, i]) * gate_up[r, columns + i], silu(x) = x / (1 + exp(-x)). `out` may be the gate's
/// half.
void apus_silu_mul(
    apus_context *context, const float *gate_up, int64_t gate_up_stride, int64_t rows, int64_t columns, float *out,
    int64_t out_stride);

/// x += y.
void apus_add(
    apus_context *context, float *x, int64_t x_stride, const float *y, int64_t y_stride, int64_t rows, int64_t columns);

// MARK: Bidirectional encoders

/// Functions that are applied to each number between the two layers of a feed-forward block.
typedef enum {
  /// x times the normal distribution's cumulative probability, through erf.
  APUS_GELU = 0,
  /// Its approximation through tanh.
  APUS_GELU_TANH = 1,
  APUS_RELU = 2,
  /// x / (1 + exp(-x)).
  APUS_SILU = 3,
} apus_activation;

/// out[r] = (z - mean(z)) / sqrt(variance(z) + epsilon) * weight + bias, z = x[r] + y[r], or x[r] where y is NULL. The
/// variance is the mean of squares. `weight` and `bias` are [columns]. `out` may be `x` or `y`.
void apus_layer_norm(
    apus_context *context, const float *x, int64_t x_stride, const float *y, int64_t y_stride, int64_t rows,
    int64_t columns, const float *weight, const float *bias, float epsilon, float *out, int64_t out_stride);

/// Applies a function to each number, in place.
void apus_activate(
    apus_context *context, float *x, int64_t stride, int64_t rows, int64_t columns, apus_activation activation);

/// Attention of every row to all rows of its sequence: out = softmax(q k^T * scale) v for each head. Rows of q, k and v
/// hold heads of `head_dimension` numbers side by side and lie `stride` numbers apart. Sequence i has the rows
/// row_start[i]..<row_start[i + 1].
void apus_attend_all(
    apus_context *context, const float *q, const float *k, const float *v, int64_t stride, const int32_t *row_start,
    int sequences, int heads, int head_dimension, float scale, float *out, int64_t out_stride);

/// out[i] = x[rows[i]].
void apus_gather(
    apus_context *context, const float *x, int64_t x_stride, const int32_t *rows, int64_t count, int64_t columns,
    float *out, int64_t out_stride);

// MARK: Logits

/// How a row of logits becomes a token.
typedef struct {
  /// Below 1e-6: the largest logit, ties to the smaller token.
  float temperature;
  /// Below 1: all tokens.
  int32_t top_k;
  float top_p;
  float min_p;
  /// The draw, in [0, 1).
  float uniform;
} apus_sampling_row;

/// Changes a row's logits for tokens that were seen, each token once: divided by `repetition` where positive,
/// multiplied where not; then less frequency * counts[i], and less `presence` where counts[i] > 0. Tokens out of
/// range are skipped.
void apus_apply_penalties(
    float *logits, int64_t columns, const int32_t *tokens, const int32_t *counts, int64_t count, float repetition,
    float frequency, float presence);

/// Sets the logits of tokens to negative infinity whose bit (i % 32 of word i / 32) is not set in a mask; tokens beyond
/// its words have no bit.
void apus_mask_logits(float *logits, int64_t columns, const uint32_t *mask, int64_t words);

/// Draws a token for each row: -1 where the row holds a NaN, a positive infinity, or nothing but negative
/// infinities.
///
/// Probabilities are softmax(logits / temperature). Top-k keeps the k largest, ties to the smaller token. Top-p
/// keeps, of what remains renormalised, the largest until their sum reaches top_p, ties to the smaller token. Min-p
/// keeps those of at least min_p times the largest. The draw walks the kept tokens in the order of their ids until
/// `uniform` of their sum is passed. Rows are overwritten.
void apus_sample(
    apus_context *context, float *logits, int64_t stride, int64_t rows, int64_t columns,
    const apus_sampling_row *parameters, int32_t *tokens);

/// log(sum(exp(row))).
float apus_log_sum_exp(apus_context *context, const float *logits, int64_t columns);

/// The `k` largest entries, largest first, ties to the smaller token. NaN counts as negative infinity. Where k
/// exceeds the columns the rest is (-1, negative infinity).
void apus_top_k(
    apus_context *context, const float *logits, int64_t columns, int k, int32_t *tokens, float *values);

#ifdef __cplusplus
}
#endif

#endif
