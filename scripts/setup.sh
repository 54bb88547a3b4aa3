#!/usr/bin/env bash
# Installs what is missing on Debian 12 (or a relative): scripts/setup.sh [build|demo|test|ci]. Each group contains the ones
# before it; the default is test. Touches nothing, not even the network, when all is there.
set -euo pipefail

packages=(g++ cmake ninja-build pkg-config libhwy-dev libtbb-dev libxxhash-dev)
demo=(libcli11-dev nlohmann-json3-dev python3)
test=(binutils libgtest-dev libgmock-dev libbenchmark-dev python3-dev python3-venv)
ci=(clang-format g++-aarch64-linux-gnu git)

group=${1:-test}
case $group in
  build) ;;
  demo) packages+=("${demo[@]}") ;;
  test) packages+=("${demo[@]}" "${test[@]}") ;;
  ci) packages+=("${demo[@]}" "${test[@]}" "${ci[@]}") ;;
  *)
    echo "usage: scripts/setup.sh [build|demo|test|ci]" >&2
    exit 2
    ;;
esac

# A Rust or Go that is not Debian's will do, too.
if [[ $group == test || $group == ci ]]; then
  command -v cargo >/dev/null || packages+=(cargo)
  command -v go >/dev/null || packages+=(golang-go)
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: not a Debian system; this needs (Debian's names): ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  if [[ $state != installed ]]; then missing+=("$package"); fi
done
if [[ ${#missing[@]} -eq 0 ]]; then exit 0; fi

as_root=()
if [[ $(id -u) -ne 0 ]]; then as_root=(sudo); fi
echo "setup: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null >"$log" 2>&1; }
if ! apt update || ! apt install -y --no-install-recommends "${missing[@]}"; then
  cat "$log" >&2
  echo "setup: could not install ${missing[*]}" >&2
  exit 1
fi
