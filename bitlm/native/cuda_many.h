// Products of many tokens of 16 bits: codes are made floats in registers and multiplied by the tensor
// cores.
//
// A code is +2 or -2, or +0 or -0 where a mask says so: as fp16 and as bf16 alike the two highest bits
// of those are sign and size, so they are the stored bits where they lie, shifted:
//   ((signs << s) ^ ~0) & 0x80008000  |  (mask << s >> 1) & 0x40004000      columns 15 - s and 31 - s
// The order of columns within a product is free. x is ordered once (bitlm_cuda_order) so that lane t
// finds what belongs to its four shifts of a word, 2t, 2t + 1, 8 + 2t and 9 + 2t, in 16 bytes.
//
// A block makes 64 R rows of 128 tokens, 64 columns a step, read two steps ahead by asynchronous copies.
// Scales are applied to the sums of a group, in fp32.
#pragma once

#include "cuda_product.h"

namespace bitlm {

constexpr int many_threads = 256, many_warps = many_threads / warp_lanes;
constexpr int many_row_warps = 4, many_token_warps = many_warps / many_row_warps;
constexpr int many_tokens = 128, token_tiles = many_tokens / many_token_warps / 8;
constexpr int many_stages = 3;
constexpr int step_columns = 64, step_bytes = step_columns / 8, step_words = 2;
constexpr int token_chunks = step_columns * 2 / 16;  // of 16 bytes
constexpr int token_bytes = many_tokens * token_chunks * 16;

constexpr int many_rows(int tiles) { return many_row_warps * tiles * tile_rows; }

// Floats from one token's sums to the next one's: 4 more, so that lanes write to different banks.
constexpr int sums_stride(int tiles) { return many_rows(tiles) + 4; }

// Bytes of one stage: x, and behind it each pass's signs and mask.
constexpr int stage_bytes(int tiles, int passes) {
  return token_bytes + passes * 2 * many_rows(tiles) * step_bytes;
}

constexpr int many_memory(int tiles, int passes) {
  int stages = many_stages * stage_bytes(tiles, passes);
  int sums = many_tokens * sums_stride(tiles) * 4;
  return stages > sums ? stages : sums;
}

// ---- Codes ---------------------------------------------------------------------------------------

// The A fragments of the two products that a word takes part in, of one row: [product][low, high k].
struct RowFragments {
  uint32_t of[2][2];
};

// signs, mask: a word, shifted to the left by 2t.
template <Codes codes>
BITLM_DEVICE RowFragments row_fragments(uint32_t signs, uint32_t mask) {
  RowFragments f;
#pragma unroll
  for (int product = 0; product < 2; product++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int shift = 8 * product + half;
      uint32_t sign = ~(signs << shift) & 0x80008000u;
      uint32_t size = codes == TERNARY ? (mask << shift >> 1) & 0x40004000u : 0x40004000u;
      f.of[product][half] = sign | size;
    }
  }
  return f;
}

// ---- Loading -------------------------------------------------------------------------------------

// Where chunk `chunk` of a token lies in a stage: neighbouring tokens have their halves exchanged, so
// that the 8 lanes that read at a time meet all banks.
BITLM_DEVICE int chunk_place(int token, int chunk) {
  return (token * token_chunks + (chunk ^ (token & 1) * (token_chunks / 2))) * 16;
}

// What a block reads, from step to step.
template <int R>
struct ManySource {
  const uint16_t* x;
  int64_t columns;
  int first_token, last_token;  // those past the last one are the last one
  int first_row, last_row;
};

template <int R>
BITLM_DEVICE void load_step(char* stage, const ManySource<R>& from, const PassRows* passes, int count,
                            int step) {
#pragma unroll
  for (int i = 0; i < many_tokens * token_chunks / many_threads; i++) {
    int at = i * many_threads + threadIdx.x, token = at / token_chunks, chunk = at % token_chunks;
    int64_t row = smaller(from.first_token + token, from.last_token);
    copy_later<16>(stage + chunk_place(token, chunk),
                   from.x + row * from.columns + step * step_columns + chunk * 8);
  }
  int row = threadIdx.x;
  if (row >= many_rows(R)) return;
  int64_t from_row = smaller(from.first_row + row, from.last_row);
  for (int i = 0; i < count; i++) {
    const bitlm_cuda_pass& pass = passes[i].pass;
    int64_t at = from_row * passes[i].bit_bytes + step * step_bytes;
    char* codes = stage + token_bytes + i * 2 * many_rows(R) * step_bytes + row * step_bytes;
    if (pass.signs) copy_later<step_bytes>(codes, pass.signs + at);
    if (pass.mask) copy_later<step_bytes>(codes + many_rows(R) * step_bytes, pass.mask + at);
  }
}

// ---- Multiplying ---------------------------------------------------------------------------------

// Of R tiles of 16 rows and a warp's tiles of 8 tokens: as mma leaves them.
template <int R>
struct Tiles {
  float of[R][token_tiles][4];
};

