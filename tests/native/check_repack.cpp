// Codes, salient lists and rows of random weights between the file's form and kernel order, all
// against plain loops over single bits; see scripts/sanitize. Stands alone: needs repack.cpp,
// salient.cpp, rows.cpp, plain.cpp, decode.cpp, layout.cpp and cpu_pool.cpp.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "floats.h"
#include "kernel.h"

namespace {

using namespace bitlm;
using Bytes = std::vector<uint8_t>;

std::mt19937 random_bits(1);

int pick(int low, int high) { return low + static_cast<int>(random_bits() % (high - low + 1)); }

float uniform() { return static_cast<float>(random_bits() % 20001) / 10000.0f - 1.0f; }

[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  std::exit(1);
}

void expect_ok(int status, const char* call) {
  if (status != BITLM_OK) fail("%s returned %d", call, status);
}

bitlm_shape make_shape(int columns, int group_size) {
  int groups = (columns + group_size - 1) / group_size, words = 0;
  for (int g = 0; g < groups; g++) {
    words += (std::min(group_size, columns - g * group_size) + 31) / 32;
  }
  return {columns, group_size, groups, words};
}

// ---- Codes -------------------------------------------------------------------------------------

// A code matrix as stored numbers u and as the file's tensors, each exactly as large as it must be,
// so that the sanitizer sees any byte beyond.
struct Matrix {
  int kind, bits, rows;
  bitlm_shape shape;
  std::vector<int> u;  // [rows][columns]

  int at(int row, int column) const { return u[static_cast<size_t>(row) * shape.columns + column]; }
  int value(int row, int column) const {
    return kind == BITLM_TERNARY ? at(row, column) - 1 : 2 * at(row, column) - ((1 << bits) - 1);
  }
  size_t bit_bytes() const { return static_cast<size_t>(rows) * ((shape.columns + 7) / 8); }
  size_t trit_bytes() const { return static_cast<size_t>(rows) * ((shape.columns + 4) / 5); }

  template <class Bit>
  Bytes plane(Bit bit) const {
    Bytes bytes(bit_bytes());
    size_t row_bytes = bit_bytes() / rows;
    for (int n = 0; n < rows; n++) {
      for (int k = 0; k < shape.columns; k++) {
        if (bit(at(n, k))) bytes[n * row_bytes + k / 8] |= static_cast<uint8_t>(1 << k % 8);
      }
    }
    return bytes;
  }

  Bytes trits() const {
    const int powers[5] = {81, 27, 9, 3, 1};
    Bytes bytes(trit_bytes());
    size_t row_bytes = trit_bytes() / rows;
    for (int n = 0; n < rows; n++) {
      for (int k = 0; k < shape.columns; k++) {
        uint8_t& byte = bytes[n * row_bytes + k / 5];
        byte = static_cast<uint8_t>(byte + powers[k % 5] * at(n, k));
      }
    }
    return bytes;
  }

  // signs, or signs and mask, or trits, in the order of `pointers`.
  std::vector<Bytes> file(bool as_trits) const {
    if (as_trits) return {trits()};
    if (kind == BITLM_TERNARY) {
      return {plane([](int code) { return code == 2; }), plane([](int code) { return code != 1; })};
    }
    std::vector<Bytes> planes;
    for (int p = 0; p < bits; p++) {
      planes.push_back(plane([&](int code) { return code >> (bits - 1 - p) & 1; }));
    }
    return planes;
  }

