// Products of tokens with infinities or NaN, from floats: such values have no integers. Each weight
// is made a float and multiplied like a dense one, so infinity times a weight of 0 is NaN.
//
// Salient entries are an exception: what replaces the code at such an entry is added to the code's
// own product, so an infinite x there can give NaN where the dense product is infinite.
#include "decode.h"
#include "floats.h"
#include "kernel.h"

namespace bitlm {
namespace {

constexpr int64_t chunk_columns = chunk_words * word_columns;

const float* token_floats(const Activations& x, int token) {
  return x.floats + static_cast<int64_t>(token) * x.shape->words * word_columns;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Adds the products of a block with columns [first, end) of a group, counted from its start.
void add_columns(const Product& p, const Decoder& decoder, int64_t block, int group, int64_t first,
                 int64_t end, float* acc) {
  const bitlm_shape& shape = *p.x->shape;
  int64_t group_column = static_cast<int64_t>(group) * full_group_words(shape) * word_columns;
  int64_t columns = decoder.piece_columns(), first_piece = group * decoder.group_pieces();
  for (int64_t piece = first / columns; piece * columns < end; piece++) {
    int64_t start = piece * columns, from = larger(first - start, 0);
    int64_t to = smaller(end - start, columns);
    for (int row = 0; row < block_rows; row++) {
      int64_t at = (block * shape.groups + group) * block_rows + row;
      float scale = p.scales ? load_float(p.scales, p.matrix->scale_type, at) : 1.0f;
      float weights[word_columns];
      decoder.read(block * block_rows + row, first_piece + piece, scale, weights);
      for (int t = 0; t < p.tokens; t++) {
        const float* x = token_floats(*p.x, p.first_token + t) + group_column + start;
        float sum = 0;
        for (int64_t k = from; k < to; k++) sum += weights[k] * x[k];
        acc[t * block_rows + row] += sum;
      }
    }
  }
}

// Adds the products of 64 salient entries of 16 rows. `column` is the chunk's first one.
void add_unit(const ListProduct& p, const uint8_t* unit, int64_t block, int first_row,
              int64_t column, const float* correction, float* acc) {
  for (int entry = 0; entry < 64; entry++) {
    if (unit[entry] & 0x80) continue;
    int row = first_row + entry / 4;
    float weight = p.scales[block * block_rows + row] * unit[64 + entry] + correction[row];
    for (int t = 0; t < p.tokens; t++) {
      float x = token_floats(*p.x, p.first_token + t)[column + unit[entry]];
      acc[t * block_rows + row] += weight * x;
    }
  }
}

}  // namespace

void codes_floats(const Product& p, int order, int64_t block, float* acc) {
  const bitlm_shape& shape = *p.x->shape;
  Decoder decoder(p.codes, order, *p.matrix, shape);
  int64_t chunk = 0;  // first one of the group
  for (int group = 0; group < shape.groups; chunk += group_chunks(shape, group), group++) {
    int64_t size = smaller(shape.group_size,
                           shape.columns - static_cast<int64_t>(group) * shape.group_size);
    int64_t first = larger(p.first_chunk - chunk, 0) * chunk_columns;
    int64_t end = smaller((p.end_chunk - chunk) * chunk_columns, size);
    if (first < end) add_columns(p, decoder, block, group, first, end, acc);
  }
}

void list_floats(const ListProduct& p, int64_t block, float* acc) {
  const bitlm_shape& shape = *p.x->shape;
  int all = chunks(shape);
  for (int tile = 0; tile < block_rows / 16; tile++) {
    const uint32_t* start = p.starts + (block * (block_rows / 16) + tile) * (all + 1);
    for (int group = 0; group < shape.groups; group++) {
      int64_t column = static_cast<int64_t>(group) * full_group_words(shape) * word_columns;
      const float* correction = p.correction + (block * shape.groups + group) * block_rows;
      for (int i = 0; i < group_chunks(shape, group); i++, start++, column += chunk_columns) {
        for (int64_t unit = start[0]; unit < start[1]; unit++) {
          add_unit(p, p.entries + unit * 128, block, 16 * tile, column, correction, acc);
        }
      }
    }
  }
}

}  // namespace bitlm
