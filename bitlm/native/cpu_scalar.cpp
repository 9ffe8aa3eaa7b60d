// The kernels for any machine, on the compiler's own vectors of 16 bytes: SSE2, NEON or plain code.
// Only table look-ups have no portable form; on ARM they are vqtbl.
#include "cpu_bytes.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define BITLM_NEON 1
#endif

namespace {

template <class T>
struct Pair {
  T low, high;
};

struct Portable {
  static constexpr int lanes = 8;

  typedef float Float4 __attribute__((vector_size(16)));
  typedef int32_t Int4 __attribute__((vector_size(16)));
  typedef uint32_t Unsigned4 __attribute__((vector_size(16)));
  typedef int16_t Short8 __attribute__((vector_size(16)));
  typedef uint16_t Word8 __attribute__((vector_size(16)));
  typedef uint8_t Byte16 __attribute__((vector_size(16)));
  typedef int8_t Signed16 __attribute__((vector_size(16)));

  using Floats = Pair<Float4>;
  using Ints = Pair<Int4>;
  using Bytes = Pair<Byte16>;
  using Table = Byte16;
  // Sums of the even bytes and of the odd ones.
  struct Words {
    Pair<Word8> even, odd;
  };

  template <class T>
  static BITLM_INLINE T read(const void* p) {
    T a;
    memcpy(&a, p, sizeof a);
    return a;
  }
  template <class T>
  static BITLM_INLINE void write(void* p, const T& a) {
    memcpy(p, &a, sizeof a);
  }

  static BITLM_INLINE Floats set(float a) { return {Float4{a, a, a, a}, Float4{a, a, a, a}}; }
  static BITLM_INLINE Floats zero() { return set(0.0f); }
  static BITLM_INLINE Floats load(const float* p) { return read<Floats>(p); }
  static BITLM_INLINE void store(float* p, Floats a) { write(p, a); }
  static BITLM_INLINE Floats add(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
  static BITLM_INLINE Floats mul(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
  static BITLM_INLINE Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
  static BITLM_INLINE Floats min(Floats a, Floats b) {
    return {a.low < b.low ? a.low : b.low, a.high < b.high ? a.high : b.high};
  }
  static BITLM_INLINE Floats max(Floats a, Floats b) {
    return {a.low > b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
  }
  static BITLM_INLINE Floats to_floats(Ints a) {
    return {__builtin_convertvector(a.low, Float4), __builtin_convertvector(a.high, Float4)};
  }
  // Adding 1.5 * 2^23 leaves the integer in the last bits, rounded to even, if it has 22 bits.
  static BITLM_INLINE Ints to_ints(Floats a) {
    constexpr float magic = 12582912.0f;
    Floats b = add(a, set(magic));
    return sub_ints({reinterpret_cast<Int4>(b.low), reinterpret_cast<Int4>(b.high)},
                    set_ints(0x4b400000u));
  }
  static BITLM_INLINE Ints magnitudes(Ints largest, Floats a) {
    Int4 low = reinterpret_cast<Int4>(a.low) & 0x7fffffff;
    Int4 high = reinterpret_cast<Int4>(a.high) & 0x7fffffff;
    return {low > largest.low ? low : largest.low, high > largest.high ? high : largest.high};
  }

  static BITLM_INLINE Floats load_floats(const void* p, int type, int64_t count) {
    if (type == BITLM_FLOAT32 && count == lanes) return read<Floats>(p);
#ifdef BITLM_NEON
    if (type == BITLM_FLOAT16 && count == lanes) {
      float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(static_cast<const uint16_t*>(p)));
      return {reinterpret_cast<Float4>(vcvt_f32_f16(vget_low_f16(half))),
              reinterpret_cast<Float4>(vcvt_f32_f16(vget_high_f16(half)))};
    }
#endif
    float part[lanes] = {};
    for (int i = 0; i < count; i++) part[i] = load_float(element(p, type, i), type);
    return load(part);
  }
  static BITLM_INLINE void store_floats(void* p, int type, int64_t count, Floats a) {
    float part[lanes];
    store(part, a);
    for (int i = 0; i < count; i++) {
      store_float(static_cast<char*>(p) + i * type_bytes(type), type, part[i]);
    }
  }

  static BITLM_INLINE Ints zero_ints() { return set_ints(0); }
  static BITLM_INLINE Ints set_ints(uint32_t value) {
    int32_t a = static_cast<int32_t>(value);
    return {Int4{a, a, a, a}, Int4{a, a, a, a}};
  }
  static BITLM_INLINE Ints load_ints(const int32_t* p) { return read<Ints>(p); }
  static BITLM_INLINE void store_ints(int32_t* p, Ints a) { write(p, a); }
  // Sums wrap around.
  static BITLM_INLINE Int4 add4(Int4 a, Int4 b) {
    return reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a) + reinterpret_cast<Unsigned4>(b));
  }
  static BITLM_INLINE Ints add_ints(Ints a, Ints b) {
    return {add4(a.low, b.low), add4(a.high, b.high)};
  }
  static BITLM_INLINE Ints sub_ints(Ints a, Ints b) {
    return {
        reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.low) - reinterpret_cast<Unsigned4>(b.low)),
        reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.high) -
                               reinterpret_cast<Unsigned4>(b.high))};
  }
  static BITLM_INLINE Ints shift_left_by(Ints a, int n) {
    return {reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.low) << n),
            reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.high) << n)};
  }
  template <int n>
  static BITLM_INLINE Ints shift_left(Ints a) {
    return {reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.low) << n),
            reinterpret_cast<Int4>(reinterpret_cast<Unsigned4>(a.high) << n)};
  }
  template <int n>
  static BITLM_INLINE Ints shift_right(Ints a) {
    return {a.low >> n, a.high >> n};
  }
  static BITLM_INLINE void store_low_bytes(const Ints (&value)[4], int8_t* out) {
    int32_t part[word_columns];
    write(part, value);
    for (int i = 0; i < word_columns; i++) out[i] = static_cast<int8_t>(part[i]);
  }

  static BITLM_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
  // gcc otherwise loads a table again for each look-up, and gathers look-ups far from their sums.
  template <class T>
  static BITLM_INLINE void keep(T&) {}
  static BITLM_INLINE Bytes load_bytes(const uint8_t* p) { return read<Bytes>(p); }
  static BITLM_INLINE void store_bytes(uint8_t* p, Bytes a) { write(p, a); }
  static BITLM_INLINE Bytes add_bytes(Bytes a, Bytes b) { return {a.low + b.low, a.high + b.high}; }
  static BITLM_INLINE Bytes low_bits(Bytes a) { return {a.low & 15, a.high & 15}; }
  static BITLM_INLINE Bytes high_bits(Bytes a) { return {a.low >> 4, a.high >> 4}; }
  static BITLM_INLINE Table load_table(const uint8_t* p) { return read<Table>(p); }
  static BITLM_INLINE Byte16 look_up16(const Table& table, Byte16 index) {
#ifdef BITLM_NEON
    return reinterpret_cast<Byte16>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(table),
                                               reinterpret_cast<uint8x16_t>(index)));
