#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The whole report in one command: installs what is missing (Debian), builds with GCC and Clang, runs us and every rival
# in turn on one core, and writes report.json, report.md and plots.
set -euo pipefail

usage() {
    cat <<'END'
usage: benchmarks/run.sh [--quick] [--core N] [--out DIR] [--without-torch] [--without-ggml]

  --quick           few and short rounds: three minutes on two idle cores, once everything is installed and built
  --core N          the core that everything is pinned to, but for rows of two threads; default: the last
  --out DIR         where the report goes; default: benchmarks/results
  --without-torch   leave PyTorch and vector-quantize-pytorch out; PyPI's PyTorch for x86 is a download of 3 GB, once.
                    (pip's own settings count: an index of CPU builds in PIP_INDEX_URL makes it a tenth of that.)
  --without-ggml    leave llama.cpp's attention out: a download of 77 MB and a minute's build, once

RVQKV_BUILD_DIR     where to build; default: build. The Python environment, ggml and the trained codebooks are
                    kept there too.

Exit codes: 0 done, whatever the figures; 1 something could not be installed, built or run; 2 bad arguments.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$(realpath -m "${RVQKV_BUILD_DIR:-$root/build}")
out=$root/benchmarks/results
core=$(taskset -cp $$ | sed 's/.*[ ,-]//')  # the last that we may use
rounds=11 seconds=0.05
torch=true ggml=true
while [ $# -gt 0 ]; do
    case $1 in
        --quick) rounds=5 seconds=0.02 ;;
        --core | --out)
            if [ $# -lt 2 ]; then
                echo "$1 needs a value" >&2
                usage >&2
                exit 2
            fi
            if [ "$1" = --core ]; then core=$2; else out=$2; fi
            shift
            ;;
        --without-torch) torch=false ;;
        --without-ggml) ggml=false ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            echo "unknown argument: $1" >&2
            usage >&2
            exit 2
            ;;
    esac
    shift
done
if ! taskset -c "$core" true 2>/dev/null; then
    echo "--core: there is no core '$core' to run on; $(taskset -cp $$ | sed 's/.*: /those that we may use: /')" >&2
    exit 2
fi
logs=$build/logs
mkdir -p "$logs" "$out"
out=$(cd "$out" && pwd)

# step NAME COMMAND...: its output goes to a log, shown if it fails. A line while it runs, on a terminal only.
step() {
    local name=$1
    shift
    [ ! -t 2 ] || printf '\r\033[K%s ...' "$name" >&2
    if ! "$@" >"$logs/benchmarks-${name// /-}.log" 2>&1 </dev/null; then
        [ ! -t 2 ] || printf '\r\033[K' >&2
        printf '%s failed; the end of %s:\n' "$name" "$logs/benchmarks-${name// /-}.log" >&2
        tail -n 30 "$logs/benchmarks-${name// /-}.log" >&2
        return 1
    fi
    [ ! -t 2 ] || printf '\r\033[K' >&2
}

install_packages() {
    command -v dpkg-query >/dev/null || return 0  # not Debian: the user has brought them
    local missing=() package sudo=()
    for package in g++ cmake ninja-build pkg-config libbenchmark-dev libeigen3-dev nlohmann-json3-dev libcli11-dev \
        libxxhash-dev libopenblas-dev time python3 clang; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q || return 1
    for package in "${missing[@]}"; do
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$package" ||
            [ "$package" = clang ] || return 1  # we do without Clang, not without the others
    done
}

venv=$build/venv
modules=(numpy scipy faiss matplotlib)
packages=(numpy scipy faiss-cpu matplotlib)
if $torch; then
    modules+=(torch vector_quantize_pytorch)
    packages+=(torch vector-quantize-pytorch)
fi
has_modules() {
    local check='import sys; from importlib.util import find_spec; sys.exit(None in map(find_spec, sys.argv[1:]))'
    "$venv/bin/python" -c "$check" "${modules[@]}" 2>/dev/null
}
install_python_packages() {
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv" || return 1
    has_modules || "$venv/bin/python" -m pip install --disable-pip-version-check "${packages[@]}"
}

