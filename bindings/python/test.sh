#!/usr/bin/env bash
# Installs the Python package into a virtual environment of its own, from the wheel, and tests it there:
#   bindings/python/test.sh BUILD_DIR [PREFIX]     PREFIX: an installed Express to build against; without: its sources
# Exit code 77 if Python's packages cannot be had, or PyTorch and transformers (then all else is tested); with CI set, that is a failure.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
prefix=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")"

rm -rf "$work/venv" "$work/wheel"
python3 -m venv "$work/venv"
python=$work/venv/bin/python
if ! "$python" -m pip install -q --disable-pip-version-check numpy pytest mypy nanobind scikit-build-core; then
  echo "NO PYTHON PACKAGES (numpy, pytest, mypy, nanobind, scikit-build-core): THE PYTHON TESTS DID NOT RUN" >&2
  if [[ -n ${CI:-} ]]; then exit 1; else exit 77; fi
fi
settings=("--config-settings=build-dir=$work/build")
if [[ -n $prefix ]]; then settings+=(--config-settings=cmake.define.EXPRESS_KV_INSTALLED=ON "--config-settings=cmake.define.CMAKE_PREFIX_PATH=$prefix"); fi
"$python" -m pip wheel -q --disable-pip-version-check --no-deps "${settings[@]}" -w "$work/wheel" .
"$python" -m pip install -q --disable-pip-version-check --no-deps "$work"/wheel/*.whl
"$python" -m mypy --strict -p express_kv # the same where PyTorch and transformers are missing
status=0
if "$python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors accelerate; then
  "$python" -m mypy --strict -p express_kv
  "$python" -c "import express_kv.transformers" # the tests skip what cannot be imported
else
  echo "NO PYTORCH OR TRANSFORMERS: THE TESTS OF express_kv.transformers AND OF TENSORS DO NOT RUN" >&2
  status=77
  if [[ -n ${CI:-} ]]; then status=1; fi
fi
export HF_HUB_OFFLINE=1
"$python" -m pytest -q -rs tests # and why what was skipped
if [[ -n $prefix ]]; then
  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name express.pc)") ../no_copy/run.sh "$work" "$python" -m pytest -q -rs tests/test_no_copy.py tests/test_cuda.py -k "copied or pointers"
fi
exit "$status"
