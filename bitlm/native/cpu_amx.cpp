// AMX int8 on top of AVX-512: products with several rows of digits at once.
//
// A tile of A is 16 rows of digits (tokens, and the digits of a token) times 64 columns, as they lie.
// A tile of B is 16 weight rows times 64 columns, codes expanded to unsigned bytes: 16 steps of 4
// columns, each a row of 64 bytes in which a dword is a weight row. A piece of columns is expanded
// once for all rows of A; sums stay integers until a group of columns ends.
#include "cpu_avx512.h"

#if defined(BITLM_EMULATE_AMX)
#include "amx_emulation.h"
#elif defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int tile_rows = 16, step_columns = 64;
constexpr int most_rows = 128 * 3;     // of digits: a panel of tokens, three digits each
constexpr int expanded_chunks = 4;     // 32 KiB of bytes: they stay in the L1 cache
constexpr int sums_stride = block_rows * sizeof(int32_t);

struct alignas(64) Configuration {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 3 are sums, 4 and 5 A, 6 and 7 B. low, high: rows of the two tiles of A, high may be 0.
INLINE void configure(int low, int high) {
  Configuration c = {};
  c.palette = 1;
  const int rows[8] = {low, low, high, high, low, high, tile_rows, tile_rows};
  for (int i = 0; i < 8; i++) {
    c.rows[i] = static_cast<uint8_t>(rows[i]);
    c.bytes[i] = rows[i] ? 64 : 0;
  }
  // gcc 12 takes only 8 bytes for the instruction's input and drops the other stores.
  __asm__ volatile("" : : "r"(&c) : "memory");
  _tile_loadconfig(&c);
}

// sums[row][64] (+)= A rows times the expanded codes of `steps` times 64 columns. high: whether the
// second tile of A is there.
INLINE void multiply_tiles(const int8_t* a, int64_t a_stride, const uint8_t* panel, int steps,
                           bool high, bool begin, int32_t* sums) {
  const int8_t* second = a + tile_rows * a_stride;
  for (int pair = 0; pair < 2; pair++) {
    int32_t* c0 = sums + 32 * pair;
    int32_t* c1 = c0 + 16;
    int32_t* c2 = c0 + tile_rows * block_rows;
    int32_t* c3 = c2 + 16;
    if (begin) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, c0, sums_stride);
      _tile_loadd(1, c1, sums_stride);
    }
    if (high && begin) {
      _tile_zero(2);
      _tile_zero(3);
    } else if (high) {
      _tile_loadd(2, c2, sums_stride);
      _tile_loadd(3, c3, sums_stride);
    }
    const uint8_t* b = panel + 128 * pair;
    if (high) {
      for (int s = 0; s < steps; s++, b += 256 * tile_rows) {
        _tile_loadd(6, b, 256);
        _tile_loadd(4, a + s * step_columns, a_stride);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + 64, 256);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, second + s * step_columns, a_stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
      _tile_stored(2, c2, sums_stride);
      _tile_stored(3, c3, sums_stride);
    } else {
      for (int s = 0; s < steps; s++, b += 256 * tile_rows) {
        _tile_loadd(6, b, 256);
        _tile_loadd(4, a + s * step_columns, a_stride);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + 64, 256);
        _tile_dpbsud(1, 4, 7);
      }
    }
    _tile_stored(0, c0, sums_stride);
    _tile_stored(1, c1, sums_stride);
  }
}

// Scales the finished integer sums of a piece and adds them to acc, as multiply_panel does.
INLINE void add_sums(const Product& p, const Piece& piece, const int32_t* sums, int64_t block,
                     Affine a, float* acc) {
  const Activations& x = *p.x;
  __m512 scales[tiles];
  unroll<tiles>([&](auto r) INLINED { scales[r] = scale_of(p, block, piece.group, r); });
  for (int token = 0; token < p.tokens; token++, acc += block_rows) {
    __m512 xs = x_scale(x, p.first_token + token, piece.first_chunk);
    int32_t sum = sum_of(x, p.first_token + token, piece);
    for (int digit = 0; digit < x.digits; digit++, sums += block_rows, sum = 0) {
      __m512 factor = _mm512_mul_ps(xs, _mm512_set1_ps(static_cast<float>(1 << 8 * digit)));
      unroll<tiles>([&](auto r) INLINED {
        __m512i u = _mm512_load_si512(sums + 16 * r);
        add_floats(acc + 16 * r, value_of(u, a, sum, x.digits == 1),
                   _mm512_mul_ps(factor, scales[r]));
      });
    }
  }
}

void digits_tiles(const Product& p, int64_t block, float* acc) {
  const Activations& x = *p.x;
  const uint8_t* codes = p.codes + block * p.block_bytes;
  const Affine a = affine(*p.matrix);
  const int rows = p.tokens * x.digits;
  alignas(64) uint8_t panel[expanded_chunks * chunk_words * 8 * 256];
  alignas(64) static thread_local int32_t sums[most_rows * block_rows];
  const int8_t* digit = x.digit + static_cast<int64_t>(p.first_token) * x.digits * x.digit_stride;
  const int whole = rows / (2 * tile_rows) * 2 * tile_rows, rest = rows - whole;
  pieces(*x.shape, p.first_chunk, p.end_chunk, longest_piece(x), [&](Piece piece) {
    for (int done = 0; done < piece.chunks; done += expanded_chunks) {
      Piece part = piece;
      part.first_word += done * chunk_words;
      part.words -= done * chunk_words;
      if (part.words > expanded_chunks * chunk_words) part.words = expanded_chunks * chunk_words;
      expand_piece(p, codes, part, panel);
      // Half a step is left where the words are odd: codes 0, whatever x has there.
      if (part.words % 2) memset(panel + part.words * 8 * 256, 0, 8 * 256);
      const int steps = (part.words + 1) / 2;
      const int8_t* from = digit + static_cast<int64_t>(part.first_word) * word_columns;
      if (whole) configure(tile_rows, tile_rows);
      for (int row = 0; row < whole; row += 2 * tile_rows) {
        multiply_tiles(from + row * x.digit_stride, x.digit_stride, panel, steps, true, done == 0,
                       sums + row * block_rows);
      }
      if (rest) {
        const int low = rest < tile_rows ? rest : tile_rows;
        configure(low, rest - low);
        multiply_tiles(from + whole * x.digit_stride, x.digit_stride, panel, steps, rest > low,
                       done == 0, sums + whole * block_rows);
      }
    }
    add_sums(p, piece, sums, block, a, acc);
  });
  _tile_release();
}

// One row of digits would leave the tiles empty: vpdpbusd reads memory as fast.
void codes_tiles(const Product& p, int64_t block, float* acc) {
  const int rows = p.tokens * p.x->digits;
  if (rows == 1 || rows > most_rows) return codes_digits(p, block, acc);
  digits_tiles(p, block, acc);
}

}  // namespace

namespace bitlm {

extern const Kernel amx_kernel = {
    "amx",        BITLM_DWORDS, load,       largest, round, tables, can_tables, can_digits,
    codes_tables, codes_tiles,  codes_bits, list,    dense, dot,    store,
};

// Whether the processor has the tiles and the system lets this process use them.
bool amx_request() {
#if defined(BITLM_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25, xsave = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & xsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (tile | int8)) != (tile | int8)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned state = 3u << 17;  // tile configuration and data
  if ((low & state) != state) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace bitlm
