// Products of many tokens of 16 bits by the tensor cores of sm_90a, whose products are 128 tokens wide.
//
// One or two bits of a weight choose among two or four values, those that its row has in its group: signs
// choose between shift - s and shift + s, and a mask or a second plane makes it four. The values are
// made of the scales in fp32 and rounded to the type of x, as a dense copy of the weight would be.
// A bit becomes 16 by the byte permutation that repeats signs, so a pair of weights takes a shift
// by two bytes, a permutation for each bit and a logic operation for each choice; the product reads
// them from registers.
//
// x is ordered once (bitlm_cuda_order, wide): what lane t finds in the eight bits 7 - 2t - h of the four
// bytes of a word, h = 0, 1, lies where the product takes its operands from. A block is TILES tiles
// of 64 rows for each of its warpgroups, and 128 tokens; x and codes come four steps of 64 columns
// ahead by asynchronous copies. A product goes on while the next one's weights are made.
#pragma once

#include "cuda_many.h"
#include "cuda_wgmma.h"

namespace bitlm {

constexpr int wide_tokens = product_tokens, wide_stages = 6, wide_ahead = wide_stages - 2;
constexpr int wide_token_bytes = wide_tokens * step_columns * 2;
constexpr int wide_passes = 3;  // two planes and a shift
constexpr int wide_chunk = 16;  // slices of tokens that are near in time, for L2

static_assert(wide_tokens == many_tokens && step_columns * 2 == swizzled_bytes);

template <int GROUPS, int TILES, int BITS>
struct Wide {
  static constexpr int bits = BITS, tiles = TILES, values = 1 << BITS;
  static constexpr int threads = GROUPS * group_threads, rows = GROUPS * TILES * product_rows;
  static constexpr int code_bytes = BITS * rows * step_bytes;
  static constexpr int stride = rows + 4;  // of sums: see sums_stride
  static constexpr int stages_memory = wide_stages * (wide_token_bytes + code_bytes);
  static constexpr int sums_memory = wide_tokens * stride * 4;
  static constexpr int memory =
      swizzle_alignment + (stages_memory > sums_memory ? stages_memory : sums_memory);
};

// ---- Loading -------------------------------------------------------------------------------------

// What a block reads, from step to step.
struct WideSource {
  const uint16_t* x;
  const uint8_t* bits[2];
  int64_t columns, bit_bytes;
  int first_token, last_token;  // those past the last one are the last one
  int first_row, last_row;
};

// x: [tokens] swizzled rows. codes: [bits][rows] of 8 bytes.
template <class Shape>
BITLM_DEVICE void load_wide(char* x, char* codes, const WideSource& from, int step) {
#pragma unroll
  for (int i = 0; i < wide_tokens * token_chunks / Shape::threads; i++) {
    int at = i * Shape::threads + threadIdx.x, token = at / token_chunks, piece = at % token_chunks;
    int64_t row = smaller(from.first_token + token, from.last_token);
    copy_later<16>(x + swizzled(token, piece),
                   from.x + row * from.columns + step * step_columns + piece * 8);
  }
#pragma unroll
  for (int bit = 0; bit < Shape::bits; bit++) {
#pragma unroll
    for (int row = threadIdx.x; row < Shape::rows; row += Shape::threads) {
      int64_t from_row = smaller(from.first_row + row, from.last_row);
      copy_later<step_bytes>(codes + (bit * Shape::rows + row) * step_bytes,
                             from.bits[bit] + from_row * from.bit_bytes + step * step_bytes);
    }
  }
}

// ---- Values --------------------------------------------------------------------------------------

// Scales as they lie in memory, of a pass, a lane's tiles and rows g and g + 8 of each.
template <class Shape>
struct RawScales {
  uint32_t of[wide_passes][Shape::tiles][2];
};

BITLM_DEVICE uint32_t raw_scale(const PassRows& p, int row, int group) {
  if (!p.pass.scales) return 0;
  int64_t at = static_cast<int64_t>(row) * p.groups + group;
  return p.pass.scale_type == BITLM_FLOAT32
             ? load<uint32_t>(static_cast<const uint32_t*>(p.pass.scales) + at)
             : load<uint16_t>(static_cast<const uint16_t*>(p.pass.scales) + at);
}

BITLM_DEVICE float scale_of_raw(const PassRows& p, uint32_t raw) {
  if (!p.pass.scales) return p.pass.factor;
  return p.pass.factor * (p.pass.scale_type == BITLM_FLOAT32
                              ? __uint_as_float(raw)
                              : short_value(static_cast<uint16_t>(raw), p.pass.scale_type));
}

// Reads a group's scales, which nothing waits for before they are made values.
template <class Shape>
BITLM_DEVICE void load_scales(RawScales<Shape>& raw, const PassRows* passes, int count, int row,
                              int last_row, int group) {
#pragma unroll
  for (int pass = 0; pass < wide_passes; pass++) {
    if (pass >= count) break;
#pragma unroll
    for (int tile = 0; tile < Shape::tiles; tile++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int own = smaller(row + tile * product_rows + 8 * i, last_row);
        raw.of[pass][tile][i] = raw_scale(passes[pass], own, group);
      }
    }
  }
}

