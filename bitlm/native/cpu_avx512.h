// Kernels for AVX-512 with VBMI and VNNI, order BITLM_DWORDS.
//
// Look-up ("tables"), 1-bit codes. A table holds the 16 sums +-x over 4 columns, cut into slices of
// 5 bits, one byte each. vpermb looks up 64 of them by 4 weight bits and the column modulo 4; 8
// looked-up slices add up in a byte, and two vpdpbusd (weights 1 and 32) then join them with the
// bytes of a row. Exact, and per instruction more multiply-adds than vpdpbusd itself.
//
// Digits, any codes. vpdpbusd of unsigned codes, isolated by AND, with signed digits of x. Bits that
// stand higher in the byte are summed apart and shifted down at the end.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernel.h"

namespace {

using bitlm::Activations;
using bitlm::block_rows;
using bitlm::ceil_div;
using bitlm::chunk_words;
using bitlm::full_group_words;
using bitlm::group_chunks;
using bitlm::group_words;
using bitlm::ListProduct;
using bitlm::Product;
using bitlm::width;
using bitlm::word_columns;

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
// Keeps a value in a register and sums in the written order: gcc otherwise folds table loads into
// every look-up again, reassociates the sums, and spills.
#define KEEP(x) __asm__("" : "+v"(x))
// Into L2 only: look-ups keep their tables in L1.
#define PREFETCH(p, ahead) _mm_prefetch(reinterpret_cast<const char*>(p) + (ahead), _MM_HINT_T1)
#define PREFETCH_NEAR(p) _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0)

constexpr int tiles = 4;  // of 16 rows in a block

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

template <int I, int N>
struct Unroll {
  template <class F>
  static INLINE void run(F& f) {
    f(Index<I>());
    Unroll<I + 1, N>::run(f);
  }
};

template <int N>
struct Unroll<N, N> {
  template <class F>
  static INLINE void run(F&) {}
};

template <int N, class F>
INLINE void unroll(F f) {
  Unroll<0, N>::run(f);
}

INLINE int32_t load_dword(const int8_t* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

INLINE __m512 load_floats(const void* p, int type, int64_t index) {
  if (type == BITLM_FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(p) + index);
  __m256i half =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + index));
  if (type == BITLM_FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 load_floats(const void* p, int type, int64_t index, int count) {
  __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (type == BITLM_FLOAT32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + index);
  }
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + index);
  if (type == BITLM_FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m256i to_bfloat(__m512 value) {
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// ---- Activations --------------------------------------------------------------------------------

uint32_t load(const void* x, int type, int64_t count, float* out) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __m512 v = load_floats(x, type, i);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
    _mm512_storeu_ps(out + i, v);
  }
  if (i < count) {
    int left = static_cast<int>(count - i);
    __m512 v = load_floats(x, type, i, left);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(v), magnitude));
    _mm512_mask_storeu_ps(out + i, static_cast<__mmask16>((1u << left) - 1), v);
  }
  return _mm512_reduce_max_epu32(largest);
}

float largest(const float* x, int64_t count) {
  __m512 a = _mm512_setzero_ps(), b = a;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    a = _mm512_max_ps(a, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    b = _mm512_max_ps(b, _mm512_abs_ps(_mm512_loadu_ps(x + i + 16)));
  }
  for (; i < count; i += 16) {
    int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    a = _mm512_max_ps(a, _mm512_abs_ps(load_floats(x, BITLM_FLOAT32, i, left)));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

INLINE void store_bytes(int8_t* p, __m512i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

template <int D>
INLINE int32_t round_digits(const float* x, int64_t count, float inverse, int8_t* out,
                            int64_t stride) {
  const __m512 r = _mm512_set1_ps(inverse);
  const __m512i limit = _mm512_set1_epi32(D == 1 ? 127 : D == 2 ? 32512 : 4194303);
  const __m512i least = _mm512_sub_epi32(_mm512_setzero_si512(), limit);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), r));
    v = _mm512_max_epi32(_mm512_min_epi32(v, limit), least);
    sum = _mm512_add_epi32(sum, v);
    store_bytes(out + i, v);
    if (D > 1) {
      // Half a unit of the next digit makes the low one lie in -128 .. 127.
      v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      store_bytes(out + stride + i, v);
    }
    if (D > 2) {
      v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
      store_bytes(out + 2 * stride + i, v);
    }
  }
  return _mm512_reduce_add_epi32(sum);
}

int32_t round(const float* x, int64_t count, float inverse, int digits, int8_t* out,
              int64_t stride) {
  return digits == 1   ? round_digits<1>(x, count, inverse, out, stride)
         : digits == 2 ? round_digits<2>(x, count, inverse, out, stride)
                       : round_digits<3>(x, count, inverse, out, stride);
}

// ---- Tables: [word][half][slice][64], byte 4*n + j: column group j, weight bits n ------------------
//
// Half 0 is looked up by bits 2..5 of each byte, half 1 by the same bits after the dword has been
// rotated left by 4, so that one AND and the byte's number give the index. gather[half][4j + i] is
// the column of bit i.
struct TableConstants {
  uint8_t gather[64];  // of two words' columns, for half 0 and 1 of each
  int8_t signs[64];    // byte i of dword n: bit i of n as -1, 1
  int32_t start[16];   // what makes up for x + 128
};

constexpr TableConstants table_constants() {
  TableConstants t = {};
  for (int word = 0; word < 2; word++) {
    for (int half = 0; half < 2; half++) {
      for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) {
          int column = !half ? 4 * (2 + i) + j : i < 2 ? 4 * (6 + i) + (j + 3) % 4 : 4 * (i - 2) + j;
          t.gather[word * 32 + half * 16 + 4 * j + i] = static_cast<uint8_t>(word * 32 + column);
        }
      }
    }
  }
  for (int n = 0; n < 16; n++) {
    int sum = 0;
    for (int i = 0; i < 4; i++) {
      t.signs[4 * n + i] = n >> i & 1 ? 1 : -1;
      sum += t.signs[4 * n + i];
    }
    t.start[n] = -128 * sum;
  }
  return t;
}

