#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds the benchmarks, runs them beside their rivals on one core, and writes results/report.json and report.md.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'TEXT'
Usage: benchmarks/run.sh [--quick] [--core N] [--out DIR]

Installs what is missing (Debian packages; faiss from PyPI in a virtual environment), builds in release mode, and runs
everything pinned to one core, repeated in random order; figures are medians.

  --quick     a few repetitions, under three minutes
  --core N    the core to use (default: the last one); two-thread rows use all cores
  --out DIR   where the report goes (default: benchmarks/results)
TEXT
}

quick=0 core=$(($(nproc) - 1)) out=benchmarks/results
while [ $# -gt 0 ]; do
    case "$1" in
    --quick) quick=1 ;;
    --core) core=${2:?--core needs a number} && shift ;;
    --out) out=${2:?--out needs a folder} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) echo "benchmarks/run.sh: unknown option '$1'" >&2 && usage >&2 && exit 2 ;;
    esac
    shift
done

missing=()
need() { [ -e "$1" ] || missing+=("$2"); }
need /usr/bin/g++ g++
need /usr/bin/cmake cmake
need /usr/bin/ninja ninja-build
need /usr/include/benchmark/benchmark.h libbenchmark-dev
need /usr/include/eigen3/Eigen/Core libeigen3-dev
need /usr/include/nlohmann/json.hpp nlohmann-json3-dev
need /usr/include/CLI/CLI.hpp libcli11-dev
need /usr/include/xxhash.h libxxhash-dev
need /usr/bin/time time
command -v python3 >/dev/null || missing+=(python3)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
    sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

build=build/benchmarks
cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE="-O2 -DNDEBUG" \
    -DRVQKV_BUILD_TESTS=OFF -DRVQKV_BUILD_EXAMPLES=ON -DRVQKV_BUILD_BENCHMARKS=ON >/dev/null
cmake --build $build --target rvqkv_benchmarks rvqkv_program

venv=build/venv
[ -x $venv/bin/python ] || python3 -m venv $venv
$venv/bin/python -c 'import faiss' 2>/dev/null ||
    $venv/bin/pip install --quiet --disable-pip-version-check numpy faiss-cpu

mkdir -p "$out"
rounds=9 seconds=0.1
[ $quick = 1 ] && rounds=5 seconds=0.02
# Two-thread rows must not be pinned to one core.
taskset -c "$core" $build/benchmarks/rvqkv_benchmarks --benchmark_filter='-threads:[^1]' \
    --benchmark_repetitions=$rounds --benchmark_min_time=$seconds --benchmark_enable_random_interleaving=true \
    --benchmark_out="$out/one_core.json" --benchmark_out_format=json >/dev/null
$build/benchmarks/rvqkv_benchmarks --benchmark_filter='threads:[^1]' \
    --benchmark_repetitions=$rounds --benchmark_min_time=$seconds --benchmark_enable_random_interleaving=true \
    --benchmark_out="$out/all_cores.json" --benchmark_out_format=json >/dev/null
# Older OpenBLAS kernels are sometimes forced by these variables; a rival must run at its best.
env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE OMP_NUM_THREADS=1 \
    taskset -c "$core" $venv/bin/python benchmarks/peers.py --rounds $rounds --out "$out/peers.json"
$venv/bin/python benchmarks/train_memory.py --program $build/examples/rvqkv --out "$out/memory.json"
$venv/bin/python benchmarks/report.py "$out"
