// Rounding an input to integers and cutting them into bit planes (bitlm_cuda_input).
//
// A thread makes one word of each plane: it has the 32 columns of that word. The four threads of a
// quad have the words of a unit, so a unit's scale and sums cost two shuffles each.
#pragma once

#include "cuda_device.h"

namespace bitlm {

constexpr int stage_threads = 256;
constexpr float int8_limit = 127, int16_limit = 32512;
// Of a float's digits: what 2 bytes hold, and what adding 1.5 * 2^23 rounds to.
constexpr float float16_limit = 32767, float32_limit = 4194303;
constexpr float sum_unit = 0x1p-32f, scale_unit = 0x1p8f;

// Where a row of an input goes: its words, sums and scales of unit 0, and how far to the next unit.
struct StagedRow {
  uint32_t* words;
  float* sums;
  float* scales;
  float* rounded;
  int64_t word_stride, sum_stride, scale_stride;
};

struct StageMemory {
  float partial[stage_threads / warp_lanes];
};

// What a row of an input is made of: a token of x, and the multipliers and places of its expert.
struct RowSource {
  int64_t x, multipliers;  // the row's first element
  const int32_t* places;
};

BITLM_DEVICE RowSource row_source(const bitlm_cuda_input& in, int row) {
  int token = row / in.rank, expert = 0;
  if (in.offsets) {
    // Tokens behind the last expert's are nobody's, and read as if they were its.
    expert = smaller(expert_of(in.experts, in.offsets, token), in.experts - 1);
  }
  int64_t copy = static_cast<int64_t>(expert) * in.rank + (row - token * in.rank);
  return {static_cast<int64_t>(token) * in.source_columns, copy * in.columns,
          in.places ? in.places + static_cast<int64_t>(expert) * in.columns : nullptr};
}

BITLM_DEVICE float column_value(const bitlm_cuda_input& in, const RowSource& row, int column) {
  int from = row.places ? load<int32_t>(row.places + column) : column;
  float value = float_at(in.x, in.x_type, row.x + from);
  if (!in.multipliers) return value;
  return value * float_at(in.multipliers, in.multiplier_type, row.multipliers + column);
}

// The `columns` (at most 32) columns from `column` on, and 0 behind them.
BITLM_DEVICE void read_columns(const bitlm_cuda_input& in, const RowSource& row, int column,
                               int columns, float (&value)[word_columns]) {
  bool whole = columns == word_columns && !in.places && !in.multipliers && in.rank == 1;
  int64_t at = row.x + column;
  if (in.x_type == BITLM_FLOAT32) {
    const float* from = static_cast<const float*>(in.x) + at;
    if (whole && (reinterpret_cast<uintptr_t>(from) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        Words four = load_words(from + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; j++) value[4 * i + j] = __uint_as_float(four.word[j]);
      }
      return;
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(in.x) + at;
    if (whole && (reinterpret_cast<uintptr_t>(from) & 15) == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Words eight = load_words(from + 8 * i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          value[8 * i + 2 * j] = short_value(static_cast<uint16_t>(eight.word[j]), in.x_type);
          value[8 * i + 2 * j + 1] =
              short_value(static_cast<uint16_t>(eight.word[j] >> 16), in.x_type);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < word_columns; i++) {
    value[i] = i < columns ? column_value(in, row, column + i) : 0.0f;
  }
}

// The largest |x|, or an infinity or NaN when there is one: ordered as integers.
BITLM_DEVICE float largest_magnitude(const float (&value)[word_columns]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < word_columns; i++) {
    largest = larger(largest, __float_as_uint(value[i]) & 0x7fffffffu);
  }
  return __uint_as_float(largest);
}

BITLM_DEVICE float larger_magnitude(float a, float b) {
  return __uint_as_float(larger(__float_as_uint(a), __float_as_uint(b)));
}

struct Larger {
  BITLM_DEVICE float operator()(float a, float b) const { return larger_magnitude(a, b); }
};

struct Sum {
  BITLM_DEVICE float operator()(float a, float b) const { return a + b; }
};

// Joins a value of every thread of the block, in a fixed order; all threads get the result.
template <class Join>
BITLM_DEVICE float over_block(float value, Join join, StageMemory& memory) {
#pragma unroll
  for (int other = 16; other; other >>= 1) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, other));
  }
  if (threadIdx.x % warp_lanes == 0) memory.partial[threadIdx.x / warp_lanes] = value;
  __syncthreads();
  value = memory.partial[0];
  for (int i = 1; i < stage_threads / warp_lanes; i++) value = join(value, memory.partial[i]);
  __syncthreads();
  return value;
}

// How a row, or a unit, is rounded: x ~ scale * level(x).
struct Rounding {
  int activation;
  float scale, inverse;  // of integers; of levels the step, or 1 in its place
};

