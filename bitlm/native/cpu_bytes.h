// Products with codes in order BITLM_BYTES, written once over a vector type V (cpu_avx2.cpp,
// cpu_scalar.cpp).
//
// Four columns of x have 16 sums +-x0 +-x1 +-x2 +-x3, and four bits of a code byte say which one a
// row needs: a look-up and an add do four multiply-adds for each of 32 rows, exactly. A sum is too
// wide for a byte, so it is cut into slices of 5 bits with a table each; eight look-ups (a word of
// 32 columns) add up to at most 31 * 8 < 256, then two slices join in 16 bits, low + 32 * high.
//
// A table entry is sum + 16 * 32^(slices-1), which is never negative: the bias of all look-ups is
// taken off at the end. Table of a word: 8 times (columns 4i ..) `slices` times 16 bytes, index bit
// j set where column 4i + j is added.
//
// V, besides what cpu_common.h needs: lanes == 8, Bytes (32 of uint8), Words (32 sums of 16 bits,
// in whatever order), Table; functions below. part(words, k) is rows 8k .. 8k+7 of Words.
#pragma once

#include "cpu_common.h"

namespace {

using bitlm::Activations;
using bitlm::block_rows;
using bitlm::chunk_words;
using bitlm::ListProduct;
using bitlm::Product;
using bitlm::word_columns;

constexpr int row_vectors = block_rows / 8;
constexpr int word_look_ups = word_columns / 4;
constexpr int most_planes = BITLM_MAX_BITS;

// ---- Chunks ------------------------------------------------------------------------------------

// Neighbouring chunks of one group.
struct Run {
  int group, chunk, chunks, word, words;
  bool last;  // of its group
};

// Goes over the runs from a chunk on: one division at the start, none for each run.
class Walk {
 public:
  Walk(const bitlm_shape& s, int chunk)
      : shape_(s), chunk_(chunk), full_words_(bitlm::full_group_words(s)),
        group_(bitlm::group_of_chunk(s, chunk)) {
    inside_ = (chunk - group_ * bitlm::group_chunks(s, 0)) * chunk_words;
    words_ = bitlm::group_words(s, group_);
  }

  // The next run, of at most `most` chunks and not past chunk `end`.
  Run next(int end, int most) {
    int left = words_ - inside_;
    int chunks = static_cast<int>(smaller(smaller(most, end - chunk_), (left + 3) / chunk_words));
    int words = static_cast<int>(smaller(chunks * chunk_words, left));
    Run run = {group_, chunk_, chunks, group_ * full_words_ + inside_, words, words == left};
    chunk_ += chunks;
    inside_ += words;
    if (run.last && group_ + 1 < shape_.groups) {
      group_++;
      inside_ = 0;
      words_ = group_ + 1 < shape_.groups ? full_words_ : bitlm::group_words(shape_, group_);
    }
    return run;
  }

 private:
  const bitlm_shape& shape_;
  int chunk_, full_words_, group_, inside_, words_;
};

// Planes of a matrix: those of ternary codes weigh the same and share their sums (one pass with two
// planes), those of a grid are passes of their own, each of twice the weight of the one before.
struct Planes {
  int passes, each;
  float weight;  // of the first pass

  explicit Planes(const bitlm_matrix& m)
      : passes(m.kind == BITLM_TERNARY ? 1 : m.bits), each(m.kind == BITLM_TERNARY ? 2 : 1),
        weight(m.kind == BITLM_TERNARY ? 0.5f : 1.0f) {}
};

// Chunks of a run: 16 bits hold eight words of look-ups, and in float mode each chunk has a scale.
BITLM_INLINE int run_chunks(int slices, const Planes& planes) {
  return slices == 5 || planes.each == 2 ? 1 : 2;
}

// Scales of the rows of a block in one group, times the planes' weight.
template <class V>
void load_scales(const Product& p, int64_t block, int group, float weight, float* out) {
  typename V::Floats factor = V::set(weight);
  if (!p.scales) {
    repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA { V::store(out + 8 * v, factor); });
    return;
  }
  int type = p.matrix->scale_type;
  int64_t start = (block * p.x->shape->groups + group) * block_rows;
  repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA {
    V::store(out + 8 * v,
             V::mul(V::load_floats(element(p.scales, type, start + 8 * v), type, 8), factor));
  });
}

// ---- Sums of look-ups --------------------------------------------------------------------------