alignas(64) constexpr TableConstants constants = table_constants();

template <int D, int S>
void build_tables(const int8_t* digit, int64_t stride, int64_t words, uint8_t* out) {
  const __m512i gather = _mm512_loadu_si512(constants.gather);
  const __m512i signs = _mm512_loadu_si512(constants.signs);
  const __m512i start = _mm512_loadu_si512(constants.start);
  const __m512i first = _mm512_add_epi32(start, _mm512_set1_epi32(16 << 5 * (S - 1)));
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t word = 0; word < words; word += 2) {
    int halves = words - word > 1 ? 4 : 2;
    alignas(64) int32_t x[D][16];
    for (int d = 0; d < D; d++) {
      // 64 bytes are there: rows may be read past their end.
      __m512i v = _mm512_loadu_si512(digit + d * stride + word * word_columns);
      _mm512_store_si512(x[d], _mm512_permutexvar_epi8(gather, _mm512_xor_si512(v, flip)));
    }
    for (int half = 0; half < halves; half++, out += 64 * S) {
      __m512i sum[4];
      unroll<4>([&](auto j) INLINED {
        sum[j] = _mm512_dpbusd_epi32(first, _mm512_set1_epi32(x[0][half * 4 + j]), signs);
        for (int d = 1; d < D; d++) {
          __m512i more = _mm512_dpbusd_epi32(start, _mm512_set1_epi32(x[d][half * 4 + j]), signs);
          sum[j] = _mm512_add_epi32(sum[j], _mm512_slli_epi32(more, 8 * d));
        }
      });
      unroll<S>([&](auto s) INLINED {
        __m512i table = _mm512_setzero_si512();
        unroll<4>([&](auto j) INLINED {
          constexpr int shift = 8 * j - 5 * s;
          __m512i moved = shift >= 0 ? _mm512_slli_epi32(sum[j], shift < 0 ? 0 : shift)
                                     : _mm512_srli_epi32(sum[j], shift < 0 ? -shift : 0);
          // table | (moved & mask)
          table = _mm512_ternarylogic_epi32(table, moved, _mm512_set1_epi32(31 << 8 * j), 0xf8);
        });
        _mm512_store_si512(out + 64 * s, table);
      });
    }
  }
}

void tables(const int8_t* digit, int64_t stride, int digits, int slices, int64_t words,
            uint8_t* out) {
  if (slices == 1) {
    build_tables<1, 1>(digit, stride, words, out);
  } else if (digits == 1) {
    build_tables<1, 2>(digit, stride, words, out);
  } else if (digits == 2) {
    build_tables<2, 4>(digit, stride, words, out);
  } else {
    build_tables<3, 5>(digit, stride, words, out);
  }
}

// ---- Walking over groups and chunks ---------------------------------------------------------------

// A run of chunks of one group whose integer sums are added up before they are scaled.
struct Piece {
  int group, first_chunk, chunks;
  int first_word, words;
};

// Cuts chunks [first, end) into pieces of at most `most` chunks and calls f(piece).
template <class F>
INLINE void pieces(const bitlm_shape& shape, int first, int end, int most, F f) {
  const int per_group = group_chunks(shape, 0), words = full_group_words(shape);
  int group = bitlm::group_of_chunk(shape, first), inside = first - group * per_group;
  for (int chunk = first; chunk < end; group++, inside = 0) {
    const bool short_group = group + 1 == shape.groups;
    const int in_group = short_group ? group_chunks(shape, group) : per_group;
    const int words_here = short_group ? group_words(shape, group) : words;
    while (inside < in_group && chunk < end) {
      int count = in_group - inside;
      if (count > end - chunk) count = end - chunk;
      if (count > most) count = most;
      int begin = inside * chunk_words, stop = begin + count * chunk_words;
      if (stop > words_here) stop = words_here;
      f(Piece{group, chunk, count, group * words + begin, stop - begin});
      chunk += count;
      inside += count;
    }
  }
}

// How many chunks may be summed as integers: one where each has its own scale, and not more than
// 32 bits hold.
INLINE int longest_piece(const Activations& x) { return x.activation == BITLM_FLOAT ? 1 : 64; }

INLINE __m512 scale_of(const Product& p, int64_t block, int group, int tile) {
  if (!p.scales) return _mm512_set1_ps(1.0f);
  return load_floats(p.scales, p.matrix->scale_type,
                     (block * p.x->shape->groups + group) * block_rows + 16 * tile);
}

INLINE void add_scaled(float* acc, __m512i sum, __m512 scale) {
  _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(acc)));
}

INLINE __m512 x_scale(const Activations& x, int token, int chunk) {
  return _mm512_set1_ps(x.scales[static_cast<int64_t>(token) * x.chunks + chunk]);
}

// ---- Look-up products -----------------------------------------------------------------------------

bool can_tables(const bitlm_matrix& m) { return m.kind == BITLM_BINARY; }

INLINE __m512i index_0(__m512i v) {
  return _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(0x3c3c3c3c), _mm512_set1_epi32(0x03020100),
                                   0xea);
}

INLINE __m512i index_1(__m512i v) { return index_0(_mm512_rol_epi32(v, 4)); }

