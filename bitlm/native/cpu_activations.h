// Rounding of activations: x as given -> `Activations` of one input of a sub-weight.
#pragma once

#include <vector>

#include "kernel.h"

namespace bitlm {

// Memory of the calling thread that is kept from call to call. 64-byte aligned.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // Throws std::bad_alloc.
  void* bytes(int64_t count);
  float* floats(int64_t count) { return static_cast<float*>(bytes(count * 4)); }

 private:
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

// The rows that an input reads: x in fp32, or the output of a stage.
struct Source {
  const float* rows;  // [tokens][stride]
  int64_t stride;
  int64_t columns;
};

struct Needs {
  bool digits, tables, bits, floats;
};

// One rounded input and its memory.
struct RoundedInput {
  Activations x;
  Scratch digit_memory, sum_memory, scale_memory, table_memory, bit_memory, float_memory;
  std::vector<float> group_sums;  // [tokens][groups]: sums of the rounded x, for shifts
};

// Sets the sizes of `out` and gets its memory; nothing is rounded yet.
void reserve(const bitlm_shape& shape, int rank, int tokens, int activation, const Needs& needs,
             RoundedInput& out);

// Rounds one token (all its `rank` rows) of `source` into `out`. base: the prepared weight.
void round_token(const Kernel& kernel, const uint8_t* base, const bitlm_input& input,
                 const Source& source, int token, const float* step, const Needs& needs,
                 bool group_sums, RoundedInput& out);

// Builds the tables of chunks [first, end) of one row. Call `reserve_tables` before, once.
void reserve_tables(int first, int end, RoundedInput& out);
void build_tables(const Kernel& kernel, int first, int end, int row, RoundedInput& out);

}  // namespace bitlm
