#!/usr/bin/env bash
# The wheel that a user gets, with the library inside, in a clean virtual environment:  bindings/python/wheel_test.sh BUILD_DIR
# Built from the sources around it (without CUDA, for the time it takes). Exit code 77 if Python's packages cannot be had; with CI set,
# that is a failure.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"

rm -rf "$work/build-venv" "$work/venv" "$work/wheel"
python3 -m venv "$work/build-venv"
if ! "$work/build-venv/bin/python" -m pip install -q --disable-pip-version-check nanobind scikit-build-core; then
  echo "NO PYTHON PACKAGES (nanobind, scikit-build-core): THE WHEEL WAS NOT TESTED" >&2
  if [[ -n ${CI:-} ]]; then exit 1; else exit 77; fi
fi
"$work/build-venv/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps "--config-settings=build-dir=$work/build" \
  --config-settings=cmake.define.EXPRESS_CUDA=OFF -w "$work/wheel" .

python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check "$work"/wheel/*.whl numpy pytest
module=$("$work/venv/bin/python" -c "import express_kv._core as core; print(core.__file__)")
if [[ $module != "$work"/venv/* ]] || readelf -d "$module" | grep -q 'NEEDED.*libexpress'; then
  echo "wheel_test.sh: $module does not have the library inside" >&2
  exit 1
fi
rm -rf "$work/tests"
cp -r tests README.md "$work/" # away from the sources, which hold a package of the same name
cd "$work/tests"
env -u PYTHONPATH -u LD_LIBRARY_PATH "$work/venv/bin/python" -m pytest -q -p no:cacheprovider test_cache.py test_stub.py
