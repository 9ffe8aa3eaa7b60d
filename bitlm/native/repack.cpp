// Codes from the file's bit planes into kernel order (layout.h), and back.
//
// Both directions meet in a Stage. A row is cut into pieces: the words of 32 columns, or in base 3
// the cells of 20. A stage holds some pieces of a block of 64 rows as bits of the stored codes u,
// one integer for each bit of u, piece and row; bit k of it is column k of the piece. The loops
// over 64 rows are plain C++ that compilers turn into vector code without any instruction-set flag.
#include <string.h>

#include <new>
#include <vector>

#include "cpu_pool.h"
#include "layout.h"
#include "trits.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bytes of codes are joined into integers in little-endian order"
#endif

#if defined(__GNUC__)
#define BITLM_PREFETCH(address) __builtin_prefetch(address)
#else
#define BITLM_PREFETCH(address) (void)(address)
#endif

namespace bitlm {
namespace {

constexpr int span_pieces = 16;  // 64 bytes of a sign plane: reads whole cache lines of each row
using Rows = uint32_t[block_rows];
using Stage = Rows[BITLM_MAX_BITS][span_pieces];  // lowest bit of u first

struct Piece {
  int64_t column;  // in the file
  int count;
};

// A span reads a little of each of 64 rows, which no hardware foresees: while bytes [first, end) of
// a row are read, asks for as many behind them.
void prefetch_next(const uint8_t* row, int64_t bytes, int64_t first, int64_t end) {
  for (int64_t at = end + 63; at < 2 * end - first + 63 && at < bytes; at += 64) {
    BITLM_PREFETCH(row + at);
  }
}

uint32_t low_bits(int count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); }

std::vector<Piece> pieces_of(const bitlm_shape& shape, int piece_columns) {
  std::vector<Piece> pieces;
  for (int64_t group = 0; group < shape.columns; group += shape.group_size) {
    int64_t end = group + shape.group_size;
    if (end > shape.columns) end = shape.columns;
    for (int64_t column = group; column < end; column += piece_columns) {
      int64_t left = end - column;
      pieces.push_back({column, static_cast<int>(left < piece_columns ? left : piece_columns)});
    }
  }
  return pieces;
}

// ---- Bit strings: rows of the file's planes ----------------------------------------------------

uint32_t read_bits(const uint8_t* row, int64_t bytes, int64_t bit, int count) {
  int64_t at = bit / 8;
  uint64_t window = 0;
  if (at + 8 <= bytes) {
    memcpy(&window, row + at, 8);
  } else {
    memcpy(&window, row + at, static_cast<size_t>(bytes - at));
  }
  return static_cast<uint32_t>(window >> bit % 8) & low_bits(count);
}

void read_row(const uint8_t* row, int64_t bytes, int64_t first_column, const Piece* pieces,
              int count, Rows* out, int lane) {
  for (int i = 0; i < count; i++) {
    out[i][lane] = read_bits(row, bytes, pieces[i].column - first_column, pieces[i].count);
  }
}

// Writes the pieces' bits behind the bits that the row already has, and 0 to the end of the byte.
void write_row(uint8_t* row, int64_t first_column, const Piece* pieces, int count, const Rows* bits,
               int lane) {
  int64_t start = pieces[0].column - first_column;
  uint8_t* at = row + start / 8;
  int filled = static_cast<int>(start % 8);
  uint64_t waiting = filled ? *at & low_bits(filled) : 0;
  for (int i = 0; i < count; i++) {
    waiting |= static_cast<uint64_t>(bits[i][lane]) << filled;
    filled += pieces[i].count;
    if (filled < 32) continue;
    memcpy(at, &waiting, 4);
    at += 4;
    waiting >>= 32;
    filled -= 32;
  }
  for (; filled > 0; filled -= 8, waiting >>= 8) *at++ = static_cast<uint8_t>(waiting);
}

// ---- Base 3 ------------------------------------------------------------------------------------

constexpr TritTables trits;

// Base-3 bytes of the columns of a span as two bit strings; 5 bytes of each are 8 base-3 bytes.
struct SpreadTrits {
  static constexpr int units = (span_pieces * word_columns + 4) / 40 + 1;
  uint8_t ones[units * 5 + 8] = {}, twos[units * 5 + 8] = {};  // read and written 8 bytes at a time

