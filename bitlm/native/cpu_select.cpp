#include "cpu_select.h"

#include <atomic>

#if defined(BITLM_WITH_X86_KERNELS)
#include <cpuid.h>
#endif

namespace bitlm {

#if defined(BITLM_WITH_X86_KERNELS)
bool amx_request();  // asks the operating system for the tile registers
#endif

namespace {

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
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni");
  if (!avx512) return BITLM_AVX2;
  return amx_request() ? BITLM_AMX : BITLM_AVX512;
#else
  return BITLM_SCALAR;
#endif
}

int detected() {
  static const int set = detect();
  return set;
}

std::atomic<int> limit{BITLM_AMX};

int instruction_set() {
  int allowed = limit.load(std::memory_order_relaxed);
  return allowed < detected() ? allowed : detected();
}

// For 1-bit codes an instruction set may have both look-ups and digit products: which is faster
// depends on the machine, on the activation mode (float, int16, int8) and on the number of tokens.
constexpr int buckets = 4;  // tokens 1, 2 to 4, 5 to 15, 16 and more
std::atomic<int> digits_faster[4][3][buckets] = {
    {},                                                  // scalar
    {},                                                  // AVX2
    {},                                                  // AVX-512
    {{{0}, {1}, {1}, {1}}, {{1}, {1}, {1}, {1}}, {{1}, {1}, {1}, {1}}},  // AMX
};

int bucket(int64_t tokens) { return tokens == 1 ? 0 : tokens < 5 ? 1 : tokens < 16 ? 2 : 3; }

}  // namespace

const Kernel& kernel() {
  switch (instruction_set()) {
#if defined(BITLM_WITH_X86_KERNELS)
    case BITLM_AMX:
      return amx_kernel;
    case BITLM_AVX512:
      return avx512_kernel;
    case BITLM_AVX2:
      return avx2_kernel;
#endif
    default:
      return scalar_kernel;
  }
}

Use choose(const Kernel& kernel, const bitlm_matrix& matrix, int activation, int64_t tokens) {
  bool levels = activation >= BITLM_INT2;
  if (levels && kernel.codes_bits && matrix.kind == BITLM_BINARY) return Use::bits;
  bool tables = kernel.codes_tables && kernel.can_tables(matrix);
  bool digits = kernel.codes_digits && kernel.can_digits(matrix);
  if (tables && digits && !levels) {
    digits = digits_faster[instruction_set()][activation][bucket(tokens)].load(
        std::memory_order_relaxed);
    return digits ? Use::digits : Use::tables;
  }
  return tables ? Use::tables : digits ? Use::digits : Use::floats;
}

}  // namespace bitlm

extern "C" {

int bitlm_abi_version(void) { return BITLM_ABI_VERSION; }

const char* bitlm_cpu_instruction_set(void) { return bitlm::kernel().name; }

int bitlm_cpu_order(void) { return bitlm::kernel().order; }

int bitlm_cpu_limit_instruction_set(int limit) {
  bitlm::limit = limit < 0 || limit > BITLM_AMX ? BITLM_AMX : limit;
  return bitlm::instruction_set();
}

int bitlm_cpu_prefer(int activation, int64_t tokens, int digits) {
  if (activation < 0 || activation > BITLM_INT8 || tokens < 1) return -1;
  std::atomic<int>& now =
      bitlm::digits_faster[bitlm::instruction_set()][activation][bitlm::bucket(tokens)];
  if (digits >= 0) now = digits != 0;
  const bitlm::Kernel& kernel = bitlm::kernel();
  bitlm_matrix binary = {};
  binary.kind = BITLM_BINARY;
  binary.bits = 1;
  bool tables = kernel.codes_tables && kernel.can_tables(binary);
  bool both = tables && kernel.codes_digits && kernel.can_digits(binary);
  return both ? now.load() : tables ? 2 : 3;
}

}  // extern "C"
