// Rank-k scales: the products of k scaled copies of x, put together.
#include "cuda_device.h"

namespace bitlm {
namespace {

constexpr int combine_threads = 256;

__global__ void __launch_bounds__(combine_threads) combine_kernel(const __grid_constant__
                                                                  bitlm_cuda_combine call) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * combine_threads + threadIdx.x;
  if (at >= static_cast<int64_t>(call.tokens) * call.rows) return;
  int64_t token = at / call.rows, row = at % call.rows;
  float sum = 0.0f;
  for (int j = 0; j < call.rank; j++) {
    float scale = float_at(call.row_scales, call.type, row * call.rank + j);
    sum = fmaf(scale, call.products[(token * call.rank + j) * call.rows + row], sum);
  }
  float* y = call.y + token * call.y_columns + call.y_column + row;
  *y = call.add ? *y + sum : sum;
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_combine_launch(const bitlm_cuda_combine* call, void* stream) {
  using namespace bitlm;
  int64_t all = static_cast<int64_t>(call->tokens) * call->rows;
  dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(all, combine_threads)));
  return launch(combine_kernel, *call, blocks, combine_threads, 0, stream);
}
