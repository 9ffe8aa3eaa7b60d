// Products of many tokens of 1 and 2 bits, by the tensor cores' product of bits.
//
// Where cuda_product.h has 8 planes of one token, the 8 columns of an instruction are here one plane of
// 8 tokens, of which few matter: with the bits x_b of a staged integer
//   x = c + sum_b w_b x_b      int1: 1 - 2 x_1   int2: 1 + 2 x_1 - 4 x_2   uint1: x_0   uint2: x_0 + 2 x_1
// and with codes w = 2 v - 1
//   w . x = 2 (sum_b w_b popcount(v & x_b) + c popcount(v)) - sum x
// Ternary codes are 2 s - m, s = sign and mask, so the last term is then of popcount(m & x_b), and c
// takes popcount(m). Counts stay integers over a group, whose scales are applied in fp32.
#pragma once

#include "cuda_product.h"

namespace bitlm {

constexpr int few_threads = 128;
constexpr int few_row_warps = 2, few_token_warps = 2;
constexpr int few_row_tiles = 2;  // of a warp
constexpr int few_rows = few_row_warps * few_row_tiles * tile_rows;
constexpr int few_units = 4;  // of a step
constexpr int few_stages = 2;
constexpr int few_row_floats = few_rows + 4;  // of a token's sums: lanes write to different banks

// What of an integer of activation A matters.
constexpr int few_planes(int A) { return A == BITLM_INT2 || A == BITLM_UINT2 ? 2 : 1; }
constexpr bool is_centred(int A) { return A == BITLM_INT1 || A == BITLM_INT2; }
constexpr int few_plane(int A, int i) { return is_centred(A) ? i + 1 : i; }
constexpr int few_weight(int A, int i) {
  return A == BITLM_INT1 ? -2 : A == BITLM_INT2 && i == 1 ? -4 : A == BITLM_INT2 || i == 1 ? 2 : 1;
}

// Tiles of 8 tokens of a warp: fewer where there are more counts.
constexpr int few_token_tiles(int A) { return few_planes(A) == 1 ? 4 : 2; }
constexpr int few_tokens(int A) { return few_token_warps * few_token_tiles(A) * 8; }

// Bytes of a stage: planes [unit][plane][token][4 words], and behind them sums [unit][token].
constexpr int few_plane_bytes(int A) { return few_units * few_planes(A) * few_tokens(A) * 16; }
constexpr int few_stage_bytes(int A) { return few_plane_bytes(A) + few_units * few_tokens(A) * 4; }

constexpr int few_memory(int A) {
  int stages = few_stages * few_stage_bytes(A), sums = few_tokens(A) * few_row_floats * 4;
  return stages > sums ? stages : sums;
}

// ---- Loading -------------------------------------------------------------------------------------

template <int A>
BITLM_DEVICE void load_planes(char* stage, const bitlm_cuda_input& in, const Slice& slice, int step) {
  constexpr int tokens = few_tokens(A), chunks = few_units * few_planes(A) * tokens;
#pragma unroll
  for (int i = 0; i < chunks / few_threads; i++) {
    int at = i * few_threads + threadIdx.x, token = at % tokens, of = at / tokens;
    int unit = step * few_units + of / few_planes(A);
    if (unit >= in.units) continue;
    int64_t row = smaller(slice.first + token, slice.end - 1);
    const uint32_t* from = in.words + static_cast<int64_t>(unit) * in.unit_words + row * digit_words;
    copy_later<16>(stage + at * 16, from + few_plane(A, of % few_planes(A)) * unit_words);
  }
}

// Minus the sums of a token's integers, since the beginning of each unit's group. A thread has a token.
struct TokenSums {
  float since;  // up to the step before
  float2 next[few_units];
};

template <int A>
BITLM_DEVICE void load_sums(TokenSums& sums, const bitlm_cuda_input& in, const Slice& slice, int step) {
  if (threadIdx.x >= static_cast<unsigned>(few_tokens(A))) return;
  int64_t row = smaller(slice.first + static_cast<int>(threadIdx.x), slice.end - 1);
#pragma unroll
  for (int i = 0; i < few_units; i++) {
    int64_t unit = smaller(step * few_units + i, in.units - 1);
    sums.next[i] = load<float2>(in.sums + (unit * in.padded_rows + row) * 4);
  }
}

template <int A>
BITLM_DEVICE void store_sums(char* stage, TokenSums& sums, const bitlm_cuda_input& in, int groups,
                             int step) {
  if (threadIdx.x >= static_cast<unsigned>(few_tokens(A))) return;
  float* to = reinterpret_cast<float*>(stage + few_plane_bytes(A)) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < few_units; i++) {
    int unit = step * few_units + i;
    bool begins = groups == 1 ? unit == 0 : unit % in.group_units == 0;
    // Pair 0 has planes 0 and 1, pair 1 planes 2 and 3.
    float own = (1.0f / sum_unit) * fmaf(4.0f, sums.next[i].y, sums.next[i].x);
    sums.since = begins ? own : sums.since + own;
    to[i * few_tokens(A)] = sums.since;
  }
}