#else
    uint8_t entries[16], at[16], found[16];
    write(entries, table);
    write(at, index);
    for (int i = 0; i < 16; i++) found[i] = entries[at[i]];
    return read<Byte16>(found);
#endif
  }
  static BITLM_INLINE Bytes look_up(const Table& table, Bytes index) {
    return {look_up16(table, index.low), look_up16(table, index.high)};
  }

  static BITLM_INLINE Words set_words(uint16_t a) {
    Word8 all = {a, a, a, a, a, a, a, a};
    return {Pair<Word8>{all, all}, Pair<Word8>{all, all}};
  }
  static BITLM_INLINE Word8 words8(Byte16 a) { return reinterpret_cast<Word8>(a); }
  static BITLM_INLINE void widen(Bytes low, Bytes high, Words& sum) {
    sum.even.low += (words8(low.low) & 255) + ((words8(high.low) & 255) << 5);
    sum.even.high += (words8(low.high) & 255) + ((words8(high.high) & 255) << 5);
    sum.odd.low += (words8(low.low) >> 8) + ((words8(high.low) >> 8) << 5);
    sum.odd.high += (words8(low.high) >> 8) + ((words8(high.high) >> 8) << 5);
  }
  static BITLM_INLINE void widen(Bytes low, Words& sum) {
    sum.even.low += words8(low.low) & 255;
    sum.even.high += words8(low.high) & 255;
    sum.odd.low += words8(low.low) >> 8;
    sum.odd.high += words8(low.high) >> 8;
  }
  // A byte's place p is row p % 2 * 16 + p / 2 % 2 * 8 + p / 4.
  template <int k>
  static BITLM_INLINE Ints part(const Words& a) {
    const Pair<Word8>& from = k / 2 ? a.odd : a.even;
    Unsigned4 low = reinterpret_cast<Unsigned4>(from.low), high = reinterpret_cast<Unsigned4>(from.high);
    if (k % 2) return {reinterpret_cast<Int4>(low >> 16), reinterpret_cast<Int4>(high >> 16)};
    return {reinterpret_cast<Int4>(low & 0xffff), reinterpret_cast<Int4>(high & 0xffff)};
  }
  template <int k>
  static BITLM_INLINE Ints signed_part(const Words& a) {
    const Pair<Word8>& from = k / 2 ? a.odd : a.even;
    Ints both = {reinterpret_cast<Int4>(from.low), reinterpret_cast<Int4>(from.high)};
    return shift_right<16>(k % 2 ? both : shift_left<16>(both));
  }

  // entries[e] of 4 columns: sum of +-x, + where bit j of e is set.
  static void tables(const int8_t* digit, int64_t stride, int digits, int slices, int64_t words,
                     uint8_t* out) {
    int32_t bias = 16 << 5 * (slices - 1);
    for (int64_t word = 0; word < words; word++) {
      int32_t x[word_columns];
      recombine(digit + word * word_columns, stride, digits, x);
      for (int i = 0; i < word_columns; i += 4) {
        int32_t sum[16];
        sum[0] = bias - x[i] - x[i + 1] - x[i + 2] - x[i + 3];
        for (int j = 0; j < 4; j++) {
          for (int e = 0; e < 1 << j; e++) sum[e + (1 << j)] = sum[e] + 2 * x[i + j];
        }
        for (int s = 0; s < slices; s++, out += 16) {
          for (int e = 0; e < 16; e++) out[e] = static_cast<uint8_t>(sum[e] >> 5 * s & 31);
        }
      }
    }
  }

  // 128 columns of a digit; position 128 is 0.
  struct Positions {
#ifdef BITLM_NEON
    uint8x16x4_t low, high;
    explicit Positions(const int8_t* x) {
      const uint8_t* p = reinterpret_cast<const uint8_t*>(x);
      for (int i = 0; i < 4; i++) low.val[i] = vld1q_u8(p + 16 * i);
      for (int i = 0; i < 4; i++) high.val[i] = vld1q_u8(p + 64 + 16 * i);
    }
    BITLM_INLINE Byte16 find(Byte16 position) const {
      uint8x16_t at = reinterpret_cast<uint8x16_t>(position);
      uint8x16_t found = vorrq_u8(vqtbl4q_u8(low, at), vqtbl4q_u8(high, veorq_u8(at, vdupq_n_u8(64))));
      return reinterpret_cast<Byte16>(found);
    }
#else
    int8_t x[129];
    explicit Positions(const int8_t* from) {
      memcpy(x, from, 128);
      x[128] = 0;
    }
    BITLM_INLINE Byte16 find(Byte16 position) const {
      uint8_t at[16], found[16];
      write(at, position);
      for (int i = 0; i < 16; i++) found[i] = static_cast<uint8_t>(x[at[i]]);
      return read<Byte16>(found);
    }
#endif
  };
  static BITLM_INLINE Bytes find(const Positions& x, Bytes position) {
    return {x.find(position.low), x.find(position.high)};
  }
  // Sums of four 16-bit numbers each: even bytes and odd bytes of a dword.
  static BITLM_INLINE Int4 fours(Short8 even, Short8 odd) {
    Int4 a = reinterpret_cast<Int4>(even), b = reinterpret_cast<Int4>(odd);
    return (a << 16 >> 16) + (a >> 16) + (b << 16 >> 16) + (b >> 16);
  }
  static BITLM_INLINE Int4 add_products4(Int4 sum, Byte16 values, Byte16 x) {
    Short8 v = reinterpret_cast<Short8>(values), w = reinterpret_cast<Short8>(x);
    Short8 odd = reinterpret_cast<Short8>(reinterpret_cast<Word8>(v) >> 8) * (w >> 8);
    return sum + fours((v & 255) * (w << 8 >> 8), odd);
  }
  static BITLM_INLINE Ints add_products(Ints sum, Bytes values, Bytes x) {
    return {add_products4(sum.low, values.low, x.low), add_products4(sum.high, values.high, x.high)};
  }
  static BITLM_INLINE Int4 add_fours4(Int4 sum, Byte16 x) {
    Short8 w = reinterpret_cast<Short8>(x);
    return sum + fours(w << 8 >> 8, w >> 8);
  }
  static BITLM_INLINE Ints add_fours(Ints sum, Bytes x) {
    return {add_fours4(sum.low, x.low), add_fours4(sum.high, x.high)};
  }
};

}  // namespace

namespace bitlm {
#ifdef BITLM_NEON
extern const Kernel scalar_kernel = make_kernel<Portable>("neon");
#else
extern const Kernel scalar_kernel = make_kernel<Portable>("scalar");
#endif
}  // namespace bitlm
