#include "cpu_activations.h"

#include <math.h>
#include <string.h>

#include <cstdlib>
#include <new>

namespace bitlm {
namespace {

constexpr float int8_limit = 127, int16_limit = 32512, float_limit = 4194303;
constexpr int64_t slack = 128;  // kernels may read that far past a row

int level_planes(int activation) {
  return activation == BITLM_INT2 || activation == BITLM_UINT2 ? 2 : 1;
}

// The real columns of chunk `chunk` and where they begin, padded and real.
struct Chunk {
  int64_t padded, real;
  int words, columns;
};

template <class F>
void each_chunk(const bitlm_shape& s, F f) {
  int index = 0;
  for (int group = 0; group < s.groups; group++) {
    int64_t begin = static_cast<int64_t>(group) * s.group_size;
    int64_t end = group + 1 < s.groups ? begin + s.group_size : s.columns;
    int64_t padded = static_cast<int64_t>(group) * full_group_words(s) * word_columns;
    for (int64_t real = begin; real < end; real += chunk_words * word_columns) {
      int64_t left = end - real;
      int columns = static_cast<int>(left < chunk_words * word_columns ? left
                                                                       : chunk_words * word_columns);
      f(index++, Chunk{padded + real - begin, real,
                       static_cast<int>(ceil_div(columns, word_columns)), columns});
    }
  }
}

// A row in fp32 with each group padded by zeros.
const float* padded_row(const uint8_t* base, const bitlm_input& input, const Source& source,
                        int token, int row, Scratch& memory) {
  const bitlm_shape& s = input.shape;
  const float* from = source.rows + token * source.stride;
  const float* scales = nullptr;
  if (input.scales) {
    scales = reinterpret_cast<const float*>(base + input.scales) + row * source.columns;
  }
  bool as_it_is = !scales && !input.columns && s.columns == s.words * word_columns &&
                  (s.groups == 1 || s.group_size % word_columns == 0);
  if (as_it_is) return from;
  const int32_t* columns =
      input.columns ? reinterpret_cast<const int32_t*>(base + input.columns) : nullptr;
  float* out = memory.floats(static_cast<int64_t>(s.words) * word_columns);
  int64_t place = 0;
  each_chunk(s, [&](int, const Chunk& chunk) {
    if (columns) {
      for (int i = 0; i < chunk.columns; i++) {
        int32_t k = columns[chunk.real + i];
        out[chunk.padded + i] = scales ? from[k] * scales[k] : from[k];
      }
    } else if (scales) {
      for (int i = 0; i < chunk.columns; i++) {
        out[chunk.padded + i] = from[chunk.real + i] * scales[chunk.real + i];
      }
    } else {
      memcpy(out + chunk.padded, from + chunk.real, sizeof(float) * chunk.columns);
    }
    place = chunk.padded + chunk.columns;
    int64_t end = chunk.padded + chunk.words * word_columns;
    memset(out + place, 0, sizeof(float) * (end - place));
  });
  return out;
}

// The step of 1- and 2-bit levels for one row, as ops/reference.py has it.
float level_step(int activation, const float* row, int64_t padded, int64_t columns,
                 const float* step) {
  if (step) return *step;
  double sum = 0;
  for (int64_t i = 0; i < padded; i++) sum += fabsf(row[i]);
  float mean = static_cast<float>(sum / columns);
  switch (activation) {
    case BITLM_UINT1:
      return 2 * mean;
    case BITLM_UINT2:
      return 2 * mean / sqrtf(3.0f);
    default:
      return mean;
  }
}

// The level of x as an integer: odd ones for levels around zero.
int level(int activation, float x, float step) {
  switch (activation) {
    case BITLM_INT1:
      return x >= 0 ? 1 : -1;
    case BITLM_UINT1:
      return x > step / 2 ? 1 : 0;
    case BITLM_UINT2: {
      float u = step > 0 ? nearbyintf(x / step) : 0;
      return u < 0 ? 0 : u > 3 ? 3 : static_cast<int>(u);
    }
    default: {
      float u = step > 0 ? floorf(x / step) : 0;
      return 2 * static_cast<int>(u < -2 ? -2 : u > 1 ? 1 : u) + 1;
    }
  }
}

void round_levels(const float* row, const bitlm_shape& s, int activation, const float* given,
                  int at, RoundedInput& out) {
  Activations& x = out.x;
  int8_t* digit = const_cast<int8_t*>(x.digit) + at * x.digit_stride;
  int32_t* sums = const_cast<int32_t*>(x.sums) + static_cast<int64_t>(at) * x.chunks;
  float* scales = const_cast<float*>(x.scales) + static_cast<int64_t>(at) * x.chunks;
  int64_t padded = static_cast<int64_t>(s.words) * word_columns;
  float step = level_step(activation, row, padded, s.columns, given);
  // Levels around zero are odd multiples of half a step, {-a, a} of a itself.
  float scale = activation == BITLM_INT2 ? step / 2 : step;
  const int planes = level_planes(activation);
  uint32_t* bits = const_cast<uint32_t*>(x.bits);
  if (bits) {
    bits += static_cast<int64_t>(at) * (planes + 1) * s.words;
    memset(bits, 0, sizeof(uint32_t) * (planes + 1) * s.words);
  }
  memset(digit, 0, padded);
  each_chunk(s, [&](int index, const Chunk& chunk) {
    int32_t sum = 0;
    for (int i = 0; i < chunk.columns; i++) {
      int value = level(activation, row[chunk.padded + i], step);
      digit[chunk.padded + i] = static_cast<int8_t>(value);
      sum += value;
      if (bits) {
        int64_t word = (chunk.padded + i) / word_columns;
        int k = static_cast<int>((chunk.padded + i) % word_columns);
        uint32_t bit = 1u << (8 * (k % 4) + k / 4);
        int u = activation == BITLM_INT2 ? (value + 3) / 2
                : activation == BITLM_INT1 ? (value + 1) / 2
                                           : value;
        for (int p = 0; p < planes; p++) bits[p * s.words + word] |= u >> p & 1 ? bit : 0;
        bits[planes * s.words + word] |= bit;
      }
    }
    sums[index] = sum;
    scales[index] = scale;
  });
}

void round_row(const Kernel& kernel, const float* row, const bitlm_shape& s, int at,
               RoundedInput& out) {
  Activations& x = out.x;
  int8_t* digit = const_cast<int8_t*>(x.digit) + at * x.digits * x.digit_stride;
  int32_t* sums = const_cast<int32_t*>(x.sums) + static_cast<int64_t>(at) * x.chunks;
  float* scales = const_cast<float*>(x.scales) + static_cast<int64_t>(at) * x.chunks;
  const bool by_chunk = x.activation == BITLM_FLOAT;
  const float limit = x.digits == 1 ? int8_limit : x.digits == 2 ? int16_limit : float_limit;
  float inverse = 0, scale = 0;
  auto scale_for = [&](const float* from, int64_t count) {
    float most = kernel.largest(from, count);
    // Smaller than that is nothing beside the rest of the row: see normalise in cpu_linear.cpp.
    inverse = most > 1e-30f ? limit / most : 0;
    // NaN, of scales that the input was multiplied by, stays NaN.
    scale = most > 1e-30f ? most / limit : most != most ? most : 0;
  };
  if (!by_chunk) scale_for(row, static_cast<int64_t>(s.words) * word_columns);
  each_chunk(s, [&](int index, const Chunk& chunk) {
    int64_t count = chunk.words * word_columns;
    if (by_chunk) scale_for(row + chunk.padded, count);
    sums[index] = kernel.round(row + chunk.padded, count, inverse, x.digits,
                               digit + chunk.padded, x.digit_stride);
    scales[index] = scale;
  });
}

}  // namespace

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::bytes(int64_t count) {
  if (count > capacity_) {
    std::free(memory_);
    memory_ = nullptr;
    capacity_ = 0;
    memory_ = std::malloc(static_cast<size_t>(count) + 64);
    if (!memory_) throw std::bad_alloc();
    capacity_ = count;
  }
  uintptr_t address = (reinterpret_cast<uintptr_t>(memory_) + 63) & ~static_cast<uintptr_t>(63);
  return reinterpret_cast<void*>(address);
}

void reserve(const bitlm_shape& shape, int rank, int tokens, int activation, const Needs& needs,
             RoundedInput& out) {
  Activations& x = out.x;
  x = {};
  int64_t rows = static_cast<int64_t>(tokens) * rank;
  int64_t padded = static_cast<int64_t>(shape.words) * word_columns;
  x.shape = &shape;
  x.tokens = static_cast<int>(rows);
  x.activation = activation;
  x.digits = activation == BITLM_FLOAT ? 3 : activation == BITLM_INT16 ? 2 : 1;
  x.slices = activation == BITLM_FLOAT  ? 5
             : activation == BITLM_INT16 ? 4
             : activation == BITLM_INT8  ? 2
                                         : 1;
  x.chunks = chunks(shape);
  // Rows a multiple of 4096 apart would share the few places of one set in the cache.
  x.digit_stride = (padded + 63) / 64 * 64;
  if (rows * x.digits > 1 && x.digit_stride % 1024 == 0) x.digit_stride += 64;
  if (needs.floats) {
    x.floats = out.float_memory.floats(rows * padded);
    return;
  }
  x.digit = static_cast<int8_t*>(
      out.digit_memory.bytes(rows * x.digits * x.digit_stride + slack));
  x.sums = static_cast<int32_t*>(out.sum_memory.bytes(rows * x.chunks * 4));
  x.scales = out.scale_memory.floats(rows * x.chunks);
  if (needs.bits) {
    int64_t planes = level_planes(activation) + 1;
    x.bits = static_cast<uint32_t*>(out.bit_memory.bytes(rows * planes * shape.words * 4));
  }
}

void round_token(const Kernel& kernel, const uint8_t* base, const bitlm_input& input,
                 const Source& source, int token, const float* step, const Needs& needs,
                 bool group_sums, RoundedInput& out) {
  static thread_local Scratch memory;
  const bitlm_shape& s = input.shape;
  Activations& x = out.x;
  int64_t padded = static_cast<int64_t>(s.words) * word_columns;
  for (int j = 0; j < input.rank; j++) {
    int at = token * input.rank + j;
    const float* row = padded_row(base, input, source, token, j, memory);
    if (needs.floats) {
      memcpy(const_cast<float*>(x.floats) + at * padded, row, sizeof(float) * padded);
    } else if (x.activation >= BITLM_INT2) {
      round_levels(row, s, x.activation, step, at, out);
    } else {
      round_row(kernel, row, s, at, out);
    }
    if (!group_sums) continue;
    float* sums = out.group_sums.data() + static_cast<int64_t>(at) * s.groups;
    for (int g = 0; g < s.groups; g++) sums[g] = 0;
    const int per_group = group_chunks(s, 0);
    each_chunk(s, [&](int index, const Chunk& chunk) {
      int g = index / per_group < s.groups ? index / per_group : s.groups - 1;
      if (needs.floats) {
        for (int i = 0; i < chunk.columns; i++) sums[g] += row[chunk.padded + i];
      } else {
        int64_t i = static_cast<int64_t>(at) * x.chunks + index;
        sums[g] += x.scales[i] * static_cast<float>(x.sums[i]);
      }
    });
  }
}

void reserve_tables(int first, int end, RoundedInput& out) {
  Activations& x = out.x;
  const int64_t words = first_word(*x.shape, end) - first_word(*x.shape, first);
  x.table_first_chunk = first;
  x.table_stride = words * 128 * x.slices;
  x.tables = static_cast<uint8_t*>(out.table_memory.bytes(x.tokens * x.table_stride));
}

void build_tables(const Kernel& kernel, int first, int end, int row, RoundedInput& out) {
  const Activations& x = out.x;
  int64_t begin = first_word(*x.shape, first), stop = first_word(*x.shape, end);
  kernel.tables(x.digit + row * x.digits * x.digit_stride + begin * word_columns, x.digit_stride,
                x.digits, x.slices, stop - begin,
                const_cast<uint8_t*>(x.tables) + row * x.table_stride);
}

}  // namespace bitlm
