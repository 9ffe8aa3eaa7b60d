// Runs a prepared weight: rounds the inputs, runs the stages, then shares the blocks of rows out over
// threads. Which thread does a block does not change what the block computes.
#include <string.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu_activations.h"
#include "cpu_pool.h"
#include "cpu_select.h"

namespace bitlm {
namespace {

constexpr int panel_tokens = 128;
// Tables of one pass over the columns. For one token they have to stay in the L1 cache, or their
// misses keep the prefetches of the codes waiting; for more, in the L2 cache. By bitlm_order: AVX2
// (measured on Zen 3) would rather miss now and then than go over 4096 columns twice.
constexpr int64_t one_token_tables[] = {40 << 10, 20 << 10}, table_bytes = 512 << 10;
constexpr int64_t prefetch_distance = 16 << 10;
// Work below this (bytes of codes times tokens) is not worth a second thread.
constexpr int64_t thread_work = 96 << 10;
constexpr int64_t token_work = 16384;  // activations to round

template <class T>
const T* at(const uint8_t* base, int64_t offset) {
  return offset ? reinterpret_cast<const T*>(base + offset) : nullptr;
}

int type_bytes(int type) { return type == BITLM_FLOAT32 ? 4 : 2; }

// Calls f(ticket) on several threads. Out of memory in one of them is thrown here.
template <class F>
void parallel(int threads, int64_t tickets, F f) {
  struct Context {
    F& f;
    std::atomic<bool> failed{false};
  } context{f};
  auto work = [](void* given, int64_t ticket) {
    Context& c = *static_cast<Context*>(given);
    try {
      c.f(ticket);
    } catch (const std::bad_alloc&) {
      c.failed = true;
    }
  };
  run(threads, tickets, work, &context);
  if (context.failed) throw std::bad_alloc();
}

// The arrays of one sub-weight.
struct Sub {
  const uint8_t* base;
  const bitlm_sub& head;
  const bitlm_input* inputs;
  const bitlm_matrix* matrices;
  const bitlm_dense* denses;
  const bitlm_projection* projections;
  const bitlm_list* lists;
  const int32_t* stage_lengths;

  Sub(const uint8_t* base, const bitlm_sub& head)
      : base(base), head(head), inputs(at<bitlm_input>(base, head.input)),
        matrices(at<bitlm_matrix>(base, head.matrix)), denses(at<bitlm_dense>(base, head.dense)),
        projections(at<bitlm_projection>(base, head.projection)),
        lists(at<bitlm_list>(base, head.list)),
        stage_lengths(at<int32_t>(base, head.stage_lengths)) {}
};

// The product of one matrix over some chunks, for any block; without `codes` it is codes_floats.
struct Step {
  Product product;
  void (*codes)(const Product& p, int64_t block, float* acc);
  int rank;
  bool direct;  // no factor and no row scales
};

// Memory of the calling thread, kept from call to call.
struct Memory {
  Scratch x, post, accumulators;
  std::vector<RoundedInput*> inputs;
  std::vector<Scratch*> stages;
  std::vector<Step> steps;
  ~Memory() {
    for (RoundedInput* input : inputs) delete input;
    for (Scratch* stage : stages) delete stage;
  }
  RoundedInput& input(int index) {
    while (static_cast<int>(inputs.size()) <= index) inputs.push_back(new RoundedInput);
    return *inputs[index];
  }
  Scratch& stage(int index) {
    while (static_cast<int>(stages.size()) <= index) stages.push_back(new Scratch);
    return *stages[index];
  }
};

// One run of tokens through one sub-weight.
struct Run {
  const Kernel& kernel;
  const Sub& sub;
  Memory& memory;
  int tokens;
  bool finite;
  int activation;
  const float* step;
  int threads;
  const float* x;     // [tokens][columns]
  const float* post;  // [tokens]: what results are multiplied by
  std::vector<Source> stages;

