// The C interface of bitlm's CUDA library: no torch, one struct per call, device pointers inside.
//
// A call launches one kernel on `stream`: it allocates nothing and waits for nothing, so it may be
// captured in a graph. It returns a cudaError_t, 0 when the launch was accepted.
#ifndef BITLM_CUDA_H
#define BITLM_CUDA_H

#include "bitlm.h"

#ifdef __cplusplus
extern "C" {
#endif

#define BITLM_CUDA_ABI_VERSION 3
#define BITLM_CUDA_MAX_PASSES 9  // 8 planes and a shift
#define BITLM_CUDA_MANY_PASSES 4

// ---- Inputs: what codes are multiplied by --------------------------------------------------------
// Rows of integers as bit planes. Each group of columns is cut into units of 128 columns, the last
// unit of a group filled up with 0. x[k] ~ scale * integer[k] with a scale for each unit, the
// integer in two's complement of 8 * digits bits; of BITLM_INT1 of 2 bits, of BITLM_INT2 of 4.
//
// words:  uint32 [units][rows][digits][8][4]: bit b of word [.., d, p, t] is bit 8d + p of the
//         integer of column 32t + b of the unit. The next unit is unit_words further on.
// sums:   fp32 [units][rows][digits == 3 ? 2 : 1][4]: minus the sums of the integers' bits 2t and
//         2t + 1 of every digit (of digit 0, then of digits 1 and 2), divided by 2^32 4^t.
// scales: fp32 [units][rows]: 2^8 times the scale; NaN where x has an infinity or NaN.
typedef struct bitlm_cuda_input {
  const void* x;           // [rows / rank][source_columns], of x_type
  const void* multipliers; // [experts][rank][columns] or null: multiply the columns
  const int32_t* places;   // [experts][columns] or null: which columns of x
  const int32_t* offsets;  // [experts] ends of the experts' tokens, or null: those are of all tokens
  const float* step;       // of the 1- and 2-bit activations, or null
  uint32_t* words;
  float* sums;
  float* scales;
  float* rounded;      // null, or fp32 [rows][columns]: x as the product sees it
  int32_t x_type, multiplier_type;
  int32_t source_columns;
  int32_t columns, group_size, units;
  int32_t group_units;  // units of each group but the last one
  int32_t rank;         // rows of a token, one for each row of `multipliers`
  int32_t rows;         // that exist; rows up to padded_rows are 0
  int32_t padded_rows;
  int32_t activation;   // bitlm_activation
  int32_t digits;       // 1: int8, 1 and 2 bits; 2: int16, float of 16-bit types; 3: float of fp32
  int32_t unit_words;
  int32_t experts;      // of offsets
} bitlm_cuda_input;

BITLM_API int bitlm_cuda_stage(const bitlm_cuda_input* input, void* stream);

// ---- Products ------------------------------------------------------------------------------------

// One term over the columns of an input: a plane of codes, or a shift (no codes). Tensors are those
// of the file, of one part of the first expert.
typedef struct bitlm_cuda_pass {
  const uint8_t* signs;  // [rows, ceil(columns / 8)]
  const uint8_t* mask;   // the same, of ternary codes, or null
  const uint8_t* trits;  // [rows, ceil(columns / 5)] instead of both, or null
  const uint8_t* zones;  // [rows, ceil(columns / 8)] or null
  const uint8_t* drop;   // [rows, ceil(columns / 8)] or null: where 1, the weight is 0
  const void* scales;    // [rows, groups], with zones [rows, 2 groups]; null: all 1
  int32_t scale_type;
  float factor;
} bitlm_cuda_pass;

// y[b, n] = sum over passes + addend[b, n] + bias[n]. The input's rows are tokens.
typedef struct bitlm_cuda_product {
  bitlm_cuda_input input;
  bitlm_cuda_pass pass[BITLM_CUDA_MAX_PASSES];
  void* y;              // [tokens][y_columns], of y_type
  const float* addend;  // the same shape, or null; may be y
  const void* bias;     // [rows], with experts [experts][rows], or null
  const int32_t* offsets;  // [experts] ends of the experts' tokens, or null
  int32_t count;  // how many of `pass`
  int32_t rows;
  int32_t y_columns, y_column;  // the rows' place in y
  int32_t y_type, bias_type;
  int32_t experts;
  // Set by the caller from ops/cuda_table.py: tokens of a block, and whether the kernel stages its
  // input itself (one token; then words, sums and scales of `input` are not read).
  int32_t block_tokens, stages;
  int32_t expert_rows;  // from an expert's rows of the tensors to the next one's
} bitlm_cuda_product;

BITLM_API int bitlm_cuda_product_launch(const bitlm_cuda_product* call, void* stream);

// The same for many tokens of 1 and 2 bits: passes of signs, signs and mask, or a shift; columns and
// group_size multiples of 128, or one group. Signs and masks lie at multiples of 16 bytes.
BITLM_API int bitlm_cuda_few_launch(const bitlm_cuda_product* call, void* stream);

// ---- Products of many tokens of 16 bits ----------------------------------------------------------

// x in the order in which the product reads it; columns: a multiple of 32.
typedef struct bitlm_cuda_order {
  const uint16_t* x;  // [tokens][columns], fp16 or bf16
  uint16_t* ordered;  // the same
  int32_t tokens, columns;
} bitlm_cuda_order;

BITLM_API int bitlm_cuda_order_launch(const bitlm_cuda_order* call, void* stream);

// y[b, n] = sum over passes + addend[b, n] + bias[n], with passes of signs, signs and mask, or a shift;
// columns and group_size multiples of 64, or one group. Signs and masks lie at multiples of 8 bytes.
typedef struct bitlm_cuda_many {
  bitlm_cuda_pass pass[BITLM_CUDA_MANY_PASSES];
  const void* x;           // [tokens][columns], ordered, of type
  void* y;                 // [tokens][y_columns], of type
  const float* addend;     // the same shape, or null
  const void* bias;        // as of bitlm_cuda_product
  const int32_t* offsets;  // as of bitlm_cuda_product
  int32_t count;  // how many of `pass`
  int32_t rows, columns, group_size, tokens;
  int32_t y_columns, y_column;  // the rows' place in y
  int32_t type, bias_type;      // type: fp16 or bf16
  int32_t experts;
  int32_t tiles;  // 1 or 2: a block makes 64 or 128 rows, of 128 tokens; bitlm_cuda_wide: 4: of 256
  int32_t reserved;
} bitlm_cuda_many;

BITLM_API int bitlm_cuda_many_launch(const bitlm_cuda_many* call, void* stream);

// The same on sm_90a, for one or two bits a weight: signs, signs and mask, or signs of two planes; and
// perhaps a shift, the last pass. Weights are rounded to `type`; x is not ordered, and lies at a multiple
// of 16 bytes. cudaErrorNotSupported where the library, or the driver, has not what it takes.
BITLM_API int bitlm_cuda_wide_launch(const bitlm_cuda_many* call, void* stream);

// ---- Other terms ---------------------------------------------------------------------------------

// y[b, n] += sum_j row_scales[n, j] * products[b * rank + j, n]: rank-k scales, and low-rank terms,
// whose products are the same for all rows. offsets, experts, expert_rows: as of bitlm_cuda_product.
typedef struct bitlm_cuda_combine {
  const float* products;    // [tokens * rank][product_rows]
  const void* row_scales;   // [rows, rank]
  const int32_t* offsets;
  float* y;                 // [tokens][y_columns]
  int32_t type;
  int32_t tokens, rank, rows, y_columns, y_column;
  int32_t product_rows;     // rows, or 1
  int32_t experts, expert_rows;
  int32_t add;  // 0: y is written, not added to
} bitlm_cuda_combine;

BITLM_API int bitlm_cuda_combine_launch(const bitlm_cuda_combine* call, void* stream);

// y[b * rank + j] = sum_k v[j, k] * multipliers[k] * x[b, k], of the expert of token b: what goes
// between the matrices of a low-rank term.
typedef struct bitlm_cuda_thin {
  const void* x;            // [tokens][columns], of x_type
  const void* v;            // [experts][parts][rank][columns], of v_type, from the own part on
  const float* multipliers; // [experts][columns] or null
  const int32_t* offsets;
  float* y;                 // [tokens * rank]
  int32_t x_type, v_type;
  int32_t tokens, rank, columns, experts, parts;
  int32_t reserved;
} bitlm_cuda_thin;

BITLM_API int bitlm_cuda_thin_launch(const bitlm_cuda_thin* call, void* stream);

// y[b, n] += scales[n] * sum_i (value_i - zeros[n]) * x[b, column of i] over a row's salient entries.
// offsets, experts, expert_rows: as of bitlm_cuda_product.
typedef struct bitlm_cuda_salient {
  const uint8_t* mask;     // [rows, ceil(columns / 8)]; null: every column of x is salient
  const uint8_t* values;   // in row-major order of the set bits, or [rows, columns]
  const int64_t* starts;   // [rows]: where a row's values begin; null without mask
  const void* scales;      // [rows]
  const uint8_t* zeros;    // [rows]
  const float* x;          // [tokens][columns]
  const int32_t* offsets;
  float* y;                // [tokens][y_columns]
  int32_t type;
  int32_t tokens, rows, columns, y_columns, y_column;
  int32_t experts, expert_rows;
  int32_t add;  // 0: y is written, not added to
} bitlm_cuda_salient;

BITLM_API int bitlm_cuda_salient_launch(const bitlm_cuda_salient* call, void* stream);

// Rows of the dense weight: out[i, :] = sum over passes of row ids[i] (first + i without ids), then
// salient entries in their place, all times multipliers. Chains and low-rank terms are the caller's.
// A row that is not one of the weight's is NaN.
typedef struct bitlm_cuda_rows {
  bitlm_cuda_pass pass[BITLM_CUDA_MAX_PASSES];
  const int64_t* ids;           // [rows_out] or null
  const uint8_t* salient_mask;  // as of bitlm_cuda_salient; null: none
  const uint8_t* salient_values;
  const int64_t* salient_starts;
  const void* salient_scales;
  const uint8_t* salient_zeros;
  const void* multipliers;      // [rows / multiplier_rows][columns] or null: input_scales
  void* out;                    // [rows_out][columns], of out_type
  int64_t rows_out, first;
  int32_t count;  // how many of `pass`
  int32_t rows, columns, group_size;
  int32_t salient_type, multiplier_type, out_type;
  int32_t multiplier_rows;      // rows, of a part of an expert, that have the same multipliers
} bitlm_cuda_rows;

BITLM_API int bitlm_cuda_rows_launch(const bitlm_cuda_rows* call, void* stream);

// ---- About the library ---------------------------------------------------------------------------

BITLM_API int bitlm_cuda_abi_version(void);
// The name of an error that a call returned, and what it means.
BITLM_API const char* bitlm_cuda_error_name(int error);
BITLM_API const char* bitlm_cuda_error_text(int error);
// The architectures that the library holds machine code for, as "80 86 89 90".
BITLM_API const char* bitlm_cuda_architectures(void);

#ifdef __cplusplus
}
#endif
#endif
