# The CUDA library: machine code for each architecture, and PTX of the newest one for later cards.
enable_language(CUDA)

set(architectures)
set(probe)
list(SORT BITLM_CUDA_ARCHITECTURES COMPARE NATURAL)
foreach(architecture ${BITLM_CUDA_ARCHITECTURES})
  list(APPEND architectures ${architecture}-real)
  list(APPEND probe -gencode=arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET BITLM_CUDA_ARCHITECTURES -1 newest)
if(newest MATCHES "^[0-9]+$")  # what is special to a card, as 90a, has no successors
  list(APPEND architectures ${newest}-virtual)
endif()
string(REPLACE ";" " " named "${BITLM_CUDA_ARCHITECTURES}")

# An nvcc that cannot build one kernel for these architectures (too old, the wrong host compiler) is
# found out here, where it costs a message and not the build.
execute_process(
  COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 --expt-relaxed-constexpr ${probe}
          -c ${CMAKE_CURRENT_SOURCE_DIR}/cuda_combine.cu -o ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe.o
  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  message(STATUS "bitlm: no CUDA kernels, nvcc cannot build them for ${named}: ${said}")
  return()
endif()

add_library(bitlm_cuda SHARED
  cuda_about.cu cuda_combine.cu cuda_few.cu cuda_many.cu cuda_product.cu cuda_product_1.cu cuda_product_2.cu
  cuda_product_3.cu cuda_rows.cu cuda_salient.cu cuda_stage.cu)
set_target_properties(bitlm_cuda PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
target_compile_options(bitlm_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
target_compile_definitions(bitlm_cuda PRIVATE BITLM_CUDA_ARCHITECTURES="${named}")
install(TARGETS bitlm_cuda LIBRARY DESTINATION bitlm RUNTIME DESTINATION bitlm)
