// AMX int8 beside AVX-512, order BITLM_DWORDS: products of digits with two or more tokens. All else
// is avx512_kernel.
//
// A tile of x holds up to 16 digit rows of 64 columns, a tile of codes 16 rows of the weight: two
// words of 1-bit codes become its 16 lines of 64 bytes. One affine byte instruction a line (GFNI)
// turns bits into the signed values themselves, so that no sum of x needs to be taken off (but for
// 8-bit grids, whose values do not fit a byte).
//
// Codes are expanded panel by panel: `panel_steps` times 64 columns of all 64 rows, which all tokens
// then pass. The vector unit is not to wait for the tile unit nor the other way round: between tile
// products stand pieces of other work, namely the expansion of the next panel and, where the scale
// changes (at each group), the scaling of the sums that the pass before has left in memory.
#include <immintrin.h>
#include <string.h>

#if defined(BITLM_EMULATE_AMX)
#include "../../tests/native/amx_emulation.h"
#elif defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel.h"

namespace {

using bitlm::Activations;
using bitlm::avx512_kernel;
using bitlm::block_rows;
using bitlm::ceil_div;
using bitlm::chunk_words;
using bitlm::Kernel;
using bitlm::ListProduct;
using bitlm::Product;
using bitlm::word_columns;

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
// gcc's tile loads do not name the memory that they read: what was written must be there before.
#define WRITTEN() __asm__ volatile("" ::: "memory")

constexpr int panel_steps = 4;
constexpr int step_bytes = 4 * 1024;  // four tiles of codes
constexpr int tile_rows = 16;
constexpr int max_tiles = 32;        // of x at a time
constexpr int run_chunks = 128;      // so that sums fit 32 bits whatever the digits
constexpr int prefetch_bytes = 4096;

int smaller(int a, int b) { return a < b ? a : b; }

// ---- What is multiplied when --------------------------------------------------------------------

// Up to panel_steps steps of one or two words (32 or 64 columns). A run is what has one scale: its
// sums stay in the tiles, or are put aside between panels, and are scaled at its end.
struct Plan {
  int steps;
  int ended;       // runs that end in this panel
  bool continues;  // the first run began in the panel before
  bool open;       // the last run goes on in the next panel
  bool starts[panel_steps], ends[panel_steps];
  int words[panel_steps];
  int64_t column[panel_steps];        // padded: where the step begins in a row of digits
  const uint8_t* codes[panel_steps];  // of the first tile of rows
  int trit[panel_steps];              // base 3: the first digit of the byte, and cells that are left
  int64_t cells[panel_steps];
  // Of the runs that end.
  int chunk[panel_steps], end_chunk[panel_steps];
  alignas(64) float scales[panel_steps][block_rows];
};

struct Planner {
  const Product& p;
  const bitlm_shape& shape;
  const int64_t block;
  const int per_group;      // chunks
  const int64_t full_words;  // of a group
  int next_chunk;           // after the current run
  int group = 0, chunk = 0;  // of the current run
  int64_t word = 0, left = 0;
  bool fresh = false;  // nothing of the run is planned yet

  Planner(const Product& p, int64_t block)
      : p(p), shape(*p.x->shape), block(block), per_group(bitlm::group_chunks(shape, 0)),
        full_words(bitlm::full_group_words(shape)), next_chunk(p.first_chunk) {}

  bool more() const { return left > 0 || next_chunk < p.end_chunk; }

  void start() {
    chunk = next_chunk;
    group = smaller(chunk / per_group, shape.groups - 1);
    const int first = group * per_group;
    const int most = p.x->activation == BITLM_FLOAT ? 1 : run_chunks;
    next_chunk = smaller(smaller(chunk + most, p.end_chunk), first + bitlm::group_chunks(shape, group));
    word = group * full_words + (chunk - first) * chunk_words;
    const int end = smaller((next_chunk - first) * chunk_words, bitlm::group_words(shape, group));
    left = group * full_words + end - word;
    fresh = true;
  }