template <int R>
BITLM_DEVICE void clear(Tiles<R>& tiles) {
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int n = 0; n < token_tiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) tiles.of[r][n][i] = 0.0f;
    }
  }
}

// Adds the products of a step's codes. ONES: only in tile 0, for all rows have the same.
template <int R, int TYPE, Codes codes>
BITLM_DEVICE void multiply_step(Tiles<R>& sums, const char* stage, const char* step_codes) {
  constexpr int tiles = codes == ONES ? 1 : R;
  int lane = threadIdx.x % warp_lanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / warp_lanes;
  int row = warp % many_row_warps * R * tile_rows + g;
  int token = warp / many_row_warps * token_tiles * 8 + g;
  uint2 signs[tiles][2] = {}, mask[tiles][2] = {};
#pragma unroll
  for (int r = 0; r < tiles; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const char* own = step_codes + (row + r * tile_rows + i * 8) * step_bytes;
      if (codes != ONES) signs[r][i] = *reinterpret_cast<const uint2*>(own);
      if (codes == TERNARY) {
        mask[r][i] = *reinterpret_cast<const uint2*>(own + many_rows(R) * step_bytes);
      }
    }
  }
#pragma unroll
  for (int word = 0; word < step_words; word++) {
    RowFragments a[tiles][2];
#pragma unroll
    for (int r = 0; r < tiles; r++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t s = word ? signs[r][i].y : signs[r][i].x;
        uint32_t m = word ? mask[r][i].y : mask[r][i].x;
        a[r][i] = codes == ONES ? row_fragments<BINARY>(0xffffffffu, 0)
                                : row_fragments<codes>(s << 2 * t, m << 2 * t);
      }
    }
#pragma unroll
    for (int n = 0; n < token_tiles; n++) {
      int place = chunk_place(token + 8 * n, word * 4 + t);
      uint4 x = *reinterpret_cast<const uint4*>(stage + place);
#pragma unroll
      for (int r = 0; r < tiles; r++) {
        const RowFragments(&own)[2] = a[r];
        multiply_add<TYPE>(sums.of[r][n], own[0].of[0][0], own[1].of[0][0], own[0].of[0][1],
                           own[1].of[0][1], x.x, x.y);
        multiply_add<TYPE>(sums.of[r][n], own[0].of[1][0], own[1].of[1][0], own[0].of[1][1],
                           own[1].of[1][1], x.z, x.w);
      }
    }
  }
}

// Adds the sums of a group times its scales, and begins the sums anew.
template <int R, Codes codes>
BITLM_DEVICE void fold(Tiles<R>& totals, Tiles<R>& sums, const PassRows& pass,
                       const ManySource<R>& from, int group) {
  int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  int row = from.first_row + warp % many_row_warps * R * tile_rows + lane / 4;
#pragma unroll
  for (int r = 0; r < R; r++) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int at = smaller(row + r * tile_rows + i * 8, from.last_row);
      scale[i] = 0.5f * scale_of(pass, at, 0, group);
    }
#pragma unroll
    for (int n = 0; n < token_tiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        totals.of[r][n][i] = fmaf(sums.of[codes == ONES ? 0 : r][n][i], scale[i / 2], totals.of[r][n][i]);
      }
    }
  }
  clear(sums);
}

// What a step of a block is.
template <int R>
struct Step {
  const char* stage;
  const ManySource<R>& from;
  int group;
  bool folds;
};

template <int R, int TYPE, Codes codes>
BITLM_DEVICE void add_step(Tiles<R>& totals, Tiles<R>& sums, const Step<R>& step,
                           const char* step_codes, const PassRows& pass) {
  multiply_step<R, TYPE, codes>(sums, step.stage, step_codes);
  if (step.folds) fold<R, codes>(totals, sums, pass, step.from, step.group);
}

// ---- A block -------------------------------------------------------------------------------------

// Writes y of a block of ROWS rows x TOKENS tokens, 8 rows at a time where they lie together.
// sums: [TOKENS][STRIDE], in shared memory, STRIDE a multiple of 4.
template <int TYPE, int TOKENS, int ROWS, int STRIDE, int THREADS>
BITLM_DEVICE void write_sums(const bitlm_cuda_many& call, const float* sums, const Slice& slice,
                             int first_row) {
  constexpr int eights = ROWS / 8;
  for (int at = threadIdx.x; at < TOKENS * eights; at += THREADS) {
    int token = at / eights, row = at % eights * 8, left = call.rows - first_row - row;
    if (slice.first + token >= slice.end || left <= 0) continue;
    const Words* own = reinterpret_cast<const Words*>(sums + token * STRIDE + row);
    const Words words[2] = {own[0], own[1]};
    int64_t place = static_cast<int64_t>(slice.first + token) * call.y_columns + call.y_column +
                    first_row + row;
    int64_t bias = static_cast<int64_t>(slice.expert) * call.rows + first_row + row;
    uint16_t value[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float sum = __uint_as_float(words[k / 4].word[k % 4]);
      if (k < left && call.addend) sum += call.addend[place + k];
      if (k < left && call.bias) sum += float_at(call.bias, call.bias_type, bias + k);
      value[k] = TYPE == BITLM_FLOAT16 ? half_of(sum) : bfloat_of(sum);
    }
    uint16_t* y = static_cast<uint16_t*>(call.y) + place;
    if (left >= 8 && (reinterpret_cast<uintptr_t>(y) & 15) == 0) {
      Words eight;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        eight.word[k] = value[2 * k] | static_cast<uint32_t>(value[2 * k + 1]) << 16;
      }
      *reinterpret_cast<Words*>(y) = eight;
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (k < left) y[k] = value[k];
      }
    }
  }
}