template <class V, int slices>
struct Sums {
  static constexpr int pairs = (slices + 1) / 2;
  static constexpr uint32_t bias = 16u << 5 * (slices - 1);
  typename V::Words half[2][pairs];

  // With at most two slices the bias goes here: 16 bits wrap around to the signed sum.
  BITLM_INLINE explicit Sums(int look_ups) {
    uint16_t start = static_cast<uint16_t>(slices <= 2 ? -look_ups * static_cast<int>(bias) : 0);
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      repeat<pairs>([&](auto pair) BITLM_INLINE_LAMBDA { half[h][pair] = V::set_words(start); });
    });
  }

  // Joins the slices of one word.
  BITLM_INLINE void widen(const typename V::Bytes (&sum)[2][slices]) {
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      repeat<pairs>([&](auto pair) BITLM_INLINE_LAMBDA {
        if constexpr (2 * pair + 1 < slices) {
          V::widen(sum[h][2 * pair], sum[h][2 * pair + 1], half[h][pair]);
        } else {
          V::widen(sum[h][2 * pair], half[h][pair]);
        }
      });
    });
  }

  // Sums of rows 8v .. 8v+7: all of it, or low + 1024 * high.
  template <int v>
  BITLM_INLINE typename V::Ints rows(int look_ups) const {
    if constexpr (slices <= 2) return low_rows<v>();
    else return V::add_ints(low_rows<v>(), V::template shift_left<10>(high_rows<v>(look_ups)));
  }

  template <int v>
  BITLM_INLINE typename V::Ints low_rows() const {
    if constexpr (slices <= 2) return V::template signed_part<v % 4>(half[v / 4][0]);
    else return V::template part<v % 4>(half[v / 4][0]);
  }

  template <int v>
  BITLM_INLINE typename V::Ints high_rows(int look_ups) const {
    typename V::Ints sum = V::sub_ints(V::template part<v % 4>(half[v / 4][1]),
                                       V::set_ints(static_cast<uint32_t>(look_ups) * (bias >> 10)));
    if constexpr (slices < 5) return sum;
    else return V::add_ints(sum, V::template shift_left<10>(V::template part<v % 4>(half[v / 4][2])));
  }
};

// Adds one table's look-ups for both halves of the block.
template <class V, int slices, bool first>
BITLM_INLINE void look_up(const uint8_t* table, typename V::Bytes (&index)[2],
                          typename V::Bytes (&sum)[2][slices]) {
  repeat<slices>([&](auto s) BITLM_INLINE_LAMBDA {
    typename V::Table entries = V::load_table(table + s * 16);
    V::keep(entries);
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      typename V::Bytes found = V::look_up(entries, index[h]);
      sum[h][s] = first ? found : V::add_bytes(sum[h][s], found);
      V::keep(sum[h][s]);
    });
  });
}

// One plane of a word, straight from the codes. `step`: bytes from 8 columns to the next 8. Codes
// `ahead` go to the second level cache only: the first is full of tables.
template <class V, int slices>
BITLM_INLINE void add_word(const uint8_t* codes, int64_t step, const uint8_t* table,
                           int64_t ahead, Sums<V, slices>& sums) {
  typename V::Bytes sum[2][slices];
  repeat<4>([&](auto q) BITLM_INLINE_LAMBDA {
    const uint8_t* from = codes + q * step;
    V::prefetch(from + ahead);
    typename V::Bytes low[2], high[2];
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      typename V::Bytes code = V::load_bytes(from + 32 * h);
      low[h] = V::low_bits(code);
      high[h] = V::high_bits(code);
    });
    look_up<V, slices, q == 0>(table + q * 32 * slices, low, sum);
    look_up<V, slices, false>(table + q * 32 * slices + 16 * slices, high, sum);
  });
  sums.widen(sum);
}

// A group's integers fit in 32 bits for this many chunks in every mode but float.
constexpr int exact_chunks = 64;

// Where a token's sums of runs go: exact while they are integers of one group, then fp32.
template <class V, int slices>
struct Totals {
  alignas(64) float floats[block_rows];
  alignas(64) int32_t ints[block_rows];
  alignas(64) int32_t high[block_rows];  // in units of 1024, when passes make sums too large