// ---- A warp --------------------------------------------------------------------------------------

// Counts of a group so far; of signs only for binary codes. pops: c's factor, in the words of a lane.
template <int A>
struct FewCounts {
  uint32_t signs[few_planes(A)][few_row_tiles][few_token_tiles(A)][4];
  uint32_t mask[few_planes(A)][few_row_tiles][few_token_tiles(A)][4];
  int pops[few_row_tiles][2];
};

template <int A>
struct FewSums {
  float of[few_row_tiles][few_token_tiles(A)][4];
};

template <int A>
BITLM_DEVICE void clear(FewCounts<A>& counts) {
#pragma unroll
  for (int r = 0; r < few_row_tiles; r++) {
    counts.pops[r][0] = counts.pops[r][1] = 0;
#pragma unroll
    for (int p = 0; p < few_planes(A); p++) {
#pragma unroll
      for (int n = 0; n < few_token_tiles(A); n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) counts.signs[p][r][n][i] = counts.mask[p][r][n][i] = 0;
      }
    }
  }
}

// Adds unit `unit` of a step. signs, mask: word t of the rows.
template <int A, Codes codes>
BITLM_DEVICE void count_unit(FewCounts<A>& counts, const char* stage, int unit,
                             const uint32_t (&signs)[few_row_tiles][2],
                             const uint32_t (&mask)[few_row_tiles][2]) {
  int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  int token = warp / few_row_warps * few_token_tiles(A) * 8;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(stage);
#pragma unroll
  for (int p = 0; p < few_planes(A); p++) {
#pragma unroll
    for (int n = 0; n < few_token_tiles(A); n++) {
      int at = (unit * few_planes(A) + p) * few_tokens(A) + token + 8 * n;
      uint32_t plane = words[at * unit_words + lane];
#pragma unroll
      for (int r = 0; r < few_row_tiles; r++) {
        add_popcounts(counts.signs[p][r][n], signs[r][0], signs[r][1], plane);
        if (codes == TERNARY) add_popcounts(counts.mask[p][r][n], mask[r][0], mask[r][1], plane);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < few_row_tiles; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int own = 2 * __popc(signs[r][i]) - (codes == TERNARY ? __popc(mask[r][i]) : 0);
      if (is_centred(A)) counts.pops[r][i] += own;
    }
  }
}

// Adds what a group came to, times its scales, and begins the counts anew. since: of store_sums.
template <int A, Codes codes>
BITLM_DEVICE void fold(FewSums<A>& sums, FewCounts<A>& counts, const PassRows& pass,
                       const LaneRows<few_row_tiles>& rows, int group, const float* since) {
  int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  int token = warp / few_row_warps * few_token_tiles(A) * 8 + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < few_row_tiles; r++) {
    float scale[2];
    int pops[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      scale[i] = scale_of(pass, rows.row[r][i], 0, group);
      pops[i] = is_centred(A) && codes != ONES ? over_quad(counts.pops[r][i]) : 0;
    }
#pragma unroll
    for (int n = 0; n < few_token_tiles(A); n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float all = codes == TERNARY ? 0.0f : since[token + 8 * n + i % 2];
        int dot = pops[i / 2];
#pragma unroll
        for (int p = 0; p < few_planes(A); p++) {
          int twice = 2 * static_cast<int>(counts.signs[p][r][n][i]);
          dot += few_weight(A, p) * (twice - static_cast<int>(counts.mask[p][r][n][i]));
        }
        float value = codes == ONES ? -all : static_cast<float>(dot) + all;
        sums.of[r][n][i] = fmaf(scale[i / 2], value, sums.of[r][n][i]);
      }
    }
  }
  clear(counts);
}

// ---- A block -------------------------------------------------------------------------------------

// A step's codes of a warp's rows.
struct FewCodes {
  FourUnits<few_row_tiles> signs, mask;
};

BITLM_DEVICE void load_codes(FewCodes& codes, const PassRows& pass,
                             const LaneRows<few_row_tiles>& rows, int step, int units) {
  const bitlm_cuda_pass& own = pass.pass;
  if (own.signs) load_units<few_row_tiles>(codes.signs, own.signs, pass.bit_bytes, rows, step, units);
  if (own.mask) load_units<few_row_tiles>(codes.mask, own.mask, pass.bit_bytes, rows, step, units);
}

template <int A, Codes codes>
BITLM_DEVICE void add_step(FewSums<A>& sums, FewCounts<A>& counts, FewCodes& words,
                           const PassRows& pass, const LaneRows<few_row_tiles>& rows,
                           const bitlm_cuda_input& in, const char* stage, int step) {
  int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < few_row_tiles; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (codes != ONES) turn_quad(words.signs.words[r][i], t);
      if (codes == TERNARY) turn_quad(words.mask.words[r][i], t);
    }
  }