// Puts the sums of a block together and writes its y.
template <int R, int TYPE>
BITLM_DEVICE void write_tiles(const bitlm_cuda_many& call, const Tiles<R>& totals,
                              const Slice& slice, int first_row) {
  float* memory = reinterpret_cast<float*>(block_memory());
  int lane = threadIdx.x % warp_lanes, g = lane / 4, t = lane % 4, warp = threadIdx.x / warp_lanes;
  int own_row = warp % many_row_warps * R * tile_rows + g;
  int own_token = warp / many_row_warps * token_tiles * 8 + 2 * t;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int n = 0; n < token_tiles; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = own_token + 8 * n + i % 2, row = own_row + r * tile_rows + i / 2 * 8;
        memory[token * sums_stride(R) + row] = totals.of[r][n][i];
      }
    }
  }
  __syncthreads();
  write_sums<TYPE, many_tokens, many_rows(R), sums_stride(R), many_threads>(call, memory, slice, first_row);
}

// passes: shared memory for what is known of each pass.
template <int R, int TYPE>
BITLM_DEVICE void many_block(const bitlm_cuda_many& call, PassRows* passes) {
  Slice slice = slice_of(call.experts, call.offsets, 1, call.tokens, blockIdx.x, many_tokens);
  if (slice.first >= slice.end) return;
  int first_row = blockIdx.y * many_rows(R), groups = ceil_div(call.columns, call.group_size);
  if (threadIdx.x < static_cast<unsigned>(call.count)) {
    passes[threadIdx.x] = pass_rows(call.pass[threadIdx.x], call.columns, groups, call.rows,
                                    slice.expert);
  }
  __syncthreads();
  ManySource<R> from = {static_cast<const uint16_t*>(call.x), call.columns, slice.first,
                        slice.end - 1, first_row, call.rows - 1};
  char* memory = block_memory();
  int bytes = stage_bytes(R, call.count), steps = call.columns / step_columns;
#pragma unroll
  for (int stage = 0; stage < many_stages - 1; stage++) {
    if (stage < steps) load_step<R>(memory + stage * bytes, from, passes, call.count, stage);
    commit_copies();
  }
  Tiles<R> totals, sums;
  clear(totals);
  clear(sums);
  for (int step = 0; step < steps; step++) {
    await_copies<many_stages - 2>();
    __syncthreads();  // all copies of this step are there, and nobody reads the step before any more
    int next = step + many_stages - 1;
    if (next < steps) {
      load_step<R>(memory + next % many_stages * bytes, from, passes, call.count, next);
    }
    commit_copies();
    const char* stage = memory + step % many_stages * bytes;
    int group = step * step_columns / call.group_size;
    bool ends = step + 1 == steps || (step + 1) * step_columns / call.group_size != group;
    Step<R> own = {stage, from, group, ends || call.count > 1};
    for (int i = 0; i < call.count; i++) {
      const char* codes = stage + token_bytes + i * 2 * many_rows(R) * step_bytes;
      if (!passes[i].pass.signs) {
        add_step<R, TYPE, ONES>(totals, sums, own, codes, passes[i]);
      } else if (passes[i].pass.mask) {
        add_step<R, TYPE, TERNARY>(totals, sums, own, codes, passes[i]);
      } else {
        add_step<R, TYPE, BINARY>(totals, sums, own, codes, passes[i]);
      }
    }
  }
  await_copies<0>();
  __syncthreads();  // the totals go where the stages were
  write_tiles<R, TYPE>(call, totals, slice, first_row);
}

// ---- Ordering x ----------------------------------------------------------------------------------

// Chunk t of a word of a token: columns 15 - s and 31 - s for s = 2t, 2t + 1, 8 + 2t, 9 + 2t.
BITLM_DEVICE void order_chunk(const bitlm_cuda_order& call, int64_t token, int word, int t) {
  const uint16_t* from = call.x + token * call.columns;
  Words four;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int s = i / 2 * 8 + 2 * t + i % 2;
    uint32_t pair = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int column = word * word_columns + 16 * half + 15 - s;
      pair |= static_cast<uint32_t>(load<uint16_t>(from + column)) << 16 * half;
    }
    four.word[i] = pair;
  }
  uint16_t* to = call.ordered + token * call.columns;
  *reinterpret_cast<Words*>(to + word * word_columns + 8 * t) = four;
}

}  // namespace bitlm
