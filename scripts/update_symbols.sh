#!/usr/bin/env bash
# What the shared library exports: capi/symbols.txt (C) and capi/symbols_cxx.txt (C++, demangled).
#
#   scripts/update_symbols.sh LIBRARY           rewrites both lists from LIBRARY: do this only when the change is meant
#   scripts/update_symbols.sh --check LIBRARY   fails when LIBRARY and the lists differ, or LIBRARY and express.h do
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

check=false
if [[ ${1:-} == --check ]]; then
  check=true
  shift
fi
library=${1:?usage: scripts/update_symbols.sh [--check] LIBRARY}

# The version node (EXPRESS_1.0, type A) is not a symbol.
exported() { nm -D --defined-only --without-symbol-versions "$library" | awk '$2 != "A" { print $3 }' | sort -u; }
exported_c() { exported | grep -v '^_Z' || true; }
exported_cxx() { exported | grep '^_Z' | c++filt | sort -u || true; }
# Functions that express.h declares: after preprocessing, a name directly before a parenthesis.
declared() { "${CC:-cc}" -std=c99 -E -P capi/express.h | grep -oE '\bexpress_[a-z0-9_]+ *\(' | tr -d ' (' | sort -u; }

if ! $check; then
  exported_c >capi/symbols.txt
  exported_cxx >capi/symbols_cxx.txt
  wc -l capi/symbols.txt capi/symbols_cxx.txt
  exit
fi

status=0
compare() { # compare NAME EXPECTED ACTUAL
  if ! diff -u --label "$1" --label "exported by $(basename "$library")" "$2" "$3"; then status=1; fi
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
exported_c >"$work/c"
exported_cxx >"$work/cxx"
declared >"$work/declared"
compare "declared in express.h" "$work/declared" "$work/c"
compare capi/symbols.txt capi/symbols.txt "$work/c"
compare capi/symbols_cxx.txt capi/symbols_cxx.txt "$work/cxx"
if [[ $status -ne 0 ]]; then
  echo "The exported symbols changed. If that is meant, run scripts/update_symbols.sh $library" >&2
else
  echo "$(wc -l <"$work/c") C and $(wc -l <"$work/cxx") C++ symbols, as listed and declared"
fi
exit $status