  Use use(const bitlm_matrix& m) const {
    if (!finite) return Use::floats;
    return choose(kernel, m, activation, static_cast<int64_t>(tokens) * sub.inputs[m.input].rank);
  }

  int threads_for(int64_t work, int64_t least) const {
    int64_t useful = work / least;
    return useful < 2 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
  }

  // What the terms that read input `i` need of it.
  Needs needs(int i) const {
    Needs n = {};
    for (int m = 0; m < sub.head.matrices; m++) {
      if (sub.matrices[m].input != i) continue;
      switch (use(sub.matrices[m])) {
        case Use::tables: n.tables = true; break;
        case Use::digits: n.digits = true; break;
        case Use::bits: n.bits = true; break;
        case Use::floats: n.floats = true; break;
      }
    }
    for (int l = 0; l < sub.head.lists; l++) n.digits |= finite && sub.lists[l].input == i;
    if (!finite) n.floats = true;
    return n;
  }

  void round(int i) {
    const bitlm_input& input = sub.inputs[i];
    const Needs n = needs(i);
    RoundedInput& rounded = memory.input(i);
    reserve(input.shape, input.rank, tokens, activation, n, rounded);
    bool sums = false;
    for (int d = 0; d < sub.head.denses; d++) sums |= sub.denses[d].input == i;
    if (sums) {
      rounded.group_sums.resize(static_cast<size_t>(tokens) * input.rank * input.shape.groups);
    }
    Source source = input.source < 0 ? Source{x, sub.head.columns, sub.head.columns}
                                     : stages[input.source];
    int64_t work = static_cast<int64_t>(tokens) * input.rank * input.shape.columns;
    parallel(threads_for(work, token_work), tokens, [&](int64_t token) {
      round_token(kernel, sub.base, input, source, static_cast<int>(token), step, n, sums, rounded);
    });
  }

  void tables(int i, int first, int end) {
    RoundedInput& rounded = memory.input(i);
    reserve_tables(first, end, rounded);
    parallel(threads_for(rounded.x.tokens * rounded.x.table_stride, 8 * token_work),
             rounded.x.tokens, [&](int64_t row) {
               build_tables(kernel, first, end, static_cast<int>(row), rounded);
             });
  }

  // The product of one matrix over chunks [first, end), ready for any block.
  Step step_of(const bitlm_matrix& m, int first, int end) const {
    const bitlm_input& input = sub.inputs[m.input];
    const Activations& rounded = memory.input(m.input).x;
    Step step = {};
    Product& p = step.product;
    p.matrix = &m;
    p.codes = sub.base + m.codes;
    p.scales = at<void>(sub.base, m.scales);
    p.block_bytes = block_bytes(kernel.order, m.bits, m.trits, input.shape);
    p.x = &rounded;
    p.tokens = tokens * input.rank;
    p.first_chunk = first;
    p.end_chunk = end;
    // What comes next is the same columns of the next block.
    p.prefetch = prefetch_distance;
    if (end - first < rounded.chunks) {
      int64_t piece = p.block_bytes * (end - first) / rounded.chunks;
      p.prefetch = ceil_div(prefetch_distance, piece < 1 ? 1 : piece) * p.block_bytes;
    }
    const Use used = use(m);
    step.codes = used == Use::tables   ? kernel.codes_tables
                 : used == Use::digits ? kernel.codes_digits
                 : used == Use::bits   ? kernel.codes_bits
                                       : nullptr;
    step.rank = input.rank;
    step.direct = input.rank == 1 && m.factor == 1.0f;
    return step;
  }

