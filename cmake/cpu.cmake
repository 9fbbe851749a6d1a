# The library `cpu`: the kernels for the CPU, compiled for each instruction set that processors of the
# target's kind may have, and their dispatch. Needs csrc/sources.cmake.
include(CheckCXXCompilerFlag)

add_library(cpu STATIC ${cpu_sources})
target_link_libraries(cpu PUBLIC Threads::Threads)

set(isas scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(kind MISTRAL_X86)
  set(avx2 -mavx2 -mfma -mf16c)
  set(avxvnni ${avx2} -mavxvnni)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12 takes the undefined inputs in its own AVX-512 header for mistakes (its bug 105593).
    list(APPEND avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  # Every processor with bf16 has VNNI too.
  set(avx512_bf16 ${avx512} -mavx512bf16 -mavx512vnni)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    # Clang 16 crashes in this pass, where vectors of bf16 are also vectors of other types.
    list(APPEND avx512_bf16 "SHELL:-mllvm -disable-vector-combine")
  endif()
  set(amx ${avx512_bf16} -mamx-tile -mamx-bf16)
  list(APPEND isas avx2 avxvnni avx512 avx512_bf16 amx)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(kind MISTRAL_AARCH64)
  set(neon -DMISTRAL_NEON)
  set(neon_dotprod ${neon} -march=armv8.2-a+dotprod)
  # csrc/cpu/processor.cpp asks for all of these.
  set(neon_bf16 ${neon} -march=armv8.2-a+dotprod+bf16)
  set(neon_i8mm ${neon} -march=armv8.2-a+dotprod+bf16+i8mm)
  list(APPEND isas neon neon_dotprod neon_bf16 neon_i8mm)
endif()

# Sets that have products of linear layers of their own, and all else from the set before them.
set(linear_isas avxvnni neon_dotprod neon_i8mm)

list(GET isas -1 newest)
set(MISTRAL_EXT_NEWEST_ISA ${newest} CACHE STRING "The last instruction set to build for: ${isas}")
list(FIND isas "${MISTRAL_EXT_NEWEST_ISA}" newest)
if(newest EQUAL -1)
  message(FATAL_ERROR
    "MISTRAL_EXT_NEWEST_ISA is '${MISTRAL_EXT_NEWEST_ISA}', expected one of ${isas}")
endif()
math(EXPR count "${newest} + 1")
list(SUBLIST isas 0 ${count} isas)

target_compile_definitions(cpu PRIVATE ${kind} MISTRAL_NEWEST_ISA=${MISTRAL_EXT_NEWEST_ISA})
check_cxx_compiler_flag(-mavxvnni has_avxvnni)  # GCC 11
foreach(isa IN LISTS isas)
  if("${isa}" STREQUAL "avxvnni")  # unquoted, it would be the variable
    if(NOT has_avxvnni)
      continue()
    endif()
    target_compile_definitions(cpu PRIVATE MISTRAL_AVXVNNI)
  endif()
  set(kernels ${cpu_kernels})
  if(isa IN_LIST linear_isas)
    set(kernels ${cpu_linear_kernels})
  endif()
  add_library(cpu_${isa} OBJECT ${kernels})
  target_compile_definitions(cpu_${isa} PRIVATE MISTRAL_ISA=${isa})
  target_compile_options(cpu_${isa} PRIVATE ${${isa}})
  target_sources(cpu PRIVATE $<TARGET_OBJECTS:cpu_${isa}>)
endforeach()
