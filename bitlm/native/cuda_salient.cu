// Salient entries: a warp takes a row and finds its values by counting the bits before them.
#include "cuda_device.h"

namespace bitlm {
namespace {

constexpr int salient_threads = 256, salient_rows = salient_threads / warp_lanes;
constexpr int salient_tokens = 4;  // of a block

struct RowSums {
  float of[salient_tokens];
};

BITLM_DEVICE void add_entry(RowSums& sums, const bitlm_cuda_salient& call, const Slice& slice,
                            float value, int column) {
#pragma unroll
  for (int i = 0; i < salient_tokens; i++) {
    int token = slice.first + i;
    if (token >= slice.end) break;
    float x = load<float>(call.x + static_cast<int64_t>(token) * call.columns + column);
    sums.of[i] = fmaf(value, x, sums.of[i]);
  }
}

BITLM_DEVICE void add_marked(RowSums& sums, const bitlm_cuda_salient& call, const Slice& slice,
                             int64_t row, float zero) {
  int lane = threadIdx.x % warp_lanes;
  const uint8_t* mask = call.mask + row * ((call.columns + 7) / 8);
  const uint8_t* values = call.values + load<int64_t>(call.starts + row);
  for (int first = 0; first < call.columns; first += warp_lanes * word_columns) {
    int column = first + lane * word_columns, left = call.columns - column;
    uint32_t word = 0;
    if (left > 0) {
      word = bits_at(mask, column, call.columns);
      if (left < word_columns) word &= (1u << left) - 1;
    }
    int own = __popc(word), before = own;
    for (int step = 1; step < warp_lanes; step *= 2) {
      int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    int all = __shfl_sync(0xffffffffu, before, warp_lanes - 1);
    for (const uint8_t* next = values + before - own; word; word &= word - 1, next++) {
      add_entry(sums, call, slice, load<uint8_t>(next) - zero, column + __ffs(word) - 1);
    }
    values += all;
  }
}

__global__ void __launch_bounds__(salient_threads) salient_kernel(const __grid_constant__
                                                                  bitlm_cuda_salient call) {
  int lane = threadIdx.x % warp_lanes;
  Slice slice = slice_of(call.experts, call.offsets, 1, call.tokens, blockIdx.x, salient_tokens);
  int own_row = blockIdx.y * salient_rows + threadIdx.x / warp_lanes;
  if (own_row >= call.rows || slice.first >= slice.end) return;
  int64_t row = static_cast<int64_t>(slice.expert) * call.expert_rows + own_row;
  float zero = load<uint8_t>(call.zeros + row);
  RowSums sums = {};
  if (call.mask) {
    add_marked(sums, call, slice, row, zero);
  } else {
    const uint8_t* values = call.values + row * call.columns;
    for (int column = lane; column < call.columns; column += warp_lanes) {
      add_entry(sums, call, slice, load<uint8_t>(values + column) - zero, column);
    }
  }
  float scale = float_at(call.scales, call.type, row);
#pragma unroll
  for (int i = 0; i < salient_tokens; i++) {
    float sum = sums.of[i];
#pragma unroll
    for (int other = 16; other; other >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    int token = slice.first + i;
    if (lane != 0 || token >= slice.end) continue;
    float* y = call.y + static_cast<int64_t>(token) * call.y_columns + call.y_column + own_row;
    *y = call.add ? *y + scale * sum : scale * sum;
  }
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_salient_launch(const bitlm_cuda_salient* call, void* stream) {
  using namespace bitlm;
  int slices = slices_of(call->experts, call->tokens, salient_tokens);
  dim3 blocks(static_cast<unsigned>(slices),
              static_cast<unsigned>(ceil_div(call->rows, salient_rows)));
  return launch(salient_kernel, *call, blocks, salient_threads, 0, stream);
}
