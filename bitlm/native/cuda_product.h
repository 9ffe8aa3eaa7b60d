// Products of packed codes with staged inputs, by the tensor cores' product of bits.
//
// The codes' bits are the matrix operand as they lie in memory: nothing is expanded. A column of the
// other operand is a bit plane of an input, so a row of codes times a plane is popcount(row & plane),
// and with x = sum_b 2^b x_b (the highest b negative) and codes w = 2 v - 1
//   w . x = sum_b 2^b (2 popcount(v & x_b) - popcount(x_b)).
// Ternary codes are 2 (sign and mask) - mask, with two products.
//
// Counts are integers below 2^23, and read as the bits of a float they are that many times 2^-149:
// multiplied by a large power of two they become ordinary floats, without a conversion. Lane (g, t)
// has planes 2t and 2t + 1 of every digit; its sums are those divided by 4^t until the very end.
#pragma once

#include "cuda_stage.h"
#include "trits.h"

namespace bitlm {

constexpr int product_warps = stage_threads / warp_lanes;
constexpr int tile_rows = 16;

// Times 2^-149, a count's unit: sum_unit.
constexpr float count_factor = 0x1p117f;
constexpr float final_factor = 1.0f / (sum_unit * scale_unit);

// What a row of codes times one row of an input is, the planes of a lane: of digit 0 when there are
// three, else of all; and of digits 1 and 2.
struct LaneSum {
  float low, high;
};

// Adds factor * 2^-149 * counts * (weight of their planes). row: 0 for row g, 1 for row g + 8. top: -1
// in lanes with the highest plane, else 1.
template <int D>
BITLM_DEVICE void add_counts(LaneSum& sum, const uint32_t (&counts)[D][4], int row, float factor,
                             float top) {
  float weight = factor;
#pragma unroll
  for (int digit = 0; digit < D; digit++) {
    float& into = D == 3 && digit > 0 ? sum.high : sum.low;
    if (D == 3 && digit == 1) weight = factor;
    float odd = digit == D - 1 ? 2.0f * weight * top : 2.0f * weight;
    into = fmaf(__uint_as_float(counts[digit][2 * row]), weight, into);
    into = fmaf(__uint_as_float(counts[digit][2 * row + 1]), odd, into);
    weight *= 256.0f;
  }
}

template <int D>
BITLM_DEVICE float value_of(const LaneSum& sum) {
  return D == 3 ? fmaf(sum.high, 256.0f, sum.low) : sum.low;
}

// Inputs of the tokens of a block.
struct Operand {
  const uint32_t* words;
  const float* sums;
  const float* scales;
  int64_t word_stride, sum_stride, scale_stride;  // from unit to unit
  int negative_pair;
};

// What a pass multiplies the input by.
enum Codes { BINARY, TERNARY, ONES };

// A warp's sums of R tiles of 16 rows and T tokens: of row g (0) and g + 8 (1) of each tile.
template <int R, int T>
struct Sums {
  float of[R][2][T];
};

// Adds scale * (codes of unit `unit`) * x. signs, mask: word t of the rows, of BINARY only signs.
template <int D, int R, int T, Codes codes>
BITLM_DEVICE void add_unit(Sums<R, T>& sums, const Operand& x, int unit,
                           const uint32_t (&signs)[R][2], const uint32_t (&mask)[R][2],
                           const float (&scale)[R][2]) {
  constexpr int row_sums = D == 3 ? 8 : 4;
  int lane = threadIdx.x % warp_lanes, t = lane % 4;
  float top = t == x.negative_pair ? -1.0f : 1.0f;
  const uint32_t* words = x.words + unit * x.word_stride + lane;
  const float* unit_sums = x.sums + unit * x.sum_stride + t;
  const float* unit_scales = x.scales + unit * x.scale_stride;
#pragma unroll
  for (int i = 0; i < T; i++) {
    LaneSum start = {0.0f, 0.0f};
    if (codes != TERNARY) {
      start.low = unit_sums[i * row_sums];
      if (D == 3) start.high = unit_sums[i * row_sums + 4];
    }
    float x_scale = unit_scales[i];
    uint32_t plane[D];
#pragma unroll
    for (int digit = 0; digit < D; digit++) plane[digit] = words[(i * D + digit) * digit_words];
#pragma unroll
    for (int r = 0; r < R; r++) {
      uint32_t of_signs[D][4] = {}, of_mask[D][4] = {};
#pragma unroll
      for (int digit = 0; digit < D; digit++) {
        if (codes != ONES) add_popcounts(of_signs[digit], signs[r][0], signs[r][1], plane[digit]);
        if (codes == TERNARY) add_popcounts(of_mask[digit], mask[r][0], mask[r][1], plane[digit]);
      }
#pragma unroll
      for (int row = 0; row < 2; row++) {
        LaneSum sum = start;
        if (codes == TERNARY) add_counts<D>(sum, of_mask, row, -count_factor, top);
        if (codes != ONES) add_counts<D>(sum, of_signs, row, 2.0f * count_factor, top);
        float value = value_of<D>(sum) * x_scale;
        float factor = codes == ONES ? -scale[r][row] : scale[r][row];
        sums.of[r][row][i] = fmaf(value, factor, sums.of[r][row][i]);
      }
    }
  }
}

// ---- Where codes lie -----------------------------------------------------------------------------

// One expert's tensors of a pass.
struct PassRows {
  bitlm_cuda_pass pass;
  int64_t bit_bytes, trit_bytes;  // of a row
  int groups, zones;              // zones: 1 or 2
};

// rows: from an expert's to the next one's.
BITLM_DEVICE PassRows pass_rows(const bitlm_cuda_pass& given, int columns, int groups, int rows,
                                int expert) {
  PassRows p;
  p.pass = given;
  p.bit_bytes = (columns + 7) / 8;
  p.trit_bytes = (columns + 4) / 5;
  p.groups = groups;
  p.zones = given.zones ? 2 : 1;
  int64_t bits = expert * p.bit_bytes * rows;
  if (given.signs) p.pass.signs += bits;
  if (given.mask) p.pass.mask += bits;
  if (given.zones) p.pass.zones += bits;
  if (given.drop) p.pass.drop += bits;
  if (given.trits) p.pass.trits += expert * p.trit_bytes * rows;
  if (given.scales) {
    int64_t scales = static_cast<int64_t>(expert) * rows * groups * p.zones;
    p.pass.scales = static_cast<const char*>(given.scales) +
                    scales * (given.scale_type == BITLM_FLOAT32 ? 4 : 2);
  }
  return p;
}

BITLM_DEVICE float scale_of(const PassRows& p, int row, int zone, int group) {
  if (!p.pass.scales) return p.pass.factor;
  int64_t at = (static_cast<int64_t>(row) * p.zones + zone) * p.groups + group;
  return p.pass.factor * float_at(p.pass.scales, p.pass.scale_type, at);
}

struct CodeWords {
  uint32_t signs, mask;  // 2 * signs - mask is the code
};

// 32 codes from `column` on, which may be anywhere in the row. Past the row's end they mean nothing.
BITLM_DEVICE CodeWords trits_at(const uint16_t* table, const uint8_t* row, int column,
                                int columns) {
  int first = column / 5, last = (smaller(column + word_columns, columns) - 1) / 5;
  uint64_t bytes = bytes_at(row, first, last - first + 1);
  uint64_t ones = 0, twos = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint64_t five = table[bytes >> 8 * i & 255];
    ones |= (five & 31) << 5 * i;
    twos |= (five >> 5) << 5 * i;
  }
  int skip = column - 5 * first;
  return {static_cast<uint32_t>(twos >> skip), ~static_cast<uint32_t>(ones >> skip)};
}

