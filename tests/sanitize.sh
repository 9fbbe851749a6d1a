#!/usr/bin/env bash
# Runs the tests of the kernels with AddressSanitizer: those for CUDA in the emulator, where it
# watches what they do to memory without the wrappers of ptx.cuh, and those for the CPU, with
# UndefinedBehaviorSanitizer too. tests/sanitize.sh [options of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/sanitized-$(python -c 'import sys; print(sys.implementation.cache_tag)')
# Kernels that this processor cannot run need not be compiled.
newest=$(python -c 'from mistral_ext import ops; print(ops.supported_isas()[-1])')
cmake --preset debug -B "$build" -DPython_EXECUTABLE="$(command -v python)" \
  -DMISTRAL_EXT_NEWEST_ISA="$newest" >/dev/null
cmake --build "$build"

# The sanitizer has to be loaded before Python is, and with it the library that throws C++
# exceptions. Python and torch do not free all they have at the end.
sanitized_pytest() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 MISTRAL_EXT_SANITIZE=1 python -m pytest "$@"
}
# Copies that come early access what those that come late do, and launches that overlap what the
# same launches do alone. Other files would take long to import. The name of a test says "emulator" if
# its fixture is `backend`; the marker `sanitize` selects others.
mapfile -t emulated < <(grep -rlE 'emulator|backend' tests --include='test_*.py')
sanitized_pytest -k "(emulator or sanitize) and not early and not test_emulator_stream" "$@" \
  "${emulated[@]}"
MISTRAL_EXT_C=$(echo "$build"/_C*.so) sanitized_pytest -k "not emulator and not sanitize" "$@" \
  tests/ops/test_{attention,embedding,linear,linear_argmax,linear_bytes,linear_rope,lora,recording,rms_norm,rope,round_to_table,sample,swiglu}.py \
  tests/cpu/test_{simd,threads}.py
