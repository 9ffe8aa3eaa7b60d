// AVX2, FMA and F16C: vectors of 32 bytes, so one vector is one half of a block.
#include <immintrin.h>

#include "cpu_bytes.h"

namespace {

struct Avx2 {
  static constexpr int lanes = 8;

  using Floats = __m256;
  using Ints = __m256i;
  using Bytes = __m256i;
  using Table = __m256i;
  // Sums of the even bytes and of the odd ones.
  struct Words {
    __m256i even, odd;
  };

  static BITLM_INLINE Floats set(float a) { return _mm256_set1_ps(a); }
  static BITLM_INLINE Floats zero() { return _mm256_setzero_ps(); }
  static BITLM_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static BITLM_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static BITLM_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static BITLM_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static BITLM_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static BITLM_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static BITLM_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static BITLM_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static BITLM_INLINE Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }
  static BITLM_INLINE Ints magnitudes(Ints largest, Floats a) {
    Ints bits = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(largest, bits);
  }

  static BITLM_INLINE Floats load_floats(const void* p, int type, int64_t count) {
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
  static BITLM_INLINE __m128i to_bfloats(Floats a) {
    Ints bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set_ints(1));
    Ints rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), set_ints(0x7fff));
    // NaN stays NaN.
    Ints quiet = _mm256_or_si256(bits, set_ints(0x400000));
    Ints nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    return _mm256_castsi256_si128(packed);
  }
  static BITLM_INLINE void store_floats(void* p, int type, int64_t count, Floats a) {
    if (type == BITLM_FLOAT32 && count == lanes) {
      _mm256_storeu_ps(static_cast<float*>(p), a);
      return;
    }
    alignas(32) char part[4 * lanes];
    if (type == BITLM_FLOAT32) {
      _mm256_store_ps(reinterpret_cast<float*>(part), a);
    } else {
      __m128i narrow = type == BITLM_FLOAT16 ? _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)
                                             : to_bfloats(a);
      if (count == lanes) {
        _mm_storeu_si128(static_cast<__m128i*>(p), narrow);
        return;
      }
      _mm_store_si128(reinterpret_cast<__m128i*>(part), narrow);
    }
    memcpy(p, part, count * type_bytes(type));
  }

  static BITLM_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
  static BITLM_INLINE Ints set_ints(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  static BITLM_INLINE Ints load_ints(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Ints*>(p));
  }
  static BITLM_INLINE void store_ints(int32_t* p, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<Ints*>(p), a);
  }
  static BITLM_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static BITLM_INLINE Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static BITLM_INLINE Ints shift_left_by(Ints a, int n) {
    return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n));
  }
  template <int n>
  static BITLM_INLINE Ints shift_left(Ints a) {
    return _mm256_slli_epi32(a, n);
  }
  template <int n>
  static BITLM_INLINE Ints shift_right(Ints a) {
    return _mm256_srai_epi32(a, n);
  }
  static BITLM_INLINE void store_low_bytes(const Ints (&value)[4], int8_t* out) {
    Ints byte = set_ints(255);
    Ints low = _mm256_packus_epi32(_mm256_and_si256(value[0], byte), _mm256_and_si256(value[1], byte));
    Ints high = _mm256_packus_epi32(_mm256_and_si256(value[2], byte), _mm256_and_si256(value[3], byte));
    Ints all = _mm256_packus_epi16(low, high);
    all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<Ints*>(out), all);
  }

  static BITLM_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(p, _MM_HINT_T1); }
  // Pins a value to a register at this point: gcc 12 otherwise loads the tables again for each
  // look-up, gathers look-ups far ahead of their sums, and spills.
  static BITLM_INLINE void keep(__m256i& value) { __asm__("" : "+x"(value)); }
  static BITLM_INLINE Bytes load_bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Bytes*>(p));
  }
  static BITLM_INLINE void store_bytes(uint8_t* p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<Bytes*>(p), a);
  }
  static BITLM_INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static BITLM_INLINE Bytes low_bits(Bytes a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
  static BITLM_INLINE Bytes high_bits(Bytes a) { return low_bits(_mm256_srli_epi16(a, 4)); }
  static BITLM_INLINE Table load_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static BITLM_INLINE Bytes look_up(Table table, Bytes index) {
    return _mm256_shuffle_epi8(table, index);
  }

  static BITLM_INLINE Words set_words(uint16_t a) {
    __m256i all = _mm256_set1_epi16(static_cast<int16_t>(a));
    return {all, all};
  }
  static BITLM_INLINE __m256i pairs(Bytes a, int even, int odd) {
    return _mm256_maddubs_epi16(a, _mm256_set1_epi16(static_cast<int16_t>(odd << 8 | even)));
  }
  static BITLM_INLINE void widen(Bytes low, Bytes high, Words& sum) {
    sum.even = _mm256_add_epi16(sum.even, _mm256_add_epi16(pairs(low, 1, 0), pairs(high, 32, 0)));
    sum.odd = _mm256_add_epi16(sum.odd, _mm256_add_epi16(pairs(low, 0, 1), pairs(high, 0, 32)));
  }
  static BITLM_INLINE void widen(Bytes low, Words& sum) {
    sum.even = _mm256_add_epi16(sum.even, pairs(low, 1, 0));
    sum.odd = _mm256_add_epi16(sum.odd, _mm256_srli_epi16(low, 8));
  }
  // A byte's place p is row p % 2 * 16 + p / 2 % 2 * 8 + p / 4.
  template <int k>
  static BITLM_INLINE Ints part(const Words& a) {
    __m256i from = k / 2 ? a.odd : a.even;
    return k % 2 ? _mm256_srli_epi32(from, 16) : _mm256_and_si256(from, _mm256_set1_epi32(0xffff));
  }
  template <int k>
  static BITLM_INLINE Ints signed_part(const Words& a) {
    __m256i from = k / 2 ? a.odd : a.even;
    return _mm256_srai_epi32(k % 2 ? from : _mm256_slli_epi32(from, 16), 16);
  }

  static void tables(const int8_t* digit, int64_t stride, int digits, int slices, int64_t words,
                     uint8_t* out);

  // 128 columns of a digit. Piece i of 16 is exclusive-ored with piece i - 1, and a position finds
  // all pieces up to its own: a shuffle gives 0 once less than 0 is left of the position.
  struct Positions {
    __m256i piece[8];
    BITLM_INLINE explicit Positions(const int8_t* x) {
      const uint8_t* p = reinterpret_cast<const uint8_t*>(x);
      piece[0] = load_table(p);
      repeat<7>([&](auto i) BITLM_INLINE_LAMBDA {
        piece[i + 1] = _mm256_xor_si256(load_table(p + 16 * i), load_table(p + 16 * i + 16));
      });
    }
  };
  static BITLM_INLINE Bytes find(const Positions& x, Bytes position) {
    Bytes found = _mm256_shuffle_epi8(x.piece[0], position);
    repeat<7>([&](auto i) BITLM_INLINE_LAMBDA {
      position = _mm256_subs_epi8(position, _mm256_set1_epi8(16));
      found = _mm256_xor_si256(found, _mm256_shuffle_epi8(x.piece[i + 1], position));
    });
    return found;
  }
  // Two products of 255 and -128 in one 16-bit sum would saturate: even and odd bytes apart.
  static BITLM_INLINE Ints add_products(Ints sum, Bytes values, Bytes x) {
    __m256i one = _mm256_set1_epi16(1), even = _mm256_set1_epi16(255);
    __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(values, even), x);
    __m256i b = _mm256_maddubs_epi16(_mm256_andnot_si256(even, values), x);
    return add_ints(sum, add_ints(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one)));
  }
  static BITLM_INLINE Ints add_fours(Ints sum, Bytes x) {
    __m256i twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    return add_ints(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
  }
};