BITLM_DEVICE CodeWords codes_at(const PassRows& p, const uint16_t* table, int row, int column,
                                int columns) {
  const bitlm_cuda_pass& pass = p.pass;
  if (column >= columns) return {0, 0};
  if (pass.trits) return trits_at(table, pass.trits + row * p.trit_bytes, column, columns);
  if (!pass.signs) return {0xffffffffu, 0xffffffffu};
  uint32_t signs = bits_at(pass.signs + row * p.bit_bytes, column, columns);
  uint32_t mask = 0xffffffffu;
  if (pass.mask) mask = bits_at(pass.mask + row * p.bit_bytes, column, columns);
  return {signs & mask, mask};
}

// The columns of a zone that are not dropped.
BITLM_DEVICE uint32_t selected_at(const PassRows& p, int row, int column, int columns, int zone) {
  if (column >= columns) return 0;
  uint32_t all = 0xffffffffu;
  if (p.pass.zones) {
    uint32_t second = bits_at(p.pass.zones + row * p.bit_bytes, column, columns);
    all = zone ? second : ~second;
  }
  if (p.pass.drop) all &= ~bits_at(p.pass.drop + row * p.bit_bytes, column, columns);
  return all;
}

// ---- The sums of a warp --------------------------------------------------------------------------

// Exchanges words in a quad: lane t had the words of unit t, then word t of units 0 .. 3.
BITLM_DEVICE void turn_quad(Words& w, int t) {
#pragma unroll
  for (int step = 1; step <= 2; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      uint32_t& low = w.word[i];
      uint32_t& high = w.word[i + step];
      bool odd = t & step;
      uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? low : high, step);
      if (odd) {
        low = got;
      } else {
        high = got;
      }
    }
  }
}

