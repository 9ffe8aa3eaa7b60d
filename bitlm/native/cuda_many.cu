// Starting products of many tokens, and the kernel that orders their inputs.
#include "cuda_many.h"

namespace bitlm {
namespace {

template <int R, int TYPE>
__global__ void __launch_bounds__(many_threads, 1)
    many_kernel(const __grid_constant__ bitlm_cuda_many call) {
  __shared__ PassRows passes[BITLM_CUDA_MANY_PASSES];
  many_block<R, TYPE>(call, passes);
}

template <int R>
int start_many(const bitlm_cuda_many& call, void* stream) {
  int slices = slices_of(call.experts, call.tokens, many_tokens);
  dim3 blocks(static_cast<unsigned>(slices),
              static_cast<unsigned>(ceil_div(call.rows, many_rows(R))));
  int memory = many_memory(R, call.count);
  auto kernel = call.type == BITLM_FLOAT16 ? many_kernel<R, BITLM_FLOAT16>
                                           : many_kernel<R, BITLM_BFLOAT16>;
  constexpr int most = many_memory(R, BITLM_CUDA_MANY_PASSES);
  return launch(kernel, call, blocks, many_threads, memory, stream, most);
}

constexpr int order_threads = 256;

__global__ void __launch_bounds__(order_threads) order_kernel(const __grid_constant__
                                                              bitlm_cuda_order call) {
  int64_t chunks = call.columns / 8, at = static_cast<int64_t>(blockIdx.x) * order_threads + threadIdx.x;
  if (at >= call.tokens * chunks) return;
  int chunk = static_cast<int>(at % chunks);
  order_chunk(call, at / chunks, chunk / 4, chunk % 4);
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_many_launch(const bitlm_cuda_many* call, void* stream) {
  using namespace bitlm;
  bool grouped = call->group_size >= call->columns || call->group_size % step_columns == 0;
  if (call->count < 1 || call->count > BITLM_CUDA_MANY_PASSES || call->columns % step_columns ||
      !grouped || call->type == BITLM_FLOAT32) {
    return cudaErrorInvalidValue;
  }
  return call->tiles == 1 ? start_many<1>(*call, stream) : start_many<2>(*call, stream);
}

int bitlm_cuda_order_launch(const bitlm_cuda_order* call, void* stream) {
  using namespace bitlm;
  if (call->columns % word_columns) return cudaErrorInvalidValue;
  int64_t chunks = static_cast<int64_t>(call->tokens) * (call->columns / 8);
  dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(chunks, order_threads)));
  return launch(order_kernel, *call, blocks, order_threads, 0, stream);
}