  // Adds a block's product to acc[tokens][64].
  void multiply(const Step& step, int64_t block, float* acc) const {
    if (step.direct) {
      step.codes ? step.codes(step.product, block, acc)
                 : codes_floats(step.product, kernel.order, block, acc);
      return;
    }
    alignas(64) float few[block_rows * 4];
    static thread_local Scratch many;
    const int64_t rows = step.product.tokens;
    float* out = rows <= 4 ? few : many.floats(rows * block_rows);
    memset(out, 0, sizeof(float) * rows * block_rows);
    step.codes ? step.codes(step.product, block, out)
               : codes_floats(step.product, kernel.order, block, out);
    const bitlm_matrix& m = *step.product.matrix;
    const float* scales = at<float>(sub.base, m.row_scales);
    int64_t padded = ceil_div(m.rows, block_rows) * block_rows;
    for (int t = 0; t < tokens; t++) {
      float* to = acc + t * block_rows;
      for (int j = 0; j < step.rank; j++) {
        const float* from = out + (static_cast<int64_t>(t) * step.rank + j) * block_rows;
        const float* s = scales ? scales + j * padded + block * block_rows : nullptr;
        for (int r = 0; r < block_rows; r++) to[r] += m.factor * (s ? s[r] * from[r] : from[r]);
      }
    }
  }

  void list(const bitlm_list& l, int64_t block, float* acc) const {
    ListProduct p = {};
    p.starts = at<uint32_t>(sub.base, l.starts);
    p.entries = sub.base + l.entries;
    p.scales = at<float>(sub.base, l.scales);
    p.correction = at<float>(sub.base, l.correction);
    p.x = &memory.input(l.input).x;
    p.tokens = tokens;
    finite ? kernel.list(p, block, acc) : list_floats(p, block, acc);
  }

  void dense(const bitlm_dense& d, int64_t block, float* acc) const {
    const void* values = sub.base + d.values + block * d.length * block_rows * type_bytes(d.type);
    for (int t = 0; t < tokens; t++) {
      const float* source =
          d.input >= 0 ? memory.input(d.input).group_sums.data() + static_cast<int64_t>(t) * d.length
                       : stages[d.stage].rows + t * stages[d.stage].stride;
      kernel.dense(values, d.type, d.length, source, acc + t * block_rows);
    }
  }

  // Everything that makes the outputs of stage `s`.
  void stage(int s) {
    int64_t length = sub.stage_lengths[s], stride = ceil_div(length, block_rows) * block_rows;
    float* out = memory.stage(s).floats(tokens * stride);
    memset(out, 0, sizeof(float) * tokens * stride);
    stages[s] = Source{out, stride, length};
    for (int i = 0; i < sub.head.projections; i++) {
      const bitlm_projection& p = sub.projections[i];
      if (p.stage != s) continue;
      const float* scales = at<float>(sub.base, p.scales);
      parallel(threads_for(tokens * length * p.columns, token_work), tokens, [&](int64_t t) {
        static thread_local Scratch scaled;
        const float* from = x + t * sub.head.columns;
        if (scales) {
          float* row = scaled.floats(p.columns);
          for (int k = 0; k < p.columns; k++) row[k] = from[k] * scales[k];
          from = row;
        }
        for (int m = 0; m < p.length; m++) {
          const uint8_t* row = sub.base + p.values + static_cast<int64_t>(m) * p.columns *
                                                         type_bytes(p.type);
          out[t * stride + m] += kernel.dot(row, p.type, p.columns, from);
        }
      });
    }
    for (int i = 0; i < sub.head.matrices; i++) {
      const bitlm_matrix& m = sub.matrices[i];
      if (m.output != s) continue;
      round(m.input);
      const int count = chunks(sub.inputs[m.input].shape);
      if (use(m) == Use::tables) tables(m.input, 0, count);
      const Step step = step_of(m, 0, count);
      parallel(threads_for(tokens * length * sub.inputs[m.input].shape.columns / 8, thread_work),
               ceil_div(length, block_rows), [&](int64_t block) {
                 static thread_local Scratch sums;
                 float* acc = sums.floats(tokens * block_rows);
                 memset(acc, 0, sizeof(float) * tokens * block_rows);
                 multiply(step, block, acc);
                 int rows = static_cast<int>(length - block * block_rows);
                 if (rows > block_rows) rows = block_rows;
                 for (int t = 0; t < tokens; t++) {
                   memcpy(out + t * stride + block * block_rows, acc + t * block_rows,
                          sizeof(float) * rows);
                 }
               });
    }
  }