// The rows that a lane works on; rows past the end are the last one, and nobody reads their sums.
template <int R>
struct LaneRows {
  int row[R][2];
};

template <int R>
BITLM_DEVICE LaneRows<R> lane_rows(int first, int rows) {
  LaneRows<R> lane;
  int g = threadIdx.x % warp_lanes / 4;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      lane.row[r][i] = smaller(first + r * tile_rows + i * 8 + g, rows - 1);
    }
  }
  return lane;
}

// Rows of whole 16 bytes whose groups are whole units: four units at a time, a load of 16 bytes a row.
template <int R>
struct FourUnits {
  Words words[R][2];
};

template <int R>
BITLM_DEVICE void load_units(FourUnits<R>& four, const uint8_t* bits, int64_t row_bytes,
                             const LaneRows<R>& lane, int step, int units) {
  int unit = 4 * step + threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Words none = {{0, 0, 0, 0}};
      four.words[r][i] =
          unit < units ? load_once(bits + lane.row[r][i] * row_bytes + 16 * unit) : none;
    }
  }
}

// Scales of the units of a step. Where each unit is a group, four fp16 scales are one load.
template <int R>
BITLM_DEVICE void load_scales(float (&scale)[4][R][2], const PassRows& p, const LaneRows<R>& lane,
                              const bitlm_cuda_input& in, int step) {
  bool joined = p.pass.scales && p.pass.scale_type != BITLM_FLOAT32 && in.group_units == 1 &&
                p.groups % 4 == 0;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (joined) {
        int64_t at = static_cast<int64_t>(lane.row[r][i]) * p.groups + 4 * step;
        uint2 four = load<uint2>(static_cast<const uint16_t*>(p.pass.scales) + at);
        scale[0][r][i] = p.pass.factor * half_value(static_cast<uint16_t>(four.x));
        scale[1][r][i] = p.pass.factor * half_value(static_cast<uint16_t>(four.x >> 16));
        scale[2][r][i] = p.pass.factor * half_value(static_cast<uint16_t>(four.y));
        scale[3][r][i] = p.pass.factor * half_value(static_cast<uint16_t>(four.y >> 16));
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int unit = smaller(4 * step + j, in.units - 1);
          int group = p.groups == 1 ? 0 : unit / in.group_units;
          scale[j][r][i] = scale_of(p, lane.row[r][i], 0, group);
        }
      }
    }
  }
}

