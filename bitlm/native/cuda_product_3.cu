// Products with inputs of 3 digits: float of fp32 inputs. A file of its own, to compile side by side.
#include "cuda_product_start.h"

namespace bitlm {
template int start_product<3>(const bitlm_cuda_product& call, void* stream);
}
