// Lists of salient entries (struct bitlm_list of bitlm.h) from the file's mask and values.
#include <string.h>

#include "layout.h"

namespace bitlm {
namespace {

constexpr int tile_rows = 16;
constexpr int row_entries = 4;  // of each row in a unit
constexpr int half_unit = tile_rows * row_entries;
constexpr int chunk_columns = chunk_words * word_columns;
constexpr uint8_t no_entry = 0x80;

int count_ones(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return static_cast<int>(bits * 0x0101010101010101 >> 56);
}

int lowest_one(uint64_t bits) { return count_ones((bits - 1) & ~bits); }

// The bits of columns [first, end) of a row, at most 64 of them.
uint64_t mask_bits(const uint8_t* row, int64_t first, int64_t end) {
  uint64_t window[2] = {};
  memcpy(window, row + first / 8, static_cast<size_t>(ceil_div(end, 8) - first / 8));
  int shift = static_cast<int>(first % 8);
  uint64_t bits = shift ? window[0] >> shift | window[1] << (64 - shift) : window[0];
  return end - first == 64 ? bits : bits & ((uint64_t{1} << (end - first)) - 1);
}

int64_t row_ones(const uint8_t* row, int64_t columns) {
  int64_t count = 0;
  for (int64_t column = 0; column < columns; column += 64) {
    count += count_ones(mask_bits(row, column, column + 64 < columns ? column + 64 : columns));
  }
  return count;
}

struct Writer {
  uint8_t* entries;  // null: only counts
  int64_t units = 0;
  int64_t chunk = 0;  // where the chunk's units begin

  void need(int64_t count) {
    for (; units < chunk + ceil_div(count, row_entries); units++) {
      if (!entries) continue;
      memset(entries + units * 2 * half_unit, no_entry, half_unit);
      memset(entries + units * 2 * half_unit + half_unit, 0, half_unit);
    }
  }

  void write(int lane, int64_t number, int position, uint8_t value) {
    int64_t unit = chunk + number / row_entries;
    uint8_t* at = entries + unit * 2 * half_unit + lane * row_entries + number % row_entries;
    at[0] = static_cast<uint8_t>(position);
    at[half_unit] = value;
  }
};

// Adds a row's entries in the columns [first, end) of a chunk; `next` is the first one's value.
const uint8_t* add_row(Writer& writer, const uint8_t* mask, int64_t first, int64_t end, int lane,
                       const uint8_t* next) {
  int64_t number = 0;
  for (int64_t column = first; column < end; column += 64) {
    uint64_t bits = mask_bits(mask, column, column + 64 < end ? column + 64 : end);
    int count = count_ones(bits);
    writer.need(number + count);
    if (!writer.entries) {
      number += count;
      continue;
    }
    for (; bits; bits &= bits - 1) {
      int position = static_cast<int>(column - first) + lowest_one(bits);
      writer.write(lane, number++, position, *next++);
    }
  }
  return next;
}

}  // namespace
}  // namespace bitlm

using namespace bitlm;

int64_t bitlm_salient(const uint8_t* mask, const uint8_t* values, int64_t rows,
                      const bitlm_shape* shape, uint32_t* starts, uint8_t* entries) {
  if (!mask || !shape || !starts || rows < 0 || (entries && !values)) return -1;
  if (shape->columns < 1 || shape->group_size < 1) return -1;
  int64_t columns = shape->columns, mask_bytes = ceil_div(columns, 8);
  int64_t tiles = ceil_div(rows, block_rows) * (block_rows / tile_rows);
  Writer writer{entries};
  for (int64_t tile = 0; tile < tiles; tile++) {
    const uint8_t* tile_mask = mask + tile * tile_rows * mask_bytes;
    int64_t left = rows - tile * tile_rows;
    int lanes = left < 0 ? 0 : left < tile_rows ? static_cast<int>(left) : tile_rows;
    const uint8_t* next[tile_rows] = {};
    for (int lane = 0; entries && lane < lanes; lane++) {
      next[lane] = values;
      values += row_ones(tile_mask + lane * mask_bytes, columns);
    }
    for (int64_t group = 0; group < columns; group += shape->group_size) {
      int64_t group_end = group + shape->group_size < columns ? group + shape->group_size : columns;
      for (int64_t first = group; first < group_end; first += chunk_columns) {
        int64_t end = first + chunk_columns < group_end ? first + chunk_columns : group_end;
        *starts++ = static_cast<uint32_t>(writer.units);
        writer.chunk = writer.units;
        for (int lane = 0; lane < lanes; lane++) {
          const uint8_t* row = tile_mask + lane * mask_bytes;
          next[lane] = add_row(writer, row, first, end, lane, next[lane]);
        }
      }
    }
    *starts++ = static_cast<uint32_t>(writer.units);
  }
  return writer.units;
}