// Joins byte sums of slices with `total`: vpdpbusd adds the four bytes of a row.
template <int S>
INLINE __m512i widen(__m512i total, const __m512i* sums) {
  const __m512i one = _mm512_set1_epi8(1), high = _mm512_set1_epi8(32);
  total = _mm512_dpbusd_epi32(total, sums[0], one);
  if (S > 1) total = _mm512_dpbusd_epi32(total, sums[1], high);
  if (S > 2) {
    __m512i more = _mm512_dpbusd_epi32(_mm512_setzero_si512(), sums[2], one);
    more = _mm512_dpbusd_epi32(more, sums[3], high);
    if (S > 4) {
      __m512i top = _mm512_dpbusd_epi32(_mm512_setzero_si512(), sums[4], one);
      more = _mm512_add_epi32(more, _mm512_slli_epi32(top, 10));
    }
    total = _mm512_add_epi32(total, _mm512_slli_epi32(more, 10));
  }
  return total;
}

// What the offsets of the tables of `words` words add up to in a row.
template <int S>
constexpr int32_t offset(int words) {
  return 8 * words * (16 << 5 * (S - 1));
}

// Adds the look-ups of word `word` of a block's 4 tiles to the byte sums.
template <int S, bool first>
INLINE void look_up_word(const uint8_t* codes, int64_t ahead, const uint8_t* table,
                         __m512i (*sums)[S]) {
  if (S <= 2) {
    __m512i t[2][S];
    unroll<2 * S>([&](auto i) INLINED {
      t[i / S][i % S] = _mm512_load_si512(table + 64 * i);
      KEEP(t[i / S][i % S]);
    });
    unroll<tiles>([&](auto r) INLINED {
      PREFETCH(codes + 64 * r, ahead);
      __m512i v = _mm512_load_si512(codes + 64 * r), i0 = index_0(v), i1 = index_1(v);
      unroll<S>([&](auto s) INLINED {
        __m512i found = _mm512_permutexvar_epi8(i0, t[0][s]);
        sums[r][s] = first ? found : _mm512_add_epi8(sums[r][s], found);
        sums[r][s] = _mm512_add_epi8(sums[r][s], _mm512_permutexvar_epi8(i1, t[1][s]));
        KEEP(sums[r][s]);
      });
    });
  } else {
    unroll<2>([&](auto half) INLINED {
      __m512i t[S];
      unroll<S>([&](auto s) INLINED {
        t[s] = _mm512_load_si512(table + 64 * (half * S + s));
        KEEP(t[s]);
      });
      unroll<tiles>([&](auto r) INLINED {
        if (!half) PREFETCH(codes + 64 * r, ahead);
        __m512i v = _mm512_load_si512(codes + 64 * r), i = half ? index_1(v) : index_0(v);
        unroll<S>([&](auto s) INLINED {
          __m512i found = _mm512_permutexvar_epi8(i, t[s]);
          sums[r][s] = first && !half ? found : _mm512_add_epi8(sums[r][s], found);
          KEEP(sums[r][s]);
        });
      });
    });
  }
}

// One token: weights go from memory through the registers once.
template <int S>
void look_up_one(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const int token = p.first_token;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const uint8_t* table = x.tables + token * x.table_stride;
  table -= bitlm::first_word(*x.shape, x.table_first_chunk) * 128 * S;
  pieces(*x.shape, p.first_chunk, p.end_chunk, longest_piece(x), [&](Piece piece) INLINED {
    __m512i total[tiles];
    unroll<tiles>([&](auto r) INLINED { total[r] = _mm512_set1_epi32(-offset<S>(piece.words)); });
    const uint8_t* from = codes + static_cast<int64_t>(piece.first_word) * 256;
    const uint8_t* t = table + static_cast<int64_t>(piece.first_word) * 128 * S;
    int left = piece.words;
    for (; left >= chunk_words; left -= chunk_words) {
      __m512i sums[tiles][S];
      look_up_word<S, true>(from, p.prefetch, t, sums);
      look_up_word<S, false>(from + 256, p.prefetch, t + 128 * S, sums);
      look_up_word<S, false>(from + 512, p.prefetch, t + 256 * S, sums);
      look_up_word<S, false>(from + 768, p.prefetch, t + 384 * S, sums);
      from += 256 * chunk_words;
      t += 128 * S * chunk_words;
      unroll<tiles>([&](auto r) INLINED { total[r] = widen<S>(total[r], sums[r]); });
    }
    if (left) {
      __m512i sums[tiles][S];
      look_up_word<S, true>(from, p.prefetch, t, sums);
      for (int word = 1; word < left; word++) {
        look_up_word<S, false>(from + 256 * word, p.prefetch, t + 128 * S * word, sums);
      }
      unroll<tiles>([&](auto r) INLINED { total[r] = widen<S>(total[r], sums[r]); });
    }
    __m512 xs = x_scale(x, token, piece.first_chunk);
    unroll<tiles>([&](auto r) INLINED {
      add_scaled(acc + 16 * r, total[r], _mm512_mul_ps(xs, scale_of(p, block, piece.group, r)));
    });
  });
}

constexpr int panel_words = 16;

