// The kernels, written once over a vector type V (cpu_scalar.cpp, cpu_avx2.cpp, cpu_avx512.cpp).
//
// A vector lane is an output row. The bits of a tile of rows are transposed so that lane r of a
// word vector holds 32 columns of row r. Look-up: V::unit columns of x give a table of all sums
// +-x0 +-x1 .. (or, for ternary planes, of subset sums), built once per token; a weight word is an
// index into those tables, unit after unit, so a look-up and an add do the work of V::unit
// multiply-adds and x is never rounded. Expand: the tile becomes fp32 weights, then multiply-adds.
//
// Everything has internal linkage and nothing of std is used: the same names are compiled with
// different instruction sets, and the linker must not merge them.
#pragma once

#include <string.h>

#include "cpu_job.h"

#if defined(__GNUC__)
#define BITLM_INLINE inline __attribute__((always_inline))
#define BITLM_PREFETCH(address) __builtin_prefetch((const void*)(address), 0, 2)
#else
#define BITLM_INLINE inline
#define BITLM_PREFETCH(address) (void)(address)
#endif

namespace {

using bitlm::block_columns;
using bitlm::Job;
using bitlm::max_segments;
using bitlm::max_tokens;
using bitlm::Segment;
using bitlm::word_columns;

// Look-ups sum x before they scale it, so larger values (and infinity, NaN) could overflow where
// the weights times x would not: those go the expanded way, which keeps the reference's meaning.
constexpr uint32_t huge_bits = 0x7149f2cau;  // 1e30f

BITLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

// The five ternary digits of a byte as bits: positive ones in bits 0..4, non-zero ones in 5..9.
struct TritTable {
  uint16_t bits[256];
  constexpr TritTable() : bits() {
    const int powers[5] = {81, 27, 9, 3, 1};
    for (int byte = 0; byte < 256; byte++) {
      int value = 0;
      for (int i = 0; i < 5; i++) {
        int digit = byte / powers[i] % 3;
        value |= (digit == 2) << i | (digit != 1) << (5 + i);
      }
      bits[byte] = static_cast<uint16_t>(value);
    }
  }
};

constexpr TritTable trit_table;

// Unpacks columns [32 * first, 32 * (first + words)) of a row of trits; columns past the end are
// not set in the mask.
inline void unpack_trits(const uint8_t* row, int64_t columns, int64_t first, int64_t words,
                         uint8_t* signs, uint8_t* mask) {
  int64_t bytes = (columns + 4) / 5, byte = first * word_columns / 5;
  int filled = -static_cast<int>(first * word_columns % 5);
  uint64_t positive = 0, nonzero = 0;
  int64_t left = columns - first * word_columns;
  for (int64_t word = 0; word < words; word++, left -= word_columns) {
    while (filled < word_columns) {
      uint64_t five = byte < bytes ? trit_table.bits[row[byte]] : 0;
      byte++;
      uint64_t p = five & 31, n = five >> 5;
      positive |= filled < 0 ? p >> -filled : p << filled;
      nonzero |= filled < 0 ? n >> -filled : n << filled;
      filled += 5;
    }
    // A padding digit is 0, which reads as -1.
    uint32_t valid = left >= word_columns ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    for (int i = 0; i < 4; i++) {
      signs[4 * word + i] = static_cast<uint8_t>(positive >> (8 * i));
      mask[4 * word + i] = static_cast<uint8_t>((nonzero & valid) >> (8 * i));
    }
    positive >>= word_columns;
    nonzero >>= word_columns;
    filled -= word_columns;
  }
}

template <class V>
bool convert(const void* x, int type, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += V::lanes) {
    V::store(out + i, V::load_floats(element(x, type, i), type, smaller(count - i, V::lanes)));
  }
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = bits_of(out[i]) & 0x7fffffffu;
    largest = largest > bits ? largest : bits;
  }
  return largest < huge_bits;
}

// weights[j][e]: what column j of a unit adds to entry e of its table.
template <class V>
struct TableWeights {
  alignas(64) float values[V::unit][V::table_vectors * V::lanes];
  explicit TableWeights(float zero_bit) {
    for (int j = 0; j < V::unit; j++) {
      for (int e = 0; e < V::table_vectors * V::lanes; e++) {
        values[j][e] = e >> j & 1 ? 1.0f : zero_bit;
      }
    }
  }
};