  void read(const uint8_t* bytes, int64_t count) {
    for (int64_t unit = 0; 8 * unit < count; unit++) {
      uint64_t one = 0, two = 0;
      for (int64_t i = 0; i < 8 && 8 * unit + i < count; i++) {
        uint64_t five = trits.bits[bytes[8 * unit + i]];
        one |= (five & 31) << 5 * i;
        two |= (five >> 5) << 5 * i;
      }
      memcpy(ones + 5 * unit, &one, 8);
      memcpy(twos + 5 * unit, &two, 8);
    }
  }

  void write(uint8_t* bytes, int64_t count) const {
    for (int64_t unit = 0; 8 * unit < count; unit++) {
      uint64_t one, two;
      memcpy(&one, ones + 5 * unit, 8);
      memcpy(&two, twos + 5 * unit, 8);
      for (int64_t i = 0; i < 8 && 8 * unit + i < count; i++) {
        bytes[8 * unit + i] = trits.number[(one >> 5 * i & 31) | (two >> 5 * i & 31) << 5];
      }
    }
  }
};

// ---- Between the file and a stage --------------------------------------------------------------

struct Job {
  const bitlm_codes& codes;
  std::vector<Piece> pieces;
  uint8_t* packed;

  int64_t bit_bytes() const { return ceil_div(codes.shape.columns, 8); }
  int64_t trit_bytes() const { return ceil_div(codes.shape.columns, 5); }
  int64_t block_bytes() const {
    return bitlm::block_bytes(codes.order, codes.bits, codes.trits_in_memory != 0, codes.shape);
  }
  int64_t piece_bytes() const {
    if (codes.trits_in_memory) return 256;
    return 256 * (codes.order == BITLM_DWORDS ? width(codes.bits) : codes.bits);
  }
};

struct Span {
  int64_t row;  // first of the block
  int rows;     // of the block that exist
  const Piece* pieces;
  int count;