// What bits choose among, twice in a word: [low bit + 2 high bit].
template <class Shape>
struct Values {
  uint32_t of[Shape::tiles][2][Shape::values];
};

template <int TYPE>
BITLM_DEVICE uint32_t twice(float value) {
  uint32_t bits = TYPE == BITLM_FLOAT16 ? half_of(value) : bfloat_of(value);
  return bits | bits << 16;
}

template <class Shape, int TYPE>
BITLM_DEVICE void make_values(Values<Shape>& values, const RawScales<Shape>& raw,
                              const PassRows* passes, int count) {
  bool masked = passes[0].pass.mask, two = Shape::bits == 2 && !masked;
  int planes = two ? 2 : 1;
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float low = scale_of_raw(passes[0], raw.of[0][tile][i]);
      float high = two ? scale_of_raw(passes[1], raw.of[1][tile][i]) : 0.0f;
      float shift = 0.0f;
      if (count > planes) {
        shift = scale_of_raw(passes[planes], two ? raw.of[2][tile][i] : raw.of[1][tile][i]);
      }
      uint32_t(&own)[Shape::values] = values.of[tile][i];
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
}

// ---- Multiplying ---------------------------------------------------------------------------------

BITLM_DEVICE uint32_t choose(uint32_t where, uint32_t one, uint32_t zero) {
  return (one & where) | (zero & ~where);
}

// The pair of weights of one register: that of bits 7 of two bytes of `bits`, from 2 PRODUCT on.
template <class Shape, int PRODUCT>
BITLM_DEVICE uint32_t weights_of(const uint32_t (&bits)[Shape::bits],
                                 const uint32_t (&values)[Shape::values]) {
  uint32_t low = spread_signs<2 * PRODUCT>(bits[0]), chosen = choose(low, values[1], values[0]);
  if (Shape::bits == 1) return chosen;
  uint32_t high = spread_signs<2 * PRODUCT>(bits[Shape::bits - 1]);
  return choose(high, choose(low, values[Shape::values - 1], values[Shape::values - 2]), chosen);
}

// A lane's words of a step's codes, shifted so that its bits are the highest of bytes: rows g and g + 8 of
// each tile.
template <class Shape>
struct LaneCodes {
  uint2 of[Shape::tiles][2][Shape::bits];
};

// row: of the block, the lane's first one.
template <class Shape>
BITLM_DEVICE void read_codes(LaneCodes<Shape>& lane, const char* codes, int row) {
  int shift = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int bit = 0; bit < Shape::bits; bit++) {
        int place = (bit * Shape::rows + row + tile * product_rows + 8 * i) * step_bytes;
        uint2 words = *reinterpret_cast<const uint2*>(codes + place);
        lane.of[tile][i][bit] = {words.x << shift, words.y << shift};
      }
    }
  }
}

// The A operand of a tile: product PRODUCT of the two of word WORD.
template <class Shape, int WORD, int PRODUCT>
BITLM_DEVICE void make_operand(uint32_t (&a)[4], const LaneCodes<Shape>& lane,
                               const Values<Shape>& values, int tile) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t bits[Shape::bits];
#pragma unroll
      for (int bit = 0; bit < Shape::bits; bit++) {
        const uint2& words = lane.of[tile][i][bit];
        bits[bit] = (WORD ? words.y : words.x) << half;
      }
      a[2 * half + i] = weights_of<Shape, PRODUCT>(bits, values.of[tile][i]);
    }
  }
}

template <class Shape>
struct WideSums {
  float of[Shape::tiles][product_sums];
};

// Two sets of operands in turn: one is made while the products of the other go on.
template <class Shape>
struct Operands {
  uint32_t of[2][Shape::tiles][4];
};

// x: of the step. add: to sums that there are already.
template <class Shape, int TYPE, int WORD, int PRODUCT>
BITLM_DEVICE void multiply_wide(WideSums<Shape>& sums, Operands<Shape>& operands, const char* x,
                                const LaneCodes<Shape>& lane, const Values<Shape>& values,
                                bool add) {
  await_products<1>();  // those before the last ones, which had the same operands' registers
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) {
    make_operand<Shape, WORD, PRODUCT>(operands.of[PRODUCT][tile], lane, values, tile);
  }
  ready_products();
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) {
    start_product<TYPE>(sums.of[tile], operands.of[PRODUCT][tile],
                        x + (2 * WORD + PRODUCT) * product_columns * 2, add);
  }
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

