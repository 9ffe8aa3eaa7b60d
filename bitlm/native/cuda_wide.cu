// Starting products of many tokens on sm_90a.
#include "cuda_device.h"

#if defined(__CUDACC__) && !defined(BITLM_CUDA_90A)  // not built for it: see cuda.cmake

int bitlm_cuda_wide_launch(const bitlm_cuda_many*, void*) { return cudaErrorNotSupported; }

#else

#include "cuda_wide.h"

namespace bitlm {
namespace {

// blocks: that a multiprocessor has to hold.
template <class Shape, int TYPE, int BLOCKS>
__global__ void __launch_bounds__(Shape::threads, BLOCKS)
    wide_kernel(const __grid_constant__ WideCall call) {
  __shared__ uint64_t landings[Shape::stages];
  wide_block<Shape, TYPE>(call, landings);
}

template <int GROUPS, int TOKENS, int BITS, int BLOCKS>
int start_wide(const bitlm_cuda_many& many, void* stream) {
  using Shape = Wide<GROUPS, TOKENS, BITS>;
  int64_t blocks = static_cast<int64_t>(slices_of(many.experts, many.tokens, TOKENS)) *
                   ceil_div(many.rows, Shape::rows);
  if (!blocks) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  WideCall call = {many, {}};
  int error = map_tokens(&call.x, many.x, many.type, many.tokens, many.columns, TOKENS);
  if (error) return error;
  auto kernel = many.type == BITLM_FLOAT16 ? wide_kernel<Shape, BITLM_FLOAT16, BLOCKS>
                                           : wide_kernel<Shape, BITLM_BFLOAT16, BLOCKS>;
  return launch(kernel, call, dim3(static_cast<unsigned>(blocks)), Shape::threads, Shape::memory,
                stream, Shape::memory);
}

template <int BITS>
int start_wide(const bitlm_cuda_many& call, void* stream) {
  switch (call.tiles) {
    case 1: return start_wide<1, 128, BITS, 2>(call, stream);
    case 2: return start_wide<2, 128, BITS, 1>(call, stream);
    case 4: return start_wide<2, 256, BITS, 1>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_wide_launch(const bitlm_cuda_many* call, void* stream) {
  using namespace bitlm;
  bool grouped = call->group_size >= call->columns || call->group_size % step_columns == 0;
  int bits = 0;
  for (int i = 0; i < call->count && i < BITLM_CUDA_MANY_PASSES; i++) {
    bits += (call->pass[i].signs != nullptr) + (call->pass[i].mask != nullptr);
  }
  if (call->count < 1 || call->count > wide_passes || !call->pass[0].signs ||
      call->columns % step_columns || !grouped || call->type == BITLM_FLOAT32) {
    return cudaErrorInvalidValue;
  }
  switch (bits) {
    case 1: return start_wide<1>(*call, stream);
    case 2: return start_wide<2>(*call, stream);
    default: return cudaErrorInvalidValue;
  }
}

#endif