template <int D, int R, int T, Codes codes>
BITLM_DEVICE void add_pass_of_units(Sums<R, T>& sums, const Operand& x, const PassRows& p,
                                    const LaneRows<R>& lane, const bitlm_cuda_input& in) {
  int warp = threadIdx.x / warp_lanes, t = threadIdx.x % 4, steps = ceil_div(in.units, 4);
  FourUnits<R> signs, mask;
  if (warp < steps && codes != ONES) {
    load_units<R>(signs, p.pass.signs, p.bit_bytes, lane, warp, in.units);
    if (codes == TERNARY) load_units<R>(mask, p.pass.mask, p.bit_bytes, lane, warp, in.units);
  }
  for (int step = warp; step < steps; step += product_warps) {
    FourUnits<R> next_signs = signs, next_mask = mask;
    int next = step + product_warps;
    if (next < steps && codes != ONES) {
      load_units<R>(next_signs, p.pass.signs, p.bit_bytes, lane, next, in.units);
      if (codes == TERNARY) load_units<R>(next_mask, p.pass.mask, p.bit_bytes, lane, next, in.units);
    }
    float scale[4][R][2];
    load_scales<R>(scale, p, lane, in, step);
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (codes != ONES) turn_quad(signs.words[r][i], t);
        if (codes == TERNARY) turn_quad(mask.words[r][i], t);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (4 * step + j >= in.units) break;
      uint32_t s[R][2] = {}, m[R][2] = {};
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (codes == BINARY) s[r][i] = signs.words[r][i].word[j];
          if (codes == TERNARY) {
            m[r][i] = mask.words[r][i].word[j];
            s[r][i] = signs.words[r][i].word[j] & m[r][i];
          }
        }
      }
      add_unit<D, R, T, codes>(sums, x, 4 * step + j, s, m, scale[j]);
    }
    signs = next_signs;
    mask = next_mask;
  }
}

// Any form: one unit at a time, words put together from where their bits lie.
template <int D, int R, int T>
BITLM_DEVICE void add_pass_of_words(Sums<R, T>& sums, const Operand& x, const PassRows& p,
                                    const LaneRows<R>& lane, const bitlm_cuda_input& in,
                                    const uint16_t* table) {
  int t = threadIdx.x % 4;
  for (int unit = threadIdx.x / warp_lanes; unit < in.units; unit += product_warps) {
    UnitPlace place = place_of(in, unit);
    int column = place.column + t * word_columns, columns = in.columns;
    CodeWords code[R][2];
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int i = 0; i < 2; i++) code[r][i] = codes_at(p, table, lane.row[r][i], column, columns);
    }
    for (int zone = 0; zone < p.zones; zone++) {
      uint32_t s[R][2], m[R][2];
      float scale[R][2];
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          uint32_t own = selected_at(p, lane.row[r][i], column, columns, zone);
          s[r][i] = code[r][i].signs & own;
          m[r][i] = code[r][i].mask & own;
          scale[r][i] = scale_of(p, lane.row[r][i], zone, place.group);
        }
      }
      add_unit<D, R, T, TERNARY>(sums, x, unit, s, m, scale);
    }
  }
}

// ---- A block -------------------------------------------------------------------------------------

// Writes sum + addend + bias of a token and a row of the block's expert.
BITLM_DEVICE void put_sum(const bitlm_cuda_product& call, int expert, int token, int row, float sum) {
  int64_t place = static_cast<int64_t>(token) * call.y_columns + call.y_column + row;
  if (call.addend) sum += call.addend[place];
  if (call.bias) {
    int64_t bias = static_cast<int64_t>(expert) * call.rows + row;
    sum += float_at(call.bias, call.bias_type, bias);
  }
  put_float(call.y, call.y_type, place, sum);
}

// Adds the warps' sums in a fixed order and writes y. memory: [warps][T][16 R] floats.
template <int R, int T>
BITLM_DEVICE void write_rows(const bitlm_cuda_product& call, const Sums<R, T>& sums,
                             const Slice& slice, int first_row, float* memory) {
  constexpr int rows = R * tile_rows;
  int lane = threadIdx.x % warp_lanes, g = lane / 4, t = lane % 4;
  float power = final_factor * static_cast<float>(1 << 2 * t);
  float* own = memory + threadIdx.x / warp_lanes * (T * rows);
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int i = 0; i < T; i++) {
        float sum = power * sums.of[r][row][i];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == 0) own[i * rows + r * tile_rows + row * 8 + g] = sum;
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < T * rows; at += stage_threads) {
    int token = slice.first + at / rows, row = first_row + at % rows;
    if (token >= slice.end || row >= call.rows) continue;
    float sum = memory[at];
    for (int warp = 1; warp < product_warps; warp++) sum += memory[warp * (T * rows) + at];
    put_sum(call, slice.expert, token, row, sum);
  }
}

