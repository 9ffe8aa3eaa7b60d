// The kernel order of codes, and reading single codes from it. Portable.
//
// A code matrix is cut into blocks of 64 rows, a block into words of 32 columns (each group of
// columns padded to whole words). The codes of a block are contiguous, word after word:
// 256 * bits bytes a word, so a kernel reads one stream.
//
// BITLM_DWORDS (AVX-512, AMX). A 64-byte vector holds 16 rows: dword r is row r, byte 4r+j has the
//   columns k with k % 4 = j. `width` bits a code: 1, 2, 4 or 8 (a grid of 3 bits takes 4, of 5 to 7
//   takes 8; ternary takes 2 and stores code + 1). A vector covers 32/width columns; bits
//   [p*width, (p+1)*width) of byte 4r+j of vector q of a word are column 32/width*q + 4p + j.
//   Vectors of a word: for q in width: for tile in 4 (rows 16 tile ..).
//   Base 3: a vector covers 20 columns, its cell has 20 columns in place of a word's 32:
//   each group is ceil(group/20) cells of 4 vectors (tiles). A byte is ceil(256 c / 243), with
//   c = sum_{t=0..4} 3^(4-t) d_t, d = code + 1 of column 20*cell + 4t + j (0 past the end: d = 0).
// BITLM_BYTES (AVX2, NEON, scalar). A 32-byte vector holds 32 rows: byte p is row
//   (p & 1) * 16 + (p >> 1 & 1) * 8 + (p >> 2), bit j is column 8q + j. `bits` planes.
//   Vectors of a word: for q in 4: for plane in bits: for half in 2 (rows 32 half ..).
//   The value is a sum over planes of weight * (bit ? 1 : -1), with these weights:
//   binary [1]; grid [1, 2, 4, ..], plane 0 the lowest bit; ternary [1/2, 1/2]: +1 is 11, 0 is 01
//   (plane 0 set), -1 is 00.
#pragma once

#include <stdint.h>

#include "bitlm.h"

namespace bitlm {

constexpr int block_rows = 64;
constexpr int word_columns = 32;
constexpr int chunk_words = 4;  // 128 columns: what sums of looked-up bytes can hold
constexpr int trit_columns = 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words of group `g`.
inline int group_words(const bitlm_shape& s, int g) {
  int64_t size = g + 1 < s.groups ? s.group_size : s.columns - static_cast<int64_t>(g) * s.group_size;
  return static_cast<int>(ceil_div(size, word_columns));
}

// Chunks: each group is cut into pieces of chunk_words words, the last piece may be short.
inline int group_chunks(const bitlm_shape& s, int g) {
  return static_cast<int>(ceil_div(group_words(s, g), chunk_words));
}

inline int full_group_words(const bitlm_shape& s) {
  return static_cast<int>(ceil_div(s.group_size, word_columns));
}

inline int chunks(const bitlm_shape& s) {
  return (s.groups - 1) * group_chunks(s, 0) + group_chunks(s, s.groups - 1);
}

// The group of a chunk, and the word that it begins with.
inline int group_of_chunk(const bitlm_shape& s, int chunk) {
  int group = chunk / group_chunks(s, 0);
  return group < s.groups ? group : s.groups - 1;
}

inline int64_t first_word(const bitlm_shape& s, int chunk) {
  if (chunk >= chunks(s)) return s.words;
  int group = group_of_chunk(s, chunk);
  return static_cast<int64_t>(group) * full_group_words(s) +
         static_cast<int64_t>(chunk - group * group_chunks(s, 0)) * chunk_words;
}

// Bits of a stored code in BITLM_DWORDS.
inline int width(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }

// Bytes of one block of 64 rows.
inline int64_t block_bytes(int order, int bits, bool trits, const bitlm_shape& s) {
  if (trits) {
    int64_t last = s.columns - static_cast<int64_t>(s.groups - 1) * s.group_size;
    return 256 * ((s.groups - 1) * ceil_div(s.group_size, trit_columns) +
                  ceil_div(last, trit_columns));
  }
  return static_cast<int64_t>(s.words) * 256 * (order == BITLM_DWORDS ? width(bits) : bits);
}

// Value of one code: -1, 1; -1, 0, 1; or 2u - (2^bits - 1). `column` is a real column.
int value_at(const uint8_t* codes, int order, int kind, int bits, bool trits, const bitlm_shape& s,
             int64_t row, int64_t column);

}  // namespace bitlm