BITLM_DEVICE Rounding integer_rounding(int activation, float largest, float limit) {
  // A largest value that small would make the inverse infinite.
  bool any = largest > 1e-30f && is_finite(largest);
  return {activation, any ? largest / limit : is_finite(largest) ? 0.0f : largest - largest,
          any ? limit / largest : 0.0f};
}

BITLM_DEVICE Rounding level_rounding(int activation, float step) {
  float scale = activation == BITLM_INT2 ? 0.5f * step : step;
  return {activation, is_finite(step) ? scale : step - step, step > 0 ? step : 1.0f};
}

// The integer of x: ops/rounding.py has the same levels.
BITLM_DEVICE int32_t integer_of(const Rounding& rounding, float x) {
  switch (rounding.activation) {
    case BITLM_INT2: {
      float level = floorf(x / rounding.inverse);
      return 2 * static_cast<int32_t>(fminf(fmaxf(level, -2.0f), 1.0f)) + 1;
    }
    case BITLM_UINT2:
      return static_cast<int32_t>(fminf(fmaxf(rintf(x / rounding.inverse), 0.0f), 3.0f));
    case BITLM_INT1:
      return x >= 0 ? 1 : -1;
    case BITLM_UINT1:
      return x / rounding.inverse > 0.5f ? 1 : 0;
    default:
      // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
      return static_cast<int32_t>(__float_as_uint(fmaf(x, rounding.inverse, 12582912.0f)) -
                                  0x4b400000u);
  }
}

// The largest |integer| of the modes that scale by the largest |x|; 0 of the others.
BITLM_DEVICE float integer_limit(const bitlm_cuda_input& in) {
  if (in.activation == BITLM_INT8) return int8_limit;
  if (in.activation == BITLM_INT16) return int16_limit;
  if (in.activation == BITLM_FLOAT) return in.digits == 3 ? float32_limit : float16_limit;
  return 0.0f;
}

// The pair of planes whose upper plane is the negative one, and what of an integer lies below its
// end: levels of few bits would otherwise be differences of large sums.
BITLM_DEVICE int top_pair(int activation) {
  return activation == BITLM_INT1 ? 0 : activation == BITLM_INT2 ? 1 : 3;
}

BITLM_DEVICE int32_t used_bits(int activation) {
  return activation == BITLM_INT1 ? 3 : activation == BITLM_INT2 ? 15 : -1;
}

// Goes over the words of a row, four threads a unit: f(unit, t, value, columns, real). Whole warps
// go, since they shuffle; what is not `real` is past the row's end and has no columns.
template <class F>
BITLM_DEVICE void each_word(const bitlm_cuda_input& in, int row, F f) {
  int words = in.units * unit_words, lane = threadIdx.x % warp_lanes;
  RowSource source = row_source(in, row);
  for (int first = threadIdx.x - lane; first < words; first += stage_threads) {
    int i = first + lane;
    bool real = i < words;
    int unit = real ? i / unit_words : 0, t = i % unit_words;
    UnitPlace place = place_of(in, unit);
    int columns = smaller(larger(place.columns - t * word_columns, 0), word_columns);
    if (!real || row >= in.rows) columns = 0;
    float value[word_columns];
    if (columns) {
      read_columns(in, source, place.column + t * word_columns, columns, value);
    } else {
#pragma unroll
      for (int k = 0; k < word_columns; k++) value[k] = 0.0f;
    }
    f(unit, t, value, columns, real);
  }
}

// The rounding of a row whose scale is that of the whole row.
BITLM_DEVICE Rounding row_rounding(const bitlm_cuda_input& in, int row, StageMemory& memory) {
  float limit = integer_limit(in), largest = 0.0f, sum = 0.0f;
  if (limit == 0.0f && in.step) {
    // A given step stays, but the row's infinities and NaN must show.
    each_word(in, row, [&](int, int, const float (&value)[word_columns], int, bool) {
      largest = larger_magnitude(largest, largest_magnitude(value));
    });
    largest = over_block(largest, Larger(), memory);
    float step = load<float>(in.step);
    return level_rounding(in.activation, is_finite(largest) ? step : largest);
  }
  each_word(in, row, [&](int, int, const float (&value)[word_columns], int, bool) {
    largest = larger_magnitude(largest, largest_magnitude(value));
    if (limit == 0.0f) {
#pragma unroll
      for (int k = 0; k < word_columns; k++) sum += fabsf(value[k]);
    }
  });
  if (limit != 0.0f) {
    return integer_rounding(in.activation, over_block(largest, Larger(), memory), limit);
  }
  float mean = over_block(sum, Sum(), memory) / static_cast<float>(in.columns);
  float factor = in.activation == BITLM_UINT1 ? 2.0f : in.activation == BITLM_UINT2
                                                           ? 1.15470053837925f : 1.0f;
  return level_rounding(in.activation, factor * mean);
}