  void finish(int64_t block, float* acc, const void* bias, int bias_type, uint8_t* y,
              int64_t y_stride, int y_type) const {
    for (int i = 0; i < sub.head.lists; i++) list(sub.lists[i], block, acc);
    for (int i = 0; i < sub.head.denses; i++) dense(sub.denses[i], block, acc);
    int64_t row = block * block_rows;
    int rows = static_cast<int>(sub.head.rows - row < block_rows ? sub.head.rows - row : block_rows);
    const void* own = bias ? static_cast<const uint8_t*>(bias) + row * type_bytes(bias_type) : nullptr;
    for (int t = 0; t < tokens; t++) {
      kernel.store(acc + t * block_rows, post[t], own, bias_type, rows,
                   y + (t * y_stride + row) * type_bytes(y_type), y_type);
    }
  }

  // y: where this sub-weight's first row of the first token goes.
  void all(const void* bias, int bias_type, uint8_t* y, int64_t y_stride, int y_type) {
    const bitlm_sub& head = sub.head;
    stages.resize(head.stages);
    for (int s = 0; s < head.stages; s++) stage(s);
    const std::vector<Pass> passes = plan();
    const int64_t blocks = ceil_div(head.rows, block_rows);
    const int use_threads = threads_for(work() * tokens, thread_work);
    const int64_t block_floats = static_cast<int64_t>(tokens) * block_rows;
    // Two blocks a ticket where there are many: fewer hand-overs, still enough to share.
    const int64_t ticket_blocks = blocks >= 16 * use_threads ? 2 : 1;
    // One pass keeps its sums in a thread's own memory, more passes keep those of all blocks.
    float* sums = nullptr;
    if (passes.size() > 1) {
      sums = memory.accumulators.floats(blocks * block_floats);
      memset(sums, 0, sizeof(float) * blocks * block_floats);
    }
    for (const Pass& pass : passes) {
      const bool last = &pass == &passes.back();
      for (const Range& range : pass) {
        if (range.tables) tables(range.input, range.first, range.end);
      }
      std::vector<Step>& steps = memory.steps;
      steps.clear();
      for (const Range& range : pass) {
        for (int i = 0; i < head.matrices; i++) {
          const bitlm_matrix& m = sub.matrices[i];
          if (m.output >= 0 || m.input != range.input) continue;
          // What does not look up takes all columns in the first pass.
          const bool looks = use(m) == Use::tables;
          if (looks) steps.push_back(step_of(m, range.first, range.end));
          else if (range.first == 0) steps.push_back(step_of(m, 0, memory.input(m.input).x.chunks));
        }
      }
      const int64_t tickets = ceil_div(blocks, ticket_blocks);
      parallel(use_threads, tickets, [&](int64_t ticket) {
        alignas(64) float few[block_rows * 4];
        static thread_local Scratch many;
        float* own = tokens <= 4 ? few : many.floats(block_floats);
        int64_t end = (ticket + 1) * ticket_blocks < blocks ? (ticket + 1) * ticket_blocks : blocks;
        for (int64_t block = ticket * ticket_blocks; block < end; block++) {
          float* acc = sums ? sums + block * block_floats : own;
          if (!sums) memset(acc, 0, sizeof(float) * block_floats);
          for (const Step& step : steps) multiply(step, block, acc);
          if (last) finish(block, acc, bias, bias_type, y, y_stride, y_type);
        }
      });
    }
  }

 private:
  // Chunks of an input for which tables are there at the same time.
  struct Range {
    int input, first, end;
    bool tables;
  };
  using Pass = std::vector<Range>;