// 16 sums of 4 columns in 16 bits, then cut into two slices.
BITLM_INLINE void store_slices(__m256i sum, uint8_t* out) {
  __m256i low = _mm256_and_si256(sum, _mm256_set1_epi16(31));
  __m256i high = _mm256_and_si256(_mm256_srli_epi16(sum, 5), _mm256_set1_epi16(31));
  __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), both);
}

// Lane e is all ones where bit j of e is set.
BITLM_INLINE __m256i entry_bit(int j) {
  __m256i entry = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1 << j));
  return _mm256_cmpeq_epi16(_mm256_and_si256(entry, bit), bit);
}

template <int slices>
void narrow_tables(const int8_t* digit, int64_t words, uint8_t* out) {
  // 2 in the byte of each column that is added: base + 2 * (those columns) is the sum of +-x.
  __m256i two = _mm256_set1_epi16(2), high_two = _mm256_set1_epi16(0x200);
  __m256i first = _mm256_or_si256(_mm256_and_si256(entry_bit(0), two),
                                  _mm256_and_si256(entry_bit(1), high_two));
  __m256i second = _mm256_or_si256(_mm256_and_si256(entry_bit(2), two),
                                   _mm256_and_si256(entry_bit(3), high_two));
  __m256i bias = _mm256_set1_epi32(slices == 1 ? 16 : 512);
  for (int64_t word = 0; word < words; word++, digit += word_columns) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(digit));
    alignas(32) int32_t base[8];
    __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    sums = _mm256_sub_epi32(bias, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(base), sums);
    for (int i = 0; i < 8; i++, out += 16 * slices) {
      int16_t pair[2];
      memcpy(pair, digit + 4 * i, 4);
      __m256i sum = _mm256_set1_epi16(static_cast<int16_t>(base[i]));
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(first, _mm256_set1_epi16(pair[0])));
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(second, _mm256_set1_epi16(pair[1])));
      if constexpr (slices == 2) {
        store_slices(sum, out);
      } else {
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(sum, sum), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
      }
    }
  }
}