  BITLM_INLINE Totals() {
    repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA { V::store(floats + 8 * v, V::zero()); });
  }

  // begin: nothing is in `ints`; finish: all goes to `floats`, times scale (and factor).
  BITLM_INLINE void add(const Sums<V, slices>& sums, int look_ups, bool begin, bool finish,
                        const float* scale, float factor) {
    repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA {
      typename V::Ints sum = sums.template rows<v>(look_ups);
      if (!begin) sum = V::add_ints(sum, V::load_ints(ints + 8 * v));
      if (finish) add_floats<v>(V::to_floats(sum), scale, factor);
      else V::store_ints(ints + 8 * v, sum);
    });
  }

  // The same for one of several passes.
  BITLM_INLINE void add_pass(const Sums<V, slices>& sums, int look_ups, int pass, bool begin,
                             bool finish, const float* scale, float factor) {
    repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA {
      typename V::Ints low = V::shift_left_by(sums.template low_rows<v>(), pass);
      if (!begin) low = V::add_ints(low, V::load_ints(ints + 8 * v));
      typename V::Floats value = V::to_floats(low);
      if (!finish) V::store_ints(ints + 8 * v, low);
      if constexpr (slices > 2) {
        typename V::Ints more = V::shift_left_by(sums.template high_rows<v>(look_ups), pass);
        if (!begin) more = V::add_ints(more, V::load_ints(high + 8 * v));
        value = V::fma(V::to_floats(more), V::set(1024.0f), value);
        if (!finish) V::store_ints(high + 8 * v, more);
      }
      if (finish) add_floats<v>(value, scale, factor);
    });
  }

  template <int v>
  BITLM_INLINE void add_floats(typename V::Floats value, const float* scale, float factor) {
    if constexpr (slices == 5) value = V::mul(value, V::set(factor));
    V::store(floats + 8 * v, V::fma(value, V::load(scale + 8 * v), V::load(floats + 8 * v)));
  }

  BITLM_INLINE void add_to(float* acc, float factor) const {
    typename V::Floats times = V::set(slices == 5 ? 1.0f : factor);
    repeat<row_vectors>([&](auto v) BITLM_INLINE_LAMBDA {
      V::store(acc + 8 * v, V::fma(V::load(floats + 8 * v), times, V::load(acc + 8 * v)));
    });
  }
};

// Adds a run to the totals; `word`(pass, i, sums) adds word i / planes.each of a pass. With passes
// and more than two slices a run must begin and finish.
template <class V, int slices, class F>
BITLM_INLINE void add_run(Totals<V, slices>& totals, const Planes& planes, const Run& run,
                          bool begin, bool finish, const float* scale, float factor, F&& word) {
  int look_ups = run.words * word_look_ups * planes.each;
  for (int pass = 0; pass < planes.passes; pass++) {
    Sums<V, slices> sums(look_ups);
    for (int i = 0; i < run.words * planes.each; i++) word(pass, i, sums);
    if (planes.passes == 1) {
      totals.add(sums, look_ups, begin, finish, scale, factor);
    } else {
      totals.add_pass(sums, look_ups, pass, begin && pass == 0,
                      finish && pass + 1 == planes.passes, scale, factor);
    }
  }
}

// ---- One token ---------------------------------------------------------------------------------

// Tables of token `token` as if they began with word 0.
BITLM_INLINE const uint8_t* tables_of(const Activations& x, int64_t token, int slices) {
  int64_t skipped = bitlm::first_word(*x.shape, x.table_first_chunk);
  return x.tables + token * x.table_stride - skipped * 128 * slices;
}

template <class V, int slices>
void one_token(const Product& p, int64_t block, float* acc) {
  const bitlm_shape& shape = *p.x->shape;
  const Planes planes(*p.matrix);
  int64_t step = 64 * p.matrix->bits;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const uint8_t* tables = tables_of(*p.x, p.first_token, slices);
  const float* x_scales = p.x->scales + static_cast<int64_t>(p.first_token) * p.x->chunks;
  alignas(64) float scale[block_rows];
  Totals<V, slices> totals;
  int group = -1, most = run_chunks(slices, planes), pending = 0;
  int shift = planes.each - 1;
  bool alone = slices == 5 || (slices == 4 && planes.passes > 1);
  Walk walk(shape, p.first_chunk);
  for (int chunk = p.first_chunk; chunk < p.end_chunk;) {
    Run run = walk.next(p.end_chunk, most);
    chunk += run.chunks;
    if (run.group != group) load_scales<V>(p, block, run.group, planes.weight, scale);
    group = run.group;
    bool begin = pending == 0;
    bool finish = run.last || chunk == p.end_chunk || alone || pending >= exact_chunks;
    pending = finish ? 0 : pending + run.chunks;
    const uint8_t* table = tables + static_cast<int64_t>(run.word) * 128 * slices;
    const uint8_t* from = codes + run.word * 4 * step;
    add_run(totals, planes, run, begin, finish, scale, x_scales[run.chunk],
            [&](int pass, int i, Sums<V, slices>& sums) BITLM_INLINE_LAMBDA {
              int word = i >> shift, plane = pass + i - (word << shift);
              add_word<V, slices>(from + word * 4 * step + 64 * plane, step,
                                  table + word * 128 * slices, p.prefetch, sums);
            });
  }
  totals.add_to(acc, x_scales[p.first_chunk]);
}

