// What the kernels of every instruction set share: number formats, and the plain fp32 functions of
// Kernel written once over a vector of floats.
//
// V needs: lanes, Floats, Ints; load, store, load_floats, store_floats (the last two convert, and
// take a count <= lanes), set, zero, add, mul, fma, and magnitudes(Ints, Floats): the larger of each
// lane and of the bits of |float|.
//
// Everything has internal linkage and nothing of std is used: the same names are compiled with
// different instruction sets, and the linker must not merge them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernel.h"

#if defined(__GNUC__)
#define BITLM_INLINE inline __attribute__((always_inline))
#define BITLM_INLINE_LAMBDA __attribute__((always_inline))
#else
#define BITLM_INLINE inline
#define BITLM_INLINE_LAMBDA
#endif

namespace {

// Calls f(0), .. f(n - 1) with constants. Loops that a compiler unrolls late leave the arrays they
// index in memory instead of registers.
template <int i>
struct Constant {
  constexpr operator int() const { return i; }
};

template <int n, int i = 0, class F>
BITLM_INLINE void repeat(F&& f) {
  if constexpr (i < n) {
    f(Constant<i>{});
    repeat<n, i + 1>(f);
  }
}

BITLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Number formats ----------------------------------------------------------------------------

BITLM_INLINE int type_bytes(int type) { return type == BITLM_FLOAT32 ? 4 : 2; }

BITLM_INLINE const void* element(const void* base, int type, int64_t index) {
  return static_cast<const char*>(base) + index * type_bytes(type);
}

BITLM_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

BITLM_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t half) {
  // Shifting the exponent into place and multiplying by 2^112 is exact, also for denormals.
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value = float_of(magnitude) * 0x1p112f;
  uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(value);
  return float_of(bits | static_cast<uint32_t>(half & 0x8000) << 16);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);
  // Adding 0.5 makes the adder round a denormal result to its last bit.
  if (bits < 0x38800000u) {
    return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000u));
  }
  bits += 0xc8000fffu + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | bits >> 13);
}

BITLM_INLINE float bfloat_to_float(uint16_t value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load_float(const void* p, int type) {
  if (type == BITLM_FLOAT32) {
    float value;
    memcpy(&value, p, 4);
    return value;
  }
  uint16_t value;
  memcpy(&value, p, 2);
  return type == BITLM_FLOAT16 ? half_to_float(value) : bfloat_to_float(value);
}

inline void store_float(void* p, int type, float value) {
  if (type == BITLM_FLOAT32) {
    memcpy(p, &value, 4);
  } else {
    uint16_t bits = type == BITLM_FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
    memcpy(p, &bits, 2);
  }
}

// ---- Functions of Kernel in fp32 ---------------------------------------------------------------

template <class V>
BITLM_INLINE uint32_t largest_lane(typename V::Ints magnitudes) {
  int32_t lanes[V::lanes], largest = 0;
  memcpy(lanes, &magnitudes, sizeof lanes);
  for (int i = 0; i < V::lanes; i++) largest = largest > lanes[i] ? largest : lanes[i];
  return static_cast<uint32_t>(largest);
}

template <class V>
uint32_t load(const void* x, int type, int64_t count, float* out) {
  typename V::Ints largest = V::zero_ints();
  int64_t i = 0;
  for (; i + V::lanes <= count; i += V::lanes) {
    typename V::Floats value = V::load_floats(element(x, type, i), type, V::lanes);
    V::store(out + i, value);
    largest = V::magnitudes(largest, value);
  }
  if (i < count) {
    typename V::Floats value = V::load_floats(element(x, type, i), type, count - i);
    V::store_floats(out + i, BITLM_FLOAT32, count - i, value);
    largest = V::magnitudes(largest, value);
  }
  return largest_lane<V>(largest);
}

template <class V>
float largest(const float* x, int64_t count) {
  typename V::Ints most[4] = {V::zero_ints(), V::zero_ints(), V::zero_ints(), V::zero_ints()};
  int64_t i = 0;
  for (; i + 4 * V::lanes <= count; i += 4 * V::lanes) {
    repeat<4>([&](auto j) BITLM_INLINE_LAMBDA {
      most[j] = V::magnitudes(most[j], V::load(x + i + j * V::lanes));
    });
  }
  for (; i < count; i += V::lanes) {
    int64_t left = smaller(count - i, V::lanes);
    most[0] = V::magnitudes(most[0], V::load_floats(x + i, BITLM_FLOAT32, left));
  }
  uint32_t bits = 0;
  for (int j = 0; j < 4; j++) {
    uint32_t mine = largest_lane<V>(most[j]);
    bits = bits > mine ? bits : mine;
  }
  return float_of(bits);
}

template <class V>
void dense(const void* values, int type, int length, const float* source, float* acc) {
  constexpr int vectors = bitlm::block_rows / V::lanes;
  typename V::Floats sum[vectors];
  repeat<vectors>([&](auto v) BITLM_INLINE_LAMBDA { sum[v] = V::load(acc + v * V::lanes); });
  for (int m = 0; m < length; m++) {
    typename V::Floats x = V::set(source[m]);
    const void* row = element(values, type, static_cast<int64_t>(m) * bitlm::block_rows);
    repeat<vectors>([&](auto v) BITLM_INLINE_LAMBDA {
      sum[v] = V::fma(V::load_floats(element(row, type, v * V::lanes), type, V::lanes), x, sum[v]);
    });
  }
  repeat<vectors>([&](auto v) BITLM_INLINE_LAMBDA { V::store(acc + v * V::lanes, sum[v]); });
}

template <class V>
float dot(const void* values, int type, int64_t count, const float* x) {
  typename V::Floats sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::lanes <= count; i += 4 * V::lanes) {
    repeat<4>([&](auto j) BITLM_INLINE_LAMBDA {
      int64_t at = i + j * V::lanes;
      sum[j] = V::fma(V::load_floats(element(values, type, at), type, V::lanes), V::load(x + at),
                      sum[j]);
    });
  }
  for (; i < count; i += V::lanes) {
    int64_t left = smaller(count - i, V::lanes);
    sum[0] = V::fma(V::load_floats(element(values, type, i), type, left),
                    V::load_floats(x + i, BITLM_FLOAT32, left), sum[0]);
  }
  float lanes[V::lanes], total = 0;
  V::store(lanes, V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
  for (int lane = 0; lane < V::lanes; lane++) total += lanes[lane];
  return total;
}

template <class V>
void store(const float* acc, float post, const void* bias, int bias_type, int rows, void* y,
           int y_type) {
  typename V::Floats factor = V::set(post);
  for (int i = 0; i < rows; i += V::lanes) {
    int64_t count = smaller(rows - i, V::lanes);
    typename V::Floats value = V::mul(V::load(acc + i), factor);
    if (bias) value = V::add(value, V::load_floats(element(bias, bias_type, i), bias_type, count));
    V::store_floats(static_cast<char*>(y) + i * type_bytes(y_type), y_type, count, value);
  }
}

}  // namespace