template <int slices>
void wide_tables(const int8_t* digit, int64_t stride, int digits, int64_t words, uint8_t* out) {
  // Lanes are entries 0..3 and 8..11, for packing with 4..7 and 12..15: bit 2 is the other vector.
  __m256i sign0 = _mm256_setr_epi32(-1, 1, -1, 1, -1, 1, -1, 1);
  __m256i sign1 = _mm256_setr_epi32(-1, -1, 1, 1, -1, -1, 1, 1);
  __m256i sign3 = _mm256_setr_epi32(-1, -1, -1, -1, 1, 1, 1, 1);
  __m256i bias = _mm256_set1_epi32(16 << 5 * (slices - 1)), ten = _mm256_set1_epi32(1023);
  for (int64_t word = 0; word < words; word++) {
    alignas(32) int32_t x[word_columns];
    recombine(digit + word * word_columns, stride, digits, x);
    for (int i = 0; i < word_columns; i += 4, out += 16 * slices) {
      __m256i sum = _mm256_add_epi32(bias, _mm256_sign_epi32(_mm256_set1_epi32(x[i]), sign0));
      sum = _mm256_add_epi32(sum, _mm256_sign_epi32(_mm256_set1_epi32(x[i + 1]), sign1));
      sum = _mm256_add_epi32(sum, _mm256_sign_epi32(_mm256_set1_epi32(x[i + 3]), sign3));
      __m256i other = _mm256_set1_epi32(x[i + 2]);
      __m256i low = _mm256_sub_epi32(sum, other), high = _mm256_add_epi32(sum, other);
      store_slices(_mm256_packus_epi32(_mm256_and_si256(low, ten), _mm256_and_si256(high, ten)), out);
      low = _mm256_srli_epi32(low, 10), high = _mm256_srli_epi32(high, 10);
      store_slices(_mm256_packus_epi32(_mm256_and_si256(low, ten), _mm256_and_si256(high, ten)),
                   out + 32);
      if constexpr (slices == 5) {
        low = _mm256_srli_epi32(low, 10), high = _mm256_srli_epi32(high, 10);
        __m256i top = _mm256_packus_epi32(low, high);
        top = _mm256_permute4x64_epi64(_mm256_packus_epi16(top, top), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm256_castsi256_si128(top));
      }
    }
  }
}

void Avx2::tables(const int8_t* digit, int64_t stride, int digits, int slices, int64_t words,
                  uint8_t* out) {
  switch (slices) {
    case 1: return narrow_tables<1>(digit, words, out);
    case 2: return narrow_tables<2>(digit, words, out);
    case 4: return wide_tables<4>(digit, stride, digits, words, out);
    case 5: return wide_tables<5>(digit, stride, digits, words, out);
  }
}

}  // namespace

namespace bitlm {
extern const Kernel avx2_kernel = make_kernel<Avx2>("avx2");
}
