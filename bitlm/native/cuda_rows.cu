// Rows of the dense weight: embeddings, dequantizing, and what the dense product of many tokens
// reads. A thread makes 8 columns where their bits are one byte and share a scale, else one at a time.
#include "cuda_device.h"

namespace bitlm {
namespace {

constexpr int row_threads = 256;

BITLM_DEVICE int bit_at(const uint8_t* bits, int64_t row, int column, int columns) {
  int64_t at = row * ((columns + 7) / 8) + column / 8;
  return load<uint8_t>(bits + at) >> column % 8 & 1;
}

BITLM_DEVICE int code_at(const bitlm_cuda_pass& pass, int64_t row, int column, int columns) {
  if (pass.trits) {
    int byte = load<uint8_t>(pass.trits + row * ((columns + 4) / 5) + column / 5);
    for (int t = column % 5; t < 4; t++) byte /= 3;
    return byte % 3 - 1;
  }
  if (!pass.signs) return 1;  // a shift
  int code = 2 * bit_at(pass.signs, row, column, columns) - 1;
  return pass.mask ? code * bit_at(pass.mask, row, column, columns) : code;
}

BITLM_DEVICE float scale_at(const bitlm_cuda_pass& pass, int64_t row, int column,
                            const bitlm_cuda_rows& call) {
  if (!pass.scales) return pass.factor;
  int groups = ceil_div(call.columns, call.group_size), zones = 1, zone = 0;
  if (pass.zones) {
    zones = 2;
    zone = bit_at(pass.zones, row, column, call.columns);
  }
  int64_t at = (row * zones + zone) * groups + column / call.group_size;
  return pass.factor * float_at(pass.scales, pass.scale_type, at);
}

BITLM_DEVICE float salient_at(const bitlm_cuda_rows& call, int64_t row, int column) {
  const uint8_t* mask = call.salient_mask + row * ((call.columns + 7) / 8);
  int before = 0;
  for (int first = 0; first < column; first += word_columns) {
    uint32_t word = bits_at(mask, first, call.columns);
    int own = column - first;
    before += __popc(own < word_columns ? word & ((1u << own) - 1) : word);
  }
  int value = load<uint8_t>(call.salient_values + load<int64_t>(call.salient_starts + row) + before);
  int zero = load<uint8_t>(call.salient_zeros + row);
  return float_at(call.salient_scales, call.salient_type, row) * static_cast<float>(value - zero);
}

__global__ void __launch_bounds__(row_threads) rows_kernel(const __grid_constant__
                                                           bitlm_cuda_rows call) {
  int64_t row = call.ids ? load<int64_t>(call.ids + blockIdx.x) : call.first + blockIdx.x;
  bool is_row = row >= 0 && row < call.rows;
  for (int column = threadIdx.x; column < call.columns; column += row_threads) {
    float sum = is_row ? 0.0f : NAN;
    if (is_row && call.salient_mask && bit_at(call.salient_mask, row, column, call.columns)) {
      sum = salient_at(call, row, column);
    } else if (is_row) {
      for (int i = 0; i < call.count; i++) {
        const bitlm_cuda_pass& pass = call.pass[i];
        float scale = scale_at(pass, row, column, call);
        sum = fmaf(static_cast<float>(code_at(pass, row, column, call.columns)), scale, sum);
      }
    }
    if (is_row && call.multipliers) {
      int64_t at = row / call.multiplier_rows * call.columns + column;
      sum *= float_at(call.multipliers, call.multiplier_type, at);
    }
    put_float(call.out, call.out_type, static_cast<int64_t>(blockIdx.x) * call.columns + column,
              sum);
  }
}

// Whether 8 columns are one byte of every plane, and in one group.
bool by_bytes(const bitlm_cuda_rows& call) {
  bool one_group = call.group_size >= call.columns;
  if (call.columns % 8 || (!one_group && call.group_size % 8)) return false;
  if (call.salient_mask || call.multipliers) return false;
  if (reinterpret_cast<uintptr_t>(call.out) % 16) return false;
  for (int i = 0; i < call.count; i++) {
    if (call.pass[i].trits || call.pass[i].zones || call.pass[i].drop) return false;
  }
  return true;
}

BITLM_DEVICE uint32_t two_of(int type, float low, float high) {
  uint32_t a = type == BITLM_FLOAT16 ? half_of(low) : bfloat_of(low);
  uint32_t b = type == BITLM_FLOAT16 ? half_of(high) : bfloat_of(high);
  return a | b << 16;
}

BITLM_DEVICE void store_eight(const bitlm_cuda_rows& call, int64_t at, const float (&value)[8]) {
  if (call.out_type == BITLM_FLOAT32) {
    float* out = static_cast<float*>(call.out) + at;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Words four;
#pragma unroll
      for (int i = 0; i < 4; i++) four.word[i] = __float_as_uint(value[4 * half + i]);
      *reinterpret_cast<Words*>(out + 4 * half) = four;
    }
    return;
  }
  Words eight;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    eight.word[i] = two_of(call.out_type, value[2 * i], value[2 * i + 1]);
  }
  *reinterpret_cast<Words*>(static_cast<uint16_t*>(call.out) + at) = eight;
}

__global__ void __launch_bounds__(row_threads) bytes_kernel(const __grid_constant__
                                                            bitlm_cuda_rows call) {
  int64_t row = call.ids ? load<int64_t>(call.ids + blockIdx.x) : call.first + blockIdx.x;
  bool is_row = row >= 0 && row < call.rows;
  int bytes = call.columns / 8, groups = ceil_div(call.columns, call.group_size);
  for (int byte = threadIdx.x; byte < bytes; byte += row_threads) {
    float value[8];
#pragma unroll
    for (int k = 0; k < 8; k++) value[k] = is_row ? 0.0f : NAN;
    int group = groups == 1 ? 0 : 8 * byte / call.group_size;
    for (int i = 0; is_row && i < call.count; i++) {
      const bitlm_cuda_pass& pass = call.pass[i];
      float scale = pass.factor;
      if (pass.scales) scale *= float_at(pass.scales, pass.scale_type, row * groups + group);
      uint32_t signs = pass.signs ? load<uint8_t>(pass.signs + row * bytes + byte) : 255u;
      uint32_t mask = pass.mask ? load<uint8_t>(pass.mask + row * bytes + byte) : 255u;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float code = signs >> k & 1 ? scale : -scale;
        value[k] += mask >> k & 1 ? code : 0.0f;
      }
    }
    store_eight(call, static_cast<int64_t>(blockIdx.x) * call.columns + 8 * byte, value);
  }
}

}  // namespace
}  // namespace bitlm

int bitlm_cuda_rows_launch(const bitlm_cuda_rows* call, void* stream) {
  using namespace bitlm;
  if (call->count < 0 || call->count > BITLM_CUDA_MAX_PASSES) return cudaErrorInvalidValue;
  dim3 blocks(static_cast<unsigned>(call->rows_out));
  auto kernel = by_bytes(*call) ? bytes_kernel : rows_kernel;
  return launch(kernel, *call, blocks, row_threads, 0, stream);
}
