// Products with inputs of 2 digits: int16, and float of 16-bit inputs. A file of its own, to compile side by side.
#include "cuda_product_start.h"

namespace bitlm {
template int start_product<2>(const bitlm_cuda_product& call, void* stream);
}
