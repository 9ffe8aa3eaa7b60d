#include "cpu_avx512.h"

namespace bitlm {

extern const Kernel avx512_kernel = {
    "avx512",     BITLM_DWORDS, load,       largest, round, tables, can_tables, can_digits,
    codes_tables, codes_digits, codes_bits, list,    dense, dot,    store,
};

}  // namespace bitlm