// ---- Several tokens ----------------------------------------------------------------------------

// Codes of a few chunks are made to indices once for all tokens, and stay in the first level cache:
// [words][planes][look-ups][64].
constexpr int panel_word_bytes = word_look_ups * block_rows;
constexpr int most_panel_chunks = 4;
constexpr int most_panel_bytes = most_planes * chunk_words * panel_word_bytes;

BITLM_INLINE int panel_chunks(int planes) { return planes == 1 ? 4 : planes == 2 ? 2 : 1; }

template <class V>
BITLM_INLINE void expand_word(const uint8_t* codes, int64_t step, int64_t ahead,
                              uint8_t* panel) {
  repeat<4>([&](auto q) BITLM_INLINE_LAMBDA {
    V::prefetch(codes + q * step + ahead);
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      typename V::Bytes code = V::load_bytes(codes + q * step + 32 * h);
      V::store_bytes(panel + q * 128 + 32 * h, V::low_bits(code));
      V::store_bytes(panel + q * 128 + 64 + 32 * h, V::high_bits(code));
    });
  });
}

// One word of T tokens: they share the loads of the indices.
template <class V, int slices, int T>
BITLM_INLINE void add_panel_word(const uint8_t* panel, const uint8_t* const (&table)[T],
                                 int64_t at, Sums<V, slices>* sums) {
  typename V::Bytes sum[T][2][slices];
  repeat<word_look_ups>([&](auto i) BITLM_INLINE_LAMBDA {
    typename V::Bytes index[2] = {V::load_bytes(panel + i * 64), V::load_bytes(panel + i * 64 + 32)};
    V::keep(index[0]);
    V::keep(index[1]);
    repeat<T>([&](auto t) BITLM_INLINE_LAMBDA {
      look_up<V, slices, i == 0>(table[t] + at + i * 16 * slices, index, sum[t]);
    });
  });
  repeat<T>([&](auto t) BITLM_INLINE_LAMBDA { sums[t].widen(sum[t]); });
}

// Indices of a few runs of a block, and the scales of their groups.
struct Panel {
  Run runs[most_panel_chunks];
  int count, start;  // the first word
  alignas(64) float scale[most_panel_chunks][block_rows];
  alignas(64) uint8_t index[most_panel_bytes];
};

// Adds a panel's products with tokens [token, token + T). T > 1 only where there is one pass.
template <class V, int slices, int T>
BITLM_INLINE void panel_tokens(const Product& p, const Planes& planes, const Panel& panel,
                               const uint8_t* tables, const float* x_scales, int token,
                               float* acc) {
  const int bits = p.matrix->bits, shift = planes.each - 1;
  const bool alone = slices == 5 || (slices == 4 && planes.passes > 1);
  const uint8_t* table[T];
  const float* x_scale[T];
  for (int t = 0; t < T; t++) {
    table[t] = tables + (token + t) * p.x->table_stride;
    x_scale[t] = x_scales + static_cast<int64_t>(token + t) * p.x->chunks;
  }
  Totals<V, slices> totals[T];
  bool begin = true;
  for (int i = 0; i < panel.count; i++) {
    const Run& run = panel.runs[i];
    const uint8_t* from = panel.index + (run.word - panel.start) * bits * panel_word_bytes;
    const int64_t at = static_cast<int64_t>(run.word) * 128 * slices;
    const bool finish = alone || i + 1 == panel.count || run.last;
    auto add_word = [&](int pass, int i, Sums<V, slices>* sums) BITLM_INLINE_LAMBDA {
      int word = i >> shift, plane = pass + i - (word << shift);
      add_panel_word<V, slices, T>(from + (word * bits + plane) * panel_word_bytes, table,
                                   at + word * 128 * slices, sums);
    };
    if constexpr (T == 1) {
      add_run(totals[0], planes, run, begin, finish, panel.scale[i], x_scale[0][run.chunk],
              [&](int pass, int i, Sums<V, slices>& sums) BITLM_INLINE_LAMBDA {
                add_word(pass, i, &sums);
              });
    } else {
      const int look_ups = run.words * word_look_ups * planes.each;
      Sums<V, slices> sums[2] = {Sums<V, slices>(look_ups), Sums<V, slices>(look_ups)};
      for (int i = 0; i < run.words * planes.each; i++) add_word(0, i, sums);
      for (int t = 0; t < T; t++) {
        totals[t].add(sums[t], look_ups, begin, finish, panel.scale[i], x_scale[t][run.chunk]);
      }
    }
    begin = finish;
  }
  for (int t = 0; t < T; t++) {
    totals[t].add_to(acc + static_cast<int64_t>(token + t) * block_rows,
                     x_scale[t][panel.runs[0].chunk]);
  }
}