// Lets the codes of the block's rows, which lie side by side, come into L2.
BITLM_DEVICE void fetch_codes(const uint8_t* codes, int64_t row_bytes, int first_row, int rows) {
  constexpr int line_bytes = 128;
  if (!codes) return;
  const uint8_t* from = codes + first_row * row_bytes;
  int64_t bytes = row_bytes * smaller(tile_rows, rows - first_row);
  for (int64_t at = threadIdx.x * line_bytes; at < bytes; at += stage_threads * line_bytes) {
    fetch_ahead(from + at);
  }
}

constexpr int staged_row_words(int digits) { return digits * digit_words + 4; }  // 4: no conflicts

// Bytes of dynamic shared memory: the sums of all warps, and before them a staged row.
inline int product_memory(int digits, int tiles, int tokens, bool stages, int units) {
  int sums = product_warps * tokens * tiles * tile_rows * 4;
  int row = stages ? units * (staged_row_words(digits) * 4 + (digits == 3 ? 32 : 16) + 4) : 0;
  return sums > row ? sums : row;
}

// FAST: rows of whole 16 bytes, groups of whole units, no zones, nothing dropped, no trits. STAGES:
// the block stages the one token itself, so that a layer is one launch.
template <int D, int R, int T, bool FAST, bool STAGES>
BITLM_DEVICE void product_block(const bitlm_cuda_product& call, StageMemory& stage,
                                const uint16_t* table) {
  const bitlm_cuda_input& in = call.input;
  Slice slice = slice_of(call.experts, call.offsets, in.rank, in.rows, blockIdx.x, T);
  if (slice.first >= slice.end) return;
  int first_row = blockIdx.y * (R * tile_rows);
  constexpr int row_sums = D == 3 ? 8 : 4;
  Operand x;
  if (STAGES) {
    uint32_t* words = reinterpret_cast<uint32_t*>(block_memory());
    float* sums = reinterpret_cast<float*>(words + in.units * staged_row_words(D));
    float* scales = sums + in.units * row_sums;
    StagedRow to = {words, sums, scales, nullptr, staged_row_words(D), row_sums, 1};
    // Staging takes as long as a good part of the codes needs from memory.
    int64_t bit_bytes = (in.columns + 7) / 8, trit_bytes = (in.columns + 4) / 5;
    for (int i = 0; i < call.count; i++) {
      fetch_codes(call.pass[i].signs, bit_bytes, first_row, call.rows);
      fetch_codes(call.pass[i].mask, bit_bytes, first_row, call.rows);
      fetch_codes(call.pass[i].trits, trit_bytes, first_row, call.rows);
    }
    stage_row<D>(in, slice.first, to, stage);
    __syncthreads();
    x = {words, sums, scales, staged_row_words(D), row_sums, 1, top_pair(in.activation)};
  } else {
    int64_t padded = in.padded_rows, first = slice.first;
    x = {in.words + first * (D * digit_words), in.sums + first * row_sums, in.scales + first,
         in.unit_words, padded * row_sums, padded, top_pair(in.activation)};
  }
  Sums<R, T> sums;
#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int i = 0; i < T; i++) sums.of[r][0][i] = sums.of[r][1][i] = 0.0f;
  }
  LaneRows<R> lane = lane_rows<R>(first_row, call.rows);
  int groups = ceil_div(in.columns, in.group_size);
  for (int i = 0; i < call.count; i++) {
    PassRows p = pass_rows(call.pass[i], in.columns, groups, call.expert_rows, slice.expert);
    if (!FAST) {
      add_pass_of_words<D, R, T>(sums, x, p, lane, in, table);
    } else if (!p.pass.signs) {
      add_pass_of_units<D, R, T, ONES>(sums, x, p, lane, in);
    } else if (p.pass.mask) {
      add_pass_of_units<D, R, T, TERNARY>(sums, x, p, lane, in);
    } else {
      add_pass_of_units<D, R, T, BINARY>(sums, x, p, lane, in);
    }
  }
  if (STAGES) __syncthreads();  // the sums go where the staged row was
  write_rows<R, T>(call, sums, slice, first_row, reinterpret_cast<float*>(block_memory()));
}

}  // namespace bitlm