  bitlm_codes codes(const std::vector<Bytes>& file, int order, bool trits_in_memory) const {
    bitlm_codes c = {};
    c.shape = shape, c.rows = rows, c.order = order, c.kind = kind, c.bits = bits;
    c.trits_in_memory = trits_in_memory;
    if (kind == BITLM_TERNARY && file.size() == 1) {
      c.trits = file[0].data();
    } else if (kind == BITLM_TERNARY) {
      c.signs[0] = file[0].data(), c.mask = file[1].data();
    } else {
      for (size_t p = 0; p < file.size(); p++) c.signs[p] = file[p].data();
    }
    return c;
  }
};

Matrix random_matrix(int rows, bitlm_shape shape, int kind) {
  int bits = kind == BITLM_BINARY ? 1 : kind == BITLM_TERNARY ? 2 : pick(1, BITLM_MAX_BITS);
  Matrix m{kind, bits, rows, shape, {}};
  m.u.resize(static_cast<size_t>(rows) * shape.columns);
  int limit = kind == BITLM_TERNARY ? 3 : 1 << bits;
  for (int& code : m.u) code = pick(0, limit - 1);
  return m;
}

Bytes repack(const Matrix& m, bool from_trits, int order, bool trits) {
  std::vector<Bytes> file = m.file(from_trits);
  bitlm_codes codes = m.codes(file, order, trits);
  Bytes packed(static_cast<size_t>(bitlm_codes_bytes(&codes)), 0xa5);
  expect_ok(bitlm_repack(&codes, packed.data(), pick(1, 3)), "bitlm_repack");
  return packed;
}

void check_codes(const Matrix& m, bool from_trits, int order, bool trits) {
  Bytes packed = repack(m, from_trits, order, trits);
  const bitlm_shape& s = m.shape;
  char name[200];
  std::snprintf(name, sizeof name, "kind %d, %d bits, %dx%d, groups of %d, order %d%s%s", m.kind,
                m.bits, m.rows, s.columns, s.group_size, order, from_trits ? ", from trits" : "",
                trits ? ", trits in memory" : "");
  auto value = [&](const bitlm_shape& shape, int row, int column) {
    return value_at(packed.data(), order, m.kind, m.bits, trits, shape, row, column);
  };
  for (int n = 0; n < m.rows; n++) {
    for (int k = 0; k < s.columns; k++) {
      if (value(s, n, k) == m.value(n, k)) continue;
      fail("%s: code %d, %d is %d, expected %d", name, n, k, value(s, n, k), m.value(n, k));
    }
  }
  // The same memory with the padding as columns: everything else must be 0, the lowest value.
  int piece = trits ? trit_columns : word_columns;
  int group = (s.group_size + piece - 1) / piece * piece;
  int last = s.columns - (s.groups - 1) * s.group_size;
  int padded_last = (last + piece - 1) / piece * piece;
  bitlm_shape padded = make_shape((s.groups - 1) * group + padded_last, group);
  int lowest = m.kind == BITLM_TERNARY ? -1 : 1 - (1 << m.bits);
  for (int n = 0; n < (m.rows + 63) / 64 * 64; n++) {
    for (int k = 0; k < padded.columns; k++) {
      bool real = n < m.rows && k % group < (k / group + 1 < s.groups ? s.group_size : last);
      if (real || value(padded, n, k) == lowest) continue;
      fail("%s: padding at row %d, padded column %d is not 0", name, n, k);
    }
  }
  for (bool to_trits : {false, true}) {
    if (to_trits && m.kind != BITLM_TERNARY) continue;
    std::vector<Bytes> expected = m.file(to_trits), back = expected;
    for (Bytes& bytes : back) std::memset(bytes.data(), 0x5a, bytes.size());
    bitlm_codes codes = m.codes(back, order, trits);
    expect_ok(bitlm_unpack(packed.data(), &codes, pick(1, 3)), "bitlm_unpack");
    for (size_t p = 0; p < back.size(); p++) {
      for (size_t i = 0; i < back[p].size(); i++) {
        if (back[p][i] == expected[p][i]) continue;
        fail("%s: unpacked byte %d of tensor %d%s is %d, expected %d", name, static_cast<int>(i),
             static_cast<int>(p), to_trits ? " (trits)" : "", back[p][i], expected[p][i]);
      }
    }
  }
}

void check_all_forms(const Matrix& m) {
  bool ternary = m.kind == BITLM_TERNARY;
  for (bool from_trits : {false, true}) {
    if (from_trits && !ternary) continue;
    check_codes(m, from_trits, BITLM_BYTES, false);
    check_codes(m, from_trits, BITLM_DWORDS, false);
    if (ternary) check_codes(m, from_trits, BITLM_DWORDS, true);
  }
}

// Every byte of every tensor that the format allows, at every place of a word.
void check_every_byte() {
  for (int group : {2048, 32, 37}) {
    Matrix binary{BITLM_BINARY, 1, 4, make_shape(2048, group), {}};
    for (int i = 0; i < 4 * 2048; i++) {
      int byte = (i % 2048 / 8 + i / 2048) % 256;
      binary.u.push_back(byte >> i % 8 & 1);
    }
    check_all_forms(binary);
    Matrix masks{BITLM_TERNARY, 2, 256, make_shape(2048, group), {}};  // row: mask, byte: signs
    for (int i = 0; i < 256 * 2048; i++) {
      int mask = i / 2048 >> i % 8 & 1, sign = i % 2048 / 8 >> i % 8 & 1;
      masks.u.push_back(mask ? 2 * sign : 1);
    }
    check_all_forms(masks);
    Matrix trits{BITLM_TERNARY, 2, 4, make_shape(243 * 5, group), {}};
    const int powers[5] = {81, 27, 9, 3, 1};
    for (int i = 0; i < 4 * 243 * 5; i++) {
      int byte = (i % (243 * 5) / 5 + i / (243 * 5)) % 243;
      trits.u.push_back(byte / powers[i % 5] % 3);
    }
    check_all_forms(trits);
    Matrix grid{BITLM_GRID, 8, 4, make_shape(256, group < 256 ? group : 256), {}};
    for (int i = 0; i < 4 * 256; i++) grid.u.push_back((i + i / 256) % 256);
    check_all_forms(grid);
  }
}

// A sign where the mask is 0 does not count.
void check_masked_signs() {
  Matrix m = random_matrix(70, make_shape(100, 33), BITLM_TERNARY);
  std::vector<Bytes> file = m.file(false);
  for (size_t i = 0; i < file[0].size(); i++) file[0][i] |= static_cast<uint8_t>(~file[1][i]);
  for (int order : {BITLM_BYTES, BITLM_DWORDS}) {
    bitlm_codes codes = m.codes(file, order, false);
    Bytes packed(static_cast<size_t>(bitlm_codes_bytes(&codes)));
    expect_ok(bitlm_repack(&codes, packed.data(), 1), "bitlm_repack");
    if (packed != repack(m, false, order, false)) fail("a sign where the mask is 0 counts");
  }
}

bitlm_shape random_shape(int columns) {
  int group = pick(0, 3) == 0 ? pick(1, 8) * 32 : pick(0, 2) ? pick(1, columns) : pick(1, 9);
  return make_shape(columns, std::min(group, columns));
}

void check_refusals() {
  Matrix m = random_matrix(3, make_shape(40, 32), BITLM_TERNARY);
  std::vector<Bytes> file = m.file(false);
  bitlm_codes good = m.codes(file, BITLM_DWORDS, false);
  std::vector<bitlm_codes> bad(8, good);
  bad[0].mask = nullptr;
  bad[1].bits = 1;
  bad[2].kind = 3;
  bad[3].order = 2;
  bad[4].order = BITLM_BYTES, bad[4].trits_in_memory = 1;
  bad[5].shape.groups = 1;
  bad[6].shape.words = 3;
  bad[7].kind = BITLM_GRID;  // two planes, one pointer
  Bytes out(static_cast<size_t>(bitlm_codes_bytes(&good)));
  for (size_t i = 0; i < bad.size(); i++) {
    if (bitlm_repack(&bad[i], out.data(), 1) != BITLM_BAD_ARGUMENT) {
      fail("wrong codes number %d are not refused", static_cast<int>(i));
    }
  }
}

// ---- Salient lists -----------------------------------------------------------------------------

struct Salient {
  Bytes mask, values, entries;
  std::vector<uint32_t> starts;
  std::vector<int> value;  // [rows][columns], -1: not salient
};

Salient random_salient(int rows, const bitlm_shape& shape) {
  Salient s;
  size_t row_bytes = static_cast<size_t>((shape.columns + 7) / 8);
  s.mask.resize(row_bytes * rows);
  s.value.assign(static_cast<size_t>(rows) * shape.columns, -1);
  int percent = pick(0, 4) ? pick(0, 20) : 100;
  for (int n = 0; n < rows; n++) {
    for (int k = 0; k < shape.columns; k++) {
      if (pick(1, 100) > percent) continue;
      s.mask[n * row_bytes + k / 8] |= static_cast<uint8_t>(1 << k % 8);
      s.values.push_back(static_cast<uint8_t>(pick(0, 255)));
      s.value[static_cast<size_t>(n) * shape.columns + k] = s.values.back();
    }
  }
  s.values.shrink_to_fit();
  s.starts.resize(static_cast<size_t>((rows + 63) / 64 * 4) * (chunks(shape) + 1));
  int64_t units = bitlm_salient(s.mask.data(), nullptr, rows, &shape, s.starts.data(), nullptr);
  if (units < 0) fail("bitlm_salient refuses to count");
  std::vector<uint32_t> counted = s.starts;
  s.entries.assign(static_cast<size_t>(units) * 128 + 1, 0x33);
  int64_t written = bitlm_salient(s.mask.data(), s.values.empty() ? s.mask.data() : s.values.data(),
                                  rows, &shape, s.starts.data(), s.entries.data());
  if (written != units || counted != s.starts) fail("bitlm_salient counts and writes differently");
  if (s.entries.back() != 0x33) fail("bitlm_salient writes past its units");
  return s;
}

void check_salient(int rows, const bitlm_shape& shape) {
  Salient s = random_salient(rows, shape);
  std::vector<int> left = s.value;
  size_t at = 0;
  uint32_t end = 0;
  for (int tile = 0; tile < (rows + 63) / 64 * 4; tile++) {
    for (int group = 0; group < shape.groups; group++) {
      int first = group * shape.group_size;
      int stop = std::min(first + shape.group_size, shape.columns);
      for (int chunk = first; chunk < stop; chunk += 128, at++) {
        if (s.starts[at] != end) fail("salient: lists do not follow each other");
        end = s.starts[at + 1];
        for (uint32_t unit = s.starts[at]; unit < end; unit++) {
          for (int i = 0; i < 64; i++) {
            int position = s.entries[unit * 128 + i], value = s.entries[unit * 128 + 64 + i];
            if (position == 0x80 && value == 0) continue;
            int row = tile * 16 + i / 4, column = chunk + position;
            size_t place = static_cast<size_t>(row) * shape.columns + column;
            if (row >= rows || column >= stop || position > 127 || left[place] != value) {
              fail("salient %dx%d, groups of %d: wrong entry %d at row %d, column %d", rows,
                   shape.columns, shape.group_size, value, row, column);
            }
            left[place] = -1;
          }
        }
      }
    }
    if (s.starts[at++] != end) fail("salient: a tile does not end with its last list");
  }
  for (int value : left) {
    if (value >= 0) fail("salient: an entry is missing");
  }
}

// ---- Products with floats ----------------------------------------------------------------------

void check_close(double got, double expected, double size, const char* name, int row, int column) {
  bool same = std::isfinite(expected)
                  ? std::fabs(got - expected) <= 2e-6 * size + 1e-30
                  : std::isnan(expected) ? std::isnan(got) : got == expected;
  if (!same) fail("%s: row %d, %d is %.9g, expected %.9g", name, row, column, got, expected);
}

void check_products(int rows, const bitlm_shape& shape) {
  Matrix m = random_matrix(rows, shape, pick(0, 2));
  int order = pick(0, 1);
  bool trits = m.kind == BITLM_TERNARY && order == BITLM_DWORDS && pick(0, 1);
  Bytes packed = repack(m, false, order, trits);
  int blocks = (rows + 63) / 64, tokens = pick(1, 3), skipped = pick(0, 1);
  std::vector<float> scales(static_cast<size_t>(blocks) * shape.groups * 64);
  for (float& scale : scales) scale = uniform();
  bool scaled = pick(0, 1);
  // NaN in the padding: it must not be read.
  std::vector<float> floats(static_cast<size_t>(skipped + tokens) * shape.words * 32, NAN);
  std::vector<std::vector<float>> x(tokens, std::vector<float>(shape.columns));
  int group_words = (shape.group_size + 31) / 32;
  for (int t = 0; t < tokens; t++) {
    for (float& value : x[t]) value = uniform();
    if (pick(0, 1)) x[t][pick(0, shape.columns - 1)] = std::numeric_limits<float>::infinity();
    if (pick(0, 3) == 0) x[t][pick(0, shape.columns - 1)] = NAN;
    for (int k = 0; k < shape.columns; k++) {
      size_t at = (k / shape.group_size) * group_words * 32 + k % shape.group_size;
      floats[static_cast<size_t>(skipped + t) * shape.words * 32 + at] = x[t][k];
    }
  }
  bitlm_matrix matrix = {};
  matrix.kind = m.kind, matrix.bits = m.bits, matrix.trits = trits, matrix.rows = rows;
  Activations activations = {};
  activations.shape = &shape, activations.floats = floats.data();
  Product p = {};
  p.matrix = &matrix, p.codes = packed.data(), p.scales = scaled ? scales.data() : nullptr;
  p.x = &activations, p.first_token = skipped, p.tokens = tokens;
  p.first_chunk = pick(0, chunks(shape) - 1), p.end_chunk = pick(p.first_chunk, chunks(shape));
  Salient salient = random_salient(rows, shape);
  std::vector<float> row_scales(blocks * 64), correction(scales.size());
  for (float& scale : row_scales) scale = uniform();
  for (float& value : correction) value = uniform();
  ListProduct l = {};
  l.starts = salient.starts.data(), l.entries = salient.entries.data();
  l.scales = row_scales.data(), l.correction = correction.data();
  l.x = &activations, l.first_token = skipped, l.tokens = tokens;
  for (int block = 0; block < blocks; block++) {
    std::vector<float> codes(tokens * 64, 0.25f), list(tokens * 64, 0.25f);
    codes_floats(p, order, block, codes.data());
    list_floats(l, block, list.data());
    for (int t = 0; t < tokens; t++) {
      for (int n = block * 64; n < rows && n < block * 64 + 64; n++) {
        double sum = 0.25, size = 1, list_sum = 0.25, list_size = 1;
        for (int k = 0; k < shape.columns; k++) {
          int group = k / shape.group_size, inside = k % shape.group_size;
          int chunk = group * ((group_words + 3) / 4) + inside / 128;
          size_t place = (static_cast<size_t>(block) * shape.groups + group) * 64 + n % 64;
          double weight = m.value(n, k) * (scaled ? scales[place] : 1.0);
          if (chunk >= p.first_chunk && chunk < p.end_chunk) {
            sum += weight * x[t][k];
            size += std::fabs(weight * x[t][k]);
          }
          int value = salient.value[static_cast<size_t>(n) * shape.columns + k];
          if (value < 0) continue;
          weight = static_cast<double>(row_scales[n]) * value + correction[place];
          list_sum += weight * x[t][k];
          list_size += (std::fabs(row_scales[n]) * value + 1) * std::fabs(x[t][k]);
        }
        check_close(codes[t * 64 + n % 64], sum, size, "codes_floats", n, t);
        check_close(list[t * 64 + n % 64], list_sum, list_size, "list_floats", n, t);
      }
    }
  }
}

// ---- Rows of a prepared weight -----------------------------------------------------------------

// A prepared weight under construction: arrays on 64-byte boundaries, given by their offsets.
struct Prepared {
  Bytes bytes;