  int64_t first_column() const { return pieces[0].column; }
  int64_t end_column() const { return pieces[count - 1].column + pieces[count - 1].count; }
};

void read_plane(const Job& job, const Span& span, const uint8_t* plane, Rows* out) {
  int64_t bytes = job.bit_bytes();
  for (int lane = 0; lane < span.rows; lane++) {
    const uint8_t* row = plane + (span.row + lane) * bytes;
    prefetch_next(row, bytes, span.first_column() / 8, span.end_column() / 8);
    read_row(row, bytes, 0, span.pieces, span.count, out, lane);
  }
}

void read_trits(const Job& job, const Span& span, Stage& stage) {
  int64_t first = span.first_column() / 5, end = ceil_div(span.end_column(), 5);
  for (int lane = 0; lane < span.rows; lane++) {
    const uint8_t* bytes = job.codes.trits + (span.row + lane) * job.trit_bytes();
    prefetch_next(bytes, job.trit_bytes(), first, end);
    SpreadTrits row;
    row.read(bytes + first, end - first);
    read_row(row.ones, sizeof row.ones, 5 * first, span.pieces, span.count, stage[0], lane);
    read_row(row.twos, sizeof row.twos, 5 * first, span.pieces, span.count, stage[1], lane);
  }
}

// Rows past the end must be 0 in the stage already.
void read_file(const Job& job, const Span& span, Stage& stage) {
  const bitlm_codes& codes = job.codes;
  if (codes.kind != BITLM_TERNARY) {
    for (int b = 0; b < codes.bits; b++) {
      read_plane(job, span, codes.signs[codes.bits - 1 - b], stage[b]);
    }
    return;
  }
  if (codes.trits) return read_trits(job, span, stage);
  read_plane(job, span, codes.mask, stage[0]);
  read_plane(job, span, codes.signs[0], stage[1]);
  for (int i = 0; i < span.count; i++) {
    uint32_t real = low_bits(span.pieces[i].count);
    for (int lane = 0; lane < span.rows; lane++) {
      stage[1][i][lane] &= stage[0][i][lane];
      stage[0][i][lane] = ~stage[0][i][lane] & real;
    }
  }
}

void write_plane(const Job& job, const Span& span, const uint8_t* plane, const Rows* bits) {
  uint8_t* to = const_cast<uint8_t*>(plane) + span.row * job.bit_bytes();
  for (int lane = 0; lane < span.rows; lane++) {
    write_row(to + lane * job.bit_bytes(), 0, span.pieces, span.count, bits, lane);
  }
}

void write_trits(const Job& job, const Span& span, const Stage& stage) {
  int64_t first = span.first_column() / 5, end = ceil_div(span.end_column(), 5);
  for (int lane = 0; lane < span.rows; lane++) {
    uint8_t* bytes = const_cast<uint8_t*>(job.codes.trits);
    uint8_t* to = bytes + (span.row + lane) * job.trit_bytes() + first;
    SpreadTrits row;
    // The span before may have written the first digits of this span's first byte.
    if (span.first_column() % 5) row.read(to, 1);
    write_row(row.ones, 5 * first, span.pieces, span.count, stage[0], lane);
    write_row(row.twos, 5 * first, span.pieces, span.count, stage[1], lane);
    row.write(to, end - first);
  }
}

// The bits past a piece's columns must be 0, as repack leaves them.
void write_file(const Job& job, const Span& span, Stage& stage) {
  const bitlm_codes& codes = job.codes;
  if (codes.kind != BITLM_TERNARY) {
    for (int b = 0; b < codes.bits; b++) {
      write_plane(job, span, codes.signs[codes.bits - 1 - b], stage[b]);
    }
    return;
  }
  if (codes.trits) write_trits(job, span, stage);
  if (codes.signs[0]) write_plane(job, span, codes.signs[0], stage[1]);
  if (!codes.mask) return;
  for (int i = 0; i < span.count; i++) {
    uint32_t real = low_bits(span.pieces[i].count);
    for (uint32_t& row : stage[0][i]) row = ~row & real;
  }
  write_plane(job, span, codes.mask, stage[0]);
}

// ---- Between a stage and kernel order ----------------------------------------------------------

// Exchanges the bits at the places of `mask` with those `distance` above.
inline uint32_t exchange(uint32_t x, int distance, uint32_t mask) {
  uint32_t differ = (x ^ x >> distance) & mask;
  return x ^ differ ^ differ << distance;
}

// Column 4p + j from bit 4p + j to bit 8j + p: four exchanges that each swap two bits of the number
// of a place.
void columns_to_bytes(const Rows& in, Rows& out) {
  for (int row = 0; row < block_rows; row++) {
    uint32_t x = exchange(in[row], 14, 0x0000cccc);
    x = exchange(x, 7, 0x00aa00aa);
    x = exchange(x, 2, 0x0c0c0c0c);
    out[row] = exchange(x, 1, 0x22222222);
  }
}

void bytes_to_columns(const Rows& in, Rows& out) {
  for (int row = 0; row < block_rows; row++) {
    uint32_t x = exchange(in[row], 1, 0x22222222);
    x = exchange(x, 2, 0x0c0c0c0c);
    x = exchange(x, 7, 0x00aa00aa);
    out[row] = exchange(x, 14, 0x0000cccc);
  }
}

// Moves the lowest 8 / W bits of each byte to every W-th place, and back.
template <int W>
inline uint32_t apart(uint32_t x) {
  if (W == 8) return x & 0x01010101;
  if (W == 4) return (x & 0x01010101) | (x & 0x02020202) << 3;
  x = (x & 0x03030303) | (x & 0x0c0c0c0c) << 2;
  return (x & 0x11111111) | (x & 0x22222222) << 1;
}

template <int W>
inline uint32_t together(uint32_t x) {
  if (W == 8) return x & 0x01010101;
  if (W == 4) return (x & 0x01010101) | (x & 0x10101010) >> 3;
  x = (x & 0x11111111) | (x & 0x44444444) >> 1;
  return (x & 0x03030303) | (x & 0x30303030) >> 2;
}

template <int W>
void pack_dwords(const Rows* bits, int count, uint8_t* out) {
  for (int q = 0; q < W; q++) {
    Rows vector = {};
    for (int b = 0; b < count; b++) {
      for (int row = 0; row < block_rows; row++) {
        vector[row] |= apart<W>(bits[b][row] >> 8 / W * q) << b;
      }
    }
    memcpy(out + 256 * q, vector, 256);
  }
}

template <int W>
void unpack_dwords(const uint8_t* in, int count, Rows* bits) {
  memset(bits, 0, sizeof(Rows) * static_cast<size_t>(count));
  for (int q = 0; q < W; q++) {
    Rows vector;
    memcpy(vector, in + 256 * q, 256);
    for (int b = 0; b < count; b++) {
      for (int row = 0; row < block_rows; row++) {
        bits[b][row] |= together<W>(vector[row] >> b) << 8 / W * q;
      }
    }
  }
}

// A byte of kernel order is 256/243 of the number, rounded up: its digits come out at the top when
// it is multiplied by 3.
void pack_trits(const Rows* bits, uint8_t* out) {
  for (int row = 0; row < block_rows; row++) {
    for (int j = 0; j < 4; j++) {
      uint32_t ones = bits[0][row] >> 8 * j & 31, twos = bits[1][row] >> 8 * j & 31;
      out[4 * row + j] = static_cast<uint8_t>((trits.number[ones | twos << 5] * 256 + 242) / 243);
    }
  }
}

void unpack_trits(const uint8_t* in, Rows* bits) {
  for (int row = 0; row < block_rows; row++) {
    uint32_t ones = 0, twos = 0;
    for (int j = 0; j < 4; j++) {
      uint32_t five = trits.bits[in[4 * row + j] * 243 >> 8];
      ones |= (five & 31) << 8 * j;
      twos |= (five >> 5) << 8 * j;
    }
    bits[0][row] = ones;
    bits[1][row] = twos;
  }
}

// One plane of order BITLM_BYTES: bytes 4d .. 4d+3 of a vector are rows d, 16+d, 8+d, 24+d.
void pack_bytes(const Rows& bits, int planes, int plane, uint8_t* out) {
  for (int half = 0; half < 2; half++) {
    const uint32_t* rows = bits + 32 * half;
    for (int q = 0; q < 4; q++) {
      uint32_t vector[8];
      for (int d = 0; d < 8; d++) {
        vector[d] = (rows[d] >> 8 * q & 255) | (rows[16 + d] >> 8 * q & 255) << 8 |
                    (rows[8 + d] >> 8 * q & 255) << 16 | (rows[24 + d] >> 8 * q & 255) << 24;
      }
      memcpy(out + (q * planes + plane) * 64 + 32 * half, vector, 32);
    }
  }
}

void unpack_bytes(const uint8_t* in, int planes, int plane, Rows& bits) {
  for (int half = 0; half < 2; half++) {
    uint32_t* rows = bits + 32 * half;
    uint32_t vector[4][8];
    for (int q = 0; q < 4; q++) memcpy(vector[q], in + (q * planes + plane) * 64 + 32 * half, 32);
    for (int i = 0; i < 4; i++) {
      uint32_t* to = rows + 16 * (i & 1) + 8 * (i >> 1);
      for (int d = 0; d < 8; d++) {
        to[d] = (vector[0][d] >> 8 * i & 255) | (vector[1][d] >> 8 * i & 255) << 8 |
                (vector[2][d] >> 8 * i & 255) << 16 | (vector[3][d] >> 8 * i & 255) << 24;
      }
    }
  }
}

void pack_piece(const Job& job, const Stage& stage, int piece, uint8_t* out) {
  int count = job.codes.bits;
  if (job.codes.order == BITLM_BYTES) {
    for (int b = 0; b < count; b++) {
      Rows plane;
      memcpy(plane, stage[b][piece], sizeof plane);
      if (job.codes.kind == BITLM_TERNARY && b == 0) {
        for (int row = 0; row < block_rows; row++) plane[row] |= stage[1][piece][row];
      }
      pack_bytes(plane, count, b, out);
    }
    return;
  }
  Rows bits[BITLM_MAX_BITS];
  for (int b = 0; b < count; b++) columns_to_bytes(stage[b][piece], bits[b]);
  if (job.codes.trits_in_memory) return pack_trits(bits, out);
  switch (width(count)) {
    case 1: memcpy(out, bits[0], 256); break;
    case 2: pack_dwords<2>(bits, count, out); break;
    case 4: pack_dwords<4>(bits, count, out); break;
    case 8: pack_dwords<8>(bits, count, out); break;
  }
}

void unpack_piece(const Job& job, const uint8_t* in, int piece, Stage& stage) {
  int count = job.codes.bits;
  if (job.codes.order == BITLM_BYTES) {
    for (int b = 0; b < count; b++) unpack_bytes(in, count, b, stage[b][piece]);
    if (job.codes.kind == BITLM_TERNARY) {
      for (int row = 0; row < block_rows; row++) stage[0][piece][row] &= ~stage[1][piece][row];
    }
    return;
  }
  Rows bits[BITLM_MAX_BITS];
  if (job.codes.trits_in_memory) {
    unpack_trits(in, bits);
  } else {
    switch (width(count)) {
      case 1: memcpy(bits[0], in, 256); break;
      case 2: unpack_dwords<2>(in, count, bits); break;
      case 4: unpack_dwords<4>(in, count, bits); break;
      case 8: unpack_dwords<8>(in, count, bits); break;
    }
  }
  for (int b = 0; b < count; b++) bytes_to_columns(bits[b], stage[b][piece]);
}

// ---- Calls -------------------------------------------------------------------------------------

template <class Work>
void for_each_span(const Job& job, int64_t block, Work work) {
  int64_t row = block * block_rows, left = job.codes.rows - row;
  int rows = left < block_rows ? static_cast<int>(left) : block_rows;
  uint8_t* packed = job.packed + block * job.block_bytes();
  int64_t count = static_cast<int64_t>(job.pieces.size());
  for (int64_t piece = 0; piece < count; piece += span_pieces) {
    int pieces = count - piece < span_pieces ? static_cast<int>(count - piece) : span_pieces;
    work(Span{row, rows, job.pieces.data() + piece, pieces}, packed + piece * job.piece_bytes());
  }
}

void repack_block(void* context, int64_t block) {
  const Job& job = *static_cast<const Job*>(context);
  Stage stage;
  memset(stage, 0, sizeof(stage[0]) * static_cast<size_t>(job.codes.bits));
  for_each_span(job, block, [&](const Span& span, uint8_t* packed) {
    read_file(job, span, stage);
    for (int i = 0; i < span.count; i++) pack_piece(job, stage, i, packed + i * job.piece_bytes());
  });
}

void unpack_block(void* context, int64_t block) {
  const Job& job = *static_cast<const Job*>(context);
  Stage stage;
  for_each_span(job, block, [&](const Span& span, uint8_t* packed) {
    for (int i = 0; i < span.count; i++) {
      unpack_piece(job, packed + i * job.piece_bytes(), i, stage);
    }
    write_file(job, span, stage);
  });
}

bool is_valid(const bitlm_shape& s) {
  if (s.columns < 1 || s.group_size < 1) return false;
  if (s.groups != ceil_div(s.columns, s.group_size)) return false;
  return s.words == static_cast<int64_t>(s.groups - 1) * full_group_words(s) +
                        group_words(s, s.groups - 1);
}

bool is_valid(const bitlm_codes* codes) {
  if (!codes || codes->rows < 0 || !is_valid(codes->shape)) return false;
  if (codes->order != BITLM_BYTES && codes->order != BITLM_DWORDS) return false;
  if (codes->trits_in_memory && (codes->kind != BITLM_TERNARY || codes->order != BITLM_DWORDS)) {
    return false;
  }
  switch (codes->kind) {
    case BITLM_BINARY: return codes->bits == 1;
    case BITLM_TERNARY: return codes->bits == 2;
    case BITLM_GRID: return codes->bits >= 1 && codes->bits <= BITLM_MAX_BITS;
    default: return false;
  }
}

bool has_signs(const bitlm_codes& codes) {
  for (int plane = 0; plane < codes.bits; plane++) {
    if (!codes.signs[plane]) return false;
  }
  return true;
}

int run_blocks(const bitlm_codes& codes, uint8_t* packed, int threads, Work work) {
  try {
    int piece_columns = codes.trits_in_memory ? trit_columns : word_columns;
    Job job{codes, pieces_of(codes.shape, piece_columns), packed};
    run(threads, ceil_div(codes.rows, block_rows), work, &job);
  } catch (const std::bad_alloc&) {
    return BITLM_NO_MEMORY;
  }
  return BITLM_OK;
}

}  // namespace
}  // namespace bitlm

