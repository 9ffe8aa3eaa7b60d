// The kernels for any machine, on the compiler's own four-lane vectors: SSE2, NEON or plain code.
#include "cpu_kernel.h"

namespace {

struct Scalar {
  static constexpr int lanes = 4, unit = 4, entries = 16, table_vectors = 4;
  static constexpr int units_per_word = 8, tokens = 2;

  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Word __attribute__((vector_size(16)));
  typedef int32_t Signed __attribute__((vector_size(16)));
  using Table = const float*;

  static BITLM_INLINE Float zero() { return Float{}; }
  static BITLM_INLINE Float set(float value) { return Float{value, value, value, value}; }
  static BITLM_INLINE Float load(const float* p) {
    Float a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static BITLM_INLINE void store(float* p, Float a) { memcpy(p, &a, sizeof a); }
  static BITLM_INLINE Float add(Float a, Float b) { return a + b; }
  static BITLM_INLINE Float sub(Float a, Float b) { return a - b; }
  static BITLM_INLINE Float mul(Float a, Float b) { return a * b; }
  static BITLM_INLINE Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float load_floats(const void* p, int type, int64_t count) {
    Float a = {};
    for (int i = 0; i < count; i++) a[i] = load_float(element(p, type, i), type);
    return a;
  }
  static void store_floats(void* p, int type, int64_t count, Float a) {
    for (int i = 0; i < count; i++) {
      store_float(static_cast<char*>(p) + i * type_bytes(type), type, a[i]);
    }
  }

  static BITLM_INLINE Word load_words(const uint32_t* p) {
    Word a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  static BITLM_INLINE void store_words(uint32_t* p, Word a) { memcpy(p, &a, sizeof a); }
  // Byte by byte: the file is little-endian whatever the machine is.
  static BITLM_INLINE Word load_bytes(const uint8_t* p, int64_t count) {
    Word a = {};
    for (int i = 0; i < count; i++) a[i / 4] |= static_cast<uint32_t>(p[i]) << (8 * (i % 4));
    return a;
  }
  static BITLM_INLINE Word load_line(const uint8_t* p) {
    Word a;
    for (int i = 0; i < lanes; i++, p += 4) {
      a[i] = p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
    }
    return a;
  }
  static BITLM_INLINE void transpose(Word (&lines)[lanes]) {
    for (int i = 0; i < lanes; i++) {
      for (int j = 0; j < i; j++) {
        uint32_t swapped = lines[i][j];
        lines[i][j] = lines[j][i];
        lines[j][i] = swapped;
      }
    }
  }
  static BITLM_INLINE Word shift_right(Word a, int n) { return a >> n; }
  static BITLM_INLINE Word shift_left(Word a, int n) { return a << n; }
  static BITLM_INLINE Word shift_unit(Word a) { return a >> unit; }
  static BITLM_INLINE Word bit_or(Word a, Word b) { return a | b; }
  static BITLM_INLINE Word bit_and(Word a, Word b) { return a & b; }
  static BITLM_INLINE Word bit_and_not(Word a, Word b) { return ~a & b; }
  static BITLM_INLINE Word as_word(Float a) { return reinterpret_cast<Word>(a); }
  static BITLM_INLINE Float as_float(Word a) { return reinterpret_cast<Float>(a); }
  // +a where the top bit is set, else -a.
  static BITLM_INLINE Float with_sign(Float a, Word sign) {
    return as_float(as_word(a) ^ (~sign & 0x80000000u));
  }
  // a where the top bit is set, else 0.
  static BITLM_INLINE Float where_sign(Float a, Word mask) {
    return as_float(as_word(a) & reinterpret_cast<Word>(reinterpret_cast<Signed>(mask) >> 31));
  }

  template <class T>
  static BITLM_INLINE void keep(T&) {}
  static BITLM_INLINE void keep_pointer(const uint8_t*&) {}
  static BITLM_INLINE Table load_table(const float* p) { return p; }
  static BITLM_INLINE Float look_up(Table table, Word index) {
    return Float{table[index[0] & 15], table[index[1] & 15], table[index[2] & 15],
                 table[index[3] & 15]};
  }
};

}  // namespace

namespace bitlm {
const Kernel scalar_kernel = make_kernel<Scalar>("scalar", 2);
}
