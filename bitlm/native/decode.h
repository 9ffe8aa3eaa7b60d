// Reads a matrix of codes row by row from kernel order. Portable; for embedding rows, and for
// products with infinities, where speed is second.
#pragma once

#include <stdint.h>

#include "layout.h"

namespace bitlm {

class Decoder {
 public:
  Decoder(const uint8_t* codes, int order, const bitlm_matrix& matrix, const bitlm_shape& shape);

  // A piece is the columns that lie together in memory: a word, or a cell of base 3. Each group
  // begins a piece.
  int piece_columns() const { return matrix_.trits ? trit_columns : word_columns; }
  int64_t group_pieces() const { return group_pieces_; }  // of each group but the last one

  // Writes scale * value of all columns of a piece, 32 or 20 floats, also of those past the group's
  // end. `piece` counts from the start of the row.
  void read(int64_t row, int64_t piece, float scale, float* weights) const;

 private:
  const uint8_t* codes_;
  int order_;
  const bitlm_matrix& matrix_;
  int64_t group_pieces_, block_bytes_, piece_bytes_;
  float step_, lowest_;  // value = step * u + lowest
};

}  // namespace bitlm
