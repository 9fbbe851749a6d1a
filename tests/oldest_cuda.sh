#!/usr/bin/env bash
# Compiles the host side of the kernels and the bindings with the headers of the oldest CUDA toolkit
# that the README promises: they must not call what its runtime lacks. The headers come from PyPI,
# which has no compiler of that age, so the host's compiler does it, as for the emulator.
set -euo pipefail
cd "$(dirname "$0")/.."

oldest=12.4
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pip install -q --no-deps --target "$scratch" "nvidia-cuda-runtime-cu12==$oldest.*" \
  "nvidia-cuda-nvcc-cu12==$oldest.*" "nvidia-cuda-cccl-cu12==$oldest.*"
flags=(-std=c++17 -fsyntax-only -w -DMISTRAL_CUDA='"all"' -DMISTRAL_HOPPER)
for headers in "$scratch"/nvidia/*/include; do
  flags+=(-isystem "$headers")
done
for folder in $(python -m pybind11 --includes); do
  flags+=(-isystem "${folder#-I}")
done

# Of the two headers that the emulator has stand-ins for, this is the one that calls the runtime.
g++ -x c++ "${flags[@]}" -include csrc/cuda/common/runtime.cuh /dev/null
flags+=(-I tests/emulator/include -I csrc/cuda/common)
printf '%s\0' csrc/cuda/*.cu csrc/cuda/*/*.cu python/*.cpp |
  xargs -0 -n 1 -P "$(nproc)" g++ -x c++ "${flags[@]}"
echo "The kernels and bindings compile with the headers of CUDA $oldest."
