# The CUDA library: machine code for each architecture, and PTX of the newest one for later cards.
enable_language(CUDA)

set(architectures)
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  list(APPEND architectures ${architecture}-real)
endforeach()
list(GET CMAKE_CUDA_ARCHITECTURES -1 newest)
list(APPEND architectures ${newest}-virtual)
string(REPLACE ";" " " named "${CMAKE_CUDA_ARCHITECTURES}")

add_library(bitlm_cuda SHARED
  cuda_about.cu cuda_combine.cu cuda_product.cu cuda_rows.cu cuda_salient.cu cuda_stage.cu)
set_target_properties(bitlm_cuda PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
target_compile_options(bitlm_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
target_compile_definitions(bitlm_cuda PRIVATE BITLM_CUDA_ARCHITECTURES="${named}")
install(TARGETS bitlm_cuda LIBRARY DESTINATION bitlm RUNTIME DESTINATION bitlm)
