// What an instruction set provides, and the structs that cpu_linear.cpp hands it.
//
// Everything in a file that is compiled for an instruction set has internal linkage, and nothing of
// std is used there: the linker must not merge code of different instruction sets.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace bitlm {

// Rounded activations of some tokens for one input (bitlm_input), columns padded by group.
// x[k] ~ scale * integer[k]; the integer is sum_d 256^d digit_d[k].
struct Activations {
  const bitlm_shape* shape;
  int tokens;  // tokens times the input's rank
  int activation;
  int digits;  // int8, 1 and 2 bits: 1; int16: 2; float: 3
  int slices;  // int8: 2, int16: 4, float: 5, 1 and 2 bits: 1
  int chunks;
  int64_t digit_stride;     // bytes from one digit row to the next; 128 bytes may be read past a row
  const int8_t* digit;      // [tokens][digits][digit_stride]; null when only `floats` are given
  const int32_t* sums;      // [tokens][chunks]: sums of the integers
  const float* scales;      // [tokens][chunks]; equal in all chunks unless activation is float
  // Tables of the words of chunks [table_first_chunk, ..), 128 * slices bytes a word:
  // entry = slice s of (512 * 32^(slices-2) + sum +-x over 4 columns), 5 bits; see the kernels.
  const uint8_t* tables;    // [tokens][table_stride] or null
  int64_t table_stride;
  int table_first_chunk;
  // 1 and 2 bits, BITLM_DWORDS: [tokens][planes + 1][words] or null: byte j, bit i of a word is
  // column 4i+j. Planes from the lowest bit of the level up; the last one marks the real columns.
  const uint32_t* bits;
  const float* floats;      // [tokens][32 * words], only for tokens with infinities or NaN
};

// Adds products of one block of 64 rows with tokens [first_token, first_token + tokens) over chunks
// [first_chunk, end_chunk): acc[t][64] += ... (without `factor` and row_scales).
struct Product {
  const bitlm_matrix* matrix;
  const uint8_t* codes;  // of the whole matrix
  const void* scales;    // [blocks][groups][64] or null
  int64_t block_bytes;
  const Activations* x;
  int first_token, tokens;
  int first_chunk, end_chunk;
  int64_t prefetch;  // how far ahead in memory lies what is read 16 KiB or so later
};

struct ListProduct {
  const uint32_t* starts;  // [tiles][chunks + 1]
  const uint8_t* entries;
  const float* scales;      // [blocks * 64]
  const float* correction;  // [blocks][groups][64]
  const Activations* x;
  int first_token, tokens;
};

struct Kernel {
  const char* name;
  int order;
  // Converts to fp32; returns the largest bit pattern of |x| (>= 0x7f800000: infinite or NaN).
  uint32_t (*load)(const void* x, int type, int64_t count, float* out);
  // Largest |x| of `count` floats (finite).
  float (*largest)(const float* x, int64_t count);
  // Rounds count floats x * inverse to the nearest integer (ties to even) within +-limit, writes its
  // digits and returns the integers' sum. count is a multiple of 32; digit rows `stride` apart.
  int32_t (*round)(const float* x, int64_t count, float inverse, int digits, int8_t* out,
                   int64_t stride);
  // Builds the tables of `words` words from the digits of one token.
  void (*tables)(const int8_t* digit, int64_t stride, int digits, int slices, int64_t words,
                 uint8_t* out);
  // Products. `codes_tables` needs x->tables, `codes_digits` x->digit, `codes_bits` x->bits; a null
  // pointer: not there for any matrix. `can_tables` and `can_digits` tell for a matrix.
  bool (*can_tables)(const bitlm_matrix& m);
  bool (*can_digits)(const bitlm_matrix& m);
  void (*codes_tables)(const Product& p, int64_t block, float* acc);
  void (*codes_digits)(const Product& p, int64_t block, float* acc);
  void (*codes_bits)(const Product& p, int64_t block, float* acc);
  void (*list)(const ListProduct& p, int64_t block, float* acc);  // needs x->digit
  // acc[64] += values[length][64] * source.
  void (*dense)(const void* values, int type, int length, const float* source, float* acc);
  // Returns sum_k values[k] * x[k].
  float (*dot)(const void* values, int type, int64_t count, const float* x);
  // y[0..rows) = acc * post + bias.
  void (*store)(const float* acc, float post, const void* bias, int bias_type, int rows, void* y,
                int y_type);
};

extern const Kernel scalar_kernel;  // NEON on ARM
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;
extern const Kernel amx_kernel;

// The same sums from `x->floats`, one code at a time: for infinities and NaN. Portable.
void codes_floats(const Product& p, int order, int64_t block, float* acc);
void list_floats(const ListProduct& p, int64_t block, float* acc);

}  // namespace bitlm
