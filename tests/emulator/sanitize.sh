#!/usr/bin/env bash
# Runs pytest with the emulator built with AddressSanitizer, which watches what the kernels do to
# memory without the wrappers of ptx.cuh: tests/emulator/sanitize.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
# It has to be loaded before Python is, and with it the library that throws C++ exceptions. Python
# and torch do not free all they have at the end.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 MISTRAL_EXT_SANITIZE=1 python -m pytest -k emulator "$@"
