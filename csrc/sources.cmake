# The source files of csrc/ and python/. Three builds use these lists: the extension, the emulator
# of CUDA (tests/emulator) and the comparison of instruction sets (tests/isas). The emulator of AMX
# (tests/amx) names its sources itself.
get_filename_component(root "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)

# Kernels for the CPU. Each file is compiled once per instruction set, each time in another
# namespace (csrc/cpu/kernels.h). For the sets in csrc/cpu/linear_sets.h only cpu_linear_kernels are
# compiled.
set(cpu_kernels
  ${root}/csrc/cpu/attention/attention.cpp
  ${root}/csrc/cpu/attention/backward.cpp
  ${root}/csrc/cpu/cross_entropy.cpp
  ${root}/csrc/cpu/embedding.cpp
  ${root}/csrc/cpu/highest_rank.cpp
  ${root}/csrc/cpu/kernels.cpp
  ${root}/csrc/cpu/linear/backward.cpp
  ${root}/csrc/cpu/linear/linear.cpp
  ${root}/csrc/cpu/lora.cpp
  ${root}/csrc/cpu/lora_gradient.cpp
  ${root}/csrc/cpu/quantize.cpp
  ${root}/csrc/cpu/rms_norm.cpp
  ${root}/csrc/cpu/rms_norm_backward.cpp
  ${root}/csrc/cpu/rope.cpp
  ${root}/csrc/cpu/rotate.cpp
  ${root}/csrc/cpu/swiglu.cpp
  ${root}/csrc/cpu/swiglu_backward.cpp)
set(cpu_linear_kernels ${root}/csrc/cpu/linear/linear.cpp)
set(cpu_sources
  ${root}/csrc/cpu/dispatch.cpp
  ${root}/csrc/cpu/parallel.cpp
  ${root}/csrc/cpu/processor.cpp
  ${root}/csrc/cpu/repack.cpp
  ${root}/csrc/cpu/sample.cpp)

# Kernels for CUDA. Those in cuda_kernels_sm90 use instructions of sm_90a, so only Hopper runs them.
set(cuda_kernels
  ${root}/csrc/cuda/attention/attention.cu
  ${root}/csrc/cuda/attention/backward.cu
  ${root}/csrc/cuda/cross_entropy.cu
  ${root}/csrc/cuda/embedding.cu
  ${root}/csrc/cuda/linear/dequantize.cu
  ${root}/csrc/cuda/linear/gemv_int4.cu
  ${root}/csrc/cuda/linear/gemv_int8.cu
  ${root}/csrc/cuda/linear/gemv_plain.cu
  ${root}/csrc/cuda/linear/gemv_q8_0.cu
  ${root}/csrc/cuda/linear/gemv_super_blocks.cu
  ${root}/csrc/cuda/linear/gemv_words.cu
  ${root}/csrc/cuda/linear/linear.cu
  ${root}/csrc/cuda/lora.cu
  ${root}/csrc/cuda/lora_gradient.cu
  ${root}/csrc/cuda/rms_norm.cu
  ${root}/csrc/cuda/rms_norm_backward.cu
  ${root}/csrc/cuda/rope.cu
  ${root}/csrc/cuda/rotate.cu
  ${root}/csrc/cuda/sample.cu
  ${root}/csrc/cuda/swiglu.cu
  ${root}/csrc/cuda/swiglu_backward.cu)
set(cuda_kernels_sm90 ${root}/csrc/cuda/attention/prefill_sm90.cu)
# The emulator of CUDA does without cuda_sources and cuda_sources_sm90, because it has its own
# functions of the CUDA runtime. cuda_headers is a folder on the include path. The emulator puts its
# own folder before it, whose runtime.cuh, ptx.cuh and ptx_sm90.cuh replace those of cuda_headers.
set(cuda_sources ${root}/csrc/cuda/common/device.cu)
set(cuda_sources_sm90 ${root}/csrc/cuda/attention/tensor_map_sm90.cu)
set(cuda_headers ${root}/csrc/cuda/common)

set(bindings
  ${root}/python/attention.cpp
  ${root}/python/attention_backward.cpp
  ${root}/python/call.cpp
  ${root}/python/cross_entropy.cpp
  ${root}/python/device.cpp
  ${root}/python/embedding.cpp
  ${root}/python/launch_failure.cpp
  ${root}/python/linear.cpp
  ${root}/python/linear_backward.cpp
  ${root}/python/linear_checks.cpp
  ${root}/python/lora.cpp
  ${root}/python/quantize.cpp
  ${root}/python/repack.cpp
  ${root}/python/rms_norm.cpp
  ${root}/python/rope.cpp
  ${root}/python/rotate.cpp
  ${root}/python/sample.cpp
  ${root}/python/sequences.cpp
  ${root}/python/swiglu.cpp
  ${root}/python/tensor.cpp)
