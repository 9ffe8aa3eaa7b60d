// The tensor cores of sm_90a: products that four warps start together and that go on by themselves.
//
// A warpgroup is four warps, from a multiple of four on. Its products read one matrix from registers and
// the other from shared memory, and add to sums in registers; none of these may be touched until
// await_products has waited for them. PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "cuda_device.h"

namespace bitlm {

constexpr int group_threads = 4 * warp_lanes;
constexpr int product_rows = 64, product_tokens = 128, product_columns = 16;
constexpr int product_sums = product_rows * product_tokens / group_threads;  // of a thread
// Rows of 128 bytes in shared memory, eight of which the hardware reads at a time: the 16-byte pieces
// of row i are exchanged by the lowest three bits of i, so that they lie in different banks.
constexpr int swizzled_bytes = 128, swizzle_alignment = 8 * swizzled_bytes;

// Where the 16-byte piece `piece` of row `row` lies.
BITLM_DEVICE int swizzled(int row, int piece) {
  return row * swizzled_bytes + (piece ^ row % 8) * 16;
}

#if defined(__CUDACC__)

// sums += a x^T, or without `add` sums = a x^T, in fp32: a is 64 rows x 16 of fp16 or bf16, x 128 tokens x 16, from `x` on, which is
// 32 k bytes into swizzled rows. Lane (g, t) of warp w has of a what it has in multiply_add, of rows
// 16 w + g and 16 w + g + 8: elements 2t and 2t + 1 of both, then 2t + 8 and 2t + 9 of both. sums 4 j + i
// are those of tokens 8 j + 2 t + i % 2 in row 16 w + g + 8 (i / 2).
template <int TYPE>
BITLM_DEVICE void start_product(float (&s)[product_sums], const uint32_t (&a)[4], const char* at,
                                bool add) {
  // Address, and the distance of eight rows, in units of 16 bytes; the highest bits: rows of 128 bytes.
  uint64_t x = (static_cast<uint32_t>(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4 |
               1ull << 16 | static_cast<uint64_t>(swizzle_alignment >> 4) << 32 | 1ull << 62;
  if (TYPE == BITLM_FLOAT16) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]),
        "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
        "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]),
        "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
        "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]),
        "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
        "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]),
        "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
        "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]),
        "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
        "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]),
        "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
        "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]),
        "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
        "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]),
        "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(static_cast<int>(add)));
  } else {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]),
        "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
        "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]),
        "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
        "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]),
        "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
        "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]),
        "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
        "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]),
        "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
        "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]),
        "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
        "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]),
        "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
        "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]),
        "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(static_cast<int>(add)));
  }
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

// Lets products see what this thread has written to shared memory; a barrier has to follow.
BITLM_DEVICE void show_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps reads of sums behind the wait before this.
BITLM_DEVICE void settle(float (&s)[product_sums]) {
#pragma unroll
  for (int i = 0; i < product_sums; i++) asm volatile("" : "+f"(s[i])::"memory");
}

// 16 bits of the sign of the byte `byte` of `bits`, and 16 of that of the next one.
template <int BYTE>
BITLM_DEVICE uint32_t spread_signs(uint32_t bits) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(spread) : "r"(bits), "n"(0x9988 + 0x1111 * BYTE));
  return spread;
}

#endif

}  // namespace bitlm
