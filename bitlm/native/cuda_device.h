// What kernels are written with: a few instructions, floats of every type, and launching.
//
// Kernels are compiled by nvcc, and by the tests also for the host: there cuda_emulation.h of
// tests/native stands for CUDA, with the same names.
#pragma once

#include <math.h>
#include <stdint.h>

#include "bitlm_cuda.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define BITLM_DEVICE __device__ __forceinline__
#else
#include "cuda_emulation.h"
#define BITLM_DEVICE inline
#endif

namespace bitlm {

constexpr int warp_lanes = 32;
constexpr int word_columns = 32;
constexpr int unit_words = 4;  // of a row: lane t of a quad has word t
constexpr int unit_columns = unit_words * word_columns;
constexpr int digit_planes = 8;
constexpr int digit_words = digit_planes * unit_words;  // a digit of a row's unit

struct alignas(16) Words {
  uint32_t word[4];
};

#if defined(__CUDACC__)

// counts += popcount(a & b): a is 16 rows x 128 bits, b 128 bits x 8 columns. Lane (g, t) = (lane / 4,
// lane % 4) has word t of rows g and g + 8 of a, word t of column g of b, and the counts of columns
// 2t and 2t + 1 in row g (0, 1) and in row g + 8 (2, 3).
BITLM_DEVICE void add_popcounts(uint32_t (&counts)[4], uint32_t a0, uint32_t a8, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
               "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+r"(counts[0]), "+r"(counts[1]), "+r"(counts[2]), "+r"(counts[3])
               : "r"(a0), "r"(a8), "r"(b));
}

// sums += a b, in fp32: a is 16 rows x 16 of fp16 or bf16, b 16 x 8 columns. Lane (g, t) has of a
// elements 2t and 2t + 1 of row g (a0) and of row g + 8 (a8), 2t + 8 and 2t + 9 of those (a0_high,
// a8_high), the same elements of column g of b, and sums as above.
template <int TYPE>
BITLM_DEVICE void multiply_add(float (&sums)[4], uint32_t a0, uint32_t a8, uint32_t a0_high,
                               uint32_t a8_high, uint32_t b, uint32_t b_high) {
  if (TYPE == BITLM_FLOAT16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a8), "r"(a0_high), "r"(a8_high), "r"(b), "r"(b_high));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a8), "r"(a0_high), "r"(a8_high), "r"(b), "r"(b_high));
  }
}

// Copies 8 or 16 bytes from global to shared memory, while the thread goes on. commit_copies makes a
// group of those since the last one; await_copies waits for all groups but the `groups` last ones.
template <int BYTES>
BITLM_DEVICE void copy_later(void* to, const void* from) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES)
                 : "memory");
  }
}

BITLM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
BITLM_DEVICE void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Reads weights, which nobody reads again: past L1, and the rest of the line comes along into L2.
BITLM_DEVICE Words load_once(const void* address) {
  Words w;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
      : "l"(address));
  return w;
}