  int64_t work() const {
    int64_t bytes = 0;
    for (int i = 0; i < sub.head.matrices; i++) {
      const bitlm_matrix& m = sub.matrices[i];
      const bitlm_input& input = sub.inputs[m.input];
      if (m.output < 0) {
        bytes += static_cast<int64_t>(m.rows) * input.shape.columns / 8 * m.bits * input.rank;
      }
    }
    return bytes;
  }

  // Rounds the inputs of the main product and says in which passes to go over their columns.
  std::vector<Pass> plan() {
    const bitlm_sub& head = sub.head;
    std::vector<char> read(head.inputs, 0);
    for (int i = 0; i < head.matrices; i++) {
      if (sub.matrices[i].output < 0) read[sub.matrices[i].input] = 1;
    }
    for (int i = 0; i < head.lists; i++) read[sub.lists[i].input] = 1;
    for (int i = 0; i < head.denses; i++) {
      if (sub.denses[i].input >= 0) read[sub.denses[i].input] = 1;
    }
    Pass whole;
    std::vector<Pass> cut;
    int64_t bytes = 0;
    for (int i = 0; i < head.inputs; i++) {
      if (!read[i]) continue;
      round(i);
      const Activations& x = memory.input(i).x;
      const bool looks = needs(i).tables;
      whole.push_back({i, 0, x.chunks, looks});
      if (!looks) {
        cut.push_back({whole.back()});
        continue;
      }
      const int64_t size = static_cast<int64_t>(x.tokens) * x.shape->words * 128 * x.slices;
      const int64_t fit = x.tokens == 1 ? one_token_tables[kernel.order] : table_bytes;
      bytes += size * (table_bytes / fit);  // in units in which table_bytes is the limit
      const int count = static_cast<int>(ceil_div(size, fit));
      const int step = static_cast<int>(ceil_div(x.chunks, count));
      for (int first = 0; first < x.chunks; first += step) {
        cut.push_back({{i, first, first + step < x.chunks ? first + step : x.chunks, true}});
      }
    }
    // Without any input there is still the bias.
    if (bytes <= table_bytes || cut.empty()) return {whole};
    return cut;
  }
};

constexpr uint32_t infinite = 0x7f800000u;
constexpr uint32_t small = 0x2b800000u;  // 2^-40
constexpr uint32_t large = 0x5d800000u;  // 2^60

// Brings a row to an ordinary size and returns what its results must be multiplied by: scales of
// very small or large activations would not fit fp32.
float normalise(float* row, int64_t count, uint32_t largest) {
  if (largest == 0 || (largest >= small && largest < large)) return 1.0f;
  const float factor = largest < small ? 0x1p80f : 0x1p-80f;
  for (int64_t i = 0; i < count; i++) row[i] *= factor;
  return 1.0f / factor;
}

void run_tokens(const Kernel& kernel, const bitlm_linear& call, int first_sub, int64_t begin,
                int64_t end, const void* bias) {
  static thread_local Memory memory;
  const uint8_t* base = reinterpret_cast<const uint8_t*>(call.weight);
  const bitlm_sub* heads = reinterpret_cast<const bitlm_sub*>(call.weight + 1);
  const int64_t columns = call.weight->columns, rows = call.weight->rows;
  const int x_bytes = type_bytes(call.x_type), y_bytes = type_bytes(call.y_type);
  for (int64_t token = begin; token < end;) {
    int count = static_cast<int>(end - token < panel_tokens ? end - token : panel_tokens);
    float* x = memory.x.floats(count * columns);
    float* post = memory.post.floats(count);
    // A run of tokens that are all finite, or one that is not. Halves overflow a sum sooner than
    // fp32, but x is what it is.
    int taken = 0;
    bool finite = true;
    for (; taken < count; taken++) {
      const uint8_t* from = static_cast<const uint8_t*>(call.x) + (token + taken) * columns * x_bytes;
      uint32_t largest = kernel.load(from, call.x_type, columns, x + taken * columns);
      if (largest >= infinite) {
        if (taken) break;
        finite = false;
      }
      post[taken] = call.activation >= BITLM_INT2 || !finite
                        ? 1.0f
                        : normalise(x + taken * columns, columns, largest);
      if (!finite) {
        taken = 1;
        break;
      }
    }
    for (int part = 0; part < call.weight->parts; part++) {
      const bitlm_sub& head = heads[first_sub + part];
      const Sub sub(base, head);
      Run one{kernel, sub, memory, taken, finite, call.activation, call.step, call.threads, x, post, {}};
      const void* own = bias ? static_cast<const uint8_t*>(bias) +
                                   static_cast<int64_t>(head.row) * type_bytes(call.bias_type)
                             : nullptr;
      one.all(own, call.bias_type,
              static_cast<uint8_t*>(call.y) + (token * rows + head.row) * y_bytes, rows, call.y_type);
    }
    token += taken;
  }
}

}  // namespace
}  // namespace bitlm

