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
cmake --preset "$preset"
cmake --build "$build" -j "$jobs"

step "Building examples/byte_lm against the installed library"
build_engine "$build" -DEXPRESS_LM_WERROR="$werror"

# The library's tests and the engine's, as one CTest run with one summary.
mkdir -p "$build/all_tests"
printf 'subdirs("%s" "%s")\n' "$PWD/$build" "$PWD/$build/byte_lm" >"$build/all_tests/CTestTestfile.cmake"
for part in "$build" "$build/byte_lm"; do
  # Into a file: under pipefail an early-closed pipe would count as a failure of ctest.
  ctest --test-dir "$part" -N >"$build/all_tests/listing.txt"
  if grep -q '^Total Tests: 0$' "$build/all_tests/listing.txt"; then
    echo "test.sh: no tests in $part" >&2
    exit 1
  fi
done

if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  step "NO NVIDIA GPU ON THIS MACHINE: GPU TESTS ARE SKIPPED (this version has no CUDA backend, hence none yet)"
else
  step "A GPU is here, but this version has no CUDA backend: there are no GPU tests"
fi

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

passed = failed = skipped = 0
for case in ElementTree.parse(sys.argv[1]).getroot().iter("testcase"):
    reason = case.find("skipped")
    if case.get("status") == "run":
        passed += 1
    elif case.get("status") == "disabled" or (reason is not None and reason.get("message", "").startswith("SKIP_")):
        skipped += 1
    else:
        failed += 1
print(passed, failed, skipped)
PYTHON
)
read -r passed failed skipped <<<"$counts"
printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
if [[ $status -eq 0 && $failed -ne 0 ]]; then status=1; fi
exit "$status"