// Lets the line of `address` come into L2, while the thread goes on.
BITLM_DEVICE void fetch_ahead(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

BITLM_DEVICE float half_value(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

BITLM_DEVICE uint16_t half_of(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

BITLM_DEVICE uint16_t bfloat_of(float value) {
  uint16_t bfloat;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(value));
  return bfloat;
}

// The block's dynamic shared memory.
BITLM_DEVICE char* block_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// most_shared_bytes: of any launch of the kernel, where one may be above 48 KiB. It is set every time,
// to the same, so that threads which launch at once do not lower each other's limit.
template <class Call>
int launch(void (*kernel)(Call), const Call& call, dim3 blocks, int threads, int shared_bytes,
           void* stream, int most_shared_bytes = 0) {
  if (!blocks.x || !blocks.y || !blocks.z) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (most_shared_bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Call*>(&call)};
  return cudaLaunchKernel(function, blocks, dim3(threads), arguments,
                          static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
}

#endif

// Reads what no kernel writes meanwhile.
template <class T>
BITLM_DEVICE T load(const void* address) {
  return __ldg(static_cast<const T*>(address));
}

BITLM_DEVICE Words load_words(const void* address) {
  uint4 four = __ldg(static_cast<const uint4*>(address));
  return {{four.x, four.y, four.z, four.w}};
}

#if !defined(__CUDACC__)
inline Words load_once(const void* address) { return load_words(address); }
#endif

BITLM_DEVICE float bfloat_value(uint16_t bfloat) {
  return __uint_as_float(static_cast<uint32_t>(bfloat) << 16);
}

// The float of 16 bits, of type BITLM_FLOAT16 or BITLM_BFLOAT16.
BITLM_DEVICE float short_value(uint16_t bits, int type) {
  return type == BITLM_FLOAT16 ? half_value(bits) : bfloat_value(bits);
}

// Element `index` of an array of floats of `type`.
BITLM_DEVICE float float_at(const void* array, int type, int64_t index) {
  if (type == BITLM_FLOAT32) return load<float>(static_cast<const float*>(array) + index);
  return short_value(load<uint16_t>(static_cast<const uint16_t*>(array) + index), type);
}

BITLM_DEVICE void put_float(void* array, int type, int64_t index, float value) {
  if (type == BITLM_FLOAT32) {
    static_cast<float*>(array)[index] = value;
  } else {
    static_cast<uint16_t*>(array)[index] = type == BITLM_FLOAT16 ? half_of(value) : bfloat_of(value);
  }
}

BITLM_DEVICE bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
BITLM_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
BITLM_DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}

// The tokens of a block: [first, end) of expert `expert`; none where there is nothing to do.
struct Slice {
  int expert, first, end;
};

// all: the rows there are, `rank` of each token. tokens: rows of a block, the index-th of which this is.
// Whole warps come here: lanes look at an expert each.
BITLM_DEVICE Slice slice_of(int experts, const int32_t* offsets, int rank, int all, int index,
                            int tokens) {
  if (!experts) return {0, index * tokens, smaller((index + 1) * tokens, all)};
  int lane = threadIdx.x % warp_lanes, start = 0;
  for (int first = 0; first < experts; first += warp_lanes) {
    int expert = first + lane;
    int end = expert < experts ? smaller(rank * load<int32_t>(offsets + expert), all) : 0;
    end = larger(end, start);
    for (int step = 1; step < warp_lanes; step *= 2) {
      int other = __shfl_up_sync(0xffffffffu, end, step);
      if (lane >= step) end = larger(end, other);
    }
    int begin = __shfl_up_sync(0xffffffffu, end, 1);
    if (lane == 0) begin = start;
    int own = ceil_div(end - begin, tokens), until = own;
    for (int step = 1; step < warp_lanes; step *= 2) {
      int other = __shfl_up_sync(0xffffffffu, until, step);
      if (lane >= step) until += other;
    }
    int blocks = __shfl_sync(0xffffffffu, until, warp_lanes - 1);
    if (index < blocks) {
      int owner = until - own <= index && index < until ? lane : 0;
      for (int step = 16; step; step /= 2) {
        owner = larger(owner, __shfl_xor_sync(0xffffffffu, owner, step));
      }
      int before = __shfl_sync(0xffffffffu, until - own, owner);
      int token = __shfl_sync(0xffffffffu, begin, owner) + (index - before) * tokens;
      end = __shfl_sync(0xffffffffu, end, owner);
      return {first + owner, token, smaller(token + tokens, end)};
    }
    index -= blocks;
    start = __shfl_sync(0xffffffffu, end, warp_lanes - 1);
  }
  return {0, 0, 0};
}

// How many blocks slice_of needs: none is empty, so never more than there are rows.
constexpr int slices_of(int experts, int rows, int tokens) {
  int most = experts ? rows / tokens + experts : ceil_div(rows, tokens);
  return most < rows ? most : rows;
}

// The expert of a token, `experts` behind the last one's; 0 where there are none.
BITLM_DEVICE int expert_of(int experts, const int32_t* offsets, int token) {
  int first = 0, end = experts;
  while (first < end) {
    int middle = (first + end) / 2;
    if (token < load<int32_t>(offsets + middle)) {
      end = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

// Where unit `unit` of an input begins, and how many of its 128 columns there are.
struct UnitPlace {
  int group, column, columns;
};

BITLM_DEVICE UnitPlace place_of(const bitlm_cuda_input& input, int unit) {
  int group = unit / input.group_units;
  int column = group * input.group_size + (unit - group * input.group_units) * unit_columns;
  int end = smaller(input.columns, (group + 1) * input.group_size);
  return {group, column, smaller(end - column, unit_columns)};
}

// Bytes [offset, offset + 8) of a row as one integer. Only the aligned words that hold one of the
// `count` bytes wanted are read.
BITLM_DEVICE uint64_t bytes_at(const uint8_t* row, int64_t offset, int count) {
  const uint8_t* from = row + offset;
  int inside = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 3);
  const uint8_t* aligned = from - inside;
  uint32_t w0 = load<uint32_t>(aligned);
  uint32_t w1 = inside + count > 4 ? load<uint32_t>(aligned + 4) : 0;
  uint32_t w2 = inside + count > 8 ? load<uint32_t>(aligned + 8) : 0;
  uint64_t low = w0 | static_cast<uint64_t>(w1) << 32;
  return inside ? low >> 8 * inside | static_cast<uint64_t>(w2) << (64 - 8 * inside) : low;
}

// Columns [column, column + 32) of a row of bits of `columns` columns; those past the end are not
// defined. `column` is one of the row's.
BITLM_DEVICE uint32_t bits_at(const uint8_t* row, int column, int columns) {
  int first = column >> 3, last = (smaller(column + word_columns, columns) - 1) >> 3;
  return static_cast<uint32_t>(bytes_at(row, first, last - first + 1) >> (column & 7));
}

}  // namespace bitlm
