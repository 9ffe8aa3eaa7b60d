// Starting products of many tokens of 1 and 2 bits.
#include "cuda_few.h"

namespace bitlm {
namespace {

template <int A>
__global__ void __launch_bounds__(few_threads, 2)
    few_kernel(const __grid_constant__ bitlm_cuda_product call) {
  __shared__ PassRows passes[BITLM_CUDA_MAX_PASSES];
  few_block<A>(call, passes);
}

template <int A>
int start_few(const bitlm_cuda_product& call, void* stream) {
  int slices = slices_of(call.experts, call.input.rows, few_tokens(A));
  dim3 blocks(static_cast<unsigned>(slices), static_cast<unsigned>(ceil_div(call.rows, few_rows)));
  return launch(few_kernel<A>, call, blocks, few_threads, few_memory(A), stream);
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_few_launch(const bitlm_cuda_product* call, void* stream) {
  using namespace bitlm;
  const bitlm_cuda_input& in = call->input;
  bool grouped = in.group_size >= in.columns || in.group_size % unit_columns == 0;
  if (call->count < 1 || call->count > BITLM_CUDA_MAX_PASSES || in.columns % unit_columns ||
      !grouped || in.digits != 1) {
    return cudaErrorInvalidValue;
  }
  switch (in.activation) {
    case BITLM_INT2: return start_few<BITLM_INT2>(*call, stream);
    case BITLM_UINT2: return start_few<BITLM_UINT2>(*call, stream);
    case BITLM_INT1: return start_few<BITLM_INT1>(*call, stream);
    case BITLM_UINT1: return start_few<BITLM_UINT1>(*call, stream);
    default: return cudaErrorInvalidValue;
  }
}
