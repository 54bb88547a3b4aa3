#!/usr/bin/env bash
# Installs the library and uses it as a stranger would. One step per CTest test:
#   package_test.sh STEP SOURCE_DIR BUILD_DIR CC CXX CUDA     (CUDA: ON if BUILD_DIR's library has the backend, else OFF)
set -euo pipefail
step=$1 source=$2 build=$3 cc=$4 cxx=$5 cuda=$6

work=$build/tests/package/work
prefix=$work/prefix # where `install` leaves the shared library
flags=(-Wall -Wextra -Werror -pedantic)

fail() {
  echo "$*" >&2
  exit 1
}

# libdir PREFIX: its library directory, whatever it is called on this system
libdir() { dirname "$(dirname "$(find "$1" -name express.pc)")"; }

# Only what was installed below PREFIX may be found, and the system's own packages.
use_prefix() {
  PKG_CONFIG_PATH=$(libdir "$1")/pkgconfig
  LD_LIBRARY_PATH=$(libdir "$1")
  export PKG_CONFIG_PATH LD_LIBRARY_PATH
}

# use_without_gpu PREFIX ON|OFF PKG_CONFIG_OPTION...: builds no_gpu.c against the installation, with CUDA or without, and
# runs it
use_without_gpu() {
  local program=$1/no_gpu expected=EXPRESS_STATUS_UNSUPPORTED status=0
  if [[ $2 == ON ]]; then expected=EXPRESS_STATUS_DEVICE_ERROR; fi
  shift 2
  # shellcheck disable=SC2046 # the flags are words
  "$cc" -std=c99 "${flags[@]}" -DEXPECTED_STATUS=$expected "$source/tests/package/no_gpu.c" \
    $(pkg-config "$@" --cflags --libs express) -o "$program"
  "$program" || status=$?
  [[ $status -eq 0 || $status -eq 77 ]] || fail "no_gpu: exit code $status"
}

# The CUDA runtime is inside and looks for the driver when it is needed; nothing of CUDA is needed to load FILE.
needs_no_cuda() {
  if readelf -d "$1" | grep NEEDED | grep -iE 'cuda|nvidia'; then fail "$1 does not load without the libraries above"; fi
}

