// Instructions of sm_90a: products that four warps start together and that go on by themselves, and
// copies of whole boxes of a matrix, which the hardware makes.
//
// A warpgroup is four warps, from a multiple of four on. Its products read one matrix from registers and
// the other from shared memory, and add to sums in registers; none of these may be touched until
// await_products has waited for them. PTX ISA, "Asynchronous warpgroup level matrix instructions",
// "cp.async.bulk.tensor" and "mbarrier".
#pragma once

#include "cuda_device.h"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "cuda_emulation_sm90a.h"
#endif

namespace bitlm {

constexpr int group_threads = 4 * warp_lanes;
constexpr int product_rows = 64, product_columns = 16;
constexpr int product_sums(int tokens) { return product_rows * tokens / group_threads; }
// Rows of a box in shared memory: 64 columns of 16 bits. The 16-byte pieces of row i are exchanged by
// the lowest three bits of i, so that those of eight rows, which are read at a time, lie in different banks.
constexpr int box_columns = 64, box_row_bytes = 128, box_alignment = 8 * box_row_bytes;

#if defined(__CUDACC__)

// ---- Products ------------------------------------------------------------------------------------

#define BITLM_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BITLM_NAMES_128 BITLM_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BITLM_SUMS_8(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), \
  "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define BITLM_SUMS_32(i) BITLM_SUMS_8(i), BITLM_SUMS_8(i + 8), BITLM_SUMS_8(i + 16), BITLM_SUMS_8(i + 24)
#define BITLM_SUMS_64(i) BITLM_SUMS_32(i), BITLM_SUMS_32(i + 32)
// A, X, ADD: the names of the operands after the sums.
#define BITLM_PRODUCT(TOKENS, TYPE, NAMES, A, X, ADD, ...) \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32." TYPE "." TYPE " {" NAMES "}, {" \
               A "}, " X ", add, 1, 1, 0;\n}" \
               : __VA_ARGS__ \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(static_cast<int>(add)))
#define BITLM_PRODUCT_128(TYPE) \
  BITLM_PRODUCT(128, TYPE, BITLM_NAMES_64, "%64, %65, %66, %67", "%68", "%69", BITLM_SUMS_64(0))
#define BITLM_PRODUCT_256(TYPE) \
  BITLM_PRODUCT(256, TYPE, BITLM_NAMES_128, "%128, %129, %130, %131", "%132", "%133", \
                BITLM_SUMS_64(0), BITLM_SUMS_64(64))

// sums += a x^T, or without `add` sums = a x^T, in fp32: a is 64 rows x 16 of fp16 or bf16, x TOKENS
// rows of a box x 16 columns, from `at` on, which is 32 k bytes into it. Lane (g, t) of warp w has of a
// what it has in multiply_add, of rows 16 w + g and 16 w + g + 8: elements 2t and 2t + 1 of both, then
// 2t + 8 and 2t + 9 of both. Its sums 4 j + i are those of tokens 8 j + 2 t + i % 2 in row
// 16 w + g + 8 (i / 2).
template <int TOKENS, int TYPE>
BITLM_DEVICE void start_product(float (&s)[product_sums(TOKENS)], const uint32_t (&a)[4],
                                const char* at, bool add) {
  // Address, and the distance of eight rows, in units of 16 bytes; the highest bits: rows of 128 bytes.
  uint64_t x = (static_cast<uint32_t>(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4 |
               1ull << 16 | static_cast<uint64_t>(box_alignment >> 4) << 32 | 1ull << 62;
  if constexpr (TOKENS == 128 && TYPE == BITLM_FLOAT16) BITLM_PRODUCT_128("f16");
  if constexpr (TOKENS == 128 && TYPE == BITLM_BFLOAT16) BITLM_PRODUCT_128("bf16");
  if constexpr (TOKENS == 256 && TYPE == BITLM_FLOAT16) BITLM_PRODUCT_256("f16");
  if constexpr (TOKENS == 256 && TYPE == BITLM_BFLOAT16) BITLM_PRODUCT_256("bf16");
}

// Before the first product, and after anything else wrote registers of the next one.
BITLM_DEVICE void ready_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the products started since the last one; await_products waits for all groups but
// the `groups` last ones.
BITLM_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int GROUPS>
BITLM_DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Keeps reads of sums behind the wait before this.
template <int COUNT>
BITLM_DEVICE void settle(float (&s)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(s[i])::"memory");
}

// 16 bits of the sign of byte BYTE of `low`, and above them 16 of that of byte BYTE of `high`.
template <int BYTE>
BITLM_DEVICE uint32_t spread_signs(uint32_t low, uint32_t high) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(spread) : "r"(low), "r"(high), "n"(0xcc88 + 0x1111 * BYTE));
  return spread;
}

// ---- Copies of boxes -----------------------------------------------------------------------------

// A matrix of 16-bit floats in device memory, of which boxes are copied.
struct TokenMap {
  CUtensorMap map;
};

// x: [tokens][columns], at a multiple of 16 bytes. box_tokens: rows of a box, up to 256. The driver's
// errors have the runtime's numbers.
inline int map_tokens(TokenMap* to, const void* x, int type, int tokens, int columns, int box_tokens) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  // The driver wants a context, which a thread has from the runtime only after it was asked for one.
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(tokens)};
  cuuint64_t strides[1] = {sizes[0] * 2};
  cuuint32_t box[2] = {box_columns, static_cast<cuuint32_t>(box_tokens)}, steps[2] = {1, 1};
  CUresult result = encode(
      &to->map, type == BITLM_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int>(result);
}

// What tells that a copy has landed, in shared memory: one copy a turn, turns have parity 0, 1, 0, ...
// One thread prepares it, then a barrier.
BITLM_DEVICE void prepare_landing(uint64_t* landing) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Starts copying the box from (token, column) on to `to`, at a multiple of box_alignment; what is
// outside of the matrix is 0. One thread calls it. bytes: of the box.
BITLM_DEVICE void start_copy(char* to, const TokenMap& from, int column, int token,
                             uint64_t* landing, int bytes) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(&from.map), "r"(at), "r"(column), "r"(token)
      : "memory");
}

// Waits for the copy of a turn. Returns false after seconds, for what a card that does not work would
// make of it: a wrong result that is noticed, not a process that never ends.
BITLM_DEVICE bool await_landing(uint64_t* landing, int parity) {
  constexpr uint64_t patience = 10ull * 1000 * 1000 * 1000;  // ns
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(landing)), there = 0;
  uint64_t begun = 0;
  for (int tries = 0;; tries++) {
    asm volatile("{\n.reg .pred there;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 there, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, there;\n}"
                 : "=r"(there) : "r"(at), "r"(parity) : "memory");
    if (there) return true;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (!tries) begun = now;
    if (now - begun > patience) return false;
  }
}

#endif

}  // namespace bitlm
