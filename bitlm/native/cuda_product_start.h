// Which product kernel a call takes, and launching it; included once for each number of digits.
#pragma once

#include "cuda_product.h"

namespace bitlm {

template <int D>
int start_product(const bitlm_cuda_product& call, void* stream);

namespace {

// Blocks of a multiprocessor that the registers must do for: many tokens have many sums.
constexpr int resident_blocks(int tokens) { return tokens >= 4 ? 1 : 2; }

template <int D, int R, int T, bool FAST, bool STAGES>
__global__ void __launch_bounds__(stage_threads, resident_blocks(T))
    product_kernel(const __grid_constant__ bitlm_cuda_product call) {
  __shared__ StageMemory stage;
  __shared__ uint16_t table[256];
  if (!FAST) {
    table[threadIdx.x] = trit_bits(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  product_block<D, R, T, FAST, STAGES>(call, stage, table);
}

bool is_aligned(const void* address, int bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether rows can be read 16 bytes, and scales 8 bytes, at a time.
bool is_fast(const bitlm_cuda_product& call) {
  const bitlm_cuda_input& in = call.input;
  bool whole = in.group_size >= in.columns || in.group_size % unit_columns == 0;
  if (!whole || in.columns % unit_columns) return false;
  for (int i = 0; i < call.count; i++) {
    const bitlm_cuda_pass& p = call.pass[i];
    if (p.trits || p.zones || p.drop) return false;
    if (!is_aligned(p.signs, 16) || !is_aligned(p.mask, 16) || !is_aligned(p.scales, 8)) {
      return false;
    }
  }
  return true;
}

template <int D, int R, int T, bool FAST, bool STAGES>
int start(const bitlm_cuda_product& call, void* stream) {
  int slices = slices_of(call.experts, call.input.rows, T);
  // Blocks of the same rows run side by side, so that memory is asked for the codes once.
  dim3 blocks(static_cast<unsigned>(slices),
              static_cast<unsigned>(ceil_div(call.rows, R * tile_rows)));
  int memory = product_memory(D, R, T, STAGES, call.input.units);
  return launch(product_kernel<D, R, T, FAST, STAGES>, call, blocks, stage_threads, memory, stream);
}

}  // namespace

template <int D>
int start_product(const bitlm_cuda_product& call, void* stream) {
  if (!is_fast(call)) {
    if (call.stages) return start<D, 1, 1, false, true>(call, stream);
    if (call.block_tokens == 1) return start<D, 1, 1, false, false>(call, stream);
    return start<D, 1, 4, false, false>(call, stream);
  }
  if (call.stages) return start<D, 1, 1, true, true>(call, stream);
  switch (call.block_tokens) {
    case 1: return start<D, 1, 1, true, false>(call, stream);
    case 2: return start<D, 1, 2, true, false>(call, stream);
    case 4: return start<D, 2, 4, true, false>(call, stream);
    default: return start<D, 2, 8, true, false>(call, stream);
  }
}

}  // namespace bitlm
