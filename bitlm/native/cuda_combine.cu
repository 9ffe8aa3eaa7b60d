// Rank-k scales: the products of k scaled copies of x, put together. And low-rank terms of experts.
#include "cuda_device.h"

namespace bitlm {
namespace {

constexpr int combine_threads = 256;

__global__ void __launch_bounds__(combine_threads) combine_kernel(const __grid_constant__
                                                                  bitlm_cuda_combine call) {
  int blocks = ceil_div(call.rows, combine_threads);  // of a token
  int64_t token = blockIdx.x / blocks;
  int64_t row = blockIdx.x % blocks * combine_threads + threadIdx.x, scales = row;
  if (row >= call.rows) return;
  if (call.experts) {
    int expert = expert_of(call.experts, call.offsets, static_cast<int>(token));
    if (expert == call.experts) return;
    scales += static_cast<int64_t>(expert) * call.expert_rows;
  }
  const float* products = call.products + (call.product_rows == 1 ? 0 : row);
  float sum = 0.0f;
  for (int j = 0; j < call.rank; j++) {
    float scale = float_at(call.row_scales, call.type, scales * call.rank + j);
    sum = fmaf(scale, products[(token * call.rank + j) * call.product_rows], sum);
  }
  float* y = call.y + token * call.y_columns + call.y_column + row;
  *y = call.add ? *y + sum : sum;
}

// A warp makes one number.
__global__ void __launch_bounds__(combine_threads) thin_kernel(const __grid_constant__
                                                               bitlm_cuda_thin call) {
  int lane = threadIdx.x % warp_lanes;
  int64_t at = static_cast<int64_t>(blockIdx.x) * (combine_threads / warp_lanes) +
               threadIdx.x / warp_lanes;
  int64_t token = at / call.rank;
  if (token >= call.tokens) return;
  int expert = expert_of(call.experts, call.offsets, static_cast<int>(token));
  if (call.experts && expert == call.experts) return;
  int64_t x = token * call.columns, multipliers = static_cast<int64_t>(expert) * call.columns;
  int64_t v = multipliers * call.parts * call.rank + at % call.rank * call.columns;
  float sum = 0.0f;
  for (int column = lane; column < call.columns; column += warp_lanes) {
    float value = float_at(call.x, call.x_type, x + column);
    if (call.multipliers) value *= load<float>(call.multipliers + multipliers + column);
    sum = fmaf(value, float_at(call.v, call.v_type, v + column), sum);
  }
#pragma unroll
  for (int other = 16; other; other >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (lane == 0) call.y[at] = sum;
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_combine_launch(const bitlm_cuda_combine* call, void* stream) {
  using namespace bitlm;
  int64_t blocks_of_token = ceil_div(call->rows, combine_threads);
  dim3 blocks(static_cast<unsigned>(call->tokens * blocks_of_token));
  return launch(combine_kernel, *call, blocks, combine_threads, 0, stream);
}

int bitlm_cuda_thin_launch(const bitlm_cuda_thin* call, void* stream) {
  using namespace bitlm;
  int64_t all = static_cast<int64_t>(call->tokens) * call->rank;
  dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(all, combine_threads / warp_lanes)));
  return launch(thin_kernel, *call, blocks, combine_threads, 0, stream);
}
