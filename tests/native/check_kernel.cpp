// Checks every function of one instruction set's Kernel on random shapes against plain loops in
// double, and times its products:
//
//   check_kernel NAME check [SEED [COUNT]]
//   check_kernel NAME bench ROWS COLUMNS TOKENS MODE KIND [GROUP [SCALES [SALIENT]]]
//
// NAME: scalar, avx2, avx512, amx (those linked: -DWITH_AVX2, -DWITH_AVX512, -DWITH_AMX).
// MODE: int8, int16, float, int2, uint2, int1, uint1. KIND: binary, ternary, trits, grid2 .. grid8.
// SCALES: none, fp16, fp32. GROUP 0: the whole row. SALIENT: share of salient entries, 0 .. 1.
// Inputs end at an unreadable page; bits that no contract fixes are random.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../bitlm/native/kernel.h"

using namespace bitlm;

namespace {

std::mt19937_64 engine;

int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
bool chance(int one_in) { return below(one_in) == 0; }
double uniform(double low, double high) {
  return low + (high - low) * static_cast<double>(engine() >> 11) * 0x1p-53;
}
float normal() {
  static std::normal_distribution<float> draw;
  return draw(engine);
}
template <class T>
T pick(std::initializer_list<T> values) {
  return values.begin()[below(static_cast<int64_t>(values.size()))];
}

[[noreturn]] void fail(const std::string& text) {
  printf("FAILED %s\n", text.c_str());
  exit(1);
}

template <class... A>
std::string text(const char* format, A... values) {
  char line[1000];
  snprintf(line, sizeof line, format, values...);
  return line;
}

// ---- Memory that ends at an unreadable page, and starts on 64 bytes if its size allows it ------

class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(int64_t bytes) {
    int64_t page = sysconf(_SC_PAGESIZE);
    room_ = ceil_div(std::max<int64_t>(bytes, 1), page) * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, room_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("mmap");
    mprotect(base_ + room_ - page, page, PROT_NONE);
    data_ = base_ + room_ - page - bytes;
  }
  ~Guarded() {
    if (base_) munmap(base_, room_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(Guarded&& other) {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(room_, other.room_);
    return *this;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* base_ = nullptr;
  char* data_ = nullptr;
  int64_t room_ = 0;
};

void fill_random(void* to, int64_t bytes) {
  uint8_t* p = static_cast<uint8_t*>(to);
  for (int64_t i = 0; i < bytes; i++) p[i] = static_cast<uint8_t>(engine());
}

// ---- Number formats, the slow way --------------------------------------------------------------

double narrow_value(uint16_t bits, int type) {
  int exponent_bits = type == BITLM_FLOAT16 ? 5 : 8, fraction_bits = 15 - exponent_bits;
  int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  int fraction = bits & ((1 << fraction_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
  double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
  return sign * ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

double value_of(const void* p, int type, int64_t i) {
  if (type == BITLM_FLOAT32) return static_cast<const float*>(p)[i];
  return narrow_value(static_cast<const uint16_t*>(p)[i], type);
}

int bytes_of(int type) { return type == BITLM_FLOAT32 ? 4 : 2; }

// A finite number near the normal distribution times `size`.
void put_random(void* p, int type, int64_t i, float size) {
  float value = normal() * size;
  if (type == BITLM_FLOAT32) {
    static_cast<float*>(p)[i] = value;
    return;
  }
  uint32_t bits;
  if (type == BITLM_BFLOAT16) {
    memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits >> 16);
    return;
  }
  // Truncated, by trying: binary search over the positive patterns of fp16.
  uint16_t low = 0, high = 0x7bff;
  while (low < high) {
    uint16_t middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (narrow_value(middle, type) <= fabs(value)) low = middle;
    else high = static_cast<uint16_t>(middle - 1);
  }
  static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(low | (value < 0 ? 0x8000 : 0));
}

// The two representable numbers around `value` must contain `got`, and it must be the nearer one.
bool rounds_to(double value, uint16_t got, int type) {
  double g = narrow_value(got, type);
  if (isnan(value)) return isnan(g);
  if (isinf(g)) return fabs(value) > narrow_value(static_cast<uint16_t>((got & 0x7fff) - 1), type);
  uint16_t magnitude = got & 0x7fff;
  double next = narrow_value(static_cast<uint16_t>(magnitude + 1), type);
  double before = magnitude ? narrow_value(static_cast<uint16_t>(magnitude - 1), type) : 0;
  double size = fabs(value), mine = fabs(g);
  if (isinf(next)) next = 2 * mine - before;
  if (value != 0 && mine != 0 && (value < 0) != (g < 0)) return false;
  // fp32 arithmetic before the rounding may move a value across a tie.
  double slack = 1e-6 * size;
  return size <= (mine + next) / 2 + slack && size >= (mine + before) / 2 - slack;
}

// ---- Shapes and activations --------------------------------------------------------------------

bitlm_shape make_shape(int columns, int group_size) {
  bitlm_shape s = {columns, std::min(group_size, columns), 0, 0};
  s.groups = static_cast<int>(ceil_div(columns, s.group_size));
  for (int g = 0; g < s.groups; g++) s.words += group_words(s, g);
  return s;
}

struct Chunk {
  int group, word, words;
};

std::vector<Chunk> list_chunks(const bitlm_shape& s) {
  std::vector<Chunk> all;
  int word = 0;
  for (int g = 0; g < s.groups; g++) {
    for (int left = group_words(s, g); left > 0; left -= chunk_words) {
      int words = std::min(left, chunk_words);
      all.push_back({g, word, words});
      word += words;
    }
  }
  if (static_cast<int>(all.size()) != chunks(s)) fail("chunks() of layout.h");
  return all;
}

// Where column k of the matrix lies among the padded columns.
int padded_column(const bitlm_shape& s, int k) {
  return (k / s.group_size * full_group_words(s)) * word_columns + k % s.group_size;
}

const char* const mode_names[] = {"float", "int16", "int8", "int2", "uint2", "int1", "uint1"};
int mode_digits(int mode) { return mode == BITLM_FLOAT ? 3 : mode == BITLM_INT16 ? 2 : 1; }
int mode_slices(int mode) {
  return mode == BITLM_FLOAT ? 5 : mode == BITLM_INT16 ? 4 : mode == BITLM_INT8 ? 2 : 1;
}
int mode_limit(int mode) {
  return mode == BITLM_FLOAT ? 4194303 : mode == BITLM_INT16 ? 32512 : 127;
}
bool is_level_mode(int mode) { return mode >= BITLM_INT2; }
int level_bits(int mode) { return mode <= BITLM_UINT2 ? 2 : 1; }
bool is_unsigned_mode(int mode) { return mode == BITLM_UINT2 || mode == BITLM_UINT1; }

struct Rounded {
  Activations a = {};
  std::vector<Chunk> chunks;
  Guarded digit, tables, bits;
  std::vector<int32_t> sums;
  std::vector<float> scales;
  std::vector<float> x;           // [tokens][32 * words]
  std::vector<int32_t> integers;  // [tokens][32 * words]
  int64_t width;                  // 32 * words

  Rounded(const Kernel& kernel, const bitlm_shape& s, int tokens, int mode)
      : chunks(list_chunks(s)), width(static_cast<int64_t>(s.words) * word_columns) {
    a.shape = &s;
    a.tokens = tokens;
    a.activation = mode;
    a.digits = mode_digits(mode);
    a.slices = mode_slices(mode);
    a.chunks = static_cast<int>(chunks.size());
    a.digit_stride = ceil_div(width, 64) * 64;
    int64_t bytes = a.digit_stride * a.digits * tokens;
    digit = Guarded(bytes + 128);  // kernels may read that far past a row
    a.digit = digit.as<int8_t>();
    fill_random(digit.as<void>(), bytes + 128);
    x.assign(width * tokens, 0.0f);
    sums.resize(static_cast<int64_t>(a.chunks) * tokens);
    scales.resize(sums.size());
    a.sums = sums.data();
    a.scales = scales.data();
    (void)kernel;
  }

  void draw(bool extreme) {
    const bitlm_shape& s = *a.shape;
    for (int t = 0; t < a.tokens; t++) {
      float size = extreme ? 1.0f : static_cast<float>(exp(uniform(-3, 3)));
      bool zero = !extreme && chance(20);
      float sign = chance(2) ? -1.0f : 1.0f;
      for (int k = 0; k < s.columns; k++) {
        float outlier = chance(50) ? 20.0f : 1.0f;
        float value = extreme ? sign : zero ? 0.0f : normal() * size * outlier;
        x[t * width + padded_column(s, k)] = value;
      }
    }
  }

  int8_t* digits_of(int token) const {
    return digit.as<int8_t>() + token * a.digits * a.digit_stride;
  }

  void round_range(const Kernel& kernel, int t, int first, int end) {
    int64_t start = static_cast<int64_t>(chunks[first].word) * word_columns;
    int64_t count = (chunks[end - 1].word + chunks[end - 1].words) * word_columns - start;
    const float* from = x.data() + t * width + start;
    float amax = kernel.largest(from, count), limit = static_cast<float>(mode_limit(a.activation));
    float inverse = amax > 0 ? limit / amax : 0.0f;
    kernel.round(from, count, inverse, a.digits, digits_of(t) + start, a.digit_stride);
    for (int c = first; c < end; c++) scales[t * a.chunks + c] = amax / limit;
  }

  // Rounds all tokens as the modes say; levels are drawn here instead.
  void round(const Kernel& kernel, bool draw_levels = true) {
    for (int t = 0; t < a.tokens; t++) {
      if (is_level_mode(a.activation)) {
        if (draw_levels) levels(t);
      } else if (a.activation == BITLM_FLOAT) {
        for (int c = 0; c < a.chunks; c++) round_range(kernel, t, c, c + 1);
      } else {
        round_range(kernel, t, 0, a.chunks);
      }
    }
  }

  void levels(int t) {
    int top = 1 << level_bits(a.activation);
    memset(digits_of(t), 0, width);
    float step = static_cast<float>(uniform(0.1, 2));
    for (int k = 0; k < a.shape->columns; k++) {
      int u = static_cast<int>(below(top));
      digits_of(t)[padded_column(*a.shape, k)] =
          static_cast<int8_t>(is_unsigned_mode(a.activation) ? u : 2 * u - (top - 1));
    }
    for (int c = 0; c < a.chunks; c++) {
      scales[t * a.chunks + c] = is_unsigned_mode(a.activation) ? step : step / 2;
    }
  }

  void recombine() {
    integers.assign(width * a.tokens, 0);
    for (int t = 0; t < a.tokens; t++) {
      for (int64_t k = 0; k < width; k++) {
        int32_t value = 0;
        for (int d = a.digits - 1; d >= 0; d--) {
          value = value * 256 + digits_of(t)[d * a.digit_stride + k];
        }
        integers[t * width + k] = value;
      }
      for (int c = 0; c < a.chunks; c++) {
        int32_t sum = 0;
        for (int k = 0; k < chunks[c].words * word_columns; k++) {
          sum += integers[t * width + chunks[c].word * word_columns + k];
        }
        sums[t * a.chunks + c] = sum;
      }
    }
  }

  int64_t words_between(int first, int end) const {
    return chunks[end - 1].word + chunks[end - 1].words - chunks[first].word;
  }

  void allocate_tables(int most_words) {
    a.table_stride = static_cast<int64_t>(most_words) * 128 * a.slices;
    tables = Guarded(a.table_stride * a.tokens);
    a.tables = tables.as<uint8_t>();
  }

  void build_tables(const Kernel& kernel, int first, int end) {
    a.table_first_chunk = first;
    for (int t = 0; t < a.tokens; t++) {
      kernel.tables(digits_of(t) + static_cast<int64_t>(chunks[first].word) * word_columns,
                    a.digit_stride, a.digits, a.slices, words_between(first, end),
                    tables.as<uint8_t>() + t * a.table_stride);
    }
  }

  // Padding columns are 0 in all planes.
  void build_bits() {
    int planes = level_bits(a.activation), words = a.shape->words;
    int64_t bytes = static_cast<int64_t>(a.tokens) * (planes + 1) * words * 4;
    bits = Guarded(bytes);
    uint32_t* out = bits.as<uint32_t>();
    memset(out, 0, bytes);
    for (int t = 0; t < a.tokens; t++) {
      for (int k = 0; k < a.shape->columns; k++) {
        int at = padded_column(*a.shape, k), value = digits_of(t)[at];
        int u = is_unsigned_mode(a.activation) ? value : (value + (1 << planes) - 1) / 2;
        int c = at % word_columns;
        u |= 1 << planes;  // the last plane marks real columns
        for (int p = 0; p <= planes; p++) {
          out[(static_cast<int64_t>(t) * (planes + 1) + p) * words + at / word_columns] |=
              static_cast<uint32_t>(u >> p & 1) << (8 * (c % 4) + c / 4);
        }
      }
    }
    a.bits = out;
  }
};

// ---- Matrices ----------------------------------------------------------------------------------

struct Matrix {
  bitlm_matrix m = {};
  bitlm_shape shape;
  int order;
  int64_t blocks, bytes_per_block;
  Guarded codes, scales;
  std::vector<int8_t> low, high;  // values, for speed in two halves: value = low + 128 * high

  Matrix(int order_, const bitlm_shape& s, int rows, int kind, int bits, bool trits, int scale_type,
         bool with_scales, bool extreme)
      : shape(s), order(order_), blocks(ceil_div(rows, block_rows)) {
    m.kind = kind;
    m.bits = kind == BITLM_TERNARY ? 2 : kind == BITLM_BINARY ? 1 : bits;
    m.trits = trits;
    m.rows = rows;
    m.scale_type = scale_type;
    m.scales = with_scales;
    m.output = -1;
    m.factor = 1;
    bytes_per_block = block_bytes(order, m.bits, trits, s);
    codes = Guarded(bytes_per_block * blocks);
    fill_codes(extreme);
    if (!with_scales) return;
    int64_t count = blocks * s.groups * block_rows;
    scales = Guarded(count * bytes_of(scale_type));
    for (int64_t i = 0; i < count; i++) put_random(scales.as<void>(), scale_type, i, 0.1f);
  }

  void fill_codes(bool extreme) {
    uint8_t* p = codes.as<uint8_t>();
    int64_t bytes = bytes_per_block * blocks;
    fill_random(p, bytes);
    if (extreme) memset(p, chance(2) ? 255 : 0, bytes);
    if (m.trits) {
      const int64_t per_group = ceil_div(shape.group_size, trit_columns);
      for (int64_t i = 0; i < bytes; i++) {
        int64_t cell = i % bytes_per_block / 256, group = cell / per_group;
        int64_t column = group * shape.group_size + cell % per_group * trit_columns + i % 4;
        int64_t end = std::min<int64_t>((group + 1) * shape.group_size, shape.columns);
        bool high = extreme && p[i];
        int c = 0;
        for (int t = 0; t < 5; t++, column += 4) {  // digits past the group's end are 0
          int digit = extreme ? 2 * high : static_cast<int>(below(3));
          c = 3 * c + (column < end ? digit : 0);
        }
        p[i] = static_cast<uint8_t>((256 * c + 242) / 243);
      }
    } else if (order == BITLM_DWORDS && m.kind == BITLM_TERNARY) {
      // 3 is no code: it becomes 2.
      for (int64_t i = 0; i < bytes; i++) p[i] = p[i] & static_cast<uint8_t>(~(p[i] >> 1 & 0x55));
    } else if (order == BITLM_DWORDS && m.kind == BITLM_GRID && width(m.bits) != m.bits) {
      int mask = (1 << m.bits) - 1;
      if (m.bits == 3) mask |= mask << 4;
      for (int64_t i = 0; i < bytes; i++) p[i] &= static_cast<uint8_t>(mask);
    } else if (order == BITLM_BYTES && m.kind == BITLM_TERNARY) {
      for (int64_t i = 0; i < bytes; i++) {
        if (i & 64) p[i] &= p[i - 64];  // plane 1 only where plane 0 is set
      }
    }
  }

  const void* scale_pointer() const { return m.scales ? scales.as<void>() : nullptr; }

  double scale(int64_t row, int group) const {
    if (!m.scales) return 1;
    int64_t i = (row / block_rows * shape.groups + group) * block_rows + row % block_rows;
    return value_of(scales.as<void>(), m.scale_type, i);
  }

  std::vector<int16_t> row_values(int64_t row) const {
    std::vector<int16_t> values(static_cast<size_t>(shape.words) * word_columns, 0);
    for (int k = 0; k < shape.columns; k++) {
      values[padded_column(shape, k)] = static_cast<int16_t>(
          value_at(codes.as<uint8_t>(), order, m.kind, m.bits, m.trits, shape, row, k));
    }
    return values;
  }
};

std::string describe(const Matrix& w, const Rounded& r) {
  static const char* const kinds[] = {"binary", "ternary", "grid"};
  return text("%d x %d groups of %d, %s%s %d bits, scales %s, %s, %d tokens", w.m.rows,
              w.shape.columns, w.shape.group_size, kinds[w.m.kind], w.m.trits ? " trits" : "",
              w.m.bits, !w.m.scales ? "none" : w.m.scale_type == BITLM_FLOAT32 ? "fp32" : "fp16",
              mode_names[r.a.activation], r.a.tokens);
}

// Runs `call` on every block and compares acc with `expected`(row, token, &magnitude). The integers
// of a chunk are exact, but sums of `chunks` numbers in fp32 are not.
void compare(const std::string& what, int64_t blocks, int rows, int tokens, int chunks,
             const std::function<void(int64_t, float*)>& call,
             const std::function<double(int64_t, int, double*)>& expected) {
  Guarded memory(static_cast<int64_t>(tokens) * 256);
  float* acc = memory.as<float>();
  std::vector<float> before(static_cast<size_t>(tokens) * 64);
  for (int64_t block = 0; block < blocks; block++) {
    for (float& v : before) v = normal();
    memcpy(acc, before.data(), before.size() * 4);
    call(block, acc);
    for (int64_t row = block * 64; row < std::min<int64_t>(rows, block * 64 + 64); row++) {
      for (int t = 0; t < tokens; t++) {
        int64_t i = static_cast<int64_t>(t) * 64 + row % 64;
        double magnitude = 0, want = expected(row, t, &magnitude) + before[i];
        double tolerance = std::max(1e-6, 4e-8 * chunks) * (magnitude + fabs(before[i]));
        if (!(fabs(acc[i] - want) <= tolerance)) {
          fail(text("%s: row %d token %d: got %.9g, expected %.9g (acc before %.9g), "
                    "error %.2e of the sum of magnitudes %.6g",
                    what.c_str(), static_cast<int>(row), t, acc[i], want, before[i],
                    fabs(acc[i] - want) / magnitude, magnitude));
        }
      }
    }
  }
}

void check_product(const std::string& name, void (*function)(const Product&, int64_t, float*),
                   const Matrix& w, const Rounded& r, int first_token, int tokens, int first,
                   int end) {
  Product p = {&w.m, w.codes.as<uint8_t>(), w.scale_pointer(), w.bytes_per_block, &r.a,
               first_token, tokens, first, end, 16384};
  std::string what =
      text("%s: %s; tokens %d + %d, chunks %d .. %d of %d, tables from %d", name.c_str(),
           describe(w, r).c_str(), first_token, tokens, first, end, r.a.chunks,
           r.a.table_first_chunk);
  int64_t known = -1;
  std::vector<int16_t> values;
  compare(
      what, w.blocks, w.m.rows, tokens, end - first,
      [&](int64_t block, float* acc) { function(p, block, acc); },
      [&](int64_t row, int t, double* magnitude) {
        if (row != known) values = w.row_values(row);
        known = row;
        double total = 0;
        const int64_t largest = w.m.kind == BITLM_GRID ? (1 << w.m.bits) - 1 : 1;
        const int32_t* x = r.integers.data() + (first_token + t) * r.width;
        for (int c = first; c < end; c++) {
          int64_t sum = 0, size = 0, start = r.chunks[c].word * word_columns;
          for (int64_t k = start; k < start + r.chunks[c].words * word_columns; k++) {
            int64_t product = static_cast<int64_t>(values[k]) * x[k];
            sum += product;
            // Codes are multiplied unsigned and the sum of x is taken away: small values round
            // like the largest.
            size += largest * (x[k] < 0 ? -static_cast<int64_t>(x[k]) : x[k]);
          }
          double scale = w.scale(row, r.chunks[c].group) *
                         r.a.scales[(first_token + t) * r.a.chunks + c];
          total += scale * static_cast<double>(sum);
          *magnitude += fabs(scale) * static_cast<double>(size);
        }
        return total;
      });
}

// ---- Salient lists -----------------------------------------------------------------------------

struct Lists {
  Guarded starts, entries, scales, correction;
  std::vector<std::vector<std::pair<int, int>>> rows;  // (padded column, value)

  Lists(const bitlm_shape& s, int64_t blocks, double share, bool extreme) {
    std::vector<Chunk> all = list_chunks(s);
    rows.resize(blocks * 64);
    for (auto& row : rows) {
      double mine = extreme ? 1 : share * uniform(0, 2);
      for (int k = 0; k < s.columns; k++) {
        if (uniform(0, 1) < mine) {
          row.push_back({padded_column(s, k), extreme ? 255 : static_cast<int>(below(256))});
        }
      }
    }
    std::vector<uint32_t> start;
    std::vector<uint8_t> bytes;
    for (int64_t tile = 0; tile < blocks * 4; tile++) {
      for (const Chunk& chunk : all) {
        start.push_back(static_cast<uint32_t>(bytes.size() / 128));
        add_chunk(tile, chunk, &bytes);
      }
      start.push_back(static_cast<uint32_t>(bytes.size() / 128));
    }
    copy(start, &starts);
    copy(bytes, &entries);
    std::vector<float> values(blocks * 64), corrections(blocks * s.groups * 64);
    for (float& v : values) v = normal() * 0.01f;
    for (float& v : corrections) v = normal();
    copy(values, &scales);
    copy(corrections, &correction);
  }

  void add_chunk(int64_t tile, const Chunk& chunk, std::vector<uint8_t>* bytes) {
    int low = chunk.word * word_columns, high = low + chunk.words * word_columns;
    std::vector<std::pair<int, int>> mine[16];
    size_t steps = 0;
    for (int r = 0; r < 16; r++) {
      for (auto entry : rows[tile * 16 + r]) {
        if (entry.first >= low && entry.first < high) mine[r].push_back(entry);
      }
      steps = std::max(steps, (mine[r].size() + 3) / 4);
    }
    for (size_t step = 0; step < steps; step++) {
      uint8_t unit[128];
      fill_random(unit, 128);
      for (int r = 0; r < 16; r++) {
        for (size_t j = 0; j < 4; j++) {
          bool there = step * 4 + j < mine[r].size();
          unit[r * 4 + j] = 0x80;
          if (!there) continue;
          unit[r * 4 + j] = static_cast<uint8_t>(mine[r][step * 4 + j].first - low);
          unit[64 + r * 4 + j] = static_cast<uint8_t>(mine[r][step * 4 + j].second);
        }
      }
      bytes->insert(bytes->end(), unit, unit + 128);
    }
  }

  template <class T>
  static void copy(const std::vector<T>& from, Guarded* to) {
    *to = Guarded(static_cast<int64_t>(from.size() * sizeof(T)));
    memcpy(to->as<T>(), from.data(), from.size() * sizeof(T));
  }

  ListProduct product(const Activations* a, int first_token, int tokens) const {
    return {starts.as<uint32_t>(), entries.as<uint8_t>(), scales.as<float>(),
            correction.as<float>(), a, first_token, tokens};
  }
};

void check_list(const Kernel& kernel, const Rounded& r, int rows, bool extreme) {
  const bitlm_shape& s = *r.a.shape;
  int64_t blocks = ceil_div(rows, 64);
  Lists lists(s, blocks, uniform(0, 0.3), extreme);
  int first = static_cast<int>(below(r.a.tokens)), tokens = r.a.tokens - first;
  ListProduct p = lists.product(&r.a, first, tokens);
  std::string what = text("list: %d x %d groups of %d, %s, tokens %d + %d", rows, s.columns,
                          s.group_size, mode_names[r.a.activation], first, tokens);
  int group_columns = full_group_words(s) * word_columns;
  compare(
      what, blocks, rows, tokens, r.a.chunks,
      [&](int64_t block, float* acc) { kernel.list(p, block, acc); },
      [&](int64_t row, int t, double* magnitude) {
        double total = 0, scale = lists.scales.as<float>()[row];
        for (auto entry : lists.rows[row]) {
          int64_t chunk = 0;
          if (r.a.activation == BITLM_FLOAT) {
            while (entry.first >= (r.chunks[chunk].word + r.chunks[chunk].words) * word_columns) {
              chunk++;
            }
          }
          double x = static_cast<double>(r.integers[(first + t) * r.width + entry.first]) *
                     r.a.scales[(first + t) * r.a.chunks + chunk];
          int group = entry.first / group_columns;
          double correction = lists.correction.as<float>()[(row / 64 * s.groups + group) * 64 +
                                                           row % 64];
          total += scale * entry.second * x + correction * x;
          *magnitude += fabs(scale * entry.second * x) + fabs(correction * x);
        }
        return total;
      });
}

// ---- The small functions -----------------------------------------------------------------------

void check_load(const Kernel& kernel) {
  int type = pick({BITLM_FLOAT32, BITLM_FLOAT16, BITLM_BFLOAT16});
  int64_t count = below(300) + 1;
  Guarded from(count * bytes_of(type)), to(count * 4);
  for (int64_t i = 0; i < count; i++) put_random(from.as<void>(), type, i, 3.0f);
  if (chance(3)) fill_random(from.as<void>(), count * bytes_of(type));  // NaN, denormals, ..
  uint32_t largest = kernel.load(from.as<void>(), type, count, to.as<float>()), want = 0;
  for (int64_t i = 0; i < count; i++) {
    double value = value_of(from.as<void>(), type, i);
    float got = to.as<float>()[i];
    if (!(isnan(value) ? isnan(got) : value == got)) {
      fail(text("load: type %d, element %d: got %g, expected %g", type, static_cast<int>(i), got,
                value));
    }
    uint32_t bits;
    memcpy(&bits, &got, 4);
    want = std::max(want, bits & 0x7fffffffu);
  }
  if (largest != want) fail(text("load: type %d: largest %08x, expected %08x", type, largest, want));
}

void check_largest(const Kernel& kernel) {
  int64_t count = below(40) * 32 + (chance(2) ? 32 : 1 + below(31));
  Guarded from(count * 4);
  float want = 0;
  for (int64_t i = 0; i < count; i++) {
    from.as<float>()[i] = normal();
    want = std::max(want, fabsf(from.as<float>()[i]));
  }
  float got = kernel.largest(from.as<float>(), count);
  if (got != want) fail(text("largest of %d: %.9g, expected %.9g", static_cast<int>(count), got, want));
}

void check_round(const Kernel& kernel) {
  int digits = static_cast<int>(below(3)) + 1;
  int64_t count = (below(20) + 1) * 32, stride = ceil_div(count, 64) * 64;
  int limit = digits == 1 ? 127 : digits == 2 ? 32512 : 4194303;
  Guarded from(count * 4), to(stride * digits);
  fill_random(to.as<void>(), stride * digits);
  std::vector<int8_t> before(to.as<int8_t>(), to.as<int8_t>() + stride * digits);
  bool ties = chance(2);
  float inverse = ties ? 0.5f : static_cast<float>(exp(uniform(-2, 2)));
  for (int64_t i = 0; i < count; i++) {
    double size = uniform(0, 1.2) * (chance(3) ? limit : chance(2) ? 300 : 10);
    double value = ties ? (chance(8) ? 1.5 * limit : floor(size)) : size / inverse;
    from.as<float>()[i] = static_cast<float>(chance(2) ? -value : value);
  }
  int32_t got_sum = kernel.round(from.as<float>(), count, inverse, digits, to.as<int8_t>(), stride);
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i++) {
    volatile float product = from.as<float>()[i] * inverse;
    double want = std::min<double>(std::max<double>(nearbyint(product), -limit), limit);
    int64_t got = 0;
    for (int d = digits - 1; d >= 0; d--) got = got * 256 + to.as<int8_t>()[d * stride + i];
    if (static_cast<double>(got) != want) {
      fail(text("round: %d digits, %.9g * %.9g: got %d, expected %d", digits, from.as<float>()[i],
                inverse, static_cast<int>(got), static_cast<int>(want)));
    }
    sum += got;
  }
  if (static_cast<int32_t>(sum) != got_sum) {
    fail(text("round: %d digits: sum %d, expected %d", digits, got_sum, static_cast<int>(sum)));
  }
  for (int d = 0; d < digits; d++) {
    for (int64_t i = count; i < stride; i++) {
      if (to.as<int8_t>()[d * stride + i] != before[d * stride + i]) {
        fail("round: wrote past count");
      }
    }
  }
}

void check_dense(const Kernel& kernel) {
  int type = pick({BITLM_FLOAT32, BITLM_FLOAT16, BITLM_BFLOAT16});
  int length = static_cast<int>(below(130)) + 1;
  Guarded values(static_cast<int64_t>(length) * 64 * bytes_of(type)), source(length * 4);
  for (int i = 0; i < length * 64; i++) put_random(values.as<void>(), type, i, 1.0f);
  for (int i = 0; i < length; i++) source.as<float>()[i] = normal();
  compare(
      text("dense: type %d, length %d", type, length), 1, 64, 1, 1,
      [&](int64_t, float* acc) {
        kernel.dense(values.as<void>(), type, length, source.as<float>(), acc);
      },
      [&](int64_t row, int, double* magnitude) {
        double total = 0;
        for (int i = 0; i < length; i++) {
          double product = value_of(values.as<void>(), type, i * 64 + row) * source.as<float>()[i];
          total += product;
          *magnitude += fabs(product);
        }
        return total;
      });
}

void check_dot(const Kernel& kernel) {
  int type = pick({BITLM_FLOAT32, BITLM_FLOAT16, BITLM_BFLOAT16});
  int64_t count = below(chance(10) ? 6000 : 300) + 1;
  Guarded values(count * bytes_of(type)), x(count * 4);
  double want = 0, magnitude = 0;
  for (int64_t i = 0; i < count; i++) {
    put_random(values.as<void>(), type, i, 1.0f);
    x.as<float>()[i] = normal();
    double product = value_of(values.as<void>(), type, i) * x.as<float>()[i];
    want += product;
    magnitude += fabs(product);
  }
  double got = kernel.dot(values.as<void>(), type, count, x.as<float>());
  if (!(fabs(got - want) <= 1e-6 * magnitude)) {
    fail(text("dot: type %d, count %d: got %.9g, expected %.9g", type, static_cast<int>(count), got,
              want));
  }
}

void check_store(const Kernel& kernel) {
  int y_type = pick({BITLM_FLOAT32, BITLM_FLOAT16, BITLM_BFLOAT16});
  int bias_type = pick({BITLM_FLOAT32, BITLM_FLOAT16, BITLM_BFLOAT16});
  int rows = static_cast<int>(below(64)) + 1;
  bool with_bias = chance(2);
  float post = chance(2) ? 1.0f : normal(), size = pick({1.0f, 1e-6f, 1e5f});
  Guarded acc(256), bias(rows * bytes_of(bias_type)), y(rows * bytes_of(y_type));
  for (int i = 0; i < 64; i++) acc.as<float>()[i] = normal() * size;
  for (int i = 0; i < rows; i++) put_random(bias.as<void>(), bias_type, i, 1.0f);
  kernel.store(acc.as<float>(), post, with_bias ? bias.as<void>() : nullptr, bias_type, rows,
               y.as<void>(), y_type);
  for (int i = 0; i < rows; i++) {
    double b = with_bias ? value_of(bias.as<void>(), bias_type, i) : 0;
    double product = static_cast<double>(acc.as<float>()[i]) * post, want = product + b;
    double error = 2e-7 * (fabs(product) + fabs(b));
    bool good = y_type == BITLM_FLOAT32 && fabs(y.as<float>()[i] - want) <= error;
    if (y_type != BITLM_FLOAT32) {
      uint16_t got = y.as<uint16_t>()[i];
      good = rounds_to(want, got, y_type) || rounds_to(want - error, got, y_type) ||
             rounds_to(want + error, got, y_type);
    }
    if (!good) {
      fail(text("store: type %d, row %d of %d: got %.9g, expected %.9g", y_type, i, rows,
                value_of(y.as<void>(), y_type, i), want));
    }
  }
}

// ---- Random cases ------------------------------------------------------------------------------

struct Tally {
  int tables = 0, digits = 0, bits = 0;
};

void check_products(const Kernel& kernel, Tally* tally) {
  bool long_row = chance(25), extreme = chance(8);
  int columns = long_row ? 5000 + static_cast<int>(below(20000)) : 1 + static_cast<int>(below(700));
  int group = pick({32, 64, 96, 100, 128, 128, 160, 256, 1 << 20, 1 << 20, 7, 333});
  if (long_row && group < 32) group = 128;
  bitlm_shape shape = make_shape(columns, group);
  int rows = 1 + static_cast<int>(below(long_row ? 40 : 200));
  int mode = pick({BITLM_INT8, BITLM_INT8, BITLM_INT16, BITLM_FLOAT, BITLM_INT2, BITLM_UINT2,
                   BITLM_INT1, BITLM_UINT1});
  int first_token = chance(3) ? static_cast<int>(below(4)) : 0;
  int tokens = pick({1, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 128});
  if (long_row && tokens > 17) tokens = 17;

  Rounded r(kernel, shape, first_token + tokens + static_cast<int>(below(2)), mode);
  r.draw(extreme);
  r.round(kernel);
  r.recombine();
  int kind = pick({BITLM_BINARY, BITLM_BINARY, BITLM_TERNARY, BITLM_TERNARY, BITLM_GRID});
  int bits = 2 + static_cast<int>(below(7));
  bool trits = kind == BITLM_TERNARY && kernel.order == BITLM_DWORDS && chance(2);
  bool with_scales = !chance(4);
  Matrix w(kernel.order, shape, rows, kind, bits, trits,
           chance(2) ? BITLM_FLOAT16 : BITLM_FLOAT32, with_scales, extreme);

  int chunks = r.a.chunks, first = 0, end = chunks, table_first = 0;
  if (chance(2)) {
    first = static_cast<int>(below(chunks));
    end = first + 1 + static_cast<int>(below(chunks - first));
    // Cells of 20 columns do not end with chunks: base 3 is cut between groups.
    if (trits) {
      while (first > 0 && r.chunks[first].group == r.chunks[first - 1].group) first--;
      while (end < chunks && r.chunks[end].group == r.chunks[end - 1].group) end++;
    }
    table_first = chance(2) ? first : static_cast<int>(below(first + 1));
  }
  if (kernel.codes_tables && kernel.can_tables(w.m)) {
    r.allocate_tables(static_cast<int>(r.words_between(table_first, end)));
    r.build_tables(kernel, table_first, end);
    check_product("codes_tables", kernel.codes_tables, w, r, first_token, tokens, first, end);
    tally->tables++;
  }
  r.a.tables = nullptr;
  if (kernel.codes_digits && kernel.can_digits(w.m)) {
    check_product("codes_digits", kernel.codes_digits, w, r, first_token, tokens, first, end);
    tally->digits++;
  }
  if (kernel.codes_bits && is_level_mode(mode) && w.m.kind == BITLM_BINARY) {
    r.build_bits();
    check_product("codes_bits", kernel.codes_bits, w, r, first_token, tokens, first, end);
    tally->bits++;
  }
  if (chance(3)) check_list(kernel, r, std::min(rows, 70), extreme && !long_row);
}

int check(const Kernel& kernel, uint64_t seed, int count) {
  Tally tally;
  for (int i = 0; i < count; i++) {
    engine.seed(seed * 1000003 + i);
    check_load(kernel);
    check_largest(kernel);
    check_round(kernel);
    check_dense(kernel);
    check_dot(kernel);
    check_store(kernel);
    check_products(kernel, &tally);
  }
  printf("%s: %d cases from seed %llu agree (tables %d, digits %d, bits %d)\n", kernel.name, count,
         static_cast<unsigned long long>(seed), tally.tables, tally.digits, tally.bits);
  return 0;
}

// ---- Timing ------------------------------------------------------------------------------------

// This thread's own time: others may use the machine.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

char* huge(int64_t bytes) {
  constexpr int64_t page = 2 << 20;
  bytes = ceil_div(bytes, page) * page;
  void* p = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) fail("mmap");
  char* aligned = reinterpret_cast<char*>(ceil_div(reinterpret_cast<int64_t>(p), page) * page);
  madvise(aligned, bytes, MADV_HUGEPAGE);
  return aligned;
}

volatile uint64_t sink;

void read_only(const char* p, int64_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(16)));
  Line a = {}, b = {}, c = {}, d = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(p + i + 2048);
    const Line* line = reinterpret_cast<const Line*>(p + i);
    a |= line[0], b |= line[1], c |= line[2], d |= line[3];
  }
  a |= b | c | d;
  sink = a[0] | a[1];
}

