// The C interface of bitlm's native library: no torch, no C++ types, one struct per call.
#ifndef BITLM_H
#define BITLM_H

#include <stdint.h>

#if defined(_WIN32)
#define BITLM_API __declspec(dllexport)
#else
#define BITLM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define BITLM_ABI_VERSION 2
#define BITLM_MAX_BITS 8

enum bitlm_type { BITLM_FLOAT32 = 0, BITLM_FLOAT16 = 1, BITLM_BFLOAT16 = 2 };

enum bitlm_instruction_set {
  BITLM_SCALAR = 0,
  BITLM_AVX2 = 1,
  BITLM_AVX512 = 2,  // F, BW, DQ, VL, VBMI, VNNI, VPOPCNTDQ, GFNI: Ice Lake, Zen 4 and later
  BITLM_AMX = 3,     // AVX512 and AMX int8
};

enum bitlm_status {
  BITLM_OK = 0,
  BITLM_BAD_ARGUMENT = 1,
  BITLM_NO_MEMORY = 2,
  BITLM_WRONG_ORDER = 3,  // prepared for another instruction set: prepare again
};

// Orders of the codes in memory (layout.h). Which one an instruction set reads never changes.
enum bitlm_order {
  BITLM_BYTES = 0,   // a byte is a row: scalar, AVX2, NEON
  BITLM_DWORDS = 1,  // a dword is a row: AVX512, AMX
};

// How x is rounded before the product; the product itself is exact in every mode.
enum bitlm_activation {
  BITLM_FLOAT = 0,  // 23 bits, a scale for each 128 columns: as exact as fp32
  BITLM_INT16 = 1,  // 16 bits, a scale for each token
  BITLM_INT8 = 2,   // 8 bits, a scale for each token
  // Levels of models trained with them; step a = *step, or by token when `step` is null.
  BITLM_INT2 = 3,   // -3a/2, -a/2, a/2, 3a/2
  BITLM_UINT2 = 4,  // 0, a, 2a, 3a
  BITLM_INT1 = 5,   // -a, a
  BITLM_UINT1 = 6,  // 0, a
};

// What codes mean. Stored codes u, in bits: see layout.h.
enum bitlm_kind {
  BITLM_BINARY = 0,   // -1, 1
  BITLM_TERNARY = 1,  // -1, 0, 1
  BITLM_GRID = 2,     // 2u - (2^bits - 1), u = 0 .. 2^bits - 1
};

// ---- A prepared weight: one block of memory, 64-byte aligned, all offsets from its start -------
// It begins with bitlm_weight, then `subs` times bitlm_sub. A sub-weight is one part of one expert.
// It is a list of terms that read inputs and add to outputs. Every array lies on a 64-byte boundary.
// "blocks" of 64 rows: ceil(rows / 64), rows past the end are 0.

// Columns of an input, cut into groups that share a scale. In memory a group is padded to whole
// words of 32 columns; x is 0 there.
typedef struct bitlm_shape {
  int32_t columns;     // real columns
  int32_t group_size;  // real columns of each group but the last one
  int32_t groups;
  int32_t words;  // of all groups together
} bitlm_shape;

typedef struct bitlm_input {
  bitlm_shape shape;
  int64_t scales;   // fp32 [rank][source columns] that multiply the source; 0: none
  int64_t columns;  // int32 [shape.columns]: which columns of the source; 0: all
  int32_t source;   // -1: x; otherwise the output of stage `source`
  int32_t rank;     // this many inputs a token, one for each row of `scales`; else 1
} bitlm_input;

// Product with a matrix of codes: out[n] += factor * sum_g scale[n, g] sum_{k in g} value(n, k) x[k];
// with rank > 1: out[n] += factor * sum_j row_scales[j, n] * sum_k value(n, k) x_j[k].
typedef struct bitlm_matrix {
  int64_t codes;       // layout.h
  int64_t scales;      // [blocks][groups][64]; 0: none (rank > 1 or all 1)
  int64_t row_scales;  // fp32 [rank][blocks * 64]; 0: none
  int32_t scale_type;
  int32_t kind, bits;  // bits: planes of a grid, 2 of ternary, 1 of binary
  int32_t trits;       // ternary codes in base 3 (only in order BITLM_DWORDS)
  int32_t rows;
  int32_t input;
  int32_t output;  // -1: y; otherwise the stage that this writes (stages run in order)
  float factor;
} bitlm_matrix;

// Dense product: y[n] += sum_m values[n, m] * source[m].
typedef struct bitlm_dense {
  int64_t values;  // [blocks][length][64]
  int32_t type;
  int32_t length;
  int32_t input;  // >= 0: the sums of that input's groups (length = groups); -1: `stage`
  int32_t stage;
} bitlm_dense;

// Dense rows that make a stage: stage[m] = sum_k values[m, k] * x[k] (x as given, times scales).
typedef struct bitlm_projection {
  int64_t values;  // [length][columns]
  int64_t scales;  // fp32 [columns]; 0: none
  int32_t type;
  int32_t length, columns;
  int32_t stage;
} bitlm_projection;

