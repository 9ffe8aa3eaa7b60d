// Chooses the kernel for this machine, cuts a call into tokens, columns and tiles, and shares the
// tiles out over threads. Which thread does a tile does not change what the tile computes.
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu_job.h"
#include "cpu_pool.h"

#if defined(BITLM_WITH_X86_KERNELS)
#include <cpuid.h>
#endif

namespace bitlm {
namespace {

constexpr int64_t table_bytes = 512 << 10;     // of one pass: they have to stay in the L2 cache
constexpr int64_t pass_columns = 16384;
constexpr int64_t thread_look_ups = 1 << 18;   // less work than this is not worth a second thread
constexpr int expand_tokens = 32;

int detect() {
#if defined(BITLM_WITH_X86_KERNELS)
  // The builtin also asks the operating system whether it saves the registers.
  unsigned a, b, c = 0, d;
  __builtin_cpu_init();
  bool half = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!half || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return BITLM_SCALAR;
  }
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? BITLM_AVX512 : BITLM_AVX2;
#else
  return BITLM_SCALAR;
#endif
}

int detected() {
  static const int set = detect();
  return set;
}

std::atomic<int> limit{BITLM_AVX512};

int instruction_set() {
  int allowed = limit.load(std::memory_order_relaxed);
  return allowed < detected() ? allowed : detected();
}

const Kernel& kernel() {
  switch (instruction_set()) {
#if defined(BITLM_WITH_X86_KERNELS)
    case BITLM_AVX512:
      return avx512_kernel;
    case BITLM_AVX2:
      return avx2_kernel;
#endif
    default:
      return scalar_kernel;
  }
}

// Scratch memory of the calling thread, kept from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Returns `count` floats on a 64-byte boundary; each slot keeps its own.
  float* floats(int64_t count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      memory_ = std::malloc(sizeof(float) * count + 64);
      if (!memory_) throw std::bad_alloc();
      capacity_ = count;
    }
    uintptr_t address = (reinterpret_cast<uintptr_t>(memory_) + 63) & ~static_cast<uintptr_t>(63);
    return reinterpret_cast<float*>(address);
  }

 private:
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

struct Scratches {
  Scratch x, signed_tables, subset_tables, segment_sums, totals;
  std::vector<Segment> segments;
};

// Cuts columns [begin, end) into segments, at most max_segments of them and at most `columns`
// columns, and returns where the first column after them is.
int64_t cut(const bitlm_linear& call, const Kernel& kernel, int64_t begin, int64_t columns,
            std::vector<Segment>& segments) {
  segments.clear();
  int64_t unit = 0, column = begin;
  while (column < call.columns && segments.size() < max_segments) {
    int64_t group = column / call.group_size;
    int64_t end = (group + 1) * call.group_size;
    if (end > call.columns) end = call.columns;
    if (end > column + segment_columns) end = column + segment_columns;
    if (end > begin + columns && column > begin) break;
    int64_t count = end - column;
    segments.push_back({column, static_cast<int32_t>(count), static_cast<int32_t>(group), unit});
    unit += count / word_columns * kernel.units_per_word +
            (count % word_columns + kernel.unit_columns - 1) / kernel.unit_columns;
    column = end;
  }
  return column;
}

struct Convert {
  const Kernel& kernel;
  const Job& job;
  float* x;
  std::atomic<bool> ordinary;
};

void convert_ticket(void* context, int64_t token) {
  Convert& c = *static_cast<Convert*>(context);
  const bitlm_linear& call = *c.job.call;
  int64_t bytes = (call.x_type == BITLM_FLOAT32 ? 4 : 2) * call.columns;
  const char* from = static_cast<const char*>(call.x) + (c.job.first_token + token) * bytes;
  if (!c.kernel.convert(from, call.x_type, call.columns, c.x + token * c.job.x_stride)) {
    c.ordinary = false;
  }
}

struct Pass {
  const Kernel& kernel;
  const Job& job;
};

void tables_ticket(void* context, int64_t token) {
  Pass& pass = *static_cast<Pass*>(context);
  pass.kernel.tables(pass.job, static_cast<int>(token));
}

void look_up_ticket(void* context, int64_t tile) {
  Pass& pass = *static_cast<Pass*>(context);
  pass.kernel.look_up(pass.job, tile * pass.kernel.tile_rows);
}

void expand_ticket(void* context, int64_t tile) {
  Pass& pass = *static_cast<Pass*>(context);
  pass.kernel.expand(pass.job, tile * pass.kernel.tile_rows);
}

struct Cost {
  bool binary = false, ternary = false;
  int64_t look_ups = 0;  // a column unit
};