// Several tokens: the indices of a few words are made once, then all tokens look up by them.
// C tokens at a time share the loads of the indices.
template <int S, int C>
INLINE void look_up_tokens(const Product& p, const Piece& piece, const uint8_t* index,
                           const uint8_t* table, const float* scales, int first, float* acc) {
  const Activations& x = *p.x;
  __m512i total[C][tiles];
  unroll<C * tiles>([&](auto i) INLINED {
    total[i / tiles][i % tiles] = _mm512_set1_epi32(-offset<S>(piece.words));
  });
  for (int word = 0; word < piece.words; word += chunk_words) {
    int halves = 2 * (piece.words - word < chunk_words ? piece.words - word : chunk_words);
    __m512i sums[C][tiles][S];
    unroll<C * tiles * S>([&](auto i) INLINED {
      sums[i / (tiles * S)][i / S % tiles][i % S] = _mm512_setzero_si512();
    });
    const uint8_t* from = index + 512 * word;
    const uint8_t* t = table + 128 * S * word;
    auto step = [&](int half) INLINED {
      __m512i entry[C][S];
      unroll<C * S>([&](auto i) INLINED {
        entry[i / S][i % S] =
            _mm512_load_si512(t + (i / S) * x.table_stride + 64 * (half * S + i % S));
        KEEP(entry[i / S][i % S]);
      });
      unroll<tiles>([&](auto r) INLINED {
        __m512i i = _mm512_load_si512(from + 256 * half + 64 * r);
        KEEP(i);
        unroll<C * S>([&](auto cs) INLINED {
          constexpr int c = cs / S, s = cs % S;
          sums[c][r][s] = _mm512_add_epi8(sums[c][r][s], _mm512_permutexvar_epi8(i, entry[c][s]));
          KEEP(sums[c][r][s]);
        });
      });
    };
    if (halves == 2 * chunk_words) {
      unroll<2 * chunk_words>([&](auto half) INLINED { step(half); });
    } else {
      for (int half = 0; half < halves; half++) step(half);
    }
    unroll<C * tiles>([&](auto i) INLINED {
      total[i / tiles][i % tiles] = widen<S>(total[i / tiles][i % tiles], sums[i / tiles][i % tiles]);
    });
  }
  unroll<C>([&](auto c) INLINED {
    __m512 xs = x_scale(x, first + c, piece.first_chunk);
    unroll<tiles>([&](auto r) INLINED {
      add_scaled(acc + c * block_rows + 16 * r, total[c][r],
                 _mm512_mul_ps(xs, _mm512_load_ps(scales + 16 * r)));
    });
  });
}

template <int S, int C>
void look_up_many(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const uint8_t* tables = x.tables + p.first_token * x.table_stride;
  tables -= bitlm::first_word(*x.shape, x.table_first_chunk) * 128 * S;
  const int most = x.activation == BITLM_FLOAT ? 1 : panel_words / chunk_words;
  alignas(64) uint8_t index[panel_words * 512];
  alignas(64) float scales[block_rows];
  pieces(*x.shape, p.first_chunk, p.end_chunk, most, [&](Piece piece) INLINED {
    const uint8_t* from = codes + static_cast<int64_t>(piece.first_word) * 256;
    for (int word = 0; word < piece.words; word++) {
      unroll<tiles>([&](auto r) INLINED {
        PREFETCH(from + 256 * word + 64 * r, p.prefetch);
        __m512i v = _mm512_load_si512(from + 256 * word + 64 * r);
        _mm512_store_si512(index + 512 * word + 64 * r, index_0(v));
        _mm512_store_si512(index + 512 * word + 256 + 64 * r, index_1(v));
      });
    }
    unroll<tiles>([&](auto r) INLINED {
      _mm512_store_ps(scales + 16 * r, scale_of(p, block, piece.group, r));
    });
    const uint8_t* table = tables + static_cast<int64_t>(piece.first_word) * 128 * S;
    int token = 0;
    for (; token + C <= p.tokens; token += C) {
      look_up_tokens<S, C>(p, piece, index, table + token * x.table_stride, scales,
                           p.first_token + token, acc + token * block_rows);
    }
    for (; token < p.tokens; token++) {
      look_up_tokens<S, 1>(p, piece, index, table + token * x.table_stride, scales,
                           p.first_token + token, acc + token * block_rows);
    }
  });
}

void codes_tables(const Product& p, int64_t block, float* acc) {
  const bool one = p.tokens == 1;
  switch (p.x->slices) {
    case 1:
      return one ? look_up_one<1>(p, block, acc) : look_up_many<1, 2>(p, block, acc);
    case 2:
      return one ? look_up_one<2>(p, block, acc) : look_up_many<2, 2>(p, block, acc);
    case 4:
      return one ? look_up_one<4>(p, block, acc) : look_up_many<4, 1>(p, block, acc);
    default:
      return one ? look_up_one<5>(p, block, acc) : look_up_many<5, 1>(p, block, acc);
  }
}

// ---- Digit products --------------------------------------------------------------------------------

bool can_digits(const bitlm_matrix&) { return true; }

// value = alpha * u + beta
struct Affine {
  int alpha, beta;
};

INLINE Affine affine(const bitlm_matrix& m) {
  return m.kind == BITLM_BINARY    ? Affine{2, -1}
         : m.kind == BITLM_TERNARY ? Affine{1, -1}
                                   : Affine{2, 1 - (1 << m.bits)};
}

INLINE int32_t sum_of(const Activations& x, int token, const Piece& piece) {
  const int32_t* sums = x.sums + static_cast<int64_t>(token) * x.chunks + piece.first_chunk;
  int32_t total = 0;
  for (int i = 0; i < piece.chunks; i++) total += sums[i];
  return total;
}

// alpha u + beta sum: as integers where 32 bits hold them, which is with one digit.
INLINE __m512 value_of(__m512i u, Affine a, int32_t sum, bool fits) {
  __m512i scaled = a.alpha == 2 ? _mm512_slli_epi32(u, 1) : u;
  if (fits) return _mm512_cvtepi32_ps(_mm512_add_epi32(scaled, _mm512_set1_epi32(a.beta * sum)));
  return _mm512_add_ps(_mm512_cvtepi32_ps(scaled),
                       _mm512_set1_ps(static_cast<float>(a.beta) * static_cast<float>(sum)));
}

INLINE void add_floats(float* acc, __m512 value, __m512 scale) {
  _mm512_storeu_ps(acc, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(acc)));
}