# Rivals that may be missing, each alone: one that cannot be had costs only its own rows. Pinned: they are young. (What
# else they would install, we have: NumPy and SciPy.)
ports=(turboquant-pro==1.9.1 pyturboquant-cpu==0.1.0)
install_ports() {
    local port
    for port in "${ports[@]}"; do
        "$venv/bin/python" -m pip show -q "${port%==*}" ||
            "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps "$port" || true
    done
}

# ggml out of llama-cpp-python's source package on PyPI, which holds llama.cpp's whole tree.
ggml_version=0.3.36 ggml_dir=$build/ggml
ggml_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
build_ggml() {
    local package=$ggml_dir/llama_cpp_python-$ggml_version.tar.gz
    if [ ! -e "$ggml_dir/source/CMakeLists.txt" ]; then
        rm -rf "$ggml_dir"
        mkdir -p "$ggml_dir/unpacked"
        echo "llama-cpp-python==$ggml_version --hash=sha256:$ggml_sha256" >"$ggml_dir/package.txt"
        "$venv/bin/python" -m pip download --disable-pip-version-check --no-deps --no-binary :all: --dest "$ggml_dir" \
            --require-hashes --requirement "$ggml_dir/package.txt" || return 1
        tar -xzf "$package" -C "$ggml_dir/unpacked" --strip-components=4 \
            "llama_cpp_python-$ggml_version/vendor/llama.cpp/ggml" || return 1
        mv "$ggml_dir/unpacked" "$ggml_dir/source"
        rm "$package"
    fi
    CC=gcc CXX=g++ cmake -S "$root/benchmarks/ggml" -B "$ggml_dir/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        "-DGGML_SOURCE=$ggml_dir/source" &&
        cmake --build "$ggml_dir/build" --target ggml-cpu ggml-base
}

# build_with COMPILER FOLDER TARGET...
build_with() {
    local compiler=$1 folder=$2
    shift 2
    CXX=$compiler cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG" -DRVQKV_BUILD_TESTS=OFF -DRVQKV_BUILD_EXAMPLES=ON \
        -DRVQKV_BUILD_BENCHMARKS=ON -DRVQKV_INSTALL=OFF "-DRVQKV_GGML_DIR=$with_ggml" &&
        cmake --build "$folder" --target "$@"
}

step 'install packages' install_packages
if ! step 'install Python packages' install_python_packages; then
    $torch && echo 'If it is PyTorch that cannot be had, --without-torch leaves it out.' >&2
    exit 1
fi
step 'install TurboQuant ports' install_ports
absent=() with_ggml=
if ! $ggml; then
    absent+=("ggml (--without-ggml)")
elif step 'build ggml' build_ggml; then
    with_ggml=$ggml_dir
else
    absent+=("ggml (its build failed: $logs/benchmarks-build-ggml.log)")
fi
step 'build with GCC' build_with g++ "$build/benchmarks-gcc" rvqkv_benchmarks rvqkv_program
options=(--gcc "$build/benchmarks-gcc/benchmarks/rvqkv_benchmarks" --program "$build/benchmarks-gcc/examples/rvqkv")
with_ggml=  # one program runs the rivals
if command -v clang++ >/dev/null; then
    step 'build with Clang' build_with clang++ "$build/benchmarks-clang" rvqkv_benchmarks
    options+=(--clang "$build/benchmarks-clang/benchmarks/rvqkv_benchmarks")
fi
$torch || options+=(--without-torch)
for rival in "${absent[@]}"; do
    options+=(--missing "$rival")
done
data=$build/benchmark-data
step 'train codebooks' "$venv/bin/python" "$root/benchmarks/prepare.py" \
    --sample "$root/examples/data/smollm2_135m_kv.safetensors" --out "$data"

raw=$build/benchmark-results.json
status=0
"$venv/bin/python" "$root/benchmarks/measure.py" "${options[@]}" --data "$data" --out "$raw" --core "$core" \
    --rounds "$rounds" --seconds "$seconds" || exit 1
"$venv/bin/python" "$root/benchmarks/report.py" "$raw" --out "$out" || status=1
sed -n '/^## Targets/,$p' "$out/report.md"
echo
echo "The whole report: $out/report.md, report.json, roofline.svg, rivals.svg, attention.svg"
exit $status
