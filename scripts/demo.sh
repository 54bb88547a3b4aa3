#!/usr/bin/env bash
# A language model with its KV cache at full size and compressed: scripts/demo.sh [--quick]
# Builds and installs the library below build/, builds the engine of examples/byte_lm against it, and measures.
set -euo pipefail
source "$(dirname "$0")/common.sh"

quick=()
if [[ ${1:-} == --quick ]]; then quick=(--quick); shift; fi
if [[ $# -ne 0 ]]; then
  echo "usage: scripts/demo.sh [--quick]" >&2
  exit 2
fi
build=build/demo
model=examples/byte_lm/model
log=build/demo.log

step "Setting up and building (log: $log)"
scripts/setup.sh demo
mkdir -p build
build_all() {
  # The engine computes on the CPU.
  cmake --preset release -B "$build" -DEXPRESS_CUDA=OFF -DEXPRESS_BUILD_TESTS=OFF -DEXPRESS_BUILD_BENCH=OFF
  cmake --build "$build" -j "$jobs"
  build_engine "$build"
}
# Not `if ! build_all`: inside a condition bash would go on after a failing command.
set +e
(set -e; build_all) >"$log" 2>&1
status=$?
set -e
if [[ $status -ne 0 ]]; then
  tail -n 50 "$log" >&2
  exit 1
fi

step "Perplexity and recall of a 12.7M-parameter byte-level model, by KV-cache policy"
python3 scripts/demo_table.py --engine "$build/byte_lm/express-lm" --model "$model" "${quick[@]}"

step "The model goes on writing, in 512 entries per head"
prompt=$(mktemp)
notes=$(mktemp)
trap 'rm -f "$prompt" "$notes"' EXIT
bytes=9000 tokens=300
if [[ ${#quick[@]} -ne 0 ]]; then bytes=3000 tokens=60; fi
head -c "$bytes" "$model/demo.txt" >"$prompt"
printf '[... the first %d bytes of demo.txt, which end in:]\n%s\n[... and the model continues:]\n' "$bytes" \
  "$(tail -c 160 "$prompt")"
status=0
"$build/byte_lm/express-lm" generate --model "$model" --prompt-file "$prompt" --tokens "$tokens" --policy express \
  --budget 512 --temperature 0.7 2>"$notes" || status=$?
printf '\n\n'
cat "$notes"
exit "$status"