template <class V, int slices>
void many_tokens(const Product& p, int64_t block, float* acc) {
  const bitlm_shape& shape = *p.x->shape;
  const Planes planes(*p.matrix);
  const int bits = p.matrix->bits, most = run_chunks(slices, planes);
  const bool pairs = slices <= 2 && planes.passes == 1;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const uint8_t* tables = tables_of(*p.x, p.first_token, slices);
  const float* x_scales = p.x->scales + static_cast<int64_t>(p.first_token) * p.x->chunks;
  Panel panel;
  Walk walk(shape, p.first_chunk);
  for (int chunk = p.first_chunk; chunk < p.end_chunk;) {
    int end = static_cast<int>(smaller(chunk + panel_chunks(bits), p.end_chunk));
    for (panel.count = 0; chunk < end; chunk += panel.runs[panel.count++].chunks) {
      Run& run = panel.runs[panel.count];
      run = walk.next(end, most);
      load_scales<V>(p, block, run.group, planes.weight, panel.scale[panel.count]);
    }
    const Run& last = panel.runs[panel.count - 1];
    panel.start = panel.runs[0].word;
    for (int i = 0; i < (last.word + last.words - panel.start) * bits; i++) {
      const uint8_t* from = codes + (panel.start + i / bits) * 256 * bits + i % bits * 64;
      expand_word<V>(from, 64 * bits, p.prefetch, panel.index + i * panel_word_bytes);
    }
    int token = 0;
    for (; pairs && token + 2 <= p.tokens; token += 2) {
      panel_tokens<V, slices, slices <= 2 ? 2 : 1>(p, planes, panel, tables, x_scales, token, acc);
    }
    for (; token < p.tokens; token++) {
      panel_tokens<V, slices, 1>(p, planes, panel, tables, x_scales, token, acc);
    }
  }
}

template <class V, int slices>
void product(const Product& p, int64_t block, float* acc) {
  if (p.tokens == 1) one_token<V, slices>(p, block, acc);
  else many_tokens<V, slices>(p, block, acc);
}

template <class V>
void codes_tables(const Product& p, int64_t block, float* acc) {
  switch (p.x->slices) {
    case 1: return product<V, 1>(p, block, acc);
    case 2: return product<V, 2>(p, block, acc);
    case 4: return product<V, 4>(p, block, acc);
    case 5: return product<V, 5>(p, block, acc);
  }
}

inline bool can_tables(const bitlm_matrix& m) { return !m.trits; }
inline bool can_digits(const bitlm_matrix&) { return false; }

// ---- Rounding and tables -----------------------------------------------------------------------

template <class V>
int32_t round(const float* x, int64_t count, float inverse, int digits, int8_t* out,
              int64_t stride) {
  typename V::Floats times = V::set(inverse);
  float limit = digits == 1 ? 127.0f : digits == 2 ? 32512.0f : 4194303.0f;
  typename V::Floats most = V::set(limit), least = V::set(-limit);
  typename V::Ints total = V::zero_ints();
  for (int64_t i = 0; i < count; i += word_columns) {
    typename V::Ints value[4];
    repeat<4>([&](auto v) BITLM_INLINE_LAMBDA {
      typename V::Floats product = V::mul(V::load(x + i + 8 * v), times);
      value[v] = V::to_ints(V::max(V::min(product, most), least));
      total = V::add_ints(total, value[v]);
    });
    for (int digit = 0;; digit++) {
      V::store_low_bytes(value, out + digit * stride + i);
      if (digit + 1 == digits) break;
      // The digit just stored is -128 .. 127: what is left is value - digit.
      repeat<4>([&](auto v) BITLM_INLINE_LAMBDA {
        value[v] = V::template shift_right<8>(V::add_ints(value[v], V::set_ints(128)));
      });
    }
  }
  int32_t lanes[8], sum = 0;
  V::store_ints(lanes, total);
  for (int lane = 0; lane < 8; lane++) sum += lanes[lane];
  return sum;
}