extern "C" {

int bitlm_cpu_linear(const bitlm_linear* call) {
  using namespace bitlm;
  if (!call || !call->weight || call->weight->magic != BITLM_MAGIC) return BITLM_BAD_ARGUMENT;
  const bitlm_weight& weight = *call->weight;
  if (call->tokens < 0 || call->activation < 0 || call->activation > BITLM_UINT1 ||
      !weight.experts != !call->offsets) {
    return BITLM_BAD_ARGUMENT;
  }
  const Kernel& use = kernel();
  if (use.order != weight.order) return BITLM_WRONG_ORDER;
  if (call->tokens == 0 || weight.rows == 0) return BITLM_OK;
  try {
    if (!weight.experts) {
      run_tokens(use, *call, 0, 0, call->tokens, call->bias);
      return BITLM_OK;
    }
    int64_t begin = 0;
    for (int expert = 0; expert < weight.experts; expert++) {
      int64_t end = call->offsets[expert];
      if (end < begin || end > call->tokens) return BITLM_BAD_ARGUMENT;
      const void* bias = call->bias ? static_cast<const uint8_t*>(call->bias) +
                                          static_cast<int64_t>(expert) * weight.rows *
                                              type_bytes(call->bias_type)
                                    : nullptr;
      run_tokens(use, *call, expert * weight.parts, begin, end, bias);
      begin = end;
    }
    uint8_t* rest = static_cast<uint8_t*>(call->y) + begin * weight.rows * type_bytes(call->y_type);
    memset(rest, 0, (call->tokens - begin) * weight.rows * type_bytes(call->y_type));
  } catch (const std::bad_alloc&) {
    return BITLM_NO_MEMORY;
  }
  return BITLM_OK;
}

int bitlm_cpu_read(const void* data, int64_t bytes, int threads) {
  constexpr int64_t piece = 64 << 10;
  std::atomic<uint64_t> all{0};
  const uint8_t* from = static_cast<const uint8_t*>(data);
  bitlm::parallel(threads, (bytes + piece - 1) / piece, [&](int64_t ticket) {
    const uint8_t* p = from + ticket * piece;
    int64_t count = bytes - ticket * piece < piece ? bytes - ticket * piece : piece;
    // Two words of each cache line: the rest comes with it, and any machine has registers for two.
    uint64_t a = 0, b = 0;
    for (int64_t i = 0; i + 64 <= count; i += 64) {
      __builtin_prefetch(p + i + 2048, 0, 3);
      uint64_t first, second;
      memcpy(&first, p + i, 8);
      memcpy(&second, p + i + 32, 8);
      a |= first;
      b |= second;
    }
    all.fetch_or(a | b, std::memory_order_relaxed);
  });
  return static_cast<int>(all.load() & 0x7fffffff);
}

}  // extern "C"