// Vector q of a word holds 32/W columns: isolates the codes that stand `2^n` times their value.
// Sums of different n are kept apart in N accumulators.
template <int W>
struct Isolated;
template <>
struct Isolated<1> {
  static constexpr int accumulators = 4, steps = 8;
  // step p is columns 4p ..; the accumulator has weight 2^(p % 4)
  static INLINE __m512i code(__m512i v, __m512i shifted, int p) {
    return _mm512_and_si512(p < 4 ? v : shifted, _mm512_set1_epi8(static_cast<char>(1 << p % 4)));
  }
  static constexpr int accumulator(int p) { return p % 4; }
  static constexpr int weight_bits = 1;
};
template <>
struct Isolated<2> {
  static constexpr int accumulators = 2, steps = 4;
  static INLINE __m512i code(__m512i v, __m512i shifted, int p) {
    return _mm512_and_si512(p < 2 ? v : shifted, _mm512_set1_epi8(static_cast<char>(3 << 2 * (p % 2))));
  }
  static constexpr int accumulator(int p) { return p % 2; }
  static constexpr int weight_bits = 2;
};
template <>
struct Isolated<4> {
  static constexpr int accumulators = 1, steps = 2;
  static INLINE __m512i code(__m512i v, __m512i shifted, int p) {
    return _mm512_and_si512(p < 1 ? v : shifted, _mm512_set1_epi8(15));
  }
  static constexpr int accumulator(int) { return 0; }
  static constexpr int weight_bits = 0;
};
template <>
struct Isolated<8> {
  static constexpr int accumulators = 1, steps = 1;
  static INLINE __m512i code(__m512i v, __m512i, int) { return v; }
  static constexpr int accumulator(int) { return 0; }
  static constexpr int weight_bits = 0;
};

// C rows of digits (tokens and their digits) at once, straight from the stream of codes.
template <int W, int C>
void digits_few(const Product& p, int64_t block, float* acc) {
  using Codes = Isolated<W>;
  constexpr int N = Codes::accumulators;
  const Activations& x = *p.x;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const int8_t* digit = x.digit + static_cast<int64_t>(p.first_token) * x.digits * x.digit_stride;
  const Affine a = affine(*p.matrix);
  pieces(*x.shape, p.first_chunk, p.end_chunk, longest_piece(x), [&](Piece piece) INLINED {
    __m512i sums[tiles][C][N];
    unroll<tiles * C * N>([&](auto i) INLINED {
      sums[i / (C * N)][i / N % C][i % N] = _mm512_setzero_si512();
    });
    const uint8_t* from = codes + static_cast<int64_t>(piece.first_word) * 256 * W;
    const int8_t* d = digit + static_cast<int64_t>(piece.first_word) * word_columns;
    for (int vector = 0; vector < piece.words * W; vector++) {
      __m512i v[tiles], shifted[tiles];
      unroll<tiles>([&](auto r) INLINED {
        PREFETCH_NEAR(from + 64 * r);
        v[r] = _mm512_load_si512(from + 64 * r);
        if (W < 8) shifted[r] = _mm512_srli_epi16(v[r], 4);
      });
      unroll<Codes::steps>([&](auto step) INLINED {
        __m512i value[tiles];
        unroll<tiles>([&](auto r) INLINED {
          value[r] = Codes::code(v[r], W < 8 ? shifted[r] : v[r], step);
        });
        unroll<C>([&](auto c) INLINED {
          __m512i b = _mm512_set1_epi32(load_dword(d + c * x.digit_stride + 4 * step));
          unroll<tiles>([&](auto r) INLINED {
            constexpr int n = Codes::accumulator(step);
            sums[r][c][n] = _mm512_dpbusd_epi32(sums[r][c][n], value[r], b);
          });
        });
      });
      from += 256;
      d += 4 * Codes::steps;
    }
    // A digit is scaled like a token of its own; the sums of x belong to the lowest digit.
    unroll<C>([&](auto c) INLINED {
      const int token = c / x.digits, k = c % x.digits;
      __m512 xs = x_scale(x, p.first_token + token, piece.first_chunk);
      xs = _mm512_mul_ps(xs, _mm512_set1_ps(static_cast<float>(1 << 8 * k)));
      int32_t sum = k ? 0 : sum_of(x, p.first_token + token, piece);
      unroll<tiles>([&](auto r) INLINED {
        __m512i u = sums[r][c][N - 1];
        for (int n = N - 2; n >= 0; n--) {
          u = _mm512_add_epi32(_mm512_srai_epi32(u, Codes::weight_bits), sums[r][c][n]);
        }
        add_floats(acc + token * block_rows + 16 * r, value_of(u, a, sum, x.digits == 1),
                   _mm512_mul_ps(xs, scale_of(p, block, piece.group, r)));
      });
    });
  });
}

