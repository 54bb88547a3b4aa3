#!/usr/bin/env bash
# Builds everything and runs every test that this machine can run: scripts/test.sh [--preset NAME]
# The last line is "N passed, N failed, N skipped"; the exit code is 0 only if nothing failed.
set -euo pipefail
source "$(dirname "$0")/common.sh"

preset=release
if [[ ${1:-} == --preset ]]; then preset=${2:?--preset needs a name}; shift 2; fi
if [[ $# -ne 0 ]]; then
  echo "usage: scripts/test.sh [--preset NAME]" >&2
  exit 2
fi
build=build/$preset
werror=OFF
if [[ $preset == ci ]]; then werror=ON; fi
trap 'echo "test.sh: stopped before the tests ran" >&2' ERR

step "Setting up"
scripts/setup.sh test

step "Building the library, its tests and benchmarks ($preset)"
mkdir -p "$build"
cmake --preset "$preset" | tee "$build/configure.log"
cmake --build "$build" -j "$jobs"

step "Building examples/byte_lm against the installed library"
build_engine "$build" -DEXPRESS_LM_WERROR="$werror"

# Bindings against the same installed library, and the quality harness with the Python of theirs.
mkdir -p "$build/bindings"
cat >"$build/bindings/CTestTestfile.cmake" <<EOF
add_test(bindings/python "$PWD/bindings/python/test.sh" "$PWD/$build/bindings/python" "$PWD/$build/stage")
add_test(bindings/wheel "$PWD/bindings/python/wheel_test.sh" "$PWD/$build/bindings/wheel")
add_test(bindings/rust "$PWD/bindings/rust/test.sh" "$PWD/$build/bindings/rust" "$PWD/$build/stage")
add_test(bindings/go "$PWD/bindings/go/test.sh" "$PWD/$build/bindings/go" "$PWD/$build/stage")
add_test(bindings/overhead "$PWD/bench/bindings_overhead/run.py" --build "$PWD/$build" --rounds 1 --calls 1000)
set_tests_properties(bindings/overhead PROPERTIES DEPENDS bindings/python)
add_test(bench/quality "$PWD/bench/quality/test.sh" "$PWD/$build/bindings/python/venv/bin/python")
set_tests_properties(bench/quality PROPERTIES DEPENDS bindings/python TIMEOUT 900 SKIP_RETURN_CODE 77)
set_tests_properties(bindings/python bindings/wheel bindings/rust bindings/go bindings/overhead PROPERTIES TIMEOUT 900 SKIP_RETURN_CODE 77)
EOF

# The library's tests, the engine's and the bindings', as one CTest run with one summary.
mkdir -p "$build/all_tests"
printf 'subdirs("%s" "%s" "%s")\n' "$PWD/$build" "$PWD/$build/byte_lm" "$PWD/$build/bindings" \
  >"$build/all_tests/CTestTestfile.cmake"
for part in library engine; do
  directory=$build
  if [[ $part == engine ]]; then directory=$build/byte_lm; fi
  # Into a file: under pipefail an early-closed pipe would count as a failure of ctest.
  ctest --test-dir "$directory" -N >"$build/all_tests/$part.txt"
  if grep -q '^Total Tests: 0$' "$build/all_tests/$part.txt"; then
    echo "test.sh: no tests in $directory" >&2
    exit 1
  fi
done

gpus=$(nvidia-smi -L 2>/dev/null | grep '^GPU' || true)
notice="The CUDA backend was built; its tests run on: $gpus"
if ! grep -q ' cuda/' "$build/all_tests/library.txt"; then
  notice="NO CUDA BACKEND WAS BUILT, NOR ITS TESTS: $(grep -o 'Express: .*' "$build/configure.log" | head -n 1)"
elif [[ -z $gpus ]]; then
  notice="NO NVIDIA GPU ON THIS MACHINE: GPU TESTS (cuda/*) ARE SKIPPED; the CUDA backend was compiled only"
fi
step "$notice"

step "Testing"
trap - ERR
status=0
junit=$PWD/$build/all_tests/results.xml
rm -f "$junit"
ctest --test-dir "$build/all_tests" --output-on-failure --no-tests=error --output-junit "$junit" || status=$?

# Skipped is what a test itself asked for; one that could not be started has failed.
counts=$(python3 - "$junit" <<'PYTHON'
import sys
import xml.etree.ElementTree as ElementTree

passed = failed = skipped = skipped_gpu = 0
for case in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
    reason = case.find("skipped")
    if case.get("status") == "run":
        passed += 1
    elif case.get("status") == "disabled" or (reason is not None and reason.get("message", "").startswith("SKIP_")):
        skipped += 1
        skipped_gpu += case.get("name").startswith("cuda/")
    else:
        failed += 1
print(passed, failed, skipped, skipped_gpu)
PYTHON
)
read -r passed failed skipped skipped_gpu <<<"$counts"
if [[ -n $gpus && $skipped_gpu -ne 0 ]]; then
  notice="NVIDIA-SMI FINDS A GPU THAT GPU TESTS CANNOT USE: $skipped_gpu of cuda/* were skipped. Is the driver too old?"
  status=1
fi
printf '\n%s\n%d passed, %d failed, %d skipped\n' "$notice" "$passed" "$failed" "$skipped"
if [[ $status -eq 0 && $failed -ne 0 ]]; then status=1; fi
exit "$status"