  void add_step(Plan& plan) {
    const int i = plan.steps++;
    plan.starts[i] = fresh;
    plan.words[i] = left > 1 ? 2 : 1;
    plan.column[i] = word * word_columns;
    const uint8_t* codes = p.codes + block * p.block_bytes;
    if (p.matrix->trits) {
      const int64_t line = (word - group * full_words) * 8, skipped = line / 5;
      const int64_t size = group + 1 < shape.groups
                               ? shape.group_size
                               : shape.columns - static_cast<int64_t>(group) * shape.group_size;
      const int64_t cell = group * ceil_div(shape.group_size, bitlm::trit_columns) + skipped;
      plan.codes[i] = codes + 256 * cell;
      plan.trit[i] = static_cast<int>(line % 5);
      plan.cells[i] = ceil_div(size, bitlm::trit_columns) - skipped;
    } else {
      plan.codes[i] = codes + 256 * word * bitlm::width(p.matrix->bits);
    }
    word += plan.words[i];
    left -= plan.words[i];
    fresh = false;
    plan.ends[i] = left == 0;
  }

  void end_run(Plan& plan) {
    const int slot = plan.ended++;
    plan.chunk[slot] = chunk;
    plan.end_chunk[slot] = next_chunk;
    const int64_t from = (block * shape.groups + group) * block_rows;
    for (int i = 0; i < block_rows; i += 16) {
      __m512 scale = _mm512_set1_ps(1.0f);
      if (p.scales && p.matrix->scale_type == BITLM_FLOAT32) {
        scale = _mm512_loadu_ps(static_cast<const float*>(p.scales) + from + i);
      } else if (p.scales) {
        __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
            static_cast<const uint16_t*>(p.scales) + from + i));
        scale = p.matrix->scale_type == BITLM_FLOAT16
                    ? _mm512_cvtph_ps(half)
                    : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      }
      _mm512_store_ps(plan.scales[slot] + i, scale);
    }
  }

  // Runs that fit a panel are not divided.
  void next(Plan& plan) {
    plan.steps = plan.ended = 0;
    plan.continues = left > 0 && !fresh;
    while (more() && plan.steps < panel_steps) {
      if (left == 0) start();
      const int64_t steps = ceil_div(left, 2), room = panel_steps - plan.steps;
      if (steps > room && steps <= panel_steps && fresh) break;
      for (int64_t i = 0; i < steps && i < room; i++) add_step(plan);
      if (left == 0) end_run(plan);
    }
    plan.open = left > 0 && !fresh;
  }
};

// ---- Codes --------------------------------------------------------------------------------------

// How codes of W bits become values: bit i of a value is the parity of the code's bits in byte 7 - i
// of `matrix`, inverted. The bits `flip` of codes are inverted before.
struct Affine {
  uint64_t matrix;
  uint8_t flip;
};

Affine affine(const bitlm_matrix& m) {
  uint8_t bit[8];
  Affine a = {0, 0};
  if (m.kind == BITLM_TERNARY) {  // u - 1: 11111111, 0, 1
    bit[0] = 1;
    for (int i = 1; i < 8; i++) bit[i] = 3;
  } else if (m.kind == BITLM_GRID && m.bits == 8) {  // u - 128, half of what is wanted less 1
    for (int i = 0; i < 8; i++) bit[i] = static_cast<uint8_t>(1 << i);
    a.flip = 0x7f;
  } else {  // 2u - (2^bits - 1): a 1 below the code, whose top bit is inverted and is the sign
    const int bits = m.kind == BITLM_GRID ? m.bits : 1;
    bit[0] = 0;
    for (int i = 1; i < 8; i++) bit[i] = static_cast<uint8_t>(1 << (i < bits ? i - 1 : bits - 1));
    a.flip = static_cast<uint8_t>((1 << (bits - 1)) - 1);
  }
  for (int i = 0; i < 8; i++) a.matrix |= static_cast<uint64_t>(bit[i]) << (8 * (7 - i));
  return a;
}

template <int W>
struct Expansion {
  static constexpr int lines = 8 / W;  // of a tile, from one vector of codes
  __m512i matrix[lines], flip;

