#!/usr/bin/env bash
# clang-tidy over all C++ sources, each compiled as CMake compiles it; of the ISA variants, generic and the widest.
#   tools/clang_tidy.sh BIN_DIR BUILD_DIR JOBS
set -euo pipefail
bin=$(realpath "$1")
build=$2
jobs=$3

"$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
    -DX_ROPE_CLS_NATIVE_TESTS=ON -DX_ROPE_CLS_CUDA=0 -DX_ROPE_CLS_ISAS="generic;avx512_bf16" > "$build.log" 2>&1 ||
    { cat "$build.log"; exit 1; }
sed -i 's/ -fno-tree-loop-distribute-patterns//' "$build/compile_commands.json" # clang does not know it
# What is not built here (CUDA) is not checked; tests/cudasim has its own style.
find csrc tests -path tests/cudasim -prune -o -name '*.cpp' -print |
    while read -r file; do ! grep -q "\"file\": \".*/$file\"" "$build/compile_commands.json" || printf '%s\0' "$file"; done |
    xargs -0 -n 1 -P "$jobs" "$bin/clang-tidy" --quiet -p "$build"
