# The CUDA library: machine code for each architecture, and PTX of the newest one for later cards (what is
# special to a card, as 90a, has no successors).
enable_language(CUDA)

set(architectures)
set(probe)
set(newest)
list(SORT BITLM_CUDA_ARCHITECTURES COMPARE NATURAL)
foreach(architecture ${BITLM_CUDA_ARCHITECTURES})
  list(APPEND architectures ${architecture}-real)
  list(APPEND probe -gencode=arch=compute_${architecture},code=sm_${architecture})
  if(architecture MATCHES "^[0-9]+$")
    set(newest ${architecture}-virtual)
  endif()
endforeach()
list(APPEND architectures ${newest})
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

# Wide products are for sm_90a alone, beside whatever the rest is built for.
set(wide_architectures ${architectures})
if("90" IN_LIST BITLM_CUDA_ARCHITECTURES OR "90a" IN_LIST BITLM_CUDA_ARCHITECTURES)
  execute_process(
    COMMAND ${CMAKE_CUDA_COMPILER} -std=c++17 --expt-relaxed-constexpr
            -gencode=arch=compute_90a,code=sm_90a
            -c ${CMAKE_CURRENT_SOURCE_DIR}/cuda_combine.cu -o ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe.o
    RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  if(failed)
    message(STATUS "bitlm: no products by wgmma, nvcc cannot build for sm_90a")
  else()
    set(wide_architectures 90a-real)
    set(wide_definitions BITLM_CUDA_90A)
    if(NOT "90a" IN_LIST BITLM_CUDA_ARCHITECTURES)
      string(APPEND named " 90a")
    endif()
  endif()
endif()
add_library(bitlm_cuda_wide OBJECT cuda_wide.cu)

add_library(bitlm_cuda SHARED
  $<TARGET_OBJECTS:bitlm_cuda_wide>
  cuda_about.cu cuda_combine.cu cuda_few.cu cuda_many.cu cuda_product.cu cuda_product_1.cu
  cuda_product_2.cu cuda_product_3.cu cuda_rows.cu cuda_salient.cu cuda_stage.cu)
foreach(target bitlm_cuda bitlm_cuda_wide)
  set_target_properties(${target} PROPERTIES
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden
    POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
endforeach()
set_property(TARGET bitlm_cuda_wide PROPERTY CUDA_ARCHITECTURES ${wide_architectures})
target_compile_definitions(bitlm_cuda_wide PRIVATE ${wide_definitions})
target_compile_definitions(bitlm_cuda PRIVATE BITLM_CUDA_ARCHITECTURES="${named}")
install(TARGETS bitlm_cuda LIBRARY DESTINATION bitlm RUNTIME DESTINATION bitlm)
