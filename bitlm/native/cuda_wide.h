// Products of many tokens of 16 bits by the tensor cores of sm_90a, whose products are 128 or 256 tokens
// wide.
//
// One or two bits of a weight choose among two or four values, those that its row has in its group: signs
// choose between shift - s and shift + s, and a mask or a second plane makes it four. The values are
// made of the scales in fp32 and rounded to the type of x, as a dense copy of the weight would be.
// Lane t of a product has columns 2t and 2t + 1 of every 8, a byte of codes: those bits are shifted to
// the signs of two words' bytes, which a byte permutation repeats 16 times each. So a pair of
// weights takes a permutation for each bit, half a shift, and a logic operation for each choice; the
// product reads them from registers.
//
// A block is 64 rows for each of its warpgroups. Boxes of x and codes come some steps of 64 columns
// ahead. A product goes on while the next one's weights are made.
#pragma once

#include "cuda_many.h"
#include "cuda_sm90a.h"

namespace bitlm {

constexpr int wide_passes = 3;  // two planes and a shift
constexpr int wide_chunk = 16;  // slices of tokens that are near in time, for L2

static_assert(step_columns == box_columns);

template <int GROUPS, int TOKENS, int BITS>
struct Wide {
  static constexpr int bits = BITS, tokens = TOKENS, values = 1 << BITS;
  static constexpr int threads = GROUPS * group_threads, rows = GROUPS * product_rows;
  // What is copied next goes where the step before the last one was, whose products all have waited for.
  static constexpr int stages = TOKENS == 256 ? 5 : 6, ahead = stages - 2;
  static constexpr int token_bytes = TOKENS * box_row_bytes, code_bytes = BITS * rows * step_bytes;
  static constexpr int stride = rows + 4;  // of sums: see sums_stride
  static constexpr int stages_memory = stages * (token_bytes + code_bytes);
  static constexpr int sums_memory = TOKENS * stride * 4;
  static constexpr int memory =
      box_alignment + (stages_memory > sums_memory ? stages_memory : sums_memory);
};

struct WideCall {
  bitlm_cuda_many many;
  TokenMap x;
};

// ---- Loading -------------------------------------------------------------------------------------

// What a thread copies of every step: 8 bytes of codes, or nothing, and the first one the box of x.
template <class Shape>
struct WideSource {
  const WideCall& call;
  const uint8_t* codes;
  int place;  // of the codes in a stage
  int first_token;
  char* memory;        // [stages] boxes of x, then [stages][bits][rows] of 8 bytes
  uint64_t* landings;  // [stages]
};

template <class Shape>
BITLM_DEVICE WideSource<Shape> wide_source(const WideCall& call, const Slice& slice, int first_row,
                                           char* memory, uint64_t* landings) {
  const bitlm_cuda_many& many = call.many;
  const uint8_t* second = many.pass[0].mask ? many.pass[0].mask : many.pass[1].signs;
  int bit = threadIdx.x / Shape::rows, row = threadIdx.x % Shape::rows;
  const uint8_t* codes = nullptr;
  if (bit < Shape::bits && first_row + row < many.rows) {
    int64_t own = static_cast<int64_t>(slice.expert) * many.rows + first_row + row;
    codes = (bit ? second : many.pass[0].signs) + own * (many.columns / 8);
  }
  return {call, codes, static_cast<int>(threadIdx.x) * step_bytes, slice.first, memory, landings};
}

template <class Shape>
BITLM_DEVICE char* codes_of(char* memory, int stage) {
  return memory + Shape::stages * Shape::token_bytes + stage * Shape::code_bytes;
}

template <class Shape>
BITLM_DEVICE void load_wide(const WideSource<Shape>& from, int step, int stage) {
  if (threadIdx.x == 0) {
    start_copy(from.memory + stage * Shape::token_bytes, from.call.x, step * step_columns,
               from.first_token, from.landings + stage, Shape::token_bytes);
  }
  if (from.codes) {
    copy_later<step_bytes>(codes_of<Shape>(from.memory, stage) + from.place,
                           from.codes + step * step_bytes);
  }
}

// ---- Values --------------------------------------------------------------------------------------

// Where the scales of a lane's rows g and g + 8 lie, of each pass; null where a pass has none.
struct LaneScales {
  const char* of[wide_passes][2];
};

// The same scales of a group, as they lie in memory.
struct RawScales {
  uint32_t of[wide_passes][2];
};

BITLM_DEVICE int scale_bytes(const bitlm_cuda_pass& pass) {
  return pass.scale_type == BITLM_FLOAT32 ? 4 : 2;
}

// row: the lane's first one, of the expert's.
BITLM_DEVICE LaneScales lane_scales(const bitlm_cuda_many& call, int expert, int row, int groups) {
  LaneScales scales;
#pragma unroll
  for (int pass = 0; pass < wide_passes; pass++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bitlm_cuda_pass& own = call.pass[pass];
      int64_t at = static_cast<int64_t>(expert) * call.rows + smaller(row + 8 * i, call.rows - 1);
      scales.of[pass][i] = pass < call.count && own.scales
          ? static_cast<const char*>(own.scales) + at * groups * scale_bytes(own) : nullptr;
    }
  }
  return scales;
}

