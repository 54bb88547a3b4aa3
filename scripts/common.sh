# What the scripts share; to be sourced. Goes to the root of the repository.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n==> %s\n' "$*"; }

# The size of every parallel build; compilers of SIMD code take about 1 GB each.
jobs=$(nproc)

# build_engine BUILD_DIR [CMAKE_ARGUMENT...]: installs the library built in BUILD_DIR into BUILD_DIR/stage, and builds
# examples/byte_lm against that installation alone, in BUILD_DIR/byte_lm.
build_engine() {
  local build=$PWD/$1 pkgconfig
  shift
  rm -rf "$build/stage"
  cmake --install "$build" --prefix "$build/stage" >/dev/null
  pkgconfig=$(dirname "$(find "$build/stage" -name express.pc)")
  PKG_CONFIG_PATH=$pkgconfig cmake -S examples/byte_lm -B "$build/byte_lm" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_BUILD_RPATH="$(dirname "$pkgconfig")" "$@"
  cmake --build "$build/byte_lm" -j "$jobs"
}