// Base 3, one row of digits. With x_{t+1} = 3 x_t mod 256 the digit obeys 3 x_t = 256 d_t + x_{t+1},
// so sum d_t a_t = (3 sum x_t a_t - sum x_{t+1} a_t) / 256 and no digit is ever taken apart.
void trits_one(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const bitlm_shape& shape = *x.shape;
  const uint8_t* from = p.codes + block * p.block_bytes;
  const int8_t* row = x.digit + static_cast<int64_t>(p.first_token) * x.digit_stride;
  __m512 xs = x_scale(x, p.first_token, 0);
  for (int group = 0; group < shape.groups; group++) {
    const int8_t* d = row + static_cast<int64_t>(group) * full_group_words(shape) * word_columns;
    int64_t size = group + 1 < shape.groups
                       ? shape.group_size
                       : shape.columns - static_cast<int64_t>(group) * shape.group_size;
    __m512i total[tiles];
    unroll<tiles>([&](auto r) INLINED { total[r] = _mm512_setzero_si512(); });
    int32_t sum = 0;
    int first = group * group_chunks(shape, 0);
    for (int i = 0; i < group_chunks(shape, group); i++) {
      sum += x.sums[static_cast<int64_t>(p.first_token) * x.chunks + first + i];
    }
    for (int64_t cells = ceil_div(size, bitlm::trit_columns); cells > 0;) {
      // As many cells as 32 bits hold.
      int64_t run = cells < 512 ? cells : 512;
      cells -= run;
      __m512i now[tiles], next[tiles];
      unroll<tiles>([&](auto r) INLINED { now[r] = next[r] = _mm512_setzero_si512(); });
      for (int64_t cell = 0; cell < run; cell++, from += 256, d += bitlm::trit_columns) {
        __m512i v[tiles];
        unroll<tiles>([&](auto r) INLINED {
          PREFETCH_NEAR(from + 64 * r);
          v[r] = _mm512_load_si512(from + 64 * r);
        });
        unroll<5>([&](auto t) INLINED {
          __m512i b = _mm512_set1_epi32(load_dword(d + 4 * t));
          unroll<tiles>([&](auto r) INLINED {
            now[r] = _mm512_dpbusd_epi32(now[r], v[r], b);
            v[r] = _mm512_add_epi8(v[r], _mm512_add_epi8(v[r], v[r]));
            next[r] = _mm512_dpbusd_epi32(next[r], v[r], b);
          });
        });
      }
      unroll<tiles>([&](auto r) INLINED {
        __m512i three = _mm512_add_epi32(now[r], _mm512_slli_epi32(now[r], 1));
        total[r] = _mm512_add_epi32(total[r],
                                    _mm512_srai_epi32(_mm512_sub_epi32(three, next[r]), 8));
      });
    }
    unroll<tiles>([&](auto r) INLINED {
      add_scaled(acc + 16 * r, _mm512_sub_epi32(total[r], _mm512_set1_epi32(sum)),
                 _mm512_mul_ps(xs, scale_of(p, block, group, r)));
    });
  }
}

// Unsigned codes of a piece, one byte each: [step][tile][64], a step is 4 columns.
template <int W>
INLINE void expand(const uint8_t* from, int words, uint8_t* panel) {
  for (int vector = 0; vector < words * W; vector++, from += 256) {
    unroll<tiles>([&](auto r) INLINED {
      PREFETCH_NEAR(from + 64 * r);
      __m512i v = _mm512_load_si512(from + 64 * r);
      const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << W) - 1));
      unroll<8 / W>([&](auto step) INLINED {
        _mm512_store_si512(panel + 256 * step + 64 * r, _mm512_and_si512(v, mask));
        if (W < 8) v = _mm512_srli_epi16(v, W);
      });
    });
    panel += 256 * (8 / W);
  }
}

// The same from base 3: steps [first, first + count) of a group, which begins at `from`.
INLINE void expand_trits(const uint8_t* from, int first, int count, uint8_t* panel) {
  const __m512i one = _mm512_set1_epi8(1);
  int cell = first / 5, skip = first % 5;
  for (int done = -skip; done < count; done += 5, cell++) {
    unroll<tiles>([&](auto r) INLINED {
      PREFETCH_NEAR(from + 256 * cell + 64 * r);
      __m512i v = _mm512_load_si512(from + 256 * static_cast<int64_t>(cell) + 64 * r);
      for (int t = 0; t < 5; t++) {
        int step = done + t;
        __mmask64 some = _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8(86));
        __mmask64 two = _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8(static_cast<char>(171)));
        __m512i digit = _mm512_maskz_mov_epi8(some, one);
        digit = _mm512_mask_add_epi8(digit, two, digit, one);
        if (step >= 0 && step < count) _mm512_store_si512(panel + 256 * step + 64 * r, digit);
        v = _mm512_add_epi8(v, _mm512_add_epi8(v, v));
      }
    });
  }
}

// Codes of a piece as unsigned bytes, [8 * words][tile][64]. codes: of the block.
INLINE void expand_piece(const Product& p, const uint8_t* codes, const Piece& piece,
                         uint8_t* panel) {
  const bitlm_shape& shape = *p.x->shape;
  const bitlm_matrix& m = *p.matrix;
  int64_t word = piece.first_word;
  if (m.trits) {
    int64_t cells = piece.group * ceil_div(shape.group_size, bitlm::trit_columns);
    int begin = static_cast<int>(word - static_cast<int64_t>(piece.group) * full_group_words(shape));
    // The last word of a group may have fewer columns than its steps, and no cell for the rest.
    int64_t size = piece.group + 1 < shape.groups
                       ? shape.group_size
                       : shape.columns - static_cast<int64_t>(piece.group) * shape.group_size;
    int steps = piece.words * 8;
    int there = static_cast<int>(5 * ceil_div(size, bitlm::trit_columns)) - begin * 8;
    if (there < steps) memset(panel + 256 * there, 0, 256 * (steps - there));
    expand_trits(codes + 256 * cells, begin * 8, there < steps ? there : steps, panel);
  } else {
    switch (width(m.bits)) {
      case 1:
        expand<1>(codes + word * 256, piece.words, panel);
        break;
      case 2:
        expand<2>(codes + word * 512, piece.words, panel);
        break;
      case 4:
        expand<4>(codes + word * 1024, piece.words, panel);
        break;
      default:
        expand<8>(codes + word * 2048, piece.words, panel);
    }
  }
}