// Salient entries: y[n] += scale[n] * sum value * x + sum_g correction[n, g] * sum_{salient in g} x.
// Lists for each tile of 16 rows and each chunk of 128 columns (4 words, not across groups), 4
// entries a row at a time: 64 bytes of positions in the chunk (0x80: no entry), row-major [16][4],
// then 64 bytes of values.
typedef struct bitlm_list {
  int64_t starts;      // uint32 [blocks * 4][chunks + 1]: in units of 128 bytes from `entries`
  int64_t entries;
  int64_t scales;      // fp32 [blocks * 64]
  int64_t correction;  // fp32 [blocks][groups][64]
  int32_t input;
  int32_t reserved;
} bitlm_list;

typedef struct bitlm_sub {
  int32_t rows, columns;
  int32_t row;  // where its rows begin in y
  int32_t stages;
  int32_t inputs, matrices, denses, projections, lists;
  int32_t reserved;
  // Offsets of the arrays of the structs above. Matrices that write stages come first, in order.
  int64_t input, matrix, dense, projection, list;
  int64_t stage_lengths;  // int32 [stages]
} bitlm_sub;

#define BITLM_MAGIC 0x3274686769657742ull

typedef struct bitlm_weight {
  uint64_t magic;
  int64_t bytes;  // all of it
  int32_t order;
  int32_t experts;  // 0: none
  int32_t parts;    // sub-weights of each expert
  int32_t rows, columns;
  int32_t reserved[7];
} bitlm_weight;

// ---- Calls -------------------------------------------------------------------------------------

// y[b, :] = W x[b, :] + bias. x: [tokens, columns], y: [tokens, rows], dense.
// With experts x is sorted by expert and offsets[e] is the end of expert e's tokens; tokens past the
// last end give 0; bias is [experts, rows].
typedef struct bitlm_linear {
  const bitlm_weight* weight;
  const void* x;
  const void* bias;  // or null
  void* y;
  const int32_t* offsets;
  const float* step;  // of the 1- and 2-bit activations, or null
  int64_t tokens;
  int32_t x_type, bias_type, y_type;
  int32_t activation;
  int32_t threads;  // at most; the result does not depend on it
  int32_t reserved;
} bitlm_linear;

// Codes as they lie in the file (README, "The file format") and as kernels read them.
typedef struct bitlm_codes {
  const uint8_t* signs[BITLM_MAX_BITS];  // [rows, ceil(columns/8)]; of a grid from the highest bit down
  const uint8_t* mask;                   // [rows, ceil(columns/8)] of ternary, or null
  const uint8_t* trits;                  // [rows, ceil(columns/5)] instead of signs and mask, or null
  bitlm_shape shape;
  int64_t rows;
  int32_t order, kind, bits, trits_in_memory;
} bitlm_codes;

BITLM_API int bitlm_abi_version(void);

// The instruction set in use: "amx", "avx512", "avx2", "neon" or "scalar"; and the order it reads.
BITLM_API const char* bitlm_cpu_instruction_set(void);
BITLM_API int bitlm_cpu_order(void);

// Uses at most `limit` (a bitlm_instruction_set; negative: no limit) from now on, in all threads,
// and returns the one that is then in use.
BITLM_API int bitlm_cpu_limit_instruction_set(int limit);

// Which product 1-bit codes use for an activation mode (float, int16, int8) and so many tokens: 0
// look-ups, 1 digit products, and both are there; 2, 3: the same, and there is no other. With
// `digits` 0 or 1 the choice is changed first, for the token counts of one class: 1, 2-4, 5-15, 16-.
BITLM_API int bitlm_cpu_prefer(int activation, int64_t tokens, int digits);

// Reads all bytes and does nothing with them: what memory allows. Returns their bitwise or.
BITLM_API int bitlm_cpu_read(const void* data, int64_t bytes, int threads);

// Returns a bitlm_status. May be called from several threads at once and after a fork.
BITLM_API int bitlm_cpu_linear(const bitlm_linear* call);

// Bytes that bitlm_repack writes.
BITLM_API int64_t bitlm_codes_bytes(const bitlm_codes* codes);
// Brings codes into kernel order, and back: `unpack` writes where the pointers of `codes` lead.
BITLM_API int bitlm_repack(const bitlm_codes* codes, uint8_t* out, int threads);
BITLM_API int bitlm_unpack(const uint8_t* packed, const bitlm_codes* codes, int threads);

// Salient lists. mask: [rows, ceil(columns/8)], values in row-major order of its set bits.
// Writes starts; returns the units of 128 bytes of `entries`. With entries null only counts.
BITLM_API int64_t bitlm_salient(const uint8_t* mask, const uint8_t* values, int64_t rows,
                                const bitlm_shape* shape, uint32_t* starts, uint8_t* entries);

// Writes rows `ids` of the weight: out[i, :] = W[ids[i], :], out [count, columns]. A weight with
// stages or experts is BITLM_BAD_ARGUMENT, and so is an id outside of the weight.
BITLM_API int bitlm_cpu_rows(const bitlm_weight* weight, const int64_t* ids, int64_t count,
                             void* out, int type);

#ifdef __cplusplus
}
#endif
#endif