BITLM_DEVICE void swap_bits(uint32_t& low, uint32_t& high, int distance, uint32_t mask) {
  uint32_t other = ((low >> distance) ^ high) & mask;
  high ^= other;
  low ^= other << distance;
}

// Digit `digit` of 32 integers as planes: bit c of plane p is bit p of column c's digit.
BITLM_DEVICE void digit_planes_of(const int32_t (&integer)[word_columns], int digit,
                                  uint32_t (&plane)[digit_planes]) {
  uint32_t two = static_cast<uint32_t>(digit | (4 + digit) << 4);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // Byte j has column 8j + i.
    uint32_t low = __byte_perm(integer[i], integer[8 + i], two);
    uint32_t high = __byte_perm(integer[16 + i], integer[24 + i], two);
    plane[i] = __byte_perm(low, high, 0x5410);
  }
  // In each byte the bits of 8 columns are a square of 8 x 8, which is turned over.
#pragma unroll
  for (int i = 0; i < 8; i += 2) swap_bits(plane[i], plane[i + 1], 1, 0x55555555u);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (!(i & 2)) swap_bits(plane[i], plane[i + 2], 2, 0x33333333u);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) swap_bits(plane[i], plane[i + 4], 4, 0x0f0f0f0fu);
}

BITLM_DEVICE int32_t over_quad(int32_t value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Writes one word of all planes of a row, and what belongs to its unit.
template <int D>
BITLM_DEVICE void write_word(const StagedRow& to, int unit, int t, bool real, int negative_pair,
                             const int32_t (&integer)[word_columns], float scale) {
  // Of each pair of planes: the sums of digit 0, and of those above it.
  int32_t low[4] = {}, high[4] = {};
  uint32_t* words = to.words + unit * to.word_stride + t;
#pragma unroll
  for (int digit = 0; digit < D; digit++) {
    uint32_t plane[digit_planes];
    digit_planes_of(integer, digit, plane);
#pragma unroll
    for (int p = 0; p < digit_planes; p++) {
      if (real) words[(digit * digit_planes + p) * unit_words] = plane[p];
    }
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      int top = digit == D - 1 && pair == negative_pair ? -2 : 2;
      int32_t sum = __popc(plane[2 * pair]) + top * __popc(plane[2 * pair + 1]);
      if (D == 3 && digit > 0) {
        high[pair] += sum << 8 * (digit - 1);
      } else {
        low[pair] += sum << 8 * digit;
      }
    }
  }
  float* sums = to.sums + unit * to.sum_stride;
#pragma unroll
  for (int pair = 0; pair < 4; pair++) {
    int32_t all = over_quad(low[pair]);
    if (real && t == pair) sums[pair] = -sum_unit * static_cast<float>(all);
    if (D == 3) {
      all = over_quad(high[pair]);
      if (real && t == pair) sums[4 + pair] = -sum_unit * static_cast<float>(all);
    }
  }
  if (real && t == 0) to.scales[unit * to.scale_stride] = scale_unit * scale;
}

// Stages one row with all threads of the block.
template <int D>
BITLM_DEVICE void stage_row(const bitlm_cuda_input& in, int row, const StagedRow& to,
                            StageMemory& memory) {
  bool by_unit = in.activation == BITLM_FLOAT;
  Rounding whole = {in.activation, 0.0f, 0.0f};
  if (!by_unit) whole = row_rounding(in, row, memory);
  each_word(in, row, [&](int unit, int t, const float (&value)[word_columns], int columns,
                         bool real) {
    Rounding rounding = whole;
    if (by_unit) {
      float largest = largest_magnitude(value);
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      rounding = integer_rounding(in.activation, largest, integer_limit(in));
    }
    int32_t integer[word_columns];
    bool finite = is_finite(rounding.scale);
#pragma unroll
    for (int k = 0; k < word_columns; k++) {
      integer[k] = finite && k < columns ? integer_of(rounding, value[k]) : 0;
    }
    if (to.rounded && columns) {
      int column = place_of(in, unit).column + t * word_columns;
#pragma unroll
      for (int k = 0; k < word_columns; k++) {
        // A float's own rounding is finer than these sums need: x as it is.
        float seen = by_unit || !finite ? value[k] : rounding.scale * integer[k];
        if (k < columns) to.rounded[column + k] = seen;
      }
    }
#pragma unroll
    for (int k = 0; k < word_columns; k++) integer[k] &= used_bits(in.activation);
    write_word<D>(to, unit, t, real, top_pair(in.activation), integer, rounding.scale);
  });
}

}  // namespace bitlm