  explicit Expansion(const bitlm_matrix& m) {
    const Affine a = affine(m);
    for (int i = 0; i < lines; i++) {
      matrix[i] = _mm512_set1_epi64(static_cast<int64_t>(a.matrix << (i * W)));
    }
    int all = a.flip;
    for (int i = W; i < 8; i += W) all |= a.flip << i;
    flip = _mm512_set1_epi8(static_cast<char>(all));
  }

  // Writes the tile of rows `tile` of a step. Columns of a missing second word count 0: there, x is
  // that of another group.
  INLINE void tile(const Plan& plan, int step, int tile, uint8_t* out) const {
    const uint8_t* from = plan.codes[step] + 64 * tile;
    const int vectors = plan.words[step] * W;
#pragma GCC unroll 2
    for (int i = 0; i < vectors; i++, from += 256, out += 64 * lines) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + prefetch_bytes, _MM_HINT_T0);
      __m512i v = _mm512_load_si512(from);
      if (W > 1) v = _mm512_xor_si512(v, flip);
#pragma GCC unroll 8
      for (int j = 0; j < lines; j++) {
        _mm512_store_si512(out + 64 * j, _mm512_gf2p8affine_epi64_epi8(v, matrix[j], 0xff));
      }
    }
    if (plan.words[step] == 1) memset(out, 0, 8 * 64);
  }
};

// Base 3. Multiplying a byte by 3 modulo 256 brings the next digit to the front, where it is told by
// two comparisons.
template <>
struct Expansion<0> {
  explicit Expansion(const bitlm_matrix&) {}

  INLINE void tile(const Plan& plan, int step, int tile, uint8_t* out) const {
    const uint8_t* from = plan.codes[step] + 64 * tile;
    const __m512i low = _mm512_set1_epi8(86), high = _mm512_set1_epi8(static_cast<char>(171));
    const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
    const int lines = plan.words[step] * 8;
    int64_t cells = plan.cells[step];
    int trit = -plan.trit[step];
    for (int line = 0; line < lines; cells--, from += 256) {
      // Past the last cell of a group x is 0.
      _mm_prefetch(reinterpret_cast<const char*>(from) + prefetch_bytes, _MM_HINT_T0);
      __m512i v = cells > 0 ? _mm512_load_si512(from) : _mm512_setzero_si512();
      for (int left = 5; left > 0 && line < lines; left--) {
        if (trit++ >= 0) {
          const __mmask64 some = _mm512_cmpge_epu8_mask(v, low);
          const __mmask64 two = _mm512_cmpge_epu8_mask(v, high);
          const __m512i value = _mm512_mask_mov_epi8(minus, some, _mm512_maskz_mov_epi8(two, plus));
          _mm512_store_si512(out + 64 * line++, value);
        }
        v = _mm512_add_epi8(v, _mm512_add_epi8(v, v));
      }
    }
    if (plan.words[step] == 1) memset(out + 8 * 64, 0, 8 * 64);
  }
};

// ---- Sums ---------------------------------------------------------------------------------------

// Tokens whose sums lie in memory, 32 rows of the weight, for each run that ended: sums of the
// digits [token][digit][32], and step_bytes further on those of the next run.
struct Sums {
  const Plan* plan;
  const int32_t* from;
  const float* scales;  // of these 32 rows
  float* acc;
  int token, tokens;  // of Activations
};

constexpr int line_sums = 32, run_sums = step_bytes / 4;

