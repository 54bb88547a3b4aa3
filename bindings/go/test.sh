#!/usr/bin/env bash
# Tests the Go module against an installed Express:  bindings/go/test.sh BUILD_DIR PREFIX
# Exit code 77 if there is no go; with CI set, that is a failure.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
prefix=$(cd "$2" && pwd)
cd "$(dirname "$0")"
if ! command -v go >/dev/null; then
  echo "NO GO ON THIS MACHINE: THE GO TESTS DID NOT RUN" >&2
  if [[ -n ${CI:-} ]]; then exit 1; else exit 77; fi
fi
PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name express.pc)")
LD_LIBRARY_PATH=$(dirname "$PKG_CONFIG_PATH")
export PKG_CONFIG_PATH LD_LIBRARY_PATH
export GOCACHE=$work/cache GOPROXY=off GOFLAGS=-mod=mod CGO_CFLAGS="-O2 -Wall -Wextra -Werror"

unformatted=$(gofmt -l .)
if [[ -n $unformatted ]]; then
  echo "gofmt would change: $unformatted" >&2
  exit 1
fi
go vet ./...
# -count=1: Go's cache of results knows nothing of the library.
go test -count=1 ./...
../no_copy/run.sh "$work/no_copy" go test -count=1 -run TestNothingIsCopied .
# Every pointer that crosses is followed: no Go pointer may lie in memory that C is given.
case $(go env GOVERSION) in
  go1.19* | go1.20*) GODEBUG=cgocheck=2 go test -count=1 . ;;
  *) GOEXPERIMENT=cgocheck2 go test -count=1 . ;;
esac
case $(go env GOOS)/$(go env GOARCH) in
  linux/amd64 | linux/arm64) go test -race -count=1 ./... ;;
  *) echo "the race detector does not run here" ;;
esac
go test -run '^$' -bench . -benchtime 1000x .
go run ./examples/decode_loop