template <class V>
void build_tables(const Job& job, const float* x, const TableWeights<V>& weights, float* tables) {
  using Float = typename V::Float;
  for (int s = 0; s < job.segment_count; s++) {
    const Segment& segment = job.segments[s];
    const float* from = x + segment.column;
    float* table = tables + segment.unit * V::entries;
    for (int left = segment.columns; left > 0; left -= word_columns, from += word_columns) {
      // One zero more than a word: a last unit may reach past it.
      alignas(64) float word[word_columns + V::unit] = {};
      int columns = left < word_columns ? left : word_columns;
      if (columns == word_columns) {
        memcpy(word, from, sizeof(float) * word_columns);
      } else {
        memcpy(word, from, sizeof(float) * columns);
      }
      for (int column = 0; column < columns; column += V::unit, table += V::entries) {
        for (int v = 0; v < V::table_vectors; v++) {
          Float sum = V::zero();
          for (int j = 0; j < V::unit; j++) {
            Float weight = V::load(weights.values[j] + v * V::lanes);
            sum = V::fma(V::set(word[column + j]), weight, sum);
          }
          V::store(table + v * V::lanes, sum);
        }
      }
    }
  }
}

template <class V>
void tables(const Job& job, int token) {
  const float* x = job.x + token * job.x_stride;
  if (job.signed_tables) {
    build_tables<V>(job, x, TableWeights<V>(-1.0f), job.signed_tables + token * job.table_stride);
  }
  if (job.subset_tables) {
    build_tables<V>(job, x, TableWeights<V>(0.0f), job.subset_tables + token * job.table_stride);
  }
  if (!job.segment_sums) return;
  for (int s = 0; s < job.segment_count; s++) {
    const float* from = x + job.segments[s].column;
    int columns = job.segments[s].columns;
    float parts[16] = {};
    int i = 0;
    for (; i + 16 <= columns; i += 16) {
      for (int j = 0; j < 16; j++) parts[j] += from[i + j];
    }
    for (; i < columns; i++) parts[i % 16] += from[i];
    float sum = 0;
    for (float part : parts) sum += part;
    job.segment_sums[token * max_segments + s] = sum;
  }
}

// A block covers at most block_columns columns but may begin and end inside a word.
constexpr int block_words = block_columns / word_columns + 2;

template <class V, int R>
struct Tile {
  using Float = typename V::Float;
  using Word = typename V::Word;
  static constexpr int rows = R * V::lanes;

  const Job& job;
  const bitlm_linear& call;
  int64_t row;
  int64_t first_word;
  alignas(64) uint32_t signs[block_words][rows];
  alignas(64) uint32_t mask[block_words][rows];
  alignas(64) float totals[max_tokens][rows];

  Tile(const Job& j, int64_t r) : job(j), call(*j.call), row(r), first_word(0) {}

  // Rows past the end repeat the last one; their results are not stored.
  BITLM_INLINE int64_t row_at(int i) const { return smaller(row + i, call.rows - 1); }

  // Bytes from a row to the next; the last row of the weight repeats instead of ending.
  BITLM_INLINE int64_t step_after(int i, int64_t stride) const {
    return R > 1 || row + i + 1 < call.rows ? stride : 0;
  }

  // Transposes `words` words from `first_word` on of each row. `stride`: bytes of a row.
  void load_bits(const uint8_t* base, int64_t stride, int words, uint32_t (*out)[rows]) const {
    for (int r = 0; r < R; r++) {
      for (int start = 0; start < words; start += V::lanes) {
        Word lines[V::lanes];
        int64_t offset = (first_word + start) * 4, bytes = stride - offset;
        const uint8_t* p = base + row_at(r * V::lanes) * stride + offset;
        for (int lane = 0; lane < V::lanes; lane++) {
          lines[lane] = bytes >= 4 * V::lanes ? V::load_line(p) : V::load_bytes(p, bytes);
          p += step_after(r * V::lanes + lane, stride);
          V::keep_pointer(p);
        }
        V::transpose(lines);
        int count = words - start < V::lanes ? words - start : V::lanes;
        for (int i = 0; i < count; i++) V::store_words(out[start + i] + r * V::lanes, lines[i]);
      }
    }
  }

