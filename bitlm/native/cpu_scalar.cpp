// The kernels for any machine: the compiler vectorises the sums where it can.
#include "cpu_kernel.h"

namespace {

struct Scalar {
  static constexpr int lanes = 4, unit = 4, entries = 16, table_vectors = 4;
  static constexpr int units_per_word = 8, tokens = 1;

  struct Float {
    float v[lanes];
  };
  struct Word {
    uint32_t v[lanes];
  };
  using Table = const float*;

  static Float zero() { return {}; }
  static Float set(float value) { return {{value, value, value, value}}; }
  static Float load(const float* p) {
    Float a;
    memcpy(a.v, p, sizeof a.v);
    return a;
  }
  static void store(float* p, Float a) { memcpy(p, a.v, sizeof a.v); }
  static Float add(Float a, Float b) {
    for (int i = 0; i < lanes; i++) a.v[i] += b.v[i];
    return a;
  }
  static Float sub(Float a, Float b) {
    for (int i = 0; i < lanes; i++) a.v[i] -= b.v[i];
    return a;
  }
  static Float mul(Float a, Float b) {
    for (int i = 0; i < lanes; i++) a.v[i] *= b.v[i];
    return a;
  }
  static Float fma(Float a, Float b, Float c) { return add(mul(a, b), c); }
  static Float load_floats(const void* p, int type, int64_t count) {
    Float a = {};
    for (int i = 0; i < count; i++) a.v[i] = load_float(element(p, type, i), type);
    return a;
  }
  static void store_floats(void* p, int type, int64_t count, Float a) {
    for (int i = 0; i < count; i++) {
      store_float(static_cast<char*>(p) + i * type_bytes(type), type, a.v[i]);
    }
  }

  static Word load_words(const uint32_t* p) {
    Word a;
    memcpy(a.v, p, sizeof a.v);
    return a;
  }
  static void store_words(uint32_t* p, Word a) { memcpy(p, a.v, sizeof a.v); }
  // Byte by byte: the file is little-endian whatever the machine is.
  static Word load_bytes(const uint8_t* p, int64_t count) {
    Word a = {};
    for (int i = 0; i < count; i++) {
      a.v[i / 4] |= static_cast<uint32_t>(p[i]) << (8 * (i % 4));
    }
    return a;
  }
  static Word load_line(const uint8_t* p) { return load_bytes(p, 4 * lanes); }
  static void transpose(Word (&lines)[lanes]) {
    for (int i = 0; i < lanes; i++) {
      for (int j = 0; j < i; j++) {
        uint32_t swapped = lines[i].v[j];
        lines[i].v[j] = lines[j].v[i];
        lines[j].v[i] = swapped;
      }
    }
  }
  static Word shift_right(Word a, int n) {
    for (uint32_t& v : a.v) v >>= n;
    return a;
  }
  static Word shift_left(Word a, int n) {
    for (uint32_t& v : a.v) v <<= n;
    return a;
  }
  static Word shift_unit(Word a) { return shift_right(a, unit); }
  static Word bit_or(Word a, Word b) {
    for (int i = 0; i < lanes; i++) a.v[i] |= b.v[i];
    return a;
  }
  static Word bit_and(Word a, Word b) {
    for (int i = 0; i < lanes; i++) a.v[i] &= b.v[i];
    return a;
  }
  static Word bit_and_not(Word a, Word b) {
    for (int i = 0; i < lanes; i++) a.v[i] = ~a.v[i] & b.v[i];
    return a;
  }
  static Word as_word(Float a) {
    Word w;
    memcpy(w.v, a.v, sizeof a.v);
    return w;
  }
  static Float as_float(Word w) {
    Float a;
    memcpy(a.v, w.v, sizeof a.v);
    return a;
  }
  // +a where the top bit is set, else -a.
  static Float with_sign(Float a, Word sign) {
    for (int i = 0; i < lanes; i++) a.v[i] = sign.v[i] >> 31 ? a.v[i] : -a.v[i];
    return a;
  }
  // a where the top bit is set, else 0.
  static Float where_sign(Float a, Word mask) {
    for (int i = 0; i < lanes; i++) a.v[i] = mask.v[i] >> 31 ? a.v[i] : 0.0f;
    return a;
  }

  template <class T>
  static void keep(T&) {}
  static void keep_pointer(const uint8_t*&) {}
  static Table load_table(const float* p) { return p; }
  static Float look_up(Table table, Word index) {
    Float a;
    for (int i = 0; i < lanes; i++) a.v[i] = table[index.v[i] & 15];
    return a;
  }
};

}  // namespace

namespace bitlm {
const Kernel scalar_kernel = make_kernel<Scalar>("scalar", 2);
}