// passes: shared memory for what is known of each pass.
template <class Shape, int TYPE>
BITLM_DEVICE void wide_block(const bitlm_cuda_many& call, PassRows* passes) {
  WidePlace place = wide_place(blockIdx.x, slices_of(call.experts, call.tokens, wide_tokens),
                               ceil_div(call.rows, Shape::rows));
  Slice slice =
      slice_of(call.experts, call.offsets, 1, call.tokens, place.slice, wide_tokens);
  if (slice.first >= slice.end) return;
  int first_row = place.row_block * Shape::rows, last_row = call.rows - 1;
  int groups = ceil_div(call.columns, call.group_size);
  if (threadIdx.x < static_cast<unsigned>(call.count)) {
    passes[threadIdx.x] = pass_rows(call.pass[threadIdx.x], call.columns, groups, call.rows,
                                    slice.expert);
  }
  __syncthreads();
  const uint8_t* second = nullptr;
  if (Shape::bits == 2) second = passes[0].pass.mask ? passes[0].pass.mask : passes[1].pass.signs;
  WideSource from = {static_cast<const uint16_t*>(call.x), {passes[0].pass.signs, second},
                     call.columns, passes[0].bit_bytes, slice.first, slice.end - 1, first_row,
                     last_row};
  char* memory = block_memory();
  memory += -reinterpret_cast<uintptr_t>(memory) & (swizzle_alignment - 1);
  char* codes = memory + wide_stages * wide_token_bytes;
  int steps = call.columns / step_columns;
#pragma unroll
  for (int step = 0; step < wide_ahead; step++) {
    if (step < steps) {
      load_wide<Shape>(memory + step * wide_token_bytes, codes + step * Shape::code_bytes, from,
                       step);
    }
    commit_copies();
  }
  int warp = threadIdx.x / warp_lanes, lane_row = threadIdx.x % warp_lanes / 4;
  int row = warp / 4 * Shape::tiles * product_rows + warp % 4 * 16 + lane_row;
  WideSums<Shape> sums;
  RawScales<Shape> raw;
  Values<Shape> values;
  Operands<Shape> operands;
  load_scales(raw, passes, call.count, first_row + row, last_row, 0);
  int group = 0, group_step = 0, group_steps = ceil_div(smaller(call.group_size, call.columns), step_columns);
  for (int step = 0, stage = 0; step < steps; step++) {
    await_copies<wide_ahead - 1>();
    show_products();
    // All copies of this step are there; and the products of the step before the last one, whose
    // memory is written next, have been waited for by all.
    __syncthreads();
    int next = step + wide_ahead, next_stage = stage + wide_ahead;
    if (next_stage >= wide_stages) next_stage -= wide_stages;
    if (next < steps) {
      load_wide<Shape>(memory + next_stage * wide_token_bytes,
                       codes + next_stage * Shape::code_bytes, from, next);
    }
    commit_copies();
    if (group_step == 0) {
      make_values<Shape, TYPE>(values, raw, passes, call.count);
      group++;
      if (group < groups) {
        load_scales(raw, passes, call.count, first_row + row, last_row, group);
      }
    }
    if (++group_step == group_steps) group_step = 0;
    LaneCodes<Shape> lane;
    read_codes<Shape>(lane, codes + stage * Shape::code_bytes, row);
    const char* x = memory + stage * wide_token_bytes;
    multiply_wide<Shape, TYPE, 0, 0>(sums, operands, x, lane, values, step > 0);
    multiply_wide<Shape, TYPE, 0, 1>(sums, operands, x, lane, values, true);
    multiply_wide<Shape, TYPE, 1, 0>(sums, operands, x, lane, values, true);
    multiply_wide<Shape, TYPE, 1, 1>(sums, operands, x, lane, values, true);
    if (++stage == wide_stages) stage = 0;
  }
  await_copies<0>();
  await_products<0>();
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) settle(sums.of[tile]);
  __syncthreads();  // the sums go where the stages were
  float* to = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int tile = 0; tile < Shape::tiles; tile++) {
#pragma unroll
    for (int i = 0; i < product_sums; i++) {
      int token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      to[token * Shape::stride + row + tile * product_rows + i % 4 / 2 * 8] = sums.of[tile][i];
    }
  }
  __syncthreads();
  write_sums<TYPE, Shape::rows, Shape::stride, Shape::threads>(call, to, slice, first_row);
}

}  // namespace bitlm