  int64_t add(const void* data, size_t size) {
    bytes.resize((bytes.size() + 63) / 64 * 64);
    int64_t at = static_cast<int64_t>(bytes.size());
    bytes.insert(bytes.end(), static_cast<const uint8_t*>(data),
                 static_cast<const uint8_t*>(data) + size);
    return at;
  }
  template <class T>
  int64_t add(const std::vector<T>& data) {
    return add(data.data(), data.size() * sizeof(T));
  }
};

uint16_t plain_bfloat(float value) {
  // Cuts off the low half, then looks which neighbour is nearer.
  uint32_t bits = bits_of(value), low = bits & 0xffff, high = bits >> 16;
  return static_cast<uint16_t>(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

double plain_half(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return half >> 15 ? -value : value;
}

void check_floats() {
  for (int half = 0; half < 0x7c00; half++) {
    double value = plain_half(static_cast<uint16_t>(half));
    if (half_to_float(static_cast<uint16_t>(half)) != value) fail("half_to_float(%#x)", half);
    if (float_to_half(static_cast<float>(value)) != half) fail("float_to_half of half %#x", half);
    int negative = float_to_half(static_cast<float>(-value));
    if (negative != (half | 0x8000)) fail("float_to_half of the negative of half %#x", half);
    // The middle to the next half rounds to the even one of the two, its neighbours to theirs.
    double next = half == 0x7bff ? 65536.0 : plain_half(static_cast<uint16_t>(half + 1));
    float middle = static_cast<float>((value + next) / 2);
    if (float_to_half(middle) != half + (half & 1)) fail("float_to_half at a middle, %#x", half);
    int below = float_to_half(std::nextafter(middle, 0.0f));
    int above = float_to_half(std::nextafter(middle, 1e9f));
    if (below != half || above != half + 1) fail("float_to_half beside a middle, %#x", half);
  }
  if (float_to_half(INFINITY) != 0x7c00 || float_to_half(1e30f) != 0x7c00) fail("infinite half");
  if ((float_to_half(NAN) & 0x7fff) <= 0x7c00) fail("half of NaN");
  if ((float_to_bfloat(NAN) & 0x7fff) <= 0x7f80) fail("bfloat16 of NaN");
  if (float_to_bfloat(float_of(0x7fffffff)) != 0x7fff) fail("bfloat16 of the largest NaN");
}

std::vector<float> random_floats(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = uniform();
  return values;
}

// Scales in the type's own precision, both as stored and as the doubles they stand for.
int64_t add_scales(Prepared& weight, std::vector<float>& values, int type) {
  if (type == BITLM_FLOAT32) return weight.add(values);
  std::vector<uint16_t> halves;
  for (float& value : values) {
    bool half = type == BITLM_FLOAT16;
    halves.push_back(half ? float_to_half(value) : float_to_bfloat(value));
    value = half ? half_to_float(halves.back()) : bfloat_to_float(halves.back());
  }
  return weight.add(halves);
}

// One sub-weight with random terms; adds what it stands for to `dense` [rows][columns].
bitlm_sub random_sub(Prepared& weight, int order, int rows, int columns, std::vector<double>& dense,
                     std::vector<double>& sizes) {
  size_t padded = static_cast<size_t>((rows + 63) / 64 * 64), blocks = padded / 64;
  std::vector<bitlm_input> inputs;
  std::vector<bitlm_matrix> matrices;
  std::vector<bitlm_dense> denses;
  std::vector<bitlm_list> lists;
  for (int term = pick(1, 3); term > 0; term--) {
    bitlm_input input = {};
    std::vector<int32_t> chosen;
    for (int k = 0; k < columns; k++) {
      if (pick(0, 1)) chosen.push_back(k);
    }
    bool gather = pick(0, 1) && !chosen.empty();
    if (!gather) {
      chosen.clear();
      for (int k = 0; k < columns; k++) chosen.push_back(k);
    }
    input.shape = random_shape(static_cast<int>(chosen.size()));
    input.source = -1;
    input.rank = pick(0, 2) ? 1 : pick(2, 4);
    bool with_scales = input.rank > 1 || pick(0, 1);
    std::vector<float> scales = random_floats(static_cast<size_t>(input.rank) * columns);
    if (!with_scales) scales.assign(scales.size(), 1.0f);
    if (with_scales) input.scales = weight.add(scales);
    if (gather) input.columns = weight.add(chosen);
    const bitlm_shape& shape = input.shape;
    auto place = [&](int row, int k, double factor, const std::vector<float>* row_scales) {
      double sum = 0, size = 0;
      for (int j = 0; j < input.rank; j++) {
        double one = scales[static_cast<size_t>(j) * columns + chosen[k]];
        if (row_scales) one *= (*row_scales)[j * padded + row];
        sum += one, size += std::fabs(one);
      }
      dense[static_cast<size_t>(row) * columns + chosen[k]] += factor * sum;
      sizes[static_cast<size_t>(row) * columns + chosen[k]] += std::fabs(factor) * size;
    };
    auto grouped = [&](int row, int k) {
      return (static_cast<size_t>(row / 64) * shape.groups + k / shape.group_size) * 64 + row % 64;
    };

    Matrix codes = random_matrix(rows, shape, pick(0, 2));
    bitlm_matrix matrix = {};
    matrix.kind = codes.kind, matrix.bits = codes.bits, matrix.rows = rows;
    matrix.trits = codes.kind == BITLM_TERNARY && order == BITLM_DWORDS && pick(0, 1);
    matrix.codes = weight.add(repack(codes, false, order, matrix.trits));
    matrix.input = static_cast<int>(inputs.size()), matrix.output = -1;
    matrix.factor = std::ldexp(1.0f, -pick(0, 3));
    matrix.scale_type = pick(0, 2);
    std::vector<float> group_scales = random_floats(blocks * shape.groups * 64);
    bool with_group_scales = input.rank == 1 && pick(0, 3);
    if (with_group_scales) {
      matrix.scales = add_scales(weight, group_scales, matrix.scale_type);
    }
    std::vector<float> row_scales = random_floats(input.rank * padded);
    bool with_row_scales = input.rank > 1 || pick(0, 1);
    if (with_row_scales) matrix.row_scales = weight.add(row_scales);
    for (int n = 0; n < rows; n++) {
      for (int k = 0; k < shape.columns; k++) {
        double scale = with_group_scales ? group_scales[grouped(n, k)] : 1.0;
        scale *= codes.value(n, k) * matrix.factor;
        place(n, k, scale, with_row_scales ? &row_scales : nullptr);
      }
    }
    matrices.push_back(matrix);

    if (input.rank == 1 && pick(0, 1)) {
      bitlm_dense shift = {};
      shift.type = pick(0, 2), shift.length = shape.groups, shift.input = matrix.input;
      std::vector<float> values = random_floats(blocks * shape.groups * 64);
      shift.values = add_scales(weight, values, shift.type);
      for (int n = 0; n < rows; n++) {
        for (int k = 0; k < shape.columns; k++) place(n, k, values[grouped(n, k)], nullptr);
      }
      denses.push_back(shift);
    }
    if (input.rank == 1 && pick(0, 1)) {
      Salient salient = random_salient(rows, shape);
      std::vector<float> entry_scales = random_floats(padded);
      std::vector<float> correction = random_floats(blocks * shape.groups * 64);
      bitlm_list list = {};
      list.starts = weight.add(salient.starts), list.entries = weight.add(salient.entries);
      list.scales = weight.add(entry_scales), list.correction = weight.add(correction);
      list.input = matrix.input;
      for (int n = 0; n < rows; n++) {
        for (int k = 0; k < shape.columns; k++) {
          int value = salient.value[static_cast<size_t>(n) * shape.columns + k];
          if (value < 0) continue;
          place(n, k, static_cast<double>(entry_scales[n]) * value, nullptr);
          place(n, k, correction[grouped(n, k)], nullptr);
        }
      }
      lists.push_back(list);
    }
    inputs.push_back(input);
  }
  bitlm_sub sub = {};
  sub.rows = rows, sub.columns = columns;
  sub.inputs = static_cast<int>(inputs.size()), sub.input = weight.add(inputs);
  sub.matrices = static_cast<int>(matrices.size()), sub.matrix = weight.add(matrices);
  sub.denses = static_cast<int>(denses.size()), sub.dense = weight.add(denses);
  sub.lists = static_cast<int>(lists.size()), sub.list = weight.add(lists);
  return sub;
}

void check_rows() {
  int columns = pick(1, 300), parts = pick(1, 2), order = pick(0, 1), rows = 0;
  Prepared weight;
  weight.bytes.resize(sizeof(bitlm_weight) + parts * sizeof(bitlm_sub));
  std::vector<double> dense, sizes;
  std::vector<bitlm_sub> subs;
  for (int part = 0; part < parts; part++) {
    int own = pick(1, 100);
    std::vector<double> own_dense(static_cast<size_t>(own) * columns), own_sizes = own_dense;
    subs.push_back(random_sub(weight, order, own, columns, own_dense, own_sizes));
    subs.back().row = rows;
    rows += own;
    dense.insert(dense.end(), own_dense.begin(), own_dense.end());
    sizes.insert(sizes.end(), own_sizes.begin(), own_sizes.end());
  }
  bitlm_weight head = {};
  head.magic = BITLM_MAGIC, head.bytes = static_cast<int64_t>(weight.bytes.size());
  head.order = order, head.parts = parts, head.rows = rows, head.columns = columns;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  size_t padded = (weight.bytes.size() + 63) / 64 * 64;
  std::unique_ptr<uint8_t, Free> memory(static_cast<uint8_t*>(std::aligned_alloc(64, padded)));
  std::memcpy(memory.get(), weight.bytes.data(), weight.bytes.size());
  std::memcpy(memory.get(), &head, sizeof head);
  std::memcpy(memory.get() + sizeof head, subs.data(), subs.size() * sizeof(bitlm_sub));
  auto* prepared = reinterpret_cast<bitlm_weight*>(memory.get());

  std::vector<int64_t> ids;
  for (int i = pick(0, 40); i > 0; i--) ids.push_back(pick(0, rows - 1));
  size_t values = ids.size() * static_cast<size_t>(columns);
  int64_t count = static_cast<int64_t>(ids.size());
  std::vector<float> out(values);
  std::vector<uint16_t> halves(values), bfloats(values);
  expect_ok(bitlm_cpu_rows(prepared, ids.data(), count, out.data(), BITLM_FLOAT32), "rows");
  expect_ok(bitlm_cpu_rows(prepared, ids.data(), count, halves.data(), BITLM_FLOAT16), "rows");
  expect_ok(bitlm_cpu_rows(prepared, ids.data(), count, bfloats.data(), BITLM_BFLOAT16), "rows");
  for (size_t i = 0; i < values; i++) {
    int column = static_cast<int>(i % columns), row = static_cast<int>(ids[i / columns]);
    size_t at = static_cast<size_t>(row) * columns + column;
    check_close(out[i], dense[at], sizes[at], "bitlm_cpu_rows", row, column);
    if (halves[i] != float_to_half(out[i])) fail("fp16 row %d, column %d", row, column);
    if (bfloats[i] != plain_bfloat(out[i])) fail("bf16 row %d, column %d", row, column);
  }
  for (int64_t id : {static_cast<int64_t>(-1), static_cast<int64_t>(rows)}) {
    if (bitlm_cpu_rows(prepared, &id, 1, out.data(), BITLM_FLOAT32) != BITLM_BAD_ARGUMENT) {
      fail("bitlm_cpu_rows takes row %d of %d", static_cast<int>(id), rows);
    }
  }
  auto* first = reinterpret_cast<bitlm_sub*>(prepared + 1);
  first->stages = 1;
  if (bitlm_cpu_rows(prepared, ids.data(), count, out.data(), 0) != BITLM_BAD_ARGUMENT) {
    fail("bitlm_cpu_rows takes a weight with stages");
  }
  first->stages = 0;
  prepared->experts = 1;
  if (bitlm_cpu_rows(prepared, ids.data(), count, out.data(), 0) != BITLM_BAD_ARGUMENT) {
    fail("bitlm_cpu_rows takes a weight with experts");
  }
}

}  // namespace

int main(int count, char** arguments) {
  int cases = count > 1 ? std::atoi(arguments[1]) : 200;
  check_floats();
  check_refusals();
  check_every_byte();
  check_masked_signs();
  for (int number = 0; number < cases; number++) {
    int columns = pick(1, number % 8 ? 300 : 2500);
    int rows = pick(1, number % 8 ? 200 : 70);
    for (int kind : {BITLM_BINARY, BITLM_TERNARY, BITLM_GRID}) {
      check_all_forms(random_matrix(rows, random_shape(columns), kind));
    }
    check_salient(rows, random_shape(columns));
    for (int i = 0; i < 4; i++) check_products(pick(1, 100), random_shape(pick(1, 500)));
    check_rows();
  }
  std::printf("repack, salient lists, rows: %d cases agree\n", cases);
  return 0;
}
