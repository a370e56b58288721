// Quantised weights: how they lie in memory. Shared by packing and products.
//
// A weight is (level(code) - offset) * scale, or code * scale - minimum, where scale and minimum belong to a group of
// neighbouring inputs of one output. Panels of 64 outputs are cut into blocks of inputs, which are stored one after
// the other, so that a pass over a panel reads memory front to back:
//
//   block  = scales [tops][64], factors [groups][64], minimums [tops][64], minimum factors [groups][64],
//            then sub-blocks of 32 inputs
//   sub-block = four times (for 16 outputs each): low nibbles, then planes of higher bits; or bytes
//
// A vector of codes has 16 lanes, one for each output, of 4 bytes, one for each of 4 neighbouring inputs: a unit. A
// sub-block has 8 units.
//
//   4 bits: 4 vectors; vector j has unit 2j in the low and unit 2j + 1 in the high nibbles.
//   5 bits: as 4 bits, and a vector whose bit u of each byte is the fifth bit of unit u.
//   6 bits: as 4 bits, and two vectors; bits 2i and 2i + 1 of vector p are the upper bits of unit 4p + i.
//   8 bits: 8 vectors. float8 weights are bytes too, in the order of inputs 0, 2, 1, 3 within a unit.

#ifndef APUS_CODES_H
#define APUS_CODES_H

#include "internal.h"

enum {
  codes_panel = 64,
  codes_sub = 32,
};

typedef enum {
  class_4,
  class_4_levels,
  // Levels of 5 bits.
  class_4_small,
  class_5,
  class_6,
  class_8,
  class_float8,
} codes_class;

typedef struct {
  int64_t outputs;
  int64_t inputs;
  apus_code_layout layout;
  codes_class class;
  // Levels for the sixteen codes of a byte shuffle, already plus the offset.
  _Alignas(64) uint8_t levels[64];
  int64_t panels;
  // Blocks of inputs, the last one with fewer sub-blocks perhaps.
  int64_t blocks;
  int64_t subs;
  // Groups of a whole block; 1 where a group spans several.
  int64_t block_groups;
  // All groups of an output as the arrays of the rows of x have them: blocks * block_groups.
  int64_t groups;
  // Scales of an output in a block: block_groups, or 1 where groups have factors.
  int64_t block_tops;
  // Bytes.
  int64_t scales_at;
  int64_t factors_at;
  int64_t minimums_at;
  int64_t minimum_factors_at;
  int64_t header_bytes;
  int64_t vector_bytes;
  int64_t sub_bytes;
  int64_t block_bytes;
  int64_t panel_bytes;
  uint8_t *data;
  size_t data_bytes;
  // Which input each place takes, or NULL.
  int32_t *order;
  // Whether `data` is someone else's.
  int is_view;
} apus_codes;

apus_codes *apus_codes_create(int64_t outputs, int64_t inputs, const apus_code_layout *layout);
// Without memory for the codes.
apus_codes *apus_codes_describe(int64_t outputs, int64_t inputs, const apus_code_layout *layout);
// Copies an order of inputs; 0 when there is no memory.
int apus_codes_set_order(apus_codes *codes, const int32_t *order);
void apus_codes_free(apus_codes *codes);
void apus_codes_pack_panel(apus_codes *codes, int64_t panel, const apus_code_rows *rows);
void apus_codes_quantize(apus_context *context, apus_codes *codes, const apus_weight_rows *sources, int count);
void apus_codes_read(const apus_codes *codes, int64_t output, float *numbers);
void apus_codes_run(
    apus_context *context, const apus_codes *codes, const float *x, int64_t x_stride, int64_t rows, const float *bias,
    float *out, int64_t out_stride);

#endif
