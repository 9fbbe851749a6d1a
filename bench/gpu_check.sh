#!/usr/bin/env bash
# Everything that only a CUDA machine can tell, without a network, in two commands:
#
#   bench/gpu_check.sh first OUT [--build FOLDER]                     at most 270 s
#   bench/gpu_check.sh second OUT [--build FOLDER] [--after REPORT]   at most 330 s
#   bench/gpu_check.sh --dry-run OUT
#   bench/gpu_check.sh merge bench/results/GPU.json REPORT...
#
# The first runs a canary, the tests marked cuda and compute-sanitizer, and times the decode step and
# the reading of a prompt. The second runs again what failed in the first, and measures the rest: all
# formats and batches, the ops beside torch, attention beside SDPA, transformers. OUT gets
# report.json and logs.tar.gz, anew after every step, so that a command that is killed leaves what it
# has found. A step that fails does not stop the others; the exit status says whether one did.
#
# FOLDER has the extension, built beforehand for the same version of Python:
#
#   CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=90a-real -DCMAKE_CUDA_FLAGS=-lineinfo" \
#     MISTRAL_EXT_CUDA=on pip install --no-deps --target FOLDER .
#
# Where it, or without it that of this checkout, cannot be imported, it is built for the GPU at hand,
# and what comes after has less time. --dry-run walks through both commands on a machine without a
# GPU, with stand-ins for it. merge makes of the reports of one GPU the file that is kept.
#
# Needs, in the Python at hand, torch, pytest, hypothesis, transformers and the dependencies of
# mistral_ext but for mistral-common; to build, nvcc, cmake, ninja and pybind11 too. Uses, where they
# are there, pytest-xdist and compute-sanitizer. Environment: PYTHON, if it is not python3; COMMIT,
# for the report, where the folder is no git repository.
set -euo pipefail
PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}" \
  exec "${PYTHON:-python3}" -m gpu_check "$@"
