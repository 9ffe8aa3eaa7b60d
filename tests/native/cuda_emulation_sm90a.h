// sm_90a in plain C++: products and copies of boxes that go on by themselves, as PTX defines wgmma,
// cp.async.bulk.tensor and mbarrier. See cuda_emulation.h, and bitlm/native/cuda_sm90a.h.
#pragma once

#include "cuda_emulation.h"

namespace bitlm {

inline float short_float(uint32_t pair, int half, bool is_half) {
  uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
  return is_half ? half_to_float(bits) : float_of(static_cast<uint32_t>(bits) << 16);
}

// Byte `byte` of row `row` of a box: the bits of its address that count the 16-byte pieces are
// exchanged by those that count the rows.
inline char* in_box(const char* box, int row, int byte) {
  uintptr_t at = reinterpret_cast<uintptr_t>(box) + static_cast<uintptr_t>(row * 128 + byte);
  return reinterpret_cast<char*>(at ^ (at >> 7 & 7) << 4);
}

inline void finish(const emulation::Started& own) {
  int t = threadIdx.x % 4;
  for (int i = 0; i < own.count; i++) {
    int token = i / 4 * 8 + 2 * t + i % 2, row = i % 4 / 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; k++) {
      uint16_t bits;
      memcpy(&bits, in_box(own.x, token, 2 * k), sizeof bits);
      sum += own.a[row][k] * short_float(bits, 0, own.half);
    }
    own.sums[i] = own.add ? own.sums[i] + sum : sum;
  }
}

// As PTX defines wgmma.m64nNk16 with a in registers.
template <int TOKENS, int TYPE>
void start_product(float (&sums)[TOKENS / 2], const uint32_t (&a)[4], const char* x, bool add) {
  using namespace emulation;
  Machine& m = machine();
  const uint32_t(*all)[most_words] = exchange(4, a, 4);
  int g = threadIdx.x % 32 / 4;
  Started own = {sums, TOKENS / 2, {}, x, TYPE == BITLM_FLOAT16, add, false};
  for (int i = 0; i < 2; i++) {
    for (int k = 0; k < 16; k++) {
      own.a[i][k] = short_float(all[4 * g + k % 8 / 2][2 * (k / 8) + i], k % 2, own.half);
    }
  }
  m.fibers[m.current].products.push_back(own);
  if (!m.late_products) finish(own);
}

inline void ready_products() {}

template <int COUNT>
void settle(float (&)[COUNT]) {}

inline void commit_products() {
  emulation::Machine& m = emulation::machine();
  m.fibers[m.current].products.push_back({nullptr, 0, {}, nullptr, false, false, true});
}

template <int GROUPS>
void await_products() {
  emulation::Machine& m = emulation::machine();
  end_groups(m.fibers[m.current].products, GROUPS, [&](const emulation::Started& each) {
    if (m.late_products) finish(each);
  });
}

// As PTX defines prmt with signs.
template <int BYTE>
uint32_t spread_signs(uint32_t low, uint32_t high) {
  uint32_t sign = 1u << (8 * BYTE + 7);
  return (low & sign ? 0xffffu : 0) | (high & sign ? 0xffff0000u : 0);
}

struct TokenMap {
  const uint16_t* x;
  int tokens, columns, box_tokens;
};

inline int map_tokens(TokenMap* to, const void* x, int, int tokens, int columns, int box_tokens) {
  if (reinterpret_cast<uintptr_t>(x) % 16 || columns % 8 || box_tokens > 256) {
    return cudaErrorInvalidValue;
  }
  *to = {static_cast<const uint16_t*>(x), tokens, columns, box_tokens};
  return cudaSuccess;
}

// A landing counts the turns that are over.
inline void prepare_landing(uint64_t* landing) { *landing = 0; }

inline void land(const emulation::Box& box) {
  const TokenMap& map = *static_cast<const TokenMap*>(box.map);
  for (int row = 0; row < map.box_tokens; row++) {
    for (int column = 0; column < 64; column++) {
      int token = box.token + row;
      uint16_t bits = 0;
      if (token < map.tokens && box.column + column < map.columns) {
        bits = map.x[static_cast<int64_t>(token) * map.columns + box.column + column];
      }
      memcpy(in_box(box.to, row, 2 * column), &bits, sizeof bits);
    }
  }
  ++*box.landing;
}

inline void start_copy(char* to, const TokenMap& from, int column, int token, uint64_t* landing,
                       int bytes) {
  emulation::Machine& m = emulation::machine();
  if (reinterpret_cast<uintptr_t>(to) % 1024 || bytes != from.box_tokens * 128) {
    emulation::fault("a box that cannot be copied");
  }
  emulation::Box box = {to, &from, column, token, landing};
  if (m.backwards) {
    land(box);
  } else {
    m.boxes.push_back(box);
  }
}

inline bool await_landing(uint64_t* landing, int parity) {
  emulation::Machine& m = emulation::machine();
  while (static_cast<int>(*landing & 1) == parity) {
    size_t i = 0;
    while (i < m.boxes.size() && m.boxes[i].landing != landing) i++;
    if (i == m.boxes.size()) {
      emulation::yield();  // nobody has started it yet
    } else {
      emulation::Box box = m.boxes[i];
      m.boxes.erase(m.boxes.begin() + static_cast<long>(i));
      land(box);
    }
  }
  return true;
}

}  // namespace bitlm
