// Floats of every storage type, read and rounded without any instruction set. Everything has
// internal linkage, so that files compiled for an instruction set may include it too.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bitlm.h"

namespace bitlm {

static inline int type_bytes(int type) { return type == BITLM_FLOAT32 ? 4 : 2; }

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline float half_to_float(uint16_t half) {
  // Shifting the exponent into place and multiplying by 2^112 is exact, also for denormals.
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value = float_of(magnitude) * 0x1p112f;
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(value);
  return float_of(bits | static_cast<uint32_t>(half & 0x8000) << 16);
}

// Rounds to nearest even. All cases are computed and masks select one, so that loops become vector
// code.
static inline uint16_t float_to_half(float value) {
  uint32_t all = bits_of(value);
  int32_t bits = static_cast<int32_t>(all & 0x7fffffffu);
  // Adding 0.5 makes the adder round a denormal result to its last bit.
  int32_t denormal = static_cast<int32_t>(bits_of(float_of(all & 0x7fffffffu) + 0.5f)) - 0x3f000000;
  int32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  int32_t is_small = -static_cast<int32_t>(bits < 0x38800000);
  int32_t is_large = -static_cast<int32_t>(bits >= 0x47800000);
  int32_t is_nan = -static_cast<int32_t>(bits > 0x7f800000);
  int32_t half = (denormal & is_small) | (normal & ~is_small);
  half = (half & ~is_large) | (0x7c00 & is_large) | (0x7e00 & is_nan);
  return static_cast<uint16_t>((all >> 16 & 0x8000) | static_cast<uint32_t>(half));
}

static inline float bfloat_to_float(uint16_t value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

// Rounds to nearest even.
static inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = bits_of(value);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  uint32_t nan = bits >> 16 | 0x40;
  bool is_nan = static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000;
  return static_cast<uint16_t>(is_nan ? nan : rounded);
}

// Element `index` of an array of floats of `type`.
static inline float load_float(const void* array, int type, int64_t index) {
  if (type == BITLM_FLOAT32) {
    float value;
    memcpy(&value, static_cast<const char*>(array) + index * 4, 4);
    return value;
  }
  uint16_t value;
  memcpy(&value, static_cast<const char*>(array) + index * 2, 2);
  return type == BITLM_FLOAT16 ? half_to_float(value) : bfloat_to_float(value);
}

}  // namespace bitlm
