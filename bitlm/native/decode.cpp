#include "decode.h"

#include <string.h>

namespace bitlm {
namespace {

// Column order is that of bytes 0 .. 31: u has one byte a column.

// Vector q of a word has columns 32/W q + 4i + j in bits W i .. of byte j.
template <int W>
void read_dwords(const uint8_t* row, uint8_t* u) {
  const uint32_t mask = ((1u << W) - 1) * 0x01010101u;
  for (int q = 0; q < W; q++) {
    uint32_t dword;
    memcpy(&dword, row + 256 * q, 4);
    for (int i = 0; i < 8 / W; i++, u += 4) {
      uint32_t four = dword >> W * i & mask;
      memcpy(u, &four, 4);
    }
  }
}

// Multiplying a byte by 3 brings its first digit above the byte and leaves the others in it.
void read_trits(const uint8_t* row, uint8_t* u) {
  uint32_t dword;
  memcpy(&dword, row, 4);
  for (int t = 0; t < 5; t++, u += 4) {
    uint32_t even = (dword & 0x00ff00ff) * 3, odd = (dword >> 8 & 0x00ff00ff) * 3;
    uint32_t digits = (even >> 8 & 0x00ff00ff) | (odd & 0xff00ff00);
    dword = (even & 0x00ff00ff) | (odd & 0x00ff00ff) << 8;
    memcpy(u, &digits, 4);
  }
}

struct SpreadBits {
  uint64_t bytes[256];  // byte j of an entry is bit j of its number
  constexpr SpreadBits() : bytes() {
    for (int number = 0; number < 256; number++) {
      for (int j = 0; j < 8; j++) bytes[number] |= static_cast<uint64_t>(number >> j & 1) << 8 * j;
    }
  }
};

constexpr SpreadBits spread_bits;

// `row` is where the row's byte lies in the vectors of its half. Both planes of ternary count 1.
void read_bytes(const uint8_t* row, int planes, bool ternary, uint8_t* u) {
  for (int q = 0; q < 4; q++) {
    uint64_t eight = 0;
    for (int plane = 0; plane < planes; plane++) {
      eight += spread_bits.bytes[row[(q * planes + plane) * 64]] << (ternary ? 0 : plane);
    }
    memcpy(u + 8 * q, &eight, 8);
  }
}

}  // namespace

Decoder::Decoder(const uint8_t* codes, int order, const bitlm_matrix& matrix,
                 const bitlm_shape& shape)
    : codes_(codes), order_(order), matrix_(matrix) {
  group_pieces_ = ceil_div(shape.group_size, piece_columns());
  block_bytes_ = block_bytes(order, matrix.bits, matrix.trits != 0, shape);
  int word_bits = order == BITLM_DWORDS ? width(matrix.bits) : matrix.bits;
  piece_bytes_ = matrix.trits ? 256 : 256 * word_bits;
  bool ternary = matrix.kind == BITLM_TERNARY;
  step_ = ternary ? 1.0f : 2.0f;
  lowest_ = ternary ? -1.0f : static_cast<float>(1 - (1 << matrix.bits));
}

void Decoder::read(int64_t row, int64_t piece, float scale, float* weights) const {
  const uint8_t* from = codes_ + row / block_rows * block_bytes_ + piece * piece_bytes_;
  int lane = static_cast<int>(row % block_rows);
  uint8_t u[word_columns];
  if (order_ == BITLM_BYTES) {
    int r = lane % 32;
    from += lane / 32 * 32 + (r & 7) * 4 + (r >> 3 & 1) * 2 + (r >> 4);
    read_bytes(from, matrix_.bits, matrix_.kind == BITLM_TERNARY, u);
  } else if (matrix_.trits) {
    read_trits(from + 4 * lane, u);
    for (int k = 0; k < trit_columns; k++) weights[k] = scale * (u[k] - 1.0f);
    return;
  } else {
    switch (width(matrix_.bits)) {
      case 1: read_dwords<1>(from + 4 * lane, u); break;
      case 2: read_dwords<2>(from + 4 * lane, u); break;
      case 4: read_dwords<4>(from + 4 * lane, u); break;
      case 8: read_dwords<8>(from + 4 * lane, u); break;
    }
  }
  for (int k = 0; k < word_columns; k++) weights[k] = scale * (step_ * u[k] + lowest_);
}

}  // namespace bitlm
