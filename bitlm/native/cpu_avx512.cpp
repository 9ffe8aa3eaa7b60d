// AVX-512 F, BW, DQ and VL: sixteen rows a vector, four columns a look-up.
#include <immintrin.h>

#include "cpu_kernel.h"

namespace {

struct Avx512 {
  static constexpr int lanes = 16, unit = 4, entries = 16, table_vectors = 1;
  static constexpr int units_per_word = 8, tokens = 4;

  using Float = __m512;
  using Word = __m512i;
  using Table = __m512;

  static BITLM_INLINE Float zero() { return _mm512_setzero_ps(); }
  static BITLM_INLINE Float set(float value) { return _mm512_set1_ps(value); }
  static BITLM_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
  static BITLM_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
  static BITLM_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static BITLM_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static BITLM_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static BITLM_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }

  static BITLM_INLINE __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }
  static BITLM_INLINE Float load_floats(const void* p, int type, int64_t count) {
    if (type == BITLM_FLOAT32) return _mm512_maskz_loadu_ps(first(count), p);
    __m256i narrow = _mm256_maskz_loadu_epi16(first(count), p);
    if (type == BITLM_FLOAT16) return _mm512_cvtph_ps(narrow);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static BITLM_INLINE void store_floats(void* p, int type, int64_t count, Float a) {
    if (type == BITLM_FLOAT32) {
      _mm512_mask_storeu_ps(p, first(count), a);
    } else if (type == BITLM_FLOAT16) {
      _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    } else {
      __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
      __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
      __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
      __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
      _mm256_mask_storeu_epi16(p, first(count), narrow);
    }
  }

  static BITLM_INLINE Word load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static BITLM_INLINE void store_words(uint32_t* p, Word a) { _mm512_storeu_si512(p, a); }
  static BITLM_INLINE Word load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static BITLM_INLINE Word load_bytes(const uint8_t* p, int64_t count) {
    return _mm512_maskz_loadu_epi8((static_cast<__mmask64>(1) << count) - 1, p);
  }
  static BITLM_INLINE void transpose(Word (&a)[lanes]) {
    Word b[lanes];
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4q + j] holds, in 128-bit lane l, column 4l + j of rows 4q .. 4q + 3.
    for (int j = 0; j < 4; j++) {
      Word low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
      Word high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
      Word low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
      Word high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
      b[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
      b[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
      b[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
      b[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < 16; i++) a[i] = b[i];
  }
  static BITLM_INLINE Word shift_right(Word a, int n) {
    return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n));
  }
  static BITLM_INLINE Word shift_left(Word a, int n) {
    return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n));
  }
  static BITLM_INLINE Word shift_unit(Word a) { return _mm512_srli_epi32(a, unit); }
  static BITLM_INLINE Word bit_or(Word a, Word b) { return _mm512_or_si512(a, b); }
  static BITLM_INLINE Word bit_and(Word a, Word b) { return _mm512_and_si512(a, b); }
  static BITLM_INLINE Word bit_and_not(Word a, Word b) { return _mm512_andnot_si512(a, b); }
  static BITLM_INLINE Word as_word(Float a) { return _mm512_castps_si512(a); }
  static BITLM_INLINE Float as_float(Word a) { return _mm512_castsi512_ps(a); }
  // +a where the top bit is set, else -a.
  static BITLM_INLINE Float with_sign(Float a, Word sign) {
    return _mm512_xor_ps(a, _mm512_andnot_ps(as_float(sign), _mm512_set1_ps(-0.0f)));
  }
  // a where the top bit is set, else 0.
  static BITLM_INLINE Float where_sign(Float a, Word mask) {
    return _mm512_maskz_mov_ps(_mm512_movepi32_mask(mask), a);
  }

  // Pins a value to a register at this point: gcc 12 otherwise loads the tables again for each
  // look-up, gathers look-ups far ahead of their sums, and spills.
  template <class T>
  static BITLM_INLINE void keep(T& value) {
    __asm__("" : "+v"(value));
  }
  static BITLM_INLINE void keep_pointer(const uint8_t*& p) { __asm__("" : "+r"(p)); }
  static BITLM_INLINE Table load_table(const float* p) { return _mm512_loadu_ps(p); }
  static BITLM_INLINE Float look_up(Table table, Word index) {
    return _mm512_permutexvar_ps(index, table);
  }
};

}  // namespace

namespace bitlm {
const Kernel avx512_kernel = make_kernel<Avx512>("avx512", 3);
}