case $step in
  install)
    # Installed to one place and moved to another: neither express.pc nor the CMake package may remember the first.
    rm -rf "$work"
    mkdir -p "$work"
    cmake --install "$build" --prefix "$work/first" >/dev/null
    mv "$work/first" "$prefix"
    if grep -rIl -e "$work/first" -e "$source" "$prefix"; then fail "the files above name the build's own directories"; fi
    cmp "$source/capi/express.h" "$prefix/include/express.h"
    [[ -e $(libdir "$prefix")/libexpress.so.1 ]] || fail "libexpress.so.1 was not installed"
    readelf -d "$(libdir "$prefix")/libexpress.so" | grep -q 'SONAME.*\[libexpress\.so\.1\]' || fail "wrong SONAME"
    needs_no_cuda "$(libdir "$prefix")/libexpress.so"
    if grep -rIiE 'cudart|/cuda' "$(libdir "$prefix")"; then fail "a program with the shared library needs nothing of CUDA"; fi
    ;;
  headers) # every installed header stands alone
    headers=("$prefix"/include/express.h "$prefix"/include/express/*.h)
    for header in "${headers[@]}"; do
      "$cxx" -std=c++20 "${flags[@]}" -I"$prefix/include" -x c++ -fsyntax-only -include "$header" /dev/null
    done
    "$cc" -std=c99 "${flags[@]}" -I"$prefix/include" -x c -fsyntax-only -include "$prefix/include/express.h" /dev/null
    echo "${#headers[@]} headers stand alone"
    ;;
  pkgconfig)
    use_prefix "$prefix"
    [[ $(pkg-config --modversion express) == 1.* ]]
    # shellcheck disable=SC2046 # the flags are words
    "$cc" -std=c99 "${flags[@]}" "$source/examples/c/decode_loop.c" $(pkg-config --cflags --libs express) -lm \
      -o "$work/decode_loop_c"
    "$work/decode_loop_c"
    if [[ $cuda == ON ]]; then
      # shellcheck disable=SC2046 # the flags are words
      "$cxx" -std=c++17 "${flags[@]}" "$source/examples/cuda/decode_graph.cc" $(pkg-config --cflags --libs express) \
        -isystem "$CUDA_INCLUDES" -L"$CUDA_LIBRARIES" -lcudart_static -lpthread -ldl -lrt -o "$work/decode_graph"
      "$work/decode_graph"
    fi
    use_without_gpu "$prefix" "$cuda"
    ;;
  cmake)
    cmake -S "$source/examples/cpp" -B "$work/cpp" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_CXX_COMPILER="$cxx" \
      -DCMAKE_BUILD_TYPE=Release -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF -DCMAKE_CXX_FLAGS="${flags[*]}"
    grep -q "^express_DIR:PATH=$prefix/" "$work/cpp/CMakeCache.txt" || fail "another installation was found"
    cmake --build "$work/cpp"
    "$work/cpp/decode_loop"
    ;;
  snippets) # the programs in C and C++ that the documentation shows
    use_prefix "$prefix"
    "$source/scripts/snippet.sh" "$source/README.md" c "$work/readme.c"
    # shellcheck disable=SC2046
    "$cc" -std=c99 "${flags[@]}" "$work/readme.c" $(pkg-config --cflags --libs express) -lm -o "$work/readme"
    "$work/readme"
    "$source/scripts/snippet.sh" "$source/docs/guide.md" cpp "$work/guide.cc"
    # shellcheck disable=SC2046
    "$cxx" -std=c++20 "${flags[@]}" "$work/guide.cc" $(pkg-config --cflags --libs express) -o "$work/guide"
    "$work/guide"
    ;;
  static)
    # As a subproject of somebody else's build, static; installed from there, and linked through both package systems.
    static=$work/static
    mkdir -p "$static/project"
    cat >"$static/project/CMakeLists.txt" <<PROJECT
cmake_minimum_required(VERSION 3.25)
project(embedder LANGUAGES CXX)
set(BUILD_SHARED_LIBS OFF)
add_subdirectory("$source" express)
add_executable(decode_loop "$source/examples/cpp/decode_loop.cc")
target_link_libraries(decode_loop PRIVATE express::express)
PROJECT
    # -O1, -G (no optimisation, four times as fast) and intermediate code alone: this is about linking, and the optimised build is
    # tested elsewhere.
    cmake -S "$static/project" -B "$static/build" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_CXX_FLAGS=-O1 \
      -DCMAKE_CUDA_FLAGS=-G -DEXPRESS_CUDA="$cuda" -DCMAKE_CUDA_ARCHITECTURES=90-virtual
    cmake --build "$static/build"
    "$static/build/decode_loop"
    if [[ -n $(find "$static/build" -name '*_test*' -type f) ]]; then fail "a subproject must not build our tests"; fi

    cmake --install "$static/build" --prefix "$static/prefix" >/dev/null
    use_prefix "$static/prefix"
    [[ -z $(find "$static/prefix" -name '*.so*') ]] || fail "a shared library in the static installation"
    # shellcheck disable=SC2046
    "$cc" -std=c99 "${flags[@]}" "$source/examples/c/decode_loop.c" $(pkg-config --static --cflags --libs express) -lm \
      -o "$static/decode_loop_c"
    if ldd "$static/decode_loop_c" | grep -q libexpress; then fail "linked dynamically"; fi
    needs_no_cuda "$static/decode_loop_c"
    "$static/decode_loop_c"
    use_without_gpu "$static/prefix" "$cuda" --static

    cmake -S "$source/examples/cpp" -B "$static/cpp" -G Ninja -DCMAKE_PREFIX_PATH="$static/prefix" \
      -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_BUILD_TYPE=Release
    cmake --build "$static/cpp"
    "$static/cpp/decode_loop"
    ;;
  without_cuda)
    # The same library without CUDA, as where there is no CUDA compiler: the same symbols, and no word of CUDA.
    cmake -S "$source" -B "$work/without_cuda" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_CXX_FLAGS=-O1 \
      -DCMAKE_BUILD_TYPE=None -DEXPRESS_CUDA=OFF -DEXPRESS_BUILD_TESTS=OFF -DEXPRESS_BUILD_BENCH=OFF
    cmake --build "$work/without_cuda"
    CC=$cc "$source/scripts/update_symbols.sh" --check "$work/without_cuda/libexpress.so"
    cmake --install "$work/without_cuda" --prefix "$work/without_cuda/prefix" >/dev/null
    use_prefix "$work/without_cuda/prefix"
    needs_no_cuda "$(libdir "$work/without_cuda/prefix")/libexpress.so"
    use_without_gpu "$work/without_cuda/prefix" OFF
    ;;
  *) fail "no step '$step'" ;;
esac
