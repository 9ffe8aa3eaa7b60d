// `torch.ops.bitlm.prepared_linear` without Python between torch's dispatcher and the kernel.
//
// libtorch has a C interface for kernels that must not depend on its headers: boxed functions over a
// stack of 64-bit values. Python (ops/binding.py) looks the functions up in the torch that is loaded
// and hands them over, so one build serves every torch that has them. A tensor on the stack is a
// handle that the kernel owns; an optional is null or a pointer that the kernel frees.
#include <stdint.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "bitlm.h"

namespace {

using Handle = void*;
using Value = uint64_t;
using Status = int32_t;  // 0: no error

// In the order of ops/binding.py.
struct Torch {
  Status (*init_impl)(const char*, const char*, const char*, uint32_t, Handle*);
  Status (*impl)(Handle, const char*, void (*)(Value*, uint64_t, uint64_t));
  Status (*data)(Handle, void**);
  Status (*dim)(Handle, int64_t*);
  Status (*sizes)(Handle, int64_t**);
  Status (*numel)(Handle, int64_t*);
  Status (*dtype)(Handle, int32_t*);
  Status (*contiguous)(Handle, bool*);
  Status (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                          Handle*);
  Status (*copy)(Handle, Handle, int32_t);
  Status (*free_tensor)(Handle);
  Status (*free_optional)(Value*);       // may be null: the value came from operator new
  Status (*threads)(uint32_t*);          // may be null, then
  int (*threads_of_torch)();             // is there
};

Torch torch_;

// Numbers of torch's ScalarType, which are part of its file formats and never change.
enum { torch_uint8 = 0, torch_int32 = 3, torch_half = 5, torch_float = 6, torch_bfloat16 = 15 };

void check(Status status, const char* what) {
  if (status) throw std::runtime_error(std::string("bitlm: torch refused to ") + what);
}

int type_of(int32_t dtype) {
  return dtype == torch_float      ? BITLM_FLOAT32
         : dtype == torch_half     ? BITLM_FLOAT16
         : dtype == torch_bfloat16 ? BITLM_BFLOAT16
                                   : -1;
}

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(Handle handle) : handle_(handle) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(Tensor&& other) {
    Handle mine = handle_;
    handle_ = other.handle_;
    other.handle_ = mine;
    return *this;
  }
  ~Tensor() {
    if (handle_) torch_.free_tensor(handle_);
  }
  explicit operator bool() const { return handle_; }
  Handle get() const { return handle_; }
  Handle release() {
    Handle mine = handle_;
    handle_ = nullptr;
    return mine;
  }
  void* data() const {
    void* p;
    check(torch_.data(handle_, &p), "tell where a tensor lies");
    return p;
  }
  int64_t dim() const {
    int64_t n;
    check(torch_.dim(handle_, &n), "tell a tensor's dimensions");
    return n;
  }
  const int64_t* sizes() const {
    int64_t* p;
    check(torch_.sizes(handle_, &p), "tell a tensor's sizes");
    return p;
  }
  int64_t numel() const {
    int64_t n;
    check(torch_.numel(handle_, &n), "tell a tensor's size");
    return n;
  }
  int32_t dtype() const {
    int32_t d;
    check(torch_.dtype(handle_, &d), "tell a tensor's dtype");
    return d;
  }
  bool contiguous() const {
    bool b;
    check(torch_.contiguous(handle_, &b), "tell a tensor's strides");
    return b;
  }

 private:
  Handle handle_ = nullptr;
};

constexpr int most_dims = 16;

