// AVX2 + FMA + F16C: eight rows a vector, three columns a look-up (vpermps has eight entries).
#include <immintrin.h>

#include "cpu_kernel.h"

namespace {

struct Avx2 {
  static constexpr int lanes = 8, unit = 3, entries = 8, table_vectors = 1;
  static constexpr int units_per_word = 11, tokens = 2;

  using Float = __m256;
  using Word = __m256i;
  using Table = __m256;

  static BITLM_INLINE Float zero() { return _mm256_setzero_ps(); }
  static BITLM_INLINE Float set(float value) { return _mm256_set1_ps(value); }
  static BITLM_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
  static BITLM_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
  static BITLM_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static BITLM_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static BITLM_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static BITLM_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }

  static BITLM_INLINE Float load_floats(const void* p, int type, int64_t count) {
    alignas(32) char part[4 * lanes] = {};
    if (count < lanes) {
      memcpy(part, p, count * type_bytes(type));
      p = part;
    }
    if (type == BITLM_FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(p));
    __m128i narrow = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if (type == BITLM_FLOAT16) return _mm256_cvtph_ps(narrow);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  static BITLM_INLINE void store_floats(void* p, int type, int64_t count, Float a) {
    if (type == BITLM_FLOAT32 && count == lanes) {
      _mm256_storeu_ps(static_cast<float*>(p), a);
      return;
    }
    alignas(32) char part[4 * lanes];
    if (type == BITLM_FLOAT32) {
      _mm256_store_ps(reinterpret_cast<float*>(part), a);
    } else if (type == BITLM_FLOAT16) {
      _mm_store_si128(reinterpret_cast<__m128i*>(part),
                      _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    } else {
      alignas(32) float wide[lanes];
      _mm256_store_ps(wide, a);
      for (int i = 0; i < lanes; i++) store_float(part + 2 * i, type, wide[i]);
    }
    memcpy(p, part, count * type_bytes(type));
  }

  static BITLM_INLINE Word load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Word*>(p));
  }
  static BITLM_INLINE void store_words(uint32_t* p, Word a) {
    _mm256_storeu_si256(reinterpret_cast<Word*>(p), a);
  }
  static BITLM_INLINE Word load_line(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Word*>(p));
  }
  static BITLM_INLINE Word load_bytes(const uint8_t* p, int64_t count) {
    alignas(32) uint8_t part[4 * lanes] = {};
    memcpy(part, p, count);
    return _mm256_load_si256(reinterpret_cast<const Word*>(part));
  }
  static BITLM_INLINE void transpose(Word (&a)[lanes]) {
    Word b[lanes];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
      b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) a[i] = b[i];
  }
  static BITLM_INLINE Word shift_right(Word a, int n) {
    return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n));
  }
  static BITLM_INLINE Word shift_left(Word a, int n) {
    return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n));
  }
  static BITLM_INLINE Word shift_unit(Word a) { return _mm256_srli_epi32(a, unit); }
  static BITLM_INLINE Word bit_or(Word a, Word b) { return _mm256_or_si256(a, b); }
  static BITLM_INLINE Word bit_and(Word a, Word b) { return _mm256_and_si256(a, b); }
  static BITLM_INLINE Word bit_and_not(Word a, Word b) { return _mm256_andnot_si256(a, b); }
  static BITLM_INLINE Word as_word(Float a) { return _mm256_castps_si256(a); }
  static BITLM_INLINE Float as_float(Word a) { return _mm256_castsi256_ps(a); }
  // +a where the top bit is set, else -a.
  static BITLM_INLINE Float with_sign(Float a, Word sign) {
    return _mm256_xor_ps(a, _mm256_andnot_ps(as_float(sign), _mm256_set1_ps(-0.0f)));
  }
  // a where the top bit is set, else 0.
  static BITLM_INLINE Float where_sign(Float a, Word mask) {
    return _mm256_and_ps(a, as_float(_mm256_srai_epi32(mask, 31)));
  }

  // Pins a value to a register at this point: gcc 12 otherwise loads the tables again for each
  // look-up, gathers look-ups far ahead of their sums, and spills.
  template <class T>
  static BITLM_INLINE void keep(T& value) {
    __asm__("" : "+x"(value));
  }
  static BITLM_INLINE void keep_pointer(const uint8_t*& p) { __asm__("" : "+r"(p)); }
  static BITLM_INLINE Table load_table(const float* p) { return _mm256_loadu_ps(p); }
  static BITLM_INLINE Float look_up(Table table, Word index) {
    return _mm256_permutevar8x32_ps(table, index);
  }
};

}  // namespace

namespace bitlm {
const Kernel avx2_kernel = make_kernel<Avx2>("avx2", 3);
}
