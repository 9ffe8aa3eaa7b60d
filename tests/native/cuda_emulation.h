// CUDA in plain C++, for machines without a GPU: the .cu files of bitlm/native, compiled for the host
// with this header in the place of CUDA, are a library with the same interface on host memory.
//
// Every thread of a block is a fiber of its own. It runs until it meets the others, at a shuffle, a
// tensor core product or __syncthreads, so all that depends on lanes, shared memory and the layout of
// fragments is what the GPU would see. Blocks run one after another. Dynamic shared memory begins as
// NaN, and what is written past its end ends the program, as do lanes that meet at different places.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#include "floats.h"

#define __global__ static
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorInvalidValue
      ? "cudaErrorInvalidValue" : "cudaErrorInvalidConfiguration";
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

struct uint2 {
  uint32_t x, y;
};

struct float2 {
  float x, y;
};

struct uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx;

namespace emulation {

constexpr int lanes = 32;
constexpr int most_threads = 1024, most_shared = 227 * 1024;
constexpr size_t stack_bytes = 128 * 1024;
constexpr int most_words = 6;  // that a thread brings to a meeting

[[noreturn]] inline void fault(const char* what) {
  fprintf(stderr, "CUDA emulation: %s (block %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y,
          threadIdx.x);
  abort();
}

struct Copy;
struct Started;

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun, done;
  std::vector<Copy> copies;
  std::vector<Started> products;
};

// Where threads meet: each brings a few words, and gets those of all when the last one has come.
struct Meeting {
  int arrived = 0, operation = 0;
  unsigned round = 0;
  uint32_t brought[lanes][most_words], seen[lanes][most_words];
};

// A copy that lands when it is waited for; `end` ends a group.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool end;
};

// A product of a warpgroup, of one thread: what it adds to, its two rows of a, and x. It reads x when
// it is waited for; `end` ends a group.
struct Started {
  float* sums;
  int count;
  float a[2][16];
  const char* x;
  bool half, add, end;
};

// A box that lands when it is waited for.
struct Box {
  char* to;
  const void* map;
  int column, token;
  uint64_t* landing;
};

struct Machine {
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> fibers;
  Meeting warp[most_threads / lanes], block;
  std::vector<Box> boxes;
  std::vector<char> shared;
  jmp_buf scheduler;
  ucontext_t back;
  std::function<void()> body;
  int threads = 0, current = 0;
  bool progress = false, backwards = false, late_products = true;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void yield() {
  Machine& m = machine();
  if (!_setjmp(m.fibers[m.current].place)) _longjmp(m.scheduler, 1);
}

inline void begin() {
  Machine& m = machine();
  m.body();
  m.fibers[m.current].done = true;
  m.progress = true;
  _longjmp(m.scheduler, 1);
}

inline void resume(int thread) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread));
  if (_setjmp(m.scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  swapcontext(&m.back, &fiber.context);
}

inline void meet(Meeting& meeting, int all, int operation) {
  Machine& m = machine();
  m.progress = true;
  if (meeting.arrived && meeting.operation != operation) fault("threads meet at different places");
  meeting.operation = operation;
  if (++meeting.arrived == all) {
    memcpy(meeting.seen, meeting.brought, sizeof meeting.seen);
    meeting.arrived = 0;
    meeting.round++;
    return;
  }
  for (unsigned round = meeting.round; meeting.round == round;) yield();
}

// Brings `count` words and returns those of all lanes of the warp.
inline const uint32_t (*exchange(int operation, const uint32_t* words, int count))[most_words] {
  Meeting& meeting = machine().warp[threadIdx.x / lanes];
  memcpy(meeting.brought[threadIdx.x % lanes], words, sizeof(uint32_t) * count);
  meet(meeting, lanes, operation);
  return meeting.seen;
}

inline void run_block(int threads) {
  Machine& m = machine();
  m.threads = threads;
  m.fibers.assign(threads, Fiber());
  while (static_cast<int>(m.stacks.size()) < threads) {
    m.stacks.emplace_back(new char[stack_bytes]);
  }
  m.block = Meeting();
  m.boxes.clear();
  for (Meeting& meeting : m.warp) meeting = Meeting();
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = m.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = m.stacks[i].get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
  }
  for (bool left = true; left;) {
    left = m.progress = false;
    for (int i = 0; i < threads; i++) {
      int thread = m.backwards ? threads - 1 - i : i;
      if (m.fibers[thread].done) continue;
      left = true;
      resume(thread);
    }
    if (left && !m.progress) fault("threads wait for others that never come");
  }
}

constexpr char guard = 0x5a;
constexpr size_t guard_bytes = 1024;

}  // namespace emulation

// 1: threads of a block run in the backward order between meetings, and what goes on by itself, copies
// and products of sm_90a, is done at once instead of at the last moment; 2: but not the products. A
// missing barrier or wait shows in one of them.
extern "C" __attribute__((used, visibility("default"))) inline void bitlm_cuda_emulate_backwards(
    int how) {
  emulation::machine().backwards = how != 0;
  emulation::machine().late_products = how != 1;
}

inline void __syncthreads() {
  emulation::meet(emulation::machine().block, emulation::machine().threads, 1);
}

inline void __syncwarp() {
  uint32_t nothing = 0;
  emulation::exchange(5, &nothing, 1);
}

inline uint32_t shuffled(uint32_t value, int mask) {
  return emulation::exchange(0x100 + mask, &value, 1)[threadIdx.x % 32 ^ mask][0];
}

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) { return shuffled(value, mask); }

inline int32_t __shfl_xor_sync(unsigned, int32_t value, int mask) {
  return static_cast<int32_t>(shuffled(static_cast<uint32_t>(value), mask));
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return bitlm::float_of(shuffled(bitlm::bits_of(value), mask));
}

