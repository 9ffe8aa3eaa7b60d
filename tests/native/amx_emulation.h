// AMX int8 in plain C++, for machines without it. Two ways to use it:
//
// Source: cpu_amx.cpp compiled with -DBITLM_EMULATE_AMX includes this file, and the intrinsics
//   become the functions below. The library then offers "amx" on every machine with AVX-512.
// Machine code: a program that includes it and calls `amx_emulation::trap()` may run an ordinary
//   build of cpu_amx.cpp: AMX instructions, illegal on the machine, are decoded and emulated in a
//   signal handler. This also checks what the compiler made of the intrinsics, but takes about a
//   microsecond an instruction.
//
// Whatever real hardware answers with a fault ends the program with a message.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace amx_emulation {

struct Tile {
  int rows = 0, bytes = 0;  // 0: not configured
  uint8_t data[16][64];
};

struct Machine {
  bool configured = false;
  Tile tile[8];
};

inline Machine& machine() {
  static thread_local Machine one;
  return one;
}

// What the calling thread has executed.
struct Counts {
  int64_t configurations, loads, stores, zeros, products;
};

inline Counts& counts() {
  static thread_local Counts all;
  return all;
}

[[noreturn]] inline void fault(const char* what) {
  fprintf(stderr, "AMX fault: %s\n", what);
  abort();
}

inline void need(bool condition, const char* what) {
  if (!condition) fault(what);
}

inline Tile& usable(int index) {
  need(machine().configured, "tile instruction without a configuration");
  Tile& t = machine().tile[index];
  need(t.rows > 0 && t.bytes > 0, "tile that the configuration leaves out");
  return t;
}

inline void release() {
  machine().configured = false;
  for (Tile& t : machine().tile) t.rows = t.bytes = 0;
}

inline void configure(const void* from) {
  uint8_t config[64];
  memcpy(config, from, 64);
  counts().configurations++;
  release();
  if (config[0] == 0) return;
  need(config[0] == 1, "palette is not 1");
  for (int i = 2; i < 16; i++) need(config[i] == 0, "reserved byte of the configuration");
  for (int i = 0; i < 16; i++) {
    int bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    need(i < 8 || (bytes == 0 && rows == 0), "configuration of a tile past the eighth");
    need(bytes <= 64 && rows <= 16, "tile larger than 16 rows of 64 bytes");
    need((bytes == 0) == (rows == 0), "tile with rows or bytes only");
    if (i >= 8) continue;
    machine().tile[i].rows = rows;
    machine().tile[i].bytes = bytes;
    memset(machine().tile[i].data, 0, sizeof machine().tile[i].data);
  }
  need(config[1] == 0, "start row of an interrupted load");
  machine().configured = true;
}

inline void zero(int index) {
  counts().zeros++;
  memset(usable(index).data, 0, sizeof(Tile::data));
}

inline void load(int index, const void* from, int64_t stride) {
  counts().loads++;
  Tile& t = usable(index);
  memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; r++) {
    memcpy(t.data[r], static_cast<const char*>(from) + r * stride, t.bytes);
  }
}

inline void store(int index, void* to, int64_t stride) {
  counts().stores++;
  Tile& t = usable(index);
  for (int r = 0; r < t.rows; r++) {
    memcpy(static_cast<char*>(to) + r * stride, t.data[r], t.bytes);
  }
}

// c += a b in dwords of four products; a, b: whether their bytes are signed.
template <class A, class B>
void product(int c_index, int a_index, int b_index) {
  counts().products++;
  Tile &c = usable(c_index), &a = usable(a_index), &b = usable(b_index);
  need(c_index != a_index && c_index != b_index && a_index != b_index, "the same tile twice");
  need(a.bytes % 4 == 0 && b.bytes % 4 == 0 && c.bytes % 4 == 0, "rows of no whole dwords");
  need(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, "shapes do not match");
  for (int m = 0; m < c.rows; m++) {
    uint32_t row[16];  // sums wrap around
    memcpy(row, c.data[m], 64);
    for (int k = 0; k < a.bytes / 4; k++) {
      for (int n = 0; n < c.bytes / 4; n++) {
        for (int i = 0; i < 4; i++) {
          A left = static_cast<A>(a.data[m][4 * k + i]);
          B right = static_cast<B>(b.data[k][4 * n + i]);
          row[n] += static_cast<uint32_t>(static_cast<int32_t>(left) * static_cast<int32_t>(right));
        }
      }
    }
    memcpy(c.data[m], row, c.bytes);
  }
}

}  // namespace amx_emulation