Tensor empty(int64_t dims, const int64_t* sizes, int32_t dtype) {
  int64_t strides[most_dims], stride = 1;
  for (int64_t i = dims - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  Handle made;
  check(torch_.empty_strided(dims, sizes, strides, dtype, 0, 0, &made), "make a tensor");
  return Tensor(made);
}

// The same values, dense, in `dtype`.
void make_dense(Tensor& tensor, int32_t dtype) {
  if (tensor.contiguous() && tensor.dtype() == dtype) return;
  if (tensor.dim() > most_dims) throw std::runtime_error("bitlm: a tensor has too many dimensions");
  Tensor dense = empty(tensor.dim(), tensor.sizes(), dtype);
  check(torch_.copy(dense.get(), tensor.get(), 0), "copy a tensor");
  tensor = static_cast<Tensor&&>(dense);
}

Handle optional(Value value) {
  Value* pointer;
  memcpy(&pointer, &value, sizeof pointer);
  if (!pointer) return nullptr;
  Handle handle = reinterpret_cast<Handle>(*pointer);
  if (torch_.free_optional) {
    torch_.free_optional(pointer);
  } else {
    delete pointer;
  }
  return handle;
}

std::string list(const int64_t* sizes, int64_t dims) {
  std::string text = "[";
  for (int64_t i = 0; i < dims; i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// (Tensor x, Tensor weight, int rows, Tensor? bias, Tensor? offsets, Tensor? step, int activation)
void prepared_linear(Value* stack, uint64_t, uint64_t) {
  Tensor x(reinterpret_cast<Handle>(stack[0])), weight(reinterpret_cast<Handle>(stack[1]));
  Tensor bias(optional(stack[3])), offsets(optional(stack[4])), step(optional(stack[5]));
  const int64_t rows = static_cast<int64_t>(stack[2]);
  bitlm_linear call = {};
  call.activation = static_cast<int32_t>(stack[6]);
  call.weight = static_cast<const bitlm_weight*>(weight.data());
  const int64_t bytes = weight.numel();
  if (bytes < static_cast<int64_t>(sizeof(bitlm_weight)) || bytes < call.weight->bytes) {
    throw std::runtime_error("the prepared weight is cut short");
  }
  const int32_t dtype = x.dtype();
  call.x_type = call.y_type = type_of(dtype);
  if (call.x_type < 0) {
    throw std::runtime_error("a prepared weight takes float32, float16 or bfloat16");
  }
  const int64_t dims = x.dim();
  const int64_t* sizes = x.sizes();
  if (dims < 1 || dims > most_dims || sizes[dims - 1] != call.weight->columns ||
      rows != call.weight->rows) {
    throw std::runtime_error(
        "the input has " + std::to_string(dims ? sizes[dims - 1] : 0) + " features and " +
        std::to_string(rows) + " are asked for; the weight is [" +
        std::to_string(call.weight->rows) + ", " + std::to_string(call.weight->columns) + "]");
  }
  int64_t shape[most_dims];
  memcpy(shape, sizes, sizeof(int64_t) * dims);
  shape[dims - 1] = rows;
  Tensor y = empty(dims, shape, dtype);
  call.tokens = x.numel() / call.weight->columns;
  if (call.tokens) {
    make_dense(x, dtype);
    call.x = x.data();
    call.y = y.data();
    const int32_t experts = call.weight->experts;
    if (bias) {
      const int64_t* b = bias.sizes();
      bool fits = experts ? bias.dim() == 2 && b[0] == experts && b[1] == rows
                          : bias.dim() == 1 && b[0] == rows;
      if (!fits) {
        throw std::runtime_error("the bias has shape " + list(b, bias.dim()) + ", expected [" +
                                 (experts ? std::to_string(experts) + ", " : "") +
                                 std::to_string(rows) + "]");
      }
      make_dense(bias, type_of(bias.dtype()) < 0 ? static_cast<int32_t>(torch_float) : bias.dtype());
      call.bias = bias.data();
      call.bias_type = type_of(bias.dtype());
    }
    if (experts) {
      if (!offsets || offsets.numel() != experts) {
        throw std::runtime_error("a weight of " + std::to_string(experts) + " experts needs " +
                                 std::to_string(experts) + " offsets");
      }
      make_dense(offsets, torch_int32);
      call.offsets = static_cast<const int32_t*>(offsets.data());
    }
    if (step) {
      make_dense(step, torch_float);
      call.step = static_cast<const float*>(step.data());
    }
    uint32_t threads = 1;
    if (torch_.threads) {
      check(torch_.threads(&threads), "tell its threads");
    } else {
      threads = static_cast<uint32_t>(torch_.threads_of_torch());
    }
    call.threads = static_cast<int32_t>(threads);
    int status = bitlm_cpu_linear(&call);
    if (status == BITLM_WRONG_ORDER) {
      throw std::runtime_error("the weight was prepared for another instruction set than the one in "
                               "use: prepare it again");
    }
    if (status == BITLM_NO_MEMORY) {
      throw std::runtime_error("no memory for the tables of a packed linear; use a smaller batch");
    }
    if (status != BITLM_OK) {
      throw std::runtime_error("the native library refused a call (status " +
                               std::to_string(status) + "); please report this");
    }
  }
  stack[0] = reinterpret_cast<Value>(y.release());
}

}  // namespace

extern "C" {

// Registers the kernel with torch for op `name` of namespace `space` on the CPU. functions: the
// pointers of struct Torch. Returns 0, or torch's error.
BITLM_API int bitlm_torch_register(const void* const* functions, const char* space,
                                   const char* name) {
  memcpy(&torch_, functions, sizeof torch_);
  Handle library;  // kept for ever: torch would take the kernel away with it
  Status status = torch_.init_impl(space, "CPU", "torch_binding.cpp", 0, &library);
  return status ? status : torch_.impl(library, name, prepared_linear);
}

}  // extern "C"
