// What the dispatcher hands to a kernel. Plain data only: this header is compiled with different
// instruction sets, and an inline function here could be linked in from the wrong one.
#pragma once

#include "bitlm.h"

namespace bitlm {

constexpr int word_columns = 32;      // columns in a 32-bit word of a plane
constexpr int segment_columns = 256;  // longest run of columns summed before it is scaled
constexpr int block_columns = 512;    // columns of a tile whose bits are transposed at once
constexpr int max_tokens = 64;
constexpr int max_segments = 128;

// A run of columns with one scale. `unit` numbers its first look-up table within the job.
struct Segment {
  int64_t column;
  int32_t columns;
  int32_t group;
  int64_t unit;
};

// One pass over a range of columns for up to max_tokens tokens.
struct Job {
  const bitlm_linear* call;
  int64_t first_token;
  int32_t tokens;
  const float* x;  // [tokens, x_stride], of the whole row
  int64_t x_stride;
  const Segment* segments;
  int32_t segment_count;
  float* signed_tables;  // [tokens, table_stride]: sums of +-x; null when no plane is binary
  float* subset_tables;  // [tokens, table_stride]: sums of a subset; null when none is ternary
  int64_t table_stride;
  float* segment_sums;  // [tokens, max_segments]: sums of x; null without a shift
  float* totals;        // [tokens, rows]: carries sums from one range of columns to the next
  bool first, last;     // whether the range of columns is the first or last one
};

struct Kernel {
  const char* name;
  int tile_rows;       // rows that `look_up` and `expand` do in a call
  int units_per_word;  // look-up tables for word_columns columns
  int unit_columns;
  int table_entries;
  int expand_look_ups;  // a weight with at least so many look-ups is expanded for long batches
  // Writes `count` floats, padded to a multiple of 16; false when one is huge, infinite or NaN.
  bool (*convert)(const void* x, int type, int64_t count, float* out);
  void (*tables)(const Job& job, int token);
  void (*look_up)(const Job& job, int64_t row);
  void (*expand)(const Job& job, int64_t row);
};

extern const Kernel scalar_kernel;
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;

}  // namespace bitlm
