#!/usr/bin/env bash
# Runs a test under the recorder of record.c:  bindings/no_copy/run.sh BUILD_DIR COMMAND...
# PKG_CONFIG_PATH has express. The test finds the record in the file $EXPRESS_POINTERS.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
shift
# Linked with the library, so that it is found also from where modules are loaded apart, as in Python.
# shellcheck disable=SC2046 # the flags are words
"${CC:-cc}" -Wall -Wextra -Werror -shared -fPIC "$(dirname "${BASH_SOURCE[0]}")/record.c" -o "$work/record.so" -Wl,--no-as-needed \
  $(pkg-config --cflags --libs express) -Wl,-rpath,"$(pkg-config --variable=libdir express)" -ldl
export EXPRESS_POINTERS=$work/pointers.txt
rm -f "$EXPRESS_POINTERS"
LD_PRELOAD=$work/record.so "$@"
if [[ ! -s $EXPRESS_POINTERS ]]; then
  echo "no_copy: the library was not called through the recorder" >&2
  exit 1
fi