  void load_plane(const bitlm_plane& plane, int64_t begin, int64_t end) {
    first_word = begin / word_columns;
    int words = static_cast<int>((end + word_columns - 1) / word_columns - first_word);
    int64_t stride = (call.columns + 7) / 8;
    if (!plane.trits) {
      load_bits(plane.signs, stride, words, signs);
      if (plane.mask) load_bits(plane.mask, stride, words, mask);
      return;
    }
    for (int i = 0; i < rows; i++) {
      uint8_t row_signs[4 * block_words], row_mask[4 * block_words];
      unpack_trits(plane.trits + row_at(i) * ((call.columns + 4) / 5), call.columns, first_word,
                   words, row_signs, row_mask);
      for (int word = 0; word < words; word++) {
        const uint8_t *s = row_signs + 4 * word, *m = row_mask + 4 * word;
        signs[word][i] = s[0] | s[1] << 8 | s[2] << 16 | static_cast<uint32_t>(s[3]) << 24;
        mask[word][i] = m[0] | m[1] << 8 | m[2] << 16 | static_cast<uint32_t>(m[3]) << 24;
      }
    }
  }

  // Transposes values [N, G] of the job's groups to out[group][row], times `factor`.
  void load_scales(const void* values, int type, float factor, int first_group, int groups,
                   float (*out)[rows]) const {
    int64_t all = (call.columns + call.group_size - 1) / call.group_size;
    for (int r = 0; r < R; r++) {
      for (int start = 0; start < groups; start += V::lanes) {
        int count = groups - start < V::lanes ? groups - start : V::lanes;
        Word lines[V::lanes];
        for (int lane = 0; lane < V::lanes; lane++) {
          int64_t index = row_at(r * V::lanes + lane) * all + first_group + start;
          lines[lane] = V::as_word(V::load_floats(element(values, type, index), type, count));
        }
        V::transpose(lines);
        for (int i = 0; i < count; i++) {
          Float line = V::mul(V::as_float(lines[i]), V::set(factor));
          V::store(out[start + i] + r * V::lanes, line);
        }
      }
    }
  }

  // Column `column` of the block and the 31 after it, one row a lane.
  BITLM_INLINE Word word_at(const uint32_t (*bits)[rows], int column, int r) const {
    int word = column / word_columns, shift = column % word_columns;
    Word low = V::load_words(bits[word] + r * V::lanes);
    if (shift == 0) return low;
    Word high = V::load_words(bits[word + 1] + r * V::lanes);
    return V::bit_or(V::shift_right(low, shift), V::shift_left(high, word_columns - shift));
  }

  void begin_totals() {
    for (int token = 0; token < job.tokens; token++) {
      memset(totals[token], 0, sizeof totals[token]);
      if (!job.first) {
        int64_t count = smaller(rows, call.rows - row);
        memcpy(totals[token], job.totals + token * call.rows + row, sizeof(float) * count);
      }
    }
  }

  void end_totals() {
    int count = static_cast<int>(smaller(rows, call.rows - row));
    alignas(64) float bias[rows] = {};
    if (job.last && call.bias) {
      for (int i = 0; i < count; i++) {
        bias[i] = load_float(element(call.bias, call.bias_type, row + i), call.bias_type);
      }
    }
    for (int token = 0; token < job.tokens; token++) {
      if (!job.last) {
        memcpy(job.totals + token * call.rows + row, totals[token], sizeof(float) * count);
        continue;
      }
      int64_t start = (job.first_token + token) * call.rows + row;
      for (int i = 0; i < count; i += V::lanes) {
        Float sum = V::add(V::load(totals[token] + i), V::load(bias + i));
        void* to = static_cast<char*>(call.y) + (start + i) * type_bytes(call.y_type);
        V::store_floats(to, call.y_type, smaller(count - i, V::lanes), sum);
      }
    }
  }

  template <int C, bool subtract>
  static BITLM_INLINE void look_up_unit(Word (&index)[R], const float* table, int64_t stride,
                                        Float (&sum)[R][C]) {
    for (int c = 0; c < C; c++) {
      typename V::Table entries = V::load_table(table + c * stride);
      V::keep(entries);
      for (int r = 0; r < R; r++) {
        Float found = V::look_up(entries, index[r]);
        sum[r][c] = subtract ? V::sub(sum[r][c], found) : V::add(sum[r][c], found);
        V::keep(sum[r][c]);
      }
    }
    for (int r = 0; r < R; r++) {
      index[r] = V::shift_unit(index[r]);
      V::keep(index[r]);
    }
  }

  template <int C, bool subtract>
  static BITLM_INLINE void look_up_word(Word (&index)[R], int units, const float* table,
                                        int64_t stride, Float (&sum)[R][C]) {
    for (int u = 0; u < units; u++) {
      look_up_unit<C, subtract>(index, table + u * V::entries, stride, sum);
    }
  }