// C rows of digits with the expanded codes of a piece.
template <int C>
INLINE void multiply_panel(const Product& p, const Piece& piece, const uint8_t* panel,
                           const float* scales, int first, Affine a, float* acc) {
  const Activations& x = *p.x;
  const int8_t* d = x.digit + (static_cast<int64_t>(p.first_token) * x.digits + first) *
                                  x.digit_stride +
                    static_cast<int64_t>(piece.first_word) * word_columns;
  __m512i sums[tiles][C];
  unroll<tiles * C>([&](auto i) INLINED { sums[i / C][i % C] = _mm512_setzero_si512(); });
  for (int step = 0; step < piece.words * 8; step++, panel += 256, d += 4) {
    __m512i v[tiles];
    unroll<tiles>([&](auto r) INLINED { v[r] = _mm512_load_si512(panel + 64 * r); });
    unroll<C>([&](auto c) INLINED {
      __m512i b = _mm512_set1_epi32(load_dword(d + c * x.digit_stride));
      unroll<tiles>([&](auto r) INLINED { sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], v[r], b); });
    });
  }
  // A digit is scaled like a token of its own; the sums of x belong to the lowest digit.
  unroll<C>([&](auto c) INLINED {
    int token = (first + c) / x.digits, digit = (first + c) % x.digits;
    __m512 xs = x_scale(x, p.first_token + token, piece.first_chunk);
    xs = _mm512_mul_ps(xs, _mm512_set1_ps(static_cast<float>(1 << 8 * digit)));
    int32_t sum = digit ? 0 : sum_of(x, p.first_token + token, piece);
    unroll<tiles>([&](auto r) INLINED {
      add_floats(acc + token * block_rows + 16 * r, value_of(sums[r][c], a, sum, x.digits == 1),
                 _mm512_mul_ps(xs, _mm512_load_ps(scales + 16 * r)));
    });
  });
}

constexpr int panel_chunks = 2;

void digits_many(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const Affine a = affine(*p.matrix);
  const int rows = p.tokens * x.digits;
  alignas(64) uint8_t panel[panel_chunks * chunk_words * 8 * 256];
  alignas(64) float scales[block_rows];
  const int most = x.activation == BITLM_FLOAT ? 1 : panel_chunks;
  pieces(*x.shape, p.first_chunk, p.end_chunk, most, [&](Piece piece) {
    expand_piece(p, codes, piece, panel);
    unroll<tiles>([&](auto r) INLINED {
      _mm512_store_ps(scales + 16 * r, scale_of(p, block, piece.group, r));
    });
    int row = 0;
    for (; row + 4 <= rows; row += 4) multiply_panel<4>(p, piece, panel, scales, row, a, acc);
    for (; row < rows; row++) multiply_panel<1>(p, piece, panel, scales, row, a, acc);
  });
}

template <int W>
void digits_of_width(const Product& p, int64_t block, float* acc) {
  switch (p.tokens * p.x->digits) {
    case 1:
      return digits_few<W, 1>(p, block, acc);
    case 2:
      return digits_few<W, 2>(p, block, acc);
    case 3:
      // 1-bit codes would need more accumulators than there are registers.
      return W == 1 ? digits_many(p, block, acc) : digits_few<W == 1 ? 2 : W, 3>(p, block, acc);
    default:
      return digits_many(p, block, acc);
  }
}

void codes_digits(const Product& p, int64_t block, float* acc) {
  const bitlm_matrix& m = *p.matrix;
  if (m.trits) {
    bool whole = p.first_chunk == 0 && p.end_chunk == p.x->chunks;
    if (whole && p.tokens == 1 && p.x->digits == 1) return trits_one(p, block, acc);
    return digits_many(p, block, acc);
  }
  switch (width(m.bits)) {
    case 1:
      return digits_of_width<1>(p, block, acc);
    case 2:
      return digits_of_width<2>(p, block, acc);
    case 4:
      return digits_of_width<4>(p, block, acc);
    default:
      return digits_of_width<8>(p, block, acc);
  }
}

// ---- 1- and 2-bit activations: popcounts ------------------------------------------------------------

// levels - and + : sum over planes of 2^plane (columns - 2 popcount(w ^ x)); levels from 0:
// 2^plane (2 popcount(w & x) - popcount(x)), and those popcounts are the sums of x.
void codes_bits(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const bool from_zero = x.activation == BITLM_UINT1 || x.activation == BITLM_UINT2;
  const int planes = x.activation == BITLM_INT2 || x.activation == BITLM_UINT2 ? 2 : 1;
  const int64_t words = x.shape->words;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  pieces(*x.shape, p.first_chunk, p.end_chunk, 64, [&](Piece piece) {
    int32_t size = x.shape->columns;
    const uint8_t* from = codes + static_cast<int64_t>(piece.first_word) * 256;
    // Real columns of the piece.
    const uint32_t* real = x.bits + planes * words + piece.first_word;
    size = 0;
    for (int w = 0; w < piece.words; w++) size += __builtin_popcount(real[w]);
    for (int t = 0; t < p.tokens; t++) {
      const int token = p.first_token + t;
      const uint32_t* bits = x.bits + static_cast<int64_t>(token) * (planes + 1) * words;
      __m512i total[tiles];
      unroll<tiles>([&](auto r) INLINED { total[r] = _mm512_setzero_si512(); });
      for (int plane = planes - 1; plane >= 0; plane--) {
        const uint32_t* b = bits + plane * words + piece.first_word;
        unroll<tiles>([&](auto r) INLINED { total[r] = _mm512_slli_epi32(total[r], 1); });
        for (int w = 0; w < piece.words; w++) {
          __m512i xb = _mm512_set1_epi32(static_cast<int32_t>(b[w]));
          __m512i valid = _mm512_set1_epi32(static_cast<int32_t>(real[w]));
          unroll<tiles>([&](auto r) INLINED {
            PREFETCH_NEAR(from + 256 * w + 64 * r);
            __m512i v = _mm512_load_si512(from + 256 * w + 64 * r);
            __m512i differ = from_zero ? _mm512_and_si512(v, xb)
                                       : _mm512_ternarylogic_epi32(v, xb, valid, 0x28);
            total[r] = _mm512_add_epi32(total[r], _mm512_popcnt_epi32(differ));
          });
        }
      }
      __m512i rest = _mm512_set1_epi32(from_zero ? -sum_of(x, token, piece)
                                                 : size * ((1 << planes) - 1));
      __m512 xs = x_scale(x, token, piece.first_chunk);
      unroll<tiles>([&](auto r) INLINED {
        __m512i twice = _mm512_slli_epi32(total[r], 1);
        __m512i sum = from_zero ? _mm512_add_epi32(twice, rest) : _mm512_sub_epi32(rest, twice);
        add_scaled(acc + t * block_rows + 16 * r, sum,
                   _mm512_mul_ps(xs, scale_of(p, block, piece.group, r)));
      });
    }
  });
}

