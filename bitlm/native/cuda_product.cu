// The product's entry: the kernels are in cuda_product_1.cu, _2.cu and _3.cu.
#include "cuda_device.h"

namespace bitlm {
template <int D>
int start_product(const bitlm_cuda_product& call, void* stream);
extern template int start_product<1>(const bitlm_cuda_product& call, void* stream);
extern template int start_product<2>(const bitlm_cuda_product& call, void* stream);
extern template int start_product<3>(const bitlm_cuda_product& call, void* stream);
}  // namespace bitlm

int bitlm_cuda_product_launch(const bitlm_cuda_product* call, void* stream) {
  if (call->count < 0 || call->count > BITLM_CUDA_MAX_PASSES) return cudaErrorInvalidValue;
  switch (call->input.digits) {
    case 1: return bitlm::start_product<1>(*call, stream);
    case 2: return bitlm::start_product<2>(*call, stream);
    case 3: return bitlm::start_product<3>(*call, stream);
    default: return cudaErrorInvalidValue;
  }
}