using namespace bitlm;

int64_t bitlm_codes_bytes(const bitlm_codes* codes) {
  if (!is_valid(codes)) return -1;
  return ceil_div(codes->rows, block_rows) *
         block_bytes(codes->order, codes->bits, codes->trits_in_memory != 0, codes->shape);
}

int bitlm_repack(const bitlm_codes* codes, uint8_t* out, int threads) {
  if (!is_valid(codes) || !out) return BITLM_BAD_ARGUMENT;
  bool ternary = codes->kind == BITLM_TERNARY;
  bool given = ternary ? codes->trits || (codes->signs[0] && codes->mask) : has_signs(*codes);
  if (!given) return BITLM_BAD_ARGUMENT;
  return run_blocks(*codes, out, threads, repack_block);
}

int bitlm_unpack(const uint8_t* packed, const bitlm_codes* codes, int threads) {
  if (!is_valid(codes) || !packed) return BITLM_BAD_ARGUMENT;
  bool ternary = codes->kind == BITLM_TERNARY;
  bool given = ternary ? codes->trits || codes->signs[0] || codes->mask : has_signs(*codes);
  if (!given) return BITLM_BAD_ARGUMENT;
  return run_blocks(*codes, const_cast<uint8_t*>(packed), threads, unpack_block);
}