// acc += scales * x's scale * sums, for N runs that follow each other and the first `count` tokens.
template <int D, int N>
INLINE void add_sums(const Activations& x, const Sums& s, int run, int count, bool eight) {
  __m512 scale[N][2];
#pragma GCC unroll 2
  for (int n = 0; n < N; n++) {
    scale[n][0] = _mm512_load_ps(s.scales + (run + n) * block_rows);
    scale[n][1] = _mm512_load_ps(s.scales + (run + n) * block_rows + 16);
  }
  const int32_t* from = s.from + run * run_sums;
  float* acc = s.acc;
  const int64_t first = static_cast<int64_t>(s.token) * x.chunks;
  const float* own = x.scales + first + s.plan->chunk[run];
  for (int t = 0; t < count; t++, from += D * line_sums, acc += block_rows, own += x.chunks) {
    __m512 total[2];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      const float x_scale = n ? own[s.plan->chunk[run + n] - s.plan->chunk[run]] : own[0];
      __m512 sum = _mm512_setzero_ps();
      if (eight) {  // the values are half of what is wanted less 1
        int32_t of_x = 0;
        for (int c = s.plan->chunk[run + n]; c < s.plan->end_chunk[run + n]; c++) {
          of_x += x.sums[first + static_cast<int64_t>(t) * x.chunks + c];
        }
        sum = _mm512_set1_ps(static_cast<float>(of_x));
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const int32_t* c = from + n * run_sums + 16 * v;
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(c + (D - 1) * line_sums));
#pragma GCC unroll 2
        for (int d = D - 2; d >= 0; d--) {
          __m512 digit = _mm512_cvtepi32_ps(_mm512_load_si512(c + d * line_sums));
          value = _mm512_fmadd_ps(value, _mm512_set1_ps(256.0f), digit);
        }
        if (eight) value = _mm512_fmadd_ps(value, _mm512_set1_ps(2.0f), sum);
        if (D == 3) value = _mm512_mul_ps(value, _mm512_set1_ps(x_scale));
        total[v] = n ? _mm512_fmadd_ps(value, scale[n][v], total[v])
                     : _mm512_mul_ps(value, scale[n][v]);
      }
    }
    const __m512 x_scale = _mm512_set1_ps(D == 3 ? 1.0f : own[0]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      __m512 old = _mm512_load_ps(acc + 16 * v);
      _mm512_store_ps(acc + 16 * v, D == 3 ? _mm512_add_ps(old, total[v])
                                           : _mm512_fmadd_ps(total[v], x_scale, old));
    }
  }
}

// Up to `count` tokens of `s`, which then begins after them.
template <int D>
INLINE void add_sums(const Activations& x, Sums& s, int count, bool eight) {
  count = smaller(count, s.tokens);
  const int runs = s.plan->ended;
  int run = 0;
  for (; run + 2 <= runs; run += 2) add_sums<D, 2>(x, s, run, count, eight);
  if (run < runs) add_sums<D, 1>(x, s, run, count, eight);
  s.from += count * D * line_sums;
  s.acc += count * block_rows;
  s.token += count;
  s.tokens -= count;
}

// ---- Products -----------------------------------------------------------------------------------

struct Memory {
  alignas(64) uint8_t panel[2][panel_steps * step_bytes];
  alignas(64) int32_t sums[2][panel_steps * run_sums];
  alignas(64) int32_t aside[max_tiles * run_sums];  // sums of a run that goes on
  Plan plan[3];
};

thread_local Memory thread_memory;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3: sums; 4, 5: x; 6, 7: codes.
void configure(int rows) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : tile_rows);
  }
  WRITTEN();  // gcc 12 takes only 8 bytes of it for what is read
  _tile_loadconfig(&config);
}

INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

INLINE void take_back(const int32_t* from) {
  _tile_loadd(0, from, 64);
  _tile_loadd(1, from + 256, 64);
  _tile_loadd(2, from + 512, 64);
  _tile_loadd(3, from + 768, 64);
}

INLINE void put_aside(int32_t* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + 256, 64);
  _tile_stored(2, to + 512, 64);
  _tile_stored(3, to + 768, 64);
}

// As add_sums reads them; tiles of `rows` rows.
INLINE void store_sums(int32_t* to, int rows) {
  int32_t* second = to + rows * line_sums;
  _tile_stored(0, to, 4 * line_sums);
  _tile_stored(1, to + 16, 4 * line_sums);
  _tile_stored(2, second, 4 * line_sums);
  _tile_stored(3, second + 16, 4 * line_sums);
}

