#!/usr/bin/env bash
# Tests the Rust crates against an installed Express:  bindings/rust/test.sh BUILD_DIR PREFIX
# Exit code 77 if there is no cargo; with CI set, that is a failure.
set -euo pipefail
CARGO_TARGET_DIR=$(mkdir -p "$1" && cd "$1" && pwd)
prefix=$(cd "$2" && pwd)
cd "$(dirname "$0")"
if ! command -v cargo >/dev/null; then
  echo "NO CARGO ON THIS MACHINE: THE RUST TESTS DID NOT RUN" >&2
  if [[ -n ${CI:-} ]]; then exit 1; else exit 77; fi
fi
PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name express.pc)")
LD_LIBRARY_PATH=$(dirname "$PKG_CONFIG_PATH")
RUSTFLAGS=-Dwarnings
export CARGO_TARGET_DIR PKG_CONFIG_PATH LD_LIBRARY_PATH RUSTFLAGS
if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; fi
cargo test --offline --quiet
../no_copy/run.sh "$CARGO_TARGET_DIR/no_copy" cargo test --offline --quiet --test no_copy -- --ignored
RUSTDOCFLAGS=-Dwarnings cargo doc --offline --quiet --no-deps
cargo run --offline --quiet --example decode_loop
