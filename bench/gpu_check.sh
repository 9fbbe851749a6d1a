#!/usr/bin/env bash
# Everything that only a CUDA machine can tell, without a network:
#
#   bench/gpu_check.sh OUT [tests | times]
#
# builds for the GPU at hand; runs the tests marked cuda and looks for memory errors and races in a
# small subset with compute-sanitizer; then times the decode step of the whole model, the ops and the
# reading of a prompt. Either half can be had alone, in about 10 minutes at most. OUT gets a log of
# each step, its measurements as JSON, and report.json with all that was found. A step that fails
# does not stop the others; the exit status says whether one did. Needs nvcc and, in the Python at
# hand, torch, cmake, ninja, pybind11, pytest, hypothesis and transformers. Environment: PYTHON, if
# it is not python3; COMMIT, for the report, where the folder is no git repository.
set -uo pipefail

if [[ $# != 1 && ! ($# == 2 && $2 =~ ^(tests|times)$) ]]; then
  echo "usage: bench/gpu_check.sh OUT [tests | times]" >&2
  exit 2
fi
half=${2:-both}
mkdir -p "$1" || exit
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

steps=()  # NAME:STATUS:SECONDS
# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, its output in OUT/NAME.log
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  printf '\n=== %s\n' "$name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n 12 "$out/$name.log"
  [[ $status != 124 && $status != 137 ]] || echo "stopped after $limit s"
  steps+=("$name:$status:$((SECONDS - begin))")
}

rm -f "$out"/{decode,ops,sm90_ops,sm90_model,report}.json
step device 30 "$python" -c 'import torch; print(torch.cuda.get_device_name())'
step build 120 env MISTRAL_EXT_CUDA=on \
  CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native -DCMAKE_CUDA_FLAGS=-lineinfo ${CMAKE_ARGS:-}" \
  "$python" -m pip install --no-build-isolation --no-deps --no-index --force-reinstall .
capability=$("$python" -c 'import torch; print(torch.cuda.get_device_capability())')

# The attention kernel of sm_90a, which is not the default yet: apart from the rest and after it, so
# that nothing that it does can spoil that.
if [[ $half != times ]]; then
  # Tests of text need mistral-common, which is of no use here.
  step tests 150 "$python" -m pytest -m cuda -p no:cacheprovider -rfE --durations=5 \
    --ignore tests/test_chat.py --ignore tests/test_text_stream.py \
    --ignore tests/test_tokenizer.py -k "not sm90"
  for tool in memcheck racecheck synccheck; do
    # Without torch's cache every tensor is an allocation of its own, whose bounds are checked.
    step "$tool" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --kernel-name kns=mistral --error-exitcode 1 \
      "$python" bench/sanitizer_subset.py
  done
  if [[ $capability == "(9, 0)" ]]; then
    step sm90_tests 60 "$python" -m pytest -m cuda -p no:cacheprovider -rfE --durations=5 \
      tests/test_attention_cuda.py tests/test_attention_hopper.py -k sm90
    step sm90_memcheck 45 env MISTRAL_EXT_ATTENTION=sm90 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool memcheck --kernel-name kns=mistral --error-exitcode 1 \
      "$python" bench/sanitizer_subset.py
  fi
fi
if [[ $half != tests ]]; then
  step decode 240 "$python" bench/decode_cuda.py --json "$out/decode.json"
  step ops 150 "$python" bench/ops.py --device cuda --json "$out/ops.json"
  if [[ $capability == "(9, 0)" ]]; then
    step sm90_ops 100 "$python" bench/ops.py --device cuda --only "attention sm90" \
      --json "$out/sm90_ops.json"
    step sm90_model 50 "$python" bench/prefill_cuda.py --json "$out/sm90_model.json"
  fi
fi

"$python" bench/gpu_report.py "$out" "${steps[@]}"