// ---- Salient entries ---------------------------------------------------------------------------------

// The 128 digits of a chunk are a table in two registers; one vpermi2b fetches 64 of them by position.
template <int D>
void list_digits(const ListProduct& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const bitlm_shape& shape = *x.shape;
  const __m512i one = _mm512_set1_epi8(1);
  for (int tile = 0; tile < tiles; tile++) {
    const int64_t row = block * block_rows + 16 * tile;
    const uint32_t* starts = p.starts + (block * tiles + tile) * (x.chunks + 1);
    const __m512 own = _mm512_loadu_ps(p.scales + row);
    for (int t = 0; t < p.tokens; t++) {
      const int token = p.first_token + t;
      const int8_t* digit = x.digit + static_cast<int64_t>(token) * x.digits * x.digit_stride;
      __m512 result = _mm512_loadu_ps(acc + t * block_rows + 16 * tile);
      pieces(shape, 0, x.chunks, 1, [&](Piece piece) INLINED {
        uint32_t begin = starts[piece.first_chunk], end = starts[piece.first_chunk + 1];
        if (begin == end) return;
        const int8_t* d = digit + static_cast<int64_t>(piece.first_word) * word_columns;
        __m512i low[D], high[D], values[D], plain[D];
        unroll<D>([&](auto k) INLINED {
          low[k] = _mm512_loadu_si512(d + k * x.digit_stride);
          high[k] = _mm512_loadu_si512(d + k * x.digit_stride + 64);
          values[k] = plain[k] = _mm512_setzero_si512();
        });
        for (uint32_t i = begin; i < end; i++) {
          const uint8_t* entry = p.entries + static_cast<int64_t>(i) * 128;
          PREFETCH_NEAR(entry);
          PREFETCH_NEAR(entry + 64);
          __m512i place = _mm512_load_si512(entry), value = _mm512_load_si512(entry + 64);
          __mmask64 there = ~_mm512_movepi8_mask(place);
          unroll<D>([&](auto k) INLINED {
            __m512i found = _mm512_permutex2var_epi8(low[k], place, high[k]);
            found = _mm512_maskz_mov_epi8(there, found);
            values[k] = _mm512_dpbusd_epi32(values[k], value, found);
            plain[k] = _mm512_dpbusd_epi32(plain[k], one, found);
          });
        }
        __m512 correction = _mm512_loadu_ps(
            p.correction + (block * shape.groups + piece.group) * block_rows + 16 * tile);
        __m512 xs = x_scale(x, token, piece.first_chunk);
        unroll<D>([&](auto k) INLINED {
          __m512 sum = _mm512_mul_ps(own, _mm512_cvtepi32_ps(values[k]));
          sum = _mm512_fmadd_ps(correction, _mm512_cvtepi32_ps(plain[k]), sum);
          result = _mm512_fmadd_ps(
              _mm512_mul_ps(xs, _mm512_set1_ps(static_cast<float>(1 << 8 * k))), sum, result);
        });
      });
      _mm512_storeu_ps(acc + t * block_rows + 16 * tile, result);
    }
  }
}

void list(const ListProduct& p, int64_t block, float* acc) {
  switch (p.x->digits) {
    case 1:
      return list_digits<1>(p, block, acc);
    case 2:
      return list_digits<2>(p, block, acc);
    default:
      return list_digits<3>(p, block, acc);
  }
}

// ---- Dense terms and the result --------------------------------------------------------------------

void dense(const void* values, int type, int length, const float* source, float* acc) {
  __m512 sum[tiles];
  unroll<tiles>([&](auto r) INLINED { sum[r] = _mm512_loadu_ps(acc + 16 * r); });
  for (int m = 0; m < length; m++) {
    __m512 s = _mm512_set1_ps(source[m]);
    unroll<tiles>([&](auto r) INLINED {
      __m512 v = load_floats(values, type, static_cast<int64_t>(m) * block_rows + 16 * r);
      sum[r] = _mm512_fmadd_ps(v, s, sum[r]);
    });
  }
  unroll<tiles>([&](auto r) INLINED { _mm512_storeu_ps(acc + 16 * r, sum[r]); });
}

float dot(const void* values, int type, int64_t count, const float* x) {
  __m512 a = _mm512_setzero_ps(), b = a;
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    a = _mm512_fmadd_ps(load_floats(values, type, i), _mm512_loadu_ps(x + i), a);
    b = _mm512_fmadd_ps(load_floats(values, type, i + 16), _mm512_loadu_ps(x + i + 16), b);
  }
  for (; i < count; i += 16) {
    int left = count - i < 16 ? static_cast<int>(count - i) : 16;
    __m512 v = load_floats(values, type, i, left);
    a = _mm512_fmadd_ps(v, load_floats(x, BITLM_FLOAT32, i, left), a);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
}

void store(const float* acc, float post, const void* bias, int bias_type, int rows, void* y,
           int y_type) {
  for (int i = 0; i < rows; i += 16) {
    int left = rows - i < 16 ? rows - i : 16;
    __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(acc + i), _mm512_set1_ps(post));
    if (bias) v = _mm512_add_ps(v, load_floats(bias, bias_type, i, left));
    if (y_type == BITLM_FLOAT32) {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + i, mask, v);
    } else {
      __m256i half = y_type == BITLM_FLOAT16
                         ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                         : to_bfloat(v);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + i, mask, half);
    }
  }
}

}  // namespace