#ifdef BITLM_EMULATE_AMX

#include <immintrin.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(config) amx_emulation::configure(config)
#define _tile_release() amx_emulation::release()
#define _tile_zero(tile) amx_emulation::zero(tile)
#define _tile_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store(tile, base, stride)
#define _tile_dpbssd(c, a, b) amx_emulation::product<int8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) amx_emulation::product<int8_t, uint8_t>(c, a, b)
#define _tile_dpbusd(c, a, b) amx_emulation::product<uint8_t, int8_t>(c, a, b)
#define _tile_dpbuud(c, a, b) amx_emulation::product<uint8_t, uint8_t>(c, a, b)

#elif defined(__linux__) && defined(__x86_64__)

#include <signal.h>
#include <ucontext.h>

namespace amx_emulation {

// One AMX instruction at `at`, executed with the registers `r`; returns its length, 0: another one.
inline int execute(const uint8_t* at, greg_t* r) {
  static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  enum { none, x66, xf3, xf2 };  // the prefix that VEX.pp stands for
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) return 0;  // 0F38, W0, 128
  const int pp = at[2] & 3, vvvv = ~(at[2] >> 3) & 15, opcode = at[3], modrm = at[4];
  const int mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  const int index_high = at[1] & 0x40 ? 0 : 8, base_high = at[1] & 0x20 ? 0 : 8;
  if (opcode == 0x5e && mod == 3) {
    if (pp == xf2) product<int8_t, int8_t>(reg, rm, vvvv);
    if (pp == xf3) product<int8_t, uint8_t>(reg, rm, vvvv);
    if (pp == x66) product<uint8_t, int8_t>(reg, rm, vvvv);
    if (pp == none) product<uint8_t, uint8_t>(reg, rm, vvvv);
    return 5;
  }
  if (opcode == 0x49 && mod == 3) {
    if (pp == none && reg == 0 && rm == 0) return release(), 5;
    if (pp == xf2) return zero(reg), 5;
    return 0;
  }
  if ((opcode != 0x49 && opcode != 0x4b) || mod == 3) return 0;
  // An address: base + displacement, and for loads and stores an index, the stride.
  int length = 5;
  int64_t address = 0, stride = 0;
  int base = rm;
  if (rm == 4) {
    const int sib = at[length++], index = (sib >> 3 & 7) + index_high;
    base = sib & 7;
    if (index != 4) stride = r[place[index]] << (sib >> 6);
  }
  const bool no_base = base == 5 && mod == 0;
  if (!no_base) address = r[place[base + base_high]];
  if (mod == 1) {
    address += static_cast<int8_t>(at[length++]);
  } else if (mod == 2 || no_base) {
    int32_t displacement;
    memcpy(&displacement, at + length, 4);
    length += 4;
    address += displacement;
    if (no_base && rm != 4) address += reinterpret_cast<int64_t>(at) + length;  // from rip
  }
  void* memory = reinterpret_cast<void*>(address);
  if (opcode == 0x49) {
    if (pp != none || reg != 0) return 0;
    configure(static_cast<char*>(memory) + stride);
    return length;
  }
  if (pp == xf2 || pp == x66) return load(reg, memory, stride), length;
  if (pp == xf3) return store(reg, memory, stride), length;
  return 0;
}

inline void on_illegal(int, siginfo_t*, void* context) {
  greg_t* r = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(r[REG_RIP]);
  int length = execute(at, r), done = 0;
  // Those that follow directly need no signal of their own.
  for (; length; done += length, length = execute(at + done, r)) {}
  need(done > 0, "an illegal instruction that is none of AMX");
  r[REG_RIP] += done;
}

// Emulates the AMX instructions of this process from now on.
inline void trap() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace amx_emulation

#endif