// Nothing waits for what this reads before it is made values.
BITLM_DEVICE void load_scales(RawScales& raw, const bitlm_cuda_many& call, const LaneScales& scales,
                              int group) {
#pragma unroll
  for (int pass = 0; pass < wide_passes; pass++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!scales.of[pass][i]) continue;
      const char* at = scales.of[pass][i] + group * scale_bytes(call.pass[pass]);
      raw.of[pass][i] = call.pass[pass].scale_type == BITLM_FLOAT32 ? load<uint32_t>(at)
                                                                    : load<uint16_t>(at);
    }
  }
}

BITLM_DEVICE float scale_of_raw(const bitlm_cuda_pass& pass, uint32_t raw) {
  if (!pass.scales) return pass.factor;
  return pass.factor * (pass.scale_type == BITLM_FLOAT32
                            ? __uint_as_float(raw)
                            : short_value(static_cast<uint16_t>(raw), pass.scale_type));
}

// What bits choose among in rows g and g + 8, twice in a word: [low bit + 2 high bit].
template <class Shape>
struct Values {
  uint32_t of[2][Shape::values];
};

template <int TYPE>
BITLM_DEVICE uint32_t twice(float value) {
  uint32_t bits = TYPE == BITLM_FLOAT16 ? half_of(value) : bfloat_of(value);
  return bits | bits << 16;
}

template <class Shape, int TYPE>
BITLM_DEVICE void make_values(Values<Shape>& values, const RawScales& raw,
                              const bitlm_cuda_many& call) {
  bool masked = call.pass[0].mask, two = Shape::bits == 2 && !masked;
  int planes = two ? 2 : 1;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float low = scale_of_raw(call.pass[0], raw.of[0][i]);
    float high = two ? scale_of_raw(call.pass[1], raw.of[1][i]) : 0.0f, shift = 0.0f;
    if (call.count > planes) {
      shift = scale_of_raw(call.pass[planes], two ? raw.of[2][i] : raw.of[1][i]);
    }
    uint32_t(&own)[Shape::values] = values.of[i];
    if (Shape::bits == 1) {
      own[0] = twice<TYPE>(shift - low);
      own[1] = twice<TYPE>(shift + low);
    } else {
      float unmasked = masked ? 0.0f : low;
      own[0] = twice<TYPE>(shift - high - unmasked);
      own[1] = twice<TYPE>(shift - high + unmasked);
      own[Shape::values - 2] = twice<TYPE>(shift + high - low);
      own[Shape::values - 1] = twice<TYPE>(shift + high + low);
    }
  }
}

// ---- Multiplying ---------------------------------------------------------------------------------

BITLM_DEVICE uint32_t choose(uint32_t where, uint32_t one, uint32_t zero) {
  return (one & where) | (zero & ~where);
}

// A word of codes twice: the lane's even and odd bit of each byte are signs.
struct Signs {
  uint32_t even, odd;
};

// The pair of weights of byte BYTE of a word.
template <class Shape, int BYTE>
BITLM_DEVICE uint32_t weights_of(const Signs (&bits)[Shape::bits],
                                 const uint32_t (&values)[Shape::values]) {
  uint32_t low = spread_signs<BYTE>(bits[0].even, bits[0].odd);
  uint32_t chosen = choose(low, values[1], values[0]);
  if (Shape::bits == 1) return chosen;
  const Signs& second = bits[Shape::bits - 1];
  uint32_t high = spread_signs<BYTE>(second.even, second.odd);
  return choose(high, choose(low, values[Shape::values - 1], values[Shape::values - 2]), chosen);
}

// A lane's words of a step's codes: rows g and g + 8.
template <class Shape>
struct LaneCodes {
  uint2 of[2][Shape::bits];
};

// row: of the block, the lane's first one.
template <class Shape>
BITLM_DEVICE void read_codes(LaneCodes<Shape>& lane, const char* codes, int row) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int bit = 0; bit < Shape::bits; bit++) {
      int place = (bit * Shape::rows + row + 8 * i) * step_bytes;
      lane.of[i][bit] = *reinterpret_cast<const uint2*>(codes + place);
    }
  }
}

// The A operand of product PRODUCT of the two of word WORD.
template <class Shape, int WORD, int PRODUCT>
BITLM_DEVICE void make_operand(uint32_t (&a)[4], const LaneCodes<Shape>& lane,
                               const Values<Shape>& values) {
  int even = 7 - 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    Signs bits[Shape::bits];
#pragma unroll
    for (int bit = 0; bit < Shape::bits; bit++) {
      uint32_t word = WORD ? lane.of[i][bit].y : lane.of[i][bit].x;
      bits[bit] = {word << even, word << (even - 1)};
    }
    a[i] = weights_of<Shape, 2 * PRODUCT>(bits, values.of[i]);
    a[2 + i] = weights_of<Shape, 2 * PRODUCT + 1>(bits, values.of[i]);
  }
}