// Columns' integers, from their digits.
inline void recombine(const int8_t* digit, int64_t stride, int digits, int32_t* out) {
  for (int k = 0; k < word_columns; k++) out[k] = digit[k];
  for (int d = 1; d < digits; d++) {
    for (int k = 0; k < word_columns; k++) out[k] += digit[d * stride + k] * (1 << 8 * d);
  }
}

// ---- Salient entries ---------------------------------------------------------------------------

// Adds one chunk of one token: `digit` is its first column. Each digit's sums fit in 32 bits.
template <class V>
BITLM_INLINE void add_entries(const uint8_t* const (&entries)[4], const uint32_t (&units)[4],
                              const typename V::Positions& x, float factor, const float* scale,
                              const float* correction, float* acc) {
  for (int tile = 0; tile < 4; tile++) {
    if (units[tile] == 0) continue;
    typename V::Ints product[2] = {V::zero_ints(), V::zero_ints()};
    typename V::Ints sum[2] = {V::zero_ints(), V::zero_ints()};
    const uint8_t* from = entries[tile];
    for (uint32_t unit = 0; unit < units[tile]; unit++, from += 128) {
      repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
        typename V::Bytes found = V::find(x, V::load_bytes(from + 32 * h));
        product[h] = V::add_products(product[h], V::load_bytes(from + 64 + 32 * h), found);
        sum[h] = V::add_fours(sum[h], found);
      });
    }
    typename V::Floats times = V::set(factor);
    repeat<2>([&](auto h) BITLM_INLINE_LAMBDA {
      int row = tile * 16 + h * 8;
      typename V::Floats value = V::mul(V::to_floats(product[h]), V::load(scale + row));
      value = V::fma(V::to_floats(sum[h]), V::load(correction + row), value);
      V::store(acc + row, V::fma(value, times, V::load(acc + row)));
    });
  }
}

template <class V>
void list(const ListProduct& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const float* scale = p.scales + block * block_rows;
  Walk walk(*x.shape, 0);
  for (int chunk = 0; chunk < x.chunks; chunk++) {
    const Run run = walk.next(x.chunks, 1);
    const uint8_t* entries[4];
    uint32_t units[4], all = 0;
    for (int tile = 0; tile < 4; tile++) {
      const uint32_t* start = p.starts + (block * 4 + tile) * (x.chunks + 1) + chunk;
      entries[tile] = p.entries + static_cast<int64_t>(start[0]) * 128;
      units[tile] = start[1] - start[0];
      all += units[tile];
    }
    if (all == 0) continue;
    const float* correction = p.correction + (block * x.shape->groups + run.group) * block_rows;
    for (int token = 0; token < p.tokens; token++) {
      int64_t at = p.first_token + token;
      float factor = x.scales[at * x.chunks + chunk];
      for (int digit = 0; digit < x.digits; digit++, factor *= 256) {
        const int8_t* from = x.digit + (at * x.digits + digit) * x.digit_stride +
                             static_cast<int64_t>(run.word) * word_columns;
        alignas(64) int8_t part[chunk_words * word_columns];
        if (run.words < chunk_words) {
          memset(part, 0, sizeof part);
          memcpy(part, from, run.words * word_columns);
          from = part;
        }
        typename V::Positions positions(from);
        add_entries<V>(entries, units, positions, factor, scale, correction,
                       acc + static_cast<int64_t>(token) * block_rows);
      }
    }
  }
}

template <class V>
constexpr bitlm::Kernel make_kernel(const char* name) {
  return {name,        BITLM_BYTES,     load<V>, largest<V>, round<V>, V::tables, can_tables,
          can_digits,  codes_tables<V>, nullptr, nullptr,    list<V>,  dense<V>,  dot<V>,
          store<V>};
}

}  // namespace
