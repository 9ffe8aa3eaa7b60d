// Random weights and inputs through every kernel against a plain loop; see scripts/sanitize.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "bitlm.h"

namespace {

std::mt19937 random_bits(1);

int pick(int low, int high) { return low + static_cast<int>(random_bits() % (high - low + 1)); }

float uniform() { return static_cast<float>(random_bits() % 20001) / 10000.0f - 1.0f; }

// Exactly as large as the tensor, so that the sanitizer sees any byte read past it.
std::vector<uint8_t> random_bytes(size_t count, int limit) {
  std::vector<uint8_t> bytes(count);
  bytes.shrink_to_fit();
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_bits() % limit);
  return bytes;
}

struct Plane {
  std::vector<uint8_t> signs, mask, trits;
  std::vector<float> scales;
};

int code(const Plane& plane, int64_t columns, int64_t row, int64_t column) {
  if (!plane.trits.empty()) {
    const int powers[5] = {81, 27, 9, 3, 1};
    return plane.trits[row * ((columns + 4) / 5) + column / 5] / powers[column % 5] % 3 - 1;
  }
  int64_t at = row * ((columns + 7) / 8) + column / 8;
  if (!plane.mask.empty() && !(plane.mask[at] >> column % 8 & 1)) return 0;
  return plane.signs[at] >> column % 8 & 1 ? 1 : -1;
}

bool one_case(int set, int number) {
  int rows = pick(1, 150), columns = pick(1, number % 8 ? 300 : 2500), batch = pick(1, 9);
  if (number % 16 == 0) batch = pick(60, 70);
  int group = pick(0, 3) ? pick(1, columns) : columns;
  int groups = (columns + group - 1) / group, planes = pick(1, 3);
  std::vector<Plane> weight(planes);
  bitlm_linear call = {};
  for (int p = 0; p < planes; p++) {
    Plane& plane = weight[p];
    size_t bytes = static_cast<size_t>(rows) * ((columns + 7) / 8);
    int kind = pick(0, 2);
    if (kind == 2) {
      plane.trits = random_bytes(static_cast<size_t>(rows) * ((columns + 4) / 5), 243);
    } else {
      plane.signs = random_bytes(bytes, 256);
      if (kind == 1) plane.mask = random_bytes(bytes, 256);
    }
    for (int i = 0; i < rows * groups; i++) plane.scales.push_back(uniform());
    call.plane[p] = {plane.signs.empty() ? nullptr : plane.signs.data(),
                     plane.mask.empty() ? nullptr : plane.mask.data(),
                     plane.trits.empty() ? nullptr : plane.trits.data(),
                     plane.scales.data(), BITLM_FLOAT32, std::ldexp(1.0f, -p)};
  }
  std::vector<float> x, bias, shift, y(static_cast<size_t>(batch) * rows);
  for (int i = 0; i < batch * columns; i++) x.push_back(uniform());
  for (int i = 0; i < rows; i++) bias.push_back(uniform());
  for (int i = 0; i < rows * groups; i++) shift.push_back(uniform());
  bool with_shift = pick(0, 1), with_bias = pick(0, 1);
  call.rows = rows, call.columns = columns, call.group_size = group, call.batch = batch;
  call.x = x.data(), call.y = y.data(), call.planes = planes, call.threads = pick(1, 3);
  call.bias = with_bias ? bias.data() : nullptr;
  call.shift = with_shift ? shift.data() : nullptr;
  call.algorithm = pick(0, 2);
  bitlm_cpu_limit_instruction_set(set);
  if (bitlm_packed_linear(&call) != BITLM_OK) return false;
  for (int b = 0; b < batch; b++) {
    for (int n = 0; n < rows; n++) {
      double sum = with_bias ? bias[n] : 0, size = 1;
      for (int k = 0; k < columns; k++) {
        double w = with_shift ? shift[n * groups + k / group] : 0;
        for (int p = 0; p < planes; p++) {
          w += code(weight[p], columns, n, k) * std::ldexp(1.0, -p) *
               weight[p].scales[n * groups + k / group];
        }
        sum += w * x[b * columns + k];
        size += std::fabs(w * x[b * columns + k]);
      }
      double difference = std::fabs(sum - y[b * rows + n]);
      if (!(difference <= 1e-5 * size)) {
        std::printf("set %d case %d: row %d token %d of %dx%d group %d batch %d: %g, expected %g\n",
                    set, number, n, b, rows, columns, group, batch, y[b * rows + n], sum);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  int cases = count > 1 ? std::atoi(arguments[1]) : 200;
  for (int set = BITLM_SCALAR; set <= BITLM_AVX512; set++) {
    if (bitlm_cpu_limit_instruction_set(set) != set) continue;
    for (int number = 0; number < cases; number++) {
      if (!one_case(set, number)) return 1;
    }
    std::printf("%s: %d cases agree\n", bitlm_cpu_instruction_set(), cases);
  }
  return 0;
}