inline int __shfl_sync(unsigned, int value, int lane) {
  uint32_t own = static_cast<uint32_t>(value);
  return static_cast<int>(emulation::exchange(0x200 + lane, &own, 1)[lane][0]);
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
  uint32_t own = static_cast<uint32_t>(value);
  int lane = threadIdx.x % 32, from = lane < distance ? lane : lane - distance;
  return static_cast<int>(emulation::exchange(0x300 + distance, &own, 1)[from][0]);
}

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) emulation::fault("an unaligned load");
  T value;
  memcpy(&value, address, sizeof value);
  return value;
}

inline float __uint_as_float(uint32_t bits) { return bitlm::float_of(bits); }
inline uint32_t __float_as_uint(float value) { return bitlm::bits_of(value); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}

namespace bitlm {

// Only what is there may be fetched.
inline void fetch_ahead(const void* address) { __ldg(static_cast<const uint8_t*>(address)); }

inline float half_value(uint16_t half) { return half_to_float(half); }
inline uint16_t half_of(float value) { return float_to_half(value); }
inline uint16_t bfloat_of(float value) { return float_to_bfloat(value); }
inline char* block_memory() { return emulation::machine().shared.data(); }

// As PTX defines mma.m16n8k128 for bits: see cuda_device.h.
inline void add_popcounts(uint32_t (&counts)[4], uint32_t a0, uint32_t a8, uint32_t b) {
  uint32_t own[3] = {a0, a8, b};
  const uint32_t(*all)[emulation::most_words] = emulation::exchange(2, own, 3);
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; i++) {
    for (int word = 0; word < 4; word++) {
      uint32_t row = all[4 * g + word][i / 2], column = all[4 * (2 * t + i % 2) + word][2];
      counts[i] += static_cast<uint32_t>(__builtin_popcount(row & column));
    }
  }
}

// As PTX defines mma.m16n8k16: see cuda_device.h.
template <int TYPE>
void multiply_add(float (&sums)[4], uint32_t a0, uint32_t a8, uint32_t a0_high, uint32_t a8_high,
                  uint32_t b, uint32_t b_high) {
  uint32_t own[6] = {a0, a8, a0_high, a8_high, b, b_high};
  const uint32_t(*all)[emulation::most_words] = emulation::exchange(3, own, 6);
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto value = [](uint32_t pair, int half) {
    uint16_t bits = static_cast<uint16_t>(pair >> 16 * half);
    return TYPE == BITLM_FLOAT16 ? half_to_float(bits) : float_of(static_cast<uint32_t>(bits) << 16);
  };
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 16; k++) {
      int quad = k % 8 / 2, high = k / 8;
      sums[i] += value(all[4 * g + quad][2 * high + i / 2], k % 2) *
                 value(all[4 * (2 * t + i % 2) + quad][4 + high], k % 2);
    }
  }
}

// Copies land at the last moment, or, with threads in the backward order, at once: a missing wait or
// a missing barrier shows in one of them.
template <int BYTES>
void copy_later(void* to, const void* from) {
  using namespace emulation;
  Machine& m = machine();
  if (reinterpret_cast<uintptr_t>(from) % BYTES || reinterpret_cast<uintptr_t>(to) % BYTES) {
    fault("an unaligned copy");
  }
  if (m.backwards) {
    memcpy(to, from, BYTES);
  } else {
    m.fibers[m.current].copies.push_back({to, from, BYTES, false});
  }
}

inline void commit_copies() {
  emulation::Machine& m = emulation::machine();
  m.fibers[m.current].copies.push_back({nullptr, nullptr, 0, true});
}

// Ends all but the last `groups` groups of what was started: calls `finish` with each.
template <class T, class Finish>
void end_groups(std::vector<T>& started, int groups, Finish finish) {
  int open = 0;
  for (const T& each : started) open += each.end;
  size_t done = 0;
  for (; open > groups; done++) {
    if (started[done].end) {
      open--;
    } else {
      finish(started[done]);
    }
  }
  started.erase(started.begin(), started.begin() + static_cast<long>(done));
}

template <int GROUPS>
void await_copies() {
  emulation::Machine& m = emulation::machine();
  end_groups(m.fibers[m.current].copies, GROUPS,
             [](const emulation::Copy& copy) { memcpy(copy.to, copy.from, copy.bytes); });
}

template <class Call>
int launch(void (*kernel)(Call), const Call& call, dim3 blocks, int threads, int shared_bytes,
           void*, int most_shared_bytes = 48 * 1024) {
  using namespace emulation;
  if (!blocks.x || !blocks.y || !blocks.z) return cudaSuccess;
  if (threads > most_threads || threads % lanes || most_shared_bytes > most_shared ||
      shared_bytes > most_shared_bytes || blocks.y > 65535 || blocks.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  Machine& m = machine();
  m.body = [&] { kernel(call); };
  for (unsigned z = 0; z < blocks.z; z++) {
    for (unsigned y = 0; y < blocks.y; y++) {
      for (unsigned x = 0; x < blocks.x; x++) {
        blockIdx = dim3(x, y, z);
        m.shared.assign(static_cast<size_t>(shared_bytes) + guard_bytes, guard);
        memset(m.shared.data(), 0xff, static_cast<size_t>(shared_bytes));
        run_block(threads);
        for (size_t i = 0; i < guard_bytes; i++) {
          if (m.shared[static_cast<size_t>(shared_bytes) + i] != guard) {
            fault("written past the end of shared memory");
          }
        }
      }
    }
  }
  return cudaSuccess;
}

}  // namespace bitlm
