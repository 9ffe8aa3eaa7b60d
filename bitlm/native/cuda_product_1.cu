// Products with inputs of 1 digit: int8, 1 and 2 bits. A file of its own, to compile side by side.
#include "cuda_product_start.h"

namespace bitlm {
template int start_product<1>(const bitlm_cuda_product& call, void* stream);
}
