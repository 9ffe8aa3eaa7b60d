// What the CUDA library says of itself.
#include "cuda_device.h"

#if !defined(BITLM_CUDA_ARCHITECTURES)
#define BITLM_CUDA_ARCHITECTURES ""
#endif

int bitlm_cuda_abi_version(void) { return BITLM_CUDA_ABI_VERSION; }

const char* bitlm_cuda_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

const char* bitlm_cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

const char* bitlm_cuda_architectures(void) { return BITLM_CUDA_ARCHITECTURES; }