  // Fetches a share of the next tile, which follows this one in memory, while a word of this one
  // is worked on: all at once would fill the core's few slots for outstanding loads.
  BITLM_INLINE void prefetch(const uint8_t* base, int64_t column) const {
    if (!base) return;
    uintptr_t tile = reinterpret_cast<uintptr_t>(base) + (row + rows) * ((call.columns + 7) / 8);
    for (int i = 0; i < rows * 4; i += 64) BITLM_PREFETCH(tile + column / 8 * rows + i);
  }

  // Adds one segment of one plane to the totals of C tokens.
  template <int C>
  void look_up_segment(const bitlm_plane& plane, const Segment& segment, const float* scale,
                       int token) {
    bool ternary = plane.mask || plane.trits;
    const float* table = (ternary ? job.subset_tables : job.signed_tables) +
                         token * job.table_stride + segment.unit * V::entries;
    int column = static_cast<int>(segment.column - first_word * word_columns);
    Float sum[R][C];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < C; c++) sum[r][c] = V::zero();
    }
    for (int left = segment.columns; left > 0; left -= word_columns, column += word_columns) {
      int units = left < word_columns ? (left + V::unit - 1) / V::unit : V::units_per_word;
      Word index[R];
      if (token == 0) {
        prefetch(plane.signs, first_word * word_columns + column);
        prefetch(plane.mask, first_word * word_columns + column);
      }
      if (ternary) {
        for (int r = 0; r < R; r++) {
          index[r] = V::bit_and(word_at(signs, column, r), word_at(mask, column, r));
        }
        look_up_word<C, false>(index, units, table, job.table_stride, sum);
        for (int r = 0; r < R; r++) {
          index[r] = V::bit_and_not(word_at(signs, column, r), word_at(mask, column, r));
        }
        look_up_word<C, true>(index, units, table, job.table_stride, sum);
      } else {
        for (int r = 0; r < R; r++) index[r] = word_at(signs, column, r);
        look_up_word<C, false>(index, units, table, job.table_stride, sum);
      }
      table += units * V::entries;
    }
    for (int c = 0; c < C; c++) {
      for (int r = 0; r < R; r++) {
        float* total = totals[token + c] + r * V::lanes;
        V::store(total, V::fma(V::load(scale + r * V::lanes), sum[r][c], V::load(total)));
      }
    }
  }

  void look_up() {
    alignas(64) float scales[max_segments][rows];
    int first_group = job.segments[0].group;
    int groups = job.segments[job.segment_count - 1].group - first_group + 1;
    begin_totals();
    for (int p = 0; p < call.planes; p++) {
      const bitlm_plane& plane = call.plane[p];
      load_scales(plane.scales, plane.scale_type, plane.factor, first_group, groups, scales);
      for (int start = 0, stop; start < job.segment_count; start = stop) {
        stop = block_end(start, block_columns);
        const Segment& last = job.segments[stop - 1];
        load_plane(plane, job.segments[start].column, last.column + last.columns);
        int token = 0;
        for (; token + V::tokens <= job.tokens; token += V::tokens) {
          for (int s = start; s < stop; s++) {
            const Segment& segment = job.segments[s];
            look_up_segment<V::tokens>(plane, segment, scales[segment.group - first_group], token);
          }
        }
        for (; token < job.tokens; token++) {
          for (int s = start; s < stop; s++) {
            const Segment& segment = job.segments[s];
            look_up_segment<1>(plane, segment, scales[segment.group - first_group], token);
          }
        }
      }
    }
    if (call.shift) add_shift(scales, first_group, groups);
    end_totals();
  }

  // The first segment after `start` that does not fit into a block with it.
  int block_end(int start, int columns) const {
    int64_t limit = job.segments[start].column + columns;
    int stop = start + 1;
    while (stop < job.segment_count &&
           job.segments[stop].column + job.segments[stop].columns <= limit) {
      stop++;
    }
    return stop;
  }

  void add_shift(float (*scales)[rows], int first_group, int groups) {
    load_scales(call.shift, call.shift_type, 1.0f, first_group, groups, scales);
    for (int token = 0; token < job.tokens; token++) {
      for (int s = 0; s < job.segment_count; s++) {
        Float sum = V::set(job.segment_sums[token * max_segments + s]);
        const float* scale = scales[job.segments[s].group - first_group];
        for (int r = 0; r < R; r++) {
          float* total = totals[token] + r * V::lanes;
          V::store(total, V::fma(V::load(scale + r * V::lanes), sum, V::load(total)));
        }
      }
    }
  }

  static constexpr int expand_columns = 128;

  // Adds codes times scales of one plane to weights[column][row], for part of a segment.
  void expand_plane(const bitlm_plane& plane, int columns, int column, const float* scale,
                    float (*weights)[rows]) const {
    bool ternary = plane.mask || plane.trits;
    for (int start = 0; start < columns; start += word_columns) {
      int count = columns - start < word_columns ? columns - start : word_columns;
      for (int r = 0; r < R; r++) {
        Float value = V::load(scale + r * V::lanes);
        Word sign = word_at(signs, column + start, r);
        Word present = ternary ? word_at(mask, column + start, r) : sign;
        for (int k = 0; k < count; k++) {
          float* weight = weights[start + k] + r * V::lanes;
          Float term = V::with_sign(value, V::shift_left(sign, 31 - k));
          if (ternary) term = V::where_sign(term, V::shift_left(present, 31 - k));
          V::store(weight, V::add(V::load(weight), term));
        }
      }
    }
  }

  template <int C>
  BITLM_INLINE void multiply(const float (*weights)[rows], int64_t column, int columns, int token) {
    const float* x = job.x + token * job.x_stride + column;
    Float sum[R][C];
    for (int r = 0; r < R; r++) {
      for (int c = 0; c < C; c++) sum[r][c] = V::zero();
    }
    for (int k = 0; k < columns; k++) {
      Float weight[R];
      for (int r = 0; r < R; r++) weight[r] = V::load(weights[k] + r * V::lanes);
      for (int c = 0; c < C; c++) {
        Float value = V::set(x[c * job.x_stride + k]);
        for (int r = 0; r < R; r++) sum[r][c] = V::fma(value, weight[r], sum[r][c]);
      }
    }
    for (int c = 0; c < C; c++) {
      for (int r = 0; r < R; r++) {
        float* total = totals[token + c] + r * V::lanes;
        V::store(total, V::add(V::load(total), sum[r][c]));
      }
    }
  }

  void expand() {
    alignas(64) float weights[expand_columns][rows];
    alignas(64) float scale[1][rows];
    begin_totals();
    for (int s = 0; s < job.segment_count; s++) {
      const Segment& segment = job.segments[s];
      for (int start = 0; start < segment.columns; start += expand_columns) {
        int64_t column = segment.column + start;
        int columns = static_cast<int>(smaller(segment.columns - start, expand_columns));
        memset(weights, 0, sizeof weights[0] * columns);
        for (int p = 0; p < call.planes; p++) {
          const bitlm_plane& plane = call.plane[p];
          load_scales(plane.scales, plane.scale_type, plane.factor, segment.group, 1, scale);
          load_plane(plane, column, column + columns);
          int offset = static_cast<int>(column - first_word * word_columns);
          expand_plane(plane, columns, offset, scale[0], weights);
        }
        if (call.shift) {
          load_scales(call.shift, call.shift_type, 1.0f, segment.group, 1, scale);
          for (int k = 0; k < columns; k++) {
            for (int i = 0; i < rows; i++) weights[k][i] += scale[0][i];
          }
        }
        int token = 0;
        for (; token + V::tokens <= job.tokens; token += V::tokens) {
          multiply<V::tokens>(weights, column, columns, token);
        }
        for (; token < job.tokens; token++) multiply<1>(weights, column, columns, token);
      }
    }
    end_totals();
  }
};

// A tile of four vectors of rows, or what is left of the matrix one vector at a time.
template <class V, bool expanded>
void tile(const Job& job, int64_t row) {
  if (job.call->rows - row >= 4 * V::lanes) {
    Tile<V, 4> whole(job, row);
    expanded ? whole.expand() : whole.look_up();
    return;
  }
  for (; row < job.call->rows; row += V::lanes) {
    Tile<V, 1> part(job, row);
    expanded ? part.expand() : part.look_up();
  }
}

template <class V>
constexpr bitlm::Kernel make_kernel(const char* name, int expand_look_ups) {
  return {name, 4 * V::lanes, V::units_per_word, V::unit, V::entries, expand_look_ups,
          convert<V>, tables<V>, tile<V, false>, tile<V, true>};
}

}  // namespace
