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

#define BITLM_ABI_VERSION 1
#define BITLM_MAX_PLANES 8

enum bitlm_type { BITLM_FLOAT32 = 0, BITLM_FLOAT16 = 1, BITLM_BFLOAT16 = 2 };

enum bitlm_instruction_set { BITLM_SCALAR = 0, BITLM_AVX2 = 1, BITLM_AVX512 = 2 };

// How the product is computed. Look-up: sums of a few activations are looked up by weight bits.
// Expand: a tile of weights becomes fp32, then multiply-adds.
enum bitlm_algorithm { BITLM_AUTO = 0, BITLM_LOOK_UP = 1, BITLM_EXPAND = 2 };

enum bitlm_status { BITLM_OK = 0, BITLM_BAD_ARGUMENT = 1, BITLM_NO_MEMORY = 2 };

// One plane of a weight, as it lies in the file: bit j of byte i of a row is column 8i+j, 1 = +1.
typedef struct bitlm_plane {
  const uint8_t* signs;  // [rows, ceil(columns/8)], or null when `trits` is set
  const uint8_t* mask;   // as `signs`, 1 = not zero; null for a binary plane
  const uint8_t* trits;  // [rows, ceil(columns/5)], base 3, or null
  const void* scales;    // [rows, groups]
  int32_t scale_type;
  float factor;  // multiplies the scales: 2^-p for planes that share those of plane 0
} bitlm_plane;

// y[b, n] = sum_k x[b, k] * (sum_p factor_p scale_p[n, k/group] code_p[n, k] + shift[n, k/group])
//           + bias[n]. All tensors are dense and row-major.
typedef struct bitlm_linear {
  int64_t rows, columns, group_size, batch;
  const void* x;      // [batch, columns]
  const void* bias;   // [rows] or null
  const void* shift;  // [rows, groups] or null
  void* y;            // [batch, rows]
  int32_t x_type, bias_type, shift_type, y_type;
  int32_t threads;  // at most; the result does not depend on it
  int32_t algorithm;
  int32_t planes;
  int32_t reserved;
  bitlm_plane plane[BITLM_MAX_PLANES];
} bitlm_linear;

BITLM_API int bitlm_abi_version(void);

// The instruction set in use: "avx512", "avx2" or "scalar".
BITLM_API const char* bitlm_cpu_instruction_set(void);

// Uses at most `limit` (a bitlm_instruction_set; negative: no limit) from now on, in all threads,
// and returns the one that is then in use.
BITLM_API int bitlm_cpu_limit_instruction_set(int limit);

// Returns a bitlm_status. May be called from several threads at once and after a fork.
BITLM_API int bitlm_packed_linear(const bitlm_linear* call);

#ifdef __cplusplus
}
#endif
#endif