struct Timing {
  std::string name;
  std::function<void(const char*)> run;
  std::vector<double> cold, warm;
};

int parse(const char* value, std::initializer_list<const char*> names, const char* what) {
  int i = 0;
  for (const char* name : names) {
    if (!strcmp(value, name)) return i;
    i++;
  }
  fail(text("%s '%s' is not known", what, value));
}

void report(Timing* timing, const char* when, std::vector<double>* times, double work) {
  std::sort(times->begin(), times->end());
  double median = (*times)[times->size() / 2];
  printf("%-22s %s  median %9.2f us  least %9.2f us  %7.1f GOP/s\n", timing->name.c_str(), when,
         median * 1e6, (*times)[0] * 1e6, work / median * 1e-9);
}

int bench(const Kernel& kernel, int count, char** arguments) {
  if (count < 5) fail("bench needs ROWS COLUMNS TOKENS MODE KIND");
  int rows = atoi(arguments[0]), columns = atoi(arguments[1]), tokens = atoi(arguments[2]);
  int mode = parse(arguments[3], {"float", "int16", "int8", "int2", "uint2", "int1", "uint1"},
                   "mode");
  int kind_index = parse(arguments[4], {"binary", "ternary", "trits", "grid2", "grid3", "grid4",
                                        "grid5", "grid6", "grid7", "grid8"}, "kind");
  int kind = kind_index == 0 ? BITLM_BINARY : kind_index <= 2 ? BITLM_TERNARY : BITLM_GRID;
  int group = count > 5 && atoi(arguments[5]) ? atoi(arguments[5]) : columns;
  int scales = count > 6 ? parse(arguments[6], {"none", "fp16", "fp32"}, "scales") : 1;
  double salient = count > 7 ? atof(arguments[7]) : 0;

  bitlm_shape shape = make_shape(columns, group);
  Rounded r(kernel, shape, tokens, mode);
  r.draw(false);
  r.round(kernel);
  Matrix w(kernel.order, shape, rows, kind, kind_index - 1, kind_index == 2,
           scales == 1 ? BITLM_FLOAT16 : BITLM_FLOAT32, scales != 0, false);
  int64_t code_bytes = w.bytes_per_block * w.blocks;
  int64_t scale_bytes =
      scales ? w.blocks * shape.groups * 64 * bytes_of(w.m.scale_type) : 0;
  scale_bytes = ceil_div(scale_bytes, 64) * 64;
  int64_t bytes = code_bytes + scale_bytes, copies = std::max<int64_t>(1, (400 << 20) / bytes);
  char* memory = huge(bytes * copies + 65536);
  for (int64_t i = 0; i < copies; i++) {
    memcpy(memory + i * bytes, w.codes.as<char>(), code_bytes);
    if (scales) memcpy(memory + i * bytes + code_bytes, w.scales.as<char>(), scale_bytes);
  }
  float* acc = reinterpret_cast<float*>(huge(w.blocks * 256 * tokens));

  // Tables of all tokens of a range of chunks shall stay in the second level cache.
  int64_t per_chunk = 512 * r.a.slices * static_cast<int64_t>(tokens);
  int range = static_cast<int>(std::max<int64_t>(4, (512 << 10) / per_chunk));
  range = std::min(range, r.a.chunks);
  if (tokens == 1) range = r.a.chunks;
  r.allocate_tables(range * chunk_words);
  const uint8_t* table_memory = r.a.tables;

  auto product = [&](const char* p) {
    return Product{&w.m, reinterpret_cast<const uint8_t*>(p), scales ? p + code_bytes : nullptr,
                   w.bytes_per_block, &r.a, 0, tokens, 0, r.a.chunks, 16384};
  };
  std::vector<Timing> all;
  all.push_back({"read only", [&](const char* p) { read_only(p, bytes); }, {}, {}});
  if (kernel.codes_tables && kernel.can_tables(w.m)) {
    all.push_back({"codes_tables", [&](const char* p) {
                     r.round(kernel, false);
                     r.a.tables = table_memory;
                     Product call = product(p);
                     for (int c = 0; c < r.a.chunks; c += range) {
                       call.first_chunk = c;
                       call.end_chunk = std::min(c + range, r.a.chunks);
                       r.build_tables(kernel, c, call.end_chunk);
                       for (int64_t block = 0; block < w.blocks; block++) {
                         kernel.codes_tables(call, block, acc + block * 64 * tokens);
                       }
                     }
                   }, {}, {}});
  }
  if (kernel.codes_digits && kernel.can_digits(w.m)) {
    all.push_back({"codes_digits", [&](const char* p) {
                     r.round(kernel, false);
                     Product call = product(p);
                     for (int64_t block = 0; block < w.blocks; block++) {
                       kernel.codes_digits(call, block, acc + block * 64 * tokens);
                     }
                   }, {}, {}});
  }
  if (kernel.codes_bits && is_level_mode(mode)) {
    r.build_bits();
    all.push_back({"codes_bits", [&](const char* p) {
                     Product call = product(p);
                     for (int64_t block = 0; block < w.blocks; block++) {
                       kernel.codes_bits(call, block, acc + block * 64 * tokens);
                     }
                   }, {}, {}});
  }
  Lists lists(shape, salient > 0 ? w.blocks : 1, salient / 2, false);
  if (salient > 0) {
    int64_t units = lists.starts.as<uint32_t>()[w.blocks * 4 * (r.a.chunks + 1) - 1];
    printf("list: %lld KiB of entries\n", static_cast<long long>(units / 8));
    all.push_back({"list (warm only)", [&](const char*) {
                     ListProduct call = lists.product(&r.a, 0, tokens);
                     for (int64_t block = 0; block < w.blocks; block++) {
                       kernel.list(call, block, acc + block * 64 * tokens);
                     }
                   }, {}, {}});
  }
  all.push_back({"round + tables", [&](const char*) {
                   r.round(kernel, false);
                   r.a.tables = table_memory;
                   for (int c = 0; c < r.a.chunks; c += range) {
                     r.build_tables(kernel, c, std::min(c + range, r.a.chunks));
                   }
                 }, {}, {}});
  double budget = 0.25;
  for (Timing& timing : all) timing.run(memory);
  for (int round = 0; round < 9; round++) {
    for (Timing& timing : all) {
      double start = now(), passed = 0;
      int64_t calls = 0;
      while (calls < copies && passed < budget) {
        for (int i = 0; i < 16 && calls < copies && (i == 0 || bytes < 262144); i++) {
          timing.run(memory + calls++ * bytes);
        }
        passed = now() - start;
      }
      timing.cold.push_back(passed / static_cast<double>(calls));
      start = now(), passed = 0, calls = 0;
      while (passed < 0.03) {
        // Reading the clock takes half a microsecond.
        for (int i = 0; i < (bytes < 262144 ? 16 : 1); i++, calls++) timing.run(memory);
        passed = now() - start;
      }
      timing.warm.push_back(passed / static_cast<double>(calls));
    }
  }
  printf("%s %d x %d groups of %d, %s, %s, %d tokens, %lld KiB, %d chunks a range\n", kernel.name,
         rows, columns, shape.group_size, arguments[4], mode_names[mode], tokens,
         static_cast<long long>(bytes / 1024), range);
  for (Timing& timing : all) {
    double work = 2.0 * rows * columns * tokens;
    report(&timing, "cold", &timing.cold, work);
    report(&timing, "warm", &timing.warm, work);
  }
  return 0;
}

const Kernel* find_kernel(const std::string& name) {
  if (name == "scalar" || name == "neon") return &scalar_kernel;
#ifdef WITH_AVX2
  if (name == "avx2") return &avx2_kernel;
#endif
#ifdef WITH_AVX512
  if (name == "avx512") return &avx512_kernel;
#endif
#ifdef WITH_AMX
  if (name == "amx") {
    syscall(SYS_arch_prctl, 0x1023, 18);  // asks the system for tile registers
    return &amx_kernel;
  }
#endif
  fail("instruction set " + name + " is not linked");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) fail("usage: check_kernel NAME check|bench ..");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const Kernel* kernel = find_kernel(arguments[1]);
  if (!strcmp(arguments[2], "bench")) return bench(*kernel, count - 3, arguments + 3);
  if (strcmp(arguments[2], "check")) fail("only check and bench are known");
  return check(*kernel, count > 3 ? strtoull(arguments[3], nullptr, 10) : 1,
               count > 4 ? atoi(arguments[4]) : 300);
}
