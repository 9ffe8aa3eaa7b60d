#include "layout.h"

namespace bitlm {
namespace {

// The digit of column 4t + j in a base-3 byte: multiplying by 3^t mod 256 brings it to the front.
int trit(uint8_t byte, int t) {
  static const int powers[5] = {1, 3, 9, 27, 81};
  return 3 * static_cast<uint8_t>(byte * powers[t]) >> 8;
}

}  // namespace

int value_at(const uint8_t* codes, int order, int kind, int bits, bool trits, const bitlm_shape& s,
             int64_t row, int64_t column) {
  const uint8_t* block = codes + row / block_rows * block_bytes(order, bits, trits, s);
  int64_t group = column / s.group_size, inside = column % s.group_size;
  int tile = static_cast<int>(row % block_rows) / 16, lane = static_cast<int>(row % 16);
  if (trits) {
    int64_t cell = group * ceil_div(s.group_size, trit_columns) + inside / trit_columns;
    int k = static_cast<int>(inside % trit_columns);
    return trit(block[cell * 256 + tile * 64 + 4 * lane + k % 4], k / 4) - 1;
  }
  int64_t word = group * full_group_words(s) + inside / word_columns;
  int k = static_cast<int>(inside % word_columns);
  if (order == BITLM_DWORDS) {
    int w = width(bits), span = word_columns / w;
    uint8_t byte = block[(word * w + k / span) * 256 + tile * 64 + 4 * lane + k % 4];
    int u = byte >> (k % span / 4 * w) & ((1 << w) - 1);
    return kind == BITLM_BINARY ? 2 * u - 1 : kind == BITLM_TERNARY ? u - 1 : 2 * u - ((1 << bits) - 1);
  }
  int half = static_cast<int>(row % block_rows) / 32, r = static_cast<int>(row % 32);
  int place = (r & 7) * 4 + (r >> 3 & 1) * 2 + (r >> 4), value = 0;
  for (int plane = 0; plane < bits; plane++) {
    uint8_t byte = block[((word * 4 + k / 8) * bits + plane) * 64 + half * 32 + place];
    int sign = byte >> (k % 8) & 1 ? 1 : -1;
    value += kind == BITLM_GRID ? sign * (1 << plane) : sign;
  }
  return kind == BITLM_TERNARY ? value / 2 : value;
}

}  // namespace bitlm