#pragma unroll
  for (int j = 0; j < few_units; j++) {
    int unit = step * few_units + j;
    if (unit >= in.units) break;
    if (codes != ONES) {
      uint32_t s[few_row_tiles][2], m[few_row_tiles][2];
#pragma unroll
      for (int r = 0; r < few_row_tiles; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          m[r][i] = codes == TERNARY ? words.mask.words[r][i].word[j] : 0xffffffffu;
          s[r][i] = words.signs.words[r][i].word[j] & m[r][i];
        }
      }
      count_unit<A, codes>(counts, stage, j, s, m);
    }
    bool last = unit + 1 == in.units;
    if (last || (pass.groups > 1 && (unit + 1) % in.group_units == 0)) {
      const float* since = reinterpret_cast<const float*>(stage + few_plane_bytes(A));
      fold<A, codes>(sums, counts, pass, rows, pass.groups == 1 ? 0 : unit / in.group_units,
                     since + j * few_tokens(A));
    }
  }
}

template <int A>
BITLM_DEVICE void write_few(const bitlm_cuda_product& call, const FewSums<A>& sums,
                            const Slice& slice, int first_row) {
  float* memory = reinterpret_cast<float*>(block_memory());
  int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  int own_row = warp % few_row_warps * few_row_tiles * tile_rows + lane / 4;
  int own_token = warp / few_row_warps * few_token_tiles(A) * 8 + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < few_row_tiles; r++) {
#pragma unroll
    for (int n = 0; n < few_token_tiles(A); n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = own_token + 8 * n + i % 2, row = own_row + r * tile_rows + i / 2 * 8;
        memory[token * few_row_floats + row] = sums.of[r][n][i];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < few_tokens(A) * few_rows; at += few_threads) {
    int token = slice.first + at / few_rows, row = first_row + at % few_rows;
    if (token >= slice.end || row >= call.rows) continue;
    float scale = (1.0f / scale_unit) * load<float>(call.input.scales + token);
    float sum = scale * memory[at / few_rows * few_row_floats + at % few_rows];
    put_sum(call, slice.expert, token, row, sum);
  }
}

// passes: shared memory for what is known of each pass.
template <int A>
BITLM_DEVICE void few_block(const bitlm_cuda_product& call, PassRows* passes) {
  const bitlm_cuda_input& in = call.input;
  Slice slice = slice_of(call.experts, call.offsets, in.rank, in.rows, blockIdx.x, few_tokens(A));
  if (slice.first >= slice.end) return;
  int first_row = blockIdx.y * few_rows, groups = ceil_div(in.columns, in.group_size);
  if (threadIdx.x < static_cast<unsigned>(call.count)) {
    passes[threadIdx.x] = pass_rows(call.pass[threadIdx.x], in.columns, groups, call.expert_rows,
                                    slice.expert);
  }
  __syncthreads();
  int warp = threadIdx.x / warp_lanes;
  LaneRows<few_row_tiles> rows = lane_rows<few_row_tiles>(
      first_row + warp % few_row_warps * few_row_tiles * tile_rows, call.rows);
  char* memory = block_memory();
  int steps = ceil_div(in.units, few_units), turns = call.count * steps;
  FewSums<A> sums = {};
  FewCounts<A> counts;
  clear(counts);
  FewCodes codes = {};
  TokenSums token_sums = {};
  load_planes<A>(memory, in, slice, 0);
  commit_copies();
  load_codes(codes, passes[0], rows, 0, in.units);
  load_sums<A>(token_sums, in, slice, 0);
  store_sums<A>(memory, token_sums, in, groups, 0);
  for (int turn = 0; turn < turns; turn++) {
    int step = turn % steps;
    const PassRows& pass = passes[turn / steps];
    const char* stage = memory + turn % few_stages * few_stage_bytes(A);
    char* next_stage = memory + (turn + 1) % few_stages * few_stage_bytes(A);
    await_copies<0>();
    __syncthreads();  // this turn's planes are there, and nobody reads the turn before's any more
    FewCodes own = codes;
    bool more = turn + 1 < turns;
    int next = (turn + 1) % steps;
    if (more) {
      load_planes<A>(next_stage, in, slice, next);
      load_codes(codes, passes[(turn + 1) / steps], rows, next, in.units);
      load_sums<A>(token_sums, in, slice, next);
    }
    commit_copies();
    if (!pass.pass.signs) {
      add_step<A, ONES>(sums, counts, own, pass, rows, in, stage, step);
    } else if (pass.pass.mask) {
      add_step<A, TERNARY>(sums, counts, own, pass, rows, in, stage, step);
    } else {
      add_step<A, BINARY>(sums, counts, own, pass, rows, in, stage, step);
    }
    if (more) store_sums<A>(next_stage, token_sums, in, groups, next);
  }
  __syncthreads();  // the sums go where the stages were
  write_few<A>(call, sums, slice, first_row);
}

}  // namespace bitlm
