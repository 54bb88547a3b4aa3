#!/usr/bin/env bash
# Tests of the quality harness with a Python that has PyTorch: bench/quality/test.sh PYTHON. Exit code 77 if there is none.
set -euo pipefail
python=${1:?usage: bench/quality/test.sh PYTHON}
cd "$(dirname "$0")"
if ! "$python" -c "import torch, pytest" 2>/dev/null; then
  echo "NO PYTORCH: THE QUALITY HARNESS AND ITS RIVALS ARE NOT TESTED" >&2
  if [[ -n ${CI:-} ]]; then exit 1; else exit 77; fi
fi
OMP_NUM_THREADS=1 "$python" -m pytest -q -rs tests
