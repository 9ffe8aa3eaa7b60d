// Which kernel this machine uses, and which of its products for which work.
#pragma once

#include "kernel.h"

namespace bitlm {

const Kernel& kernel();

enum class Use { tables, digits, bits, floats };

// The product for a matrix with `tokens` tokens (times the input's rank).
Use choose(const Kernel& kernel, const bitlm_matrix& matrix, int activation, int64_t tokens);

}  // namespace bitlm