// Two operands in turn: one is made while the product of the other goes on.
struct Operands {
  uint32_t of[2][4];
};

// x: of the step. add: to sums that there are already.
template <class Shape, int TYPE, int WORD, int PRODUCT>
BITLM_DEVICE void multiply_wide(float (&sums)[product_sums(Shape::tokens)], Operands& operands,
                                const char* x, const LaneCodes<Shape>& lane,
                                const Values<Shape>& values, bool add) {
  await_products<1>();  // the one before the last, which had the same operand's registers
  make_operand<Shape, WORD, PRODUCT>(operands.of[PRODUCT], lane, values);
  ready_products();
  start_product<Shape::tokens, TYPE>(sums, operands.of[PRODUCT],
                                     x + (2 * WORD + PRODUCT) * product_columns * 2, add);
  commit_products();
}

// ---- A block -------------------------------------------------------------------------------------

// Which slice of tokens and which block of rows the index-th block is: wide_chunk slices, all rows of
// those, the next slices.
struct WidePlace {
  int slice, row_block;
};

BITLM_DEVICE WidePlace wide_place(int index, int slices, int row_blocks) {
  int chunk = index / (wide_chunk * row_blocks), left = index - chunk * wide_chunk * row_blocks;
  int own = smaller(slices - chunk * wide_chunk, wide_chunk);
  return {chunk * wide_chunk + left % own, left / own};
}

// landings: [stages], in shared memory.
template <class Shape, int TYPE>
BITLM_DEVICE void wide_block(const WideCall& whole, uint64_t* landings) {
  const bitlm_cuda_many& call = whole.many;
  WidePlace place = wide_place(blockIdx.x, slices_of(call.experts, call.tokens, Shape::tokens),
                               ceil_div(call.rows, Shape::rows));
  Slice slice =
      slice_of(call.experts, call.offsets, 1, call.tokens, place.slice, Shape::tokens);
  if (slice.first >= slice.end) return;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < Shape::stages; stage++) prepare_landing(landings + stage);
  }
  __syncthreads();
  int first_row = place.row_block * Shape::rows, groups = ceil_div(call.columns, call.group_size);
  char* memory = block_memory();
  memory += -reinterpret_cast<uintptr_t>(memory) & (box_alignment - 1);
  WideSource<Shape> from = wide_source<Shape>(whole, slice, first_row, memory, landings);
  int steps = call.columns / step_columns;
#pragma unroll
  for (int step = 0; step < Shape::ahead; step++) {
    if (step < steps) load_wide<Shape>(from, step, step);
    commit_copies();
  }
  int row = threadIdx.x / warp_lanes * 16 + threadIdx.x % warp_lanes / 4;
  LaneScales scales = lane_scales(call, slice.expert, first_row + row, groups);
  RawScales raw = {};
  load_scales(raw, call, scales, 0);
  float sums[product_sums(Shape::tokens)];
  Values<Shape> values;
  Operands operands;
  bool landed = true;
  int group = 0, group_step = 0;
  int group_steps = ceil_div(smaller(call.group_size, call.columns), step_columns);
  for (int step = 0, stage = 0, parity = 0; step < steps; step++) {
    await_copies<Shape::ahead - 1>();
    landed = landed && await_landing(landings + stage, parity);
    __syncthreads();  // all copies of this step are there, and see Wide::ahead
    int next = step + Shape::ahead, next_stage = stage + Shape::ahead;
    if (next_stage >= Shape::stages) next_stage -= Shape::stages;
    if (next < steps) load_wide<Shape>(from, next, next_stage);
    commit_copies();
    __syncwarp();
    if (group_step == 0) {
      make_values<Shape, TYPE>(values, raw, call);
      group++;
      if (group < groups) load_scales(raw, call, scales, group);
    }
    if (++group_step == group_steps) group_step = 0;
    LaneCodes<Shape> lane;
    read_codes<Shape>(lane, codes_of<Shape>(memory, stage), row);
    const char* x = memory + stage * Shape::token_bytes;
    multiply_wide<Shape, TYPE, 0, 0>(sums, operands, x, lane, values, step > 0);
    multiply_wide<Shape, TYPE, 0, 1>(sums, operands, x, lane, values, true);
    multiply_wide<Shape, TYPE, 1, 0>(sums, operands, x, lane, values, true);
    multiply_wide<Shape, TYPE, 1, 1>(sums, operands, x, lane, values, true);
    if (++stage == Shape::stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  await_copies<0>();
  await_products<0>();
  settle(sums);
  __syncthreads();  // the sums go where the stages were
  float* to = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < product_sums(Shape::tokens); i++) {
    int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    to[token * Shape::stride + row + i % 4 / 2 * 8] =
        landed ? sums[i] : __uint_as_float(0x7fc00000u);
  }
  __syncthreads();
  write_sums<TYPE, Shape::tokens, Shape::rows, Shape::stride, Shape::threads>(call, to, slice,
                                                                              first_row);
}

}  // namespace bitlm
