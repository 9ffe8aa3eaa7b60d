// What one core can multiply at most, from registers: the roof of `scripts/bench kernels --plot`.
// Prints a JSON object: instructions, and 10^9 multiplications and additions a second. Which it
// measures is decided when it is compiled (-march=native, or less).
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

volatile unsigned char sink;
constexpr int64_t repeats = 2000000;
constexpr int registers = 8;

// operations: multiplications and additions of one repeat. run(n) does n repeats.
template <class F>
double rate(double operations, F run) {
  double best = 0;
  for (int round = 0; round < 7; round++) {
    auto start = std::chrono::steady_clock::now();
    run(repeats);
    std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    double found = operations * repeats / passed.count() * 1e-9;
    if (found > best) best = found;
  }
  return best;
}

// The sums are local to a loop of its own: the compiler then keeps them in registers.
template <class V, class F>
void repeat(int64_t count, F step) {
  V sum[registers];
  memset(sum, 0, sizeof sum);
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 8
    for (int r = 0; r < registers; r++) sum[r] = step(sum[r]);
  }
  for (V s : sum) sink = reinterpret_cast<unsigned char*>(&s)[0];
}

bool first = true;

void print(const char* what, double value) {
  printf("%s\"%s\": %.0f", first ? "{" : ", ", what, value);
  first = false;
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
void measure() {
  __m512i code = _mm512_set1_epi8(5), table = _mm512_set1_epi8(3);
  // A look-up stands for 4 columns of a row in one of two slices: 4 operations a byte.
  print("look-ups (vpermb, vpaddb)", rate(64.0 * 4 * registers, [&](int64_t count) {
    repeat<__m512i>(count, [&](__m512i sum) {
      __m512i found;
      __asm__("vpermb %2, %3, %1\n vpaddb %1, %0, %0" : "+v"(sum), "=&v"(found)
              : "v"(table), "v"(code));
      return sum;
    });
  }));
  print("digit products (vpdpbusd)", rate(64.0 * 2 * registers, [&](int64_t count) {
    repeat<__m512i>(count, [&](__m512i sum) {
      __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(table), "v"(code));
      return sum;
    });
  }));
}
#elif defined(__AVX2__)
void measure() {
  __m256i code = _mm256_set1_epi8(5), table = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
  print("look-ups (vpshufb, vpaddb)", rate(32.0 * 4 * registers, [&](int64_t count) {
    repeat<__m256i>(count, [&](__m256i sum) {
      __m256i found;
      __asm__("vpshufb %2, %3, %1\n vpaddb %1, %0, %0" : "+x"(sum), "=&x"(found)
              : "x"(code), "x"(table));
      return sum;
    });
  }));
  print("digit products (vpmaddubsw, vpmaddwd, vpaddd)",
        rate(32.0 * 2 * registers, [&](int64_t count) {
    repeat<__m256i>(count, [&](__m256i sum) {
      __m256i found;
      __asm__("vpmaddubsw %2, %3, %1\n vpmaddwd %4, %1, %1\n vpaddd %1, %0, %0"
              : "+x"(sum), "=&x"(found) : "x"(code), "x"(table), "x"(one));
      return sum;
    });
  }));
}
#else
void measure() {}
#endif

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
void measure_tiles() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return;
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } c = {};
  c.palette = 1;
  for (int i = 0; i < 8; i++) c.rows[i] = 16, c.bytes[i] = 64;
  // gcc 12 takes only 8 bytes for the instruction's input and drops the other stores.
  __asm__ volatile("" : : "r"(&c) : "memory");
  _tile_loadconfig(&c);
  print("tiles (tdpbsud)", rate(16.0 * 16 * 64 * 2 * 4, [](int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }));
  _tile_release();
}
#else
void measure_tiles() {}
#endif

}  // namespace

int main() {
  measure();
  measure_tiles();
  puts(first ? "{}" : "}");
}