// Up to max_tiles tiles of tokens, from the `first`-th of x on.
template <int W, int D>
void multiply(const Product& p, int64_t block, int first, int tokens, float* acc) {
  Memory& memory = thread_memory;
  const Activations& x = *p.x;
  const bool eight = W == 8 && p.matrix->kind == BITLM_GRID && p.matrix->bits == 8;
  const Expansion<W> expansion(*p.matrix);
  const int64_t stride = x.digit_stride;
  const int8_t* digits = x.digit + first * D * stride;

  // All tiles of x have the same rows, as few as will do; the last tile overlaps with the one before.
  const int tiles = static_cast<int>(ceil_div(tokens, tile_rows / D));
  const int each = static_cast<int>(ceil_div(tokens, tiles)), rows = each * D;
  const int overlap = tiles * each - tokens;
  const int pairs = tiles / 2, single = tiles % 2;
  configure(rows);

  Planner planner(p, block);
  int current = 0, parity = 0;
  planner.next(memory.plan[0]);
  for (int i = 0; i < memory.plan[0].steps * 4; i++) {
    expansion.tile(memory.plan[0], i / 4, i % 4, memory.panel[0] + i * 1024);
  }

  Sums sums = {}, more_sums = {};  // what the pass before has left
  auto scale_sums = [&](int count) INLINED {
    if (sums.tokens == 0) {
      sums = more_sums;
      more_sums.tokens = 0;
    }
    if (sums.tokens) add_sums<D>(x, sums, count, eight);
  };
  auto scale_all_sums = [&]() INLINED {
    while (sums.tokens | more_sums.tokens) scale_sums(max_tiles * tile_rows);
  };

  for (bool last = false; !last; current = (current + 1) % 3) {
    const Plan& plan = memory.plan[current];
    const uint8_t* panel = memory.panel[parity];
    Plan& next = memory.plan[(current + 1) % 3];
    last = !planner.more();
    next.steps = 0;
    if (!last) planner.next(next);
    parity ^= 1;
    uint8_t* next_panel = memory.panel[parity];

    // What is done between tile products: `places` of them share out the tiles to expand.
    const int places = plan.steps * 2 * (2 * pairs + single), expansions = next.steps * 4;
    int expanded = 0, due = 0, share = 0;
    auto between = [&]() INLINED {
      due += expansions;
      for (; due >= places; due -= places, expanded++) {
        expansion.tile(next, expanded / 4, expanded % 4, next_panel + expanded * 1024);
      }
      scale_sums(share);
    };
    // The digits that are read next come from the L2 cache.
    const int8_t* ahead = nullptr;
    int ahead_rows = 0;
    const Plan* ahead_plan = nullptr;
    auto look_ahead = [&](int tile) {
      const bool further = tile >= tiles;
      const int token = further ? 0 : tile * each;
      ahead_plan = further ? &next : &plan;
      ahead = digits + token * D * stride;
      ahead_rows = smaller(2 * each, tokens - token) * D;
    };
    auto fetch = [&](int step, int part) INLINED {
      if (step >= ahead_plan->steps) return;
      const int begin = part * (ahead_rows / 2);
      const int end = part ? ahead_rows : ahead_rows / 2;
      const int8_t* from = ahead + ahead_plan->column[step] + begin * stride;
      for (int i = begin; i < end; i++, from += stride) {
        _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
      }
    };
    // Sums of the runs that ended in a pass; `skip` tokens of the second half are there already.
    int32_t* ended = nullptr;
    auto leave_sums = [&](int token, int half, int second_token, int second_half, int skip) {
      scale_all_sums();
      if (plan.ended == 0) return;
      auto part = [&](int index, int token, int half, int skip) {
        return Sums{&plan, ended + (index * rows + skip * D) * line_sums,
                    plan.scales[0] + half * line_sums,
                    acc + (token + skip) * block_rows + half * line_sums, first + token + skip,
                    each - skip};
      };
      const bool same = half != second_half;
      sums = part(0, token, half, same ? skip : 0);
      more_sums = part(1, second_token, second_half, skip);
      ended = nullptr;
    };
    int pass = 0;
    auto begin_pass = [&]() {
      ended = memory.sums[(current + pass++) & 1];
      const int waiting = sums.tokens + more_sums.tokens;
      share = (waiting + 2 * plan.steps - 1) / (2 * plan.steps);
    };
  }
  _tile_release();
}
