// Times ggml's matrix products, one turn at a time, for a process that times others in between.
//
// Reads commands from standard input and answers each with one line of JSON:
//   prepare ROWS COLUMNS TYPE COLD_MIB   makes the weight, in each kind of buffer that takes it, in
//                                        as many copies as fill COLD_MIB (0: one copy)
//     -> [{"name": "q4_0@AMX", "bytes": 9437184, "copies": 34, "error": 0.009}, ...]
//   run NAME BATCH THREADS SECONDS       computes for about SECONDS, copy after copy
//     -> 512.7                           microseconds a product
//   drop                                 forgets all weights -> 0
// A name without @ is ggml's plain CPU buffer; "error" is the relative error against the
// dequantized weight. Anything it does not understand ends it with a message.
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr int kSampleRows = 64;         // quantized once, repeated over all rows
constexpr double kGraphSeconds = 0.02;  // a graph holds about this much work
constexpr int kLargestGraph = 256;
constexpr int kWeightSeed = 1, kInputSeed = 2;

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "bench_ggml: %s\n", message.c_str());
  std::exit(1);
}

std::vector<float> normal(size_t count, float deviation, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

struct ContextDeleter {
  void operator()(ggml_context* c) const { ggml_free(c); }
};
struct BufferDeleter {
  void operator()(ggml_backend_buffer* b) const { ggml_backend_buffer_free(b); }
};
using Context = std::unique_ptr<ggml_context, ContextDeleter>;
using Buffer = std::unique_ptr<ggml_backend_buffer, BufferDeleter>;

Context make_context(int tensors, size_t more = 0) {
  return Context(ggml_init({ggml_tensor_overhead() * tensors + more, nullptr, true}));
}

// Products of some copies of a weight with one batch of activations.
struct Graph {
  Context context;
  Buffer buffer;
  ggml_cgraph* graph;
  ggml_tensor* result;
  int products;
};

struct Weight {
  Context context;
  Buffer buffer;
  std::vector<ggml_tensor*> copies;
  std::map<int, std::vector<Graph>> graphs;  // by batch; together they use every copy
  size_t next = 0;
};

class Bench {
 public:
  Bench() : backend_(ggml_backend_cpu_init()), device_(ggml_backend_get_device(backend_)) {
    kinds_.push_back(ggml_backend_cpu_buffer_type());
    auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device_),
                                          "ggml_backend_dev_get_extra_bufts"));
    auto more = get ? get(device_) : nullptr;
    while (more && *more) kinds_.push_back(*more++);
  }

  std::string prepare(int64_t rows, int64_t columns, const std::string& type_name, double mib) {
    ggml_type type = find_type(type_name);
    std::vector<float> dense = normal(kSampleRows * columns, 0.02f, kWeightSeed);
    size_t sample_bytes = ggml_row_size(type, columns) * kSampleRows;
    std::vector<char> sample(sample_bytes);
    if (type == GGML_TYPE_F32) {
      std::memcpy(sample.data(), dense.data(), sample_bytes);
    } else {
      std::vector<float> importance(columns, 1.0f);
      ggml_quantize_chunk(type, dense.data(), sample.data(), 0, kSampleRows, columns,
                          importance.data());
    }
    std::vector<char> data(ggml_row_size(type, columns) * rows);
    for (size_t at = 0; at < data.size(); at += sample_bytes) {
      std::memcpy(&data[at], sample.data(), std::min(sample_bytes, data.size() - at));
    }
    int copies = std::max(1, static_cast<int>(std::ceil(mib * 1048576 / data.size())));
    std::ostringstream answer;
    answer << "[";
    for (size_t kind = 0; kind < kinds_.size(); kind++) {
      if (kind && !takes(kinds_[kind], type, rows, columns)) continue;
      Weight weight = make_weight(kinds_[kind], type, rows, columns, copies, data);
      if (!weight.buffer) continue;
      std::string name = type_name;
      if (kind) name += std::string("@") + ggml_backend_buft_name(kinds_[kind]);
      answer << (answer.tellp() > 1 ? ", " : "") << "{\"name\": \"" << name << "\", \"bytes\": "
             << data.size() << ", \"copies\": " << copies
             << ", \"error\": " << error(weight, type, data) << "}";
      weights_[name] = std::move(weight);
    }
    answer << "]";
    return answer.str();
  }

  double run(const std::string& name, int batch, int threads, double seconds) {
    auto found = weights_.find(name);
    if (found == weights_.end()) fail("no weight " + name + " was prepared");
    ggml_backend_cpu_set_n_threads(backend_, threads);
    Weight& weight = found->second;
    std::vector<Graph>& graphs = weight.graphs[batch];
    if (graphs.empty()) graphs = make_graphs(weight, batch);
    int64_t products = 0;
    double start = now(), passed = 0;
    while (!products || passed < seconds) {
      Graph& graph = graphs[weight.next++ % graphs.size()];
      ggml_backend_graph_compute(backend_, graph.graph);
      products += graph.products;
      passed = now() - start;
    }
    return passed * 1e6 / products;
  }

  void drop() { weights_.clear(); }

 private:
  static ggml_type find_type(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
      const char* own = ggml_type_name(static_cast<ggml_type>(i));
      if (own && name == own) return static_cast<ggml_type>(i);
    }
    fail("ggml has no type " + name);
  }

  // Tells whether products with a weight in such a buffer have a kernel.
  bool takes(ggml_backend_buffer_type_t kind, ggml_type type, int64_t rows, int64_t columns) {
    Buffer empty(ggml_backend_buft_alloc_buffer(kind, 0));
    if (!empty) return false;
    Context context = make_context(4);
    ggml_tensor* weight = ggml_new_tensor_2d(context.get(), type, columns, rows);
    weight->buffer = empty.get();
    ggml_tensor* x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, columns, 1);
    return ggml_backend_dev_supports_op(device_, ggml_mul_mat(context.get(), weight, x));
  }

  static Weight make_weight(ggml_backend_buffer_type_t kind, ggml_type type, int64_t rows,
                            int64_t columns, int copies, const std::vector<char>& data) {
    Weight weight;
    weight.context = make_context(copies + 1);
    for (int i = 0; i < copies; i++) {
      weight.copies.push_back(ggml_new_tensor_2d(weight.context.get(), type, columns, rows));
    }
    weight.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(weight.context.get(), kind));
    if (!weight.buffer) return weight;
    for (ggml_tensor* copy : weight.copies) {
      ggml_backend_tensor_set(copy, data.data(), 0, data.size());
    }
    return weight;
  }

  Graph make_graph(const Weight& weight, int batch, size_t first, int products) {
    Graph graph;
    int tensors = products + 8;
    graph.context = make_context(tensors, ggml_graph_overhead_custom(tensors, false));
    ggml_context* context = graph.context.get();
    int64_t columns = weight.copies[0]->ne[0];
    ggml_tensor* x = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, batch);
    graph.graph = ggml_new_graph_custom(context, tensors, false);
    for (int i = 0; i < products; i++) {
      ggml_tensor* copy = weight.copies[(first + i) % weight.copies.size()];
      graph.result = ggml_mul_mat(context, copy, x);
      ggml_build_forward_expand(graph.graph, graph.result);
    }
    graph.products = products;
    graph.buffer.reset(ggml_backend_alloc_ctx_tensors(context, backend_));
    if (!graph.buffer) fail("no memory for a graph");
    std::vector<float> values = normal(columns * batch, 1, kInputSeed);
    ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
    return graph;
  }

  // Graphs of about kGraphSeconds: starting one costs as much as a small product.
  std::vector<Graph> make_graphs(const Weight& weight, int batch) {
    Graph one = make_graph(weight, batch, 0, 1);
    ggml_backend_graph_compute(backend_, one.graph);
    double start = now();
    ggml_backend_graph_compute(backend_, one.graph);
    int products = std::max(1, std::min(kLargestGraph,
                                        static_cast<int>(kGraphSeconds / (now() - start))));
    std::vector<Graph> graphs;
    size_t used = 0;
    while (used < weight.copies.size()) {
      graphs.push_back(make_graph(weight, batch, used, products));
      used += products;
    }
    return graphs;
  }

  // Relative error of the first rows against the dequantized weight.
  double error(const Weight& weight, ggml_type type, const std::vector<char>& data) {
    int64_t columns = weight.copies[0]->ne[0], rows = std::min<int64_t>(8, weight.copies[0]->ne[1]);
    Graph graph = make_graph(weight, 1, 0, 1);
    ggml_backend_graph_compute(backend_, graph.graph);
    std::vector<float> result(rows), dense(rows * columns), x = normal(columns, 1, kInputSeed);
    ggml_backend_tensor_get(graph.result, result.data(), 0, rows * sizeof(float));
    if (type == GGML_TYPE_F32) {
      std::memcpy(dense.data(), data.data(), dense.size() * sizeof(float));
    } else {
      ggml_get_type_traits(type)->to_float(data.data(), dense.data(), rows * columns);
    }
    double wrong = 0, all = 0;
    for (int64_t n = 0; n < rows; n++) {
      double exact = 0;
      for (int64_t k = 0; k < columns; k++) exact += double{dense[n * columns + k]} * x[k];
      wrong += (exact - result[n]) * (exact - result[n]);
      all += exact * exact;
    }
    return std::sqrt(wrong / all);
  }

  ggml_backend_t backend_;
  ggml_backend_dev_t device_;
  std::vector<ggml_backend_buffer_type_t> kinds_;
  std::map<std::string, Weight> weights_;
};

}  // namespace

int main() {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  Bench bench;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command, name;
    words >> command;
    if (command == "prepare") {
      int64_t rows = 0, columns = 0;
      double mib = 0;
      words >> rows >> columns >> name >> mib;
      if (!words) fail("cannot read '" + line + "'");
      std::printf("%s\n", bench.prepare(rows, columns, name, mib).c_str());
    } else if (command == "run") {
      int batch = 0, threads = 0;
      double seconds = 0;
      words >> name >> batch >> threads >> seconds;
      if (!words) fail("cannot read '" + line + "'");
      std::printf("%.3f\n", bench.run(name, batch, threads, seconds));
    } else if (command == "drop") {
      bench.drop();
      std::printf("0\n");
    } else {
      fail("unknown command '" + line + "'");
    }
    std::fflush(stdout);
  }
}
