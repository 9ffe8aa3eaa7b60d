// Stages inputs in device memory, for products of several tokens or with wide inputs.
#include "cuda_stage.h"

namespace bitlm {
namespace {

template <int D>
__global__ void __launch_bounds__(stage_threads) stage_kernel(const __grid_constant__
                                                              bitlm_cuda_input in) {
  __shared__ StageMemory memory;
  constexpr int sums = D == 3 ? 8 : 4;
  int row = blockIdx.x;
  StagedRow to;
  to.words = in.words + static_cast<int64_t>(row) * D * digit_words;
  to.sums = in.sums + static_cast<int64_t>(row) * sums;
  to.scales = in.scales + row;
  to.rounded = in.rounded ? in.rounded + static_cast<int64_t>(row) * in.columns : nullptr;
  to.word_stride = in.unit_words;
  to.sum_stride = static_cast<int64_t>(in.padded_rows) * sums;
  to.scale_stride = in.padded_rows;
  stage_row<D>(in, row, to, memory);
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_stage(const bitlm_cuda_input* input, void* stream) {
  using namespace bitlm;
  dim3 blocks(static_cast<unsigned>(input->padded_rows));
  switch (input->digits) {
    case 1: return launch(stage_kernel<1>, *input, blocks, stage_threads, 0, stream);
    case 2: return launch(stage_kernel<2>, *input, blocks, stage_threads, 0, stream);
    case 3: return launch(stage_kernel<3>, *input, blocks, stage_threads, 0, stream);
    default: return cudaErrorInvalidValue;
  }
}
