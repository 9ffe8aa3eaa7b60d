// Five ternary digits in a byte of the file, for the CPU and the GPU code.
#pragma once

#include <stdint.h>

namespace bitlm {

// Digits of a byte, the first one the highest, as bits: digit t is 1 where bit t is set, 2 where bit
// 5 + t is. A code is its digit - 1.
constexpr uint16_t trit_bits(int byte) {
  uint16_t bits = 0;
  for (int t = 4; t >= 0; t--, byte /= 3) {
    int digit = byte % 3;
    bits = static_cast<uint16_t>(bits | (digit == 1) << t | (digit == 2) << (5 + t));
  }
  return bits;
}

struct TritTables {
  uint16_t bits[256];    // of each byte
  uint8_t number[1024];  // and back
  constexpr TritTables() : bits(), number() {
    for (int byte = 0; byte < 256; byte++) bits[byte] = trit_bits(byte);
    for (int byte = 0; byte < 243; byte++) number[bits[byte]] = static_cast<uint8_t>(byte);
  }
};

}  // namespace bitlm