Cost cost(const bitlm_linear& call) {
  Cost result;
  for (int p = 0; p < call.planes; p++) {
    bool ternary = call.plane[p].mask || call.plane[p].trits;
    (ternary ? result.ternary : result.binary) = true;
    result.look_ups += ternary ? 2 : 1;
  }
  return result;
}

// Does the tokens from `first_token` on, at most max_tokens; returns how many.
int multiply(const bitlm_linear& call, int64_t first_token, const Cost& cost, int threads) {
  static thread_local Scratches scratch;
  const Kernel& use = kernel();
  int64_t left = call.batch - first_token;
  int tokens = static_cast<int>(left < max_tokens ? left : max_tokens);
  int64_t tiles = (call.rows + use.tile_rows - 1) / use.tile_rows;
  int token_threads = tokens * call.columns >= (1 << 15) ? threads : 1;

  Job job = {};
  job.call = &call;
  job.first_token = first_token;
  job.tokens = tokens;
  job.x_stride = (call.columns + 15) / 16 * 16;
  float* x = scratch.x.floats(tokens * job.x_stride);
  job.x = x;
  Convert conversion{use, job, x, {true}};
  run(token_threads, tokens, convert_ticket, &conversion);

  bool expand = call.algorithm == BITLM_EXPAND || !conversion.ordinary ||
                (call.algorithm == BITLM_AUTO && tokens >= expand_tokens &&
                 cost.look_ups >= use.expand_look_ups);
  int64_t columns = pass_columns;
  if (!expand) {
    int64_t token_bytes = tokens * (cost.binary + cost.ternary) * sizeof(float) *
                          use.units_per_word * use.table_entries;
    int64_t words = table_bytes / token_bytes;
    int64_t fit = words * word_columns / block_columns * block_columns;
    columns = fit < block_columns ? block_columns : fit < pass_columns ? fit : pass_columns;
  }
  for (int64_t begin = 0; begin < call.columns;) {
    int64_t end = cut(call, use, begin, columns, scratch.segments);
    job.segments = scratch.segments.data();
    job.segment_count = static_cast<int32_t>(scratch.segments.size());
    job.first = begin == 0;
    job.last = end == call.columns;
    if (!(job.first && job.last)) job.totals = scratch.totals.floats(tokens * call.rows);
    Pass pass{use, job};
    if (!expand) {
      const Segment& last = scratch.segments.back();
      int64_t units = last.unit + (last.columns / word_columns + 1) * use.units_per_word;
      job.table_stride = units * use.table_entries;
      if (cost.binary) job.signed_tables = scratch.signed_tables.floats(tokens * job.table_stride);
      if (cost.ternary) job.subset_tables = scratch.subset_tables.floats(tokens * job.table_stride);
      if (call.shift) job.segment_sums = scratch.segment_sums.floats(tokens * max_segments);
      run(token_threads, tokens, tables_ticket, &pass);
    }
    run(threads, tiles, expand ? expand_ticket : look_up_ticket, &pass);
    begin = end;
  }
  return tokens;
}

bool valid(const bitlm_linear& call) {
  if (call.rows < 0 || call.columns < 1 || call.group_size < 1 || call.batch < 0) return false;
  if (call.planes < 1 || call.planes > BITLM_MAX_PLANES) return false;
  for (int p = 0; p < call.planes; p++) {
    const bitlm_plane& plane = call.plane[p];
    if (!plane.scales || !plane.signs == !plane.trits) return false;
  }
  return true;
}

}  // namespace
}  // namespace bitlm

extern "C" {

int bitlm_abi_version(void) { return BITLM_ABI_VERSION; }

const char* bitlm_cpu_instruction_set(void) { return bitlm::kernel().name; }

int bitlm_cpu_limit_instruction_set(int limit) {
  bitlm::limit = limit < 0 || limit > BITLM_AVX512 ? BITLM_AVX512 : limit;
  return bitlm::instruction_set();
}

int bitlm_packed_linear(const bitlm_linear* call) {
  if (!call || !bitlm::valid(*call)) return BITLM_BAD_ARGUMENT;
  if (call->rows == 0 || call->batch == 0) return BITLM_OK;
  bitlm::Cost cost = bitlm::cost(*call);
  int64_t work = call->rows * call->columns / 4 * cost.look_ups * call->batch;
  int64_t useful = work / bitlm::thread_look_ups;
  int threads = useful < 1 ? 1 : useful < call->threads ? static_cast<int>(useful) : call->threads;
  try {
    for (int64_t token = 0; token < call->batch;) {
      token += bitlm::multiply(*call, token, cost, threads);
    }
  } catch (const std::bad_alloc&) {
    return BITLM_NO_MEMORY;
  }
  return BITLM_OK;
}

}  // extern "C"
