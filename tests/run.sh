#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Installs what is missing (Debian), builds, and runs the tests. The last line is "N passed, M failed": test cases of
# every configuration, plus one for each build and each other check.
#
#   tests/run.sh         everything: lint of sources, scripts and Python, GCC, Clang, sanitizers, aarch64, clang-tidy,
#                        documentation
#   tests/run.sh TAG     only the tests that carry the tag (golden, slow, files, ...), built once with GCC; `fault`
#                        (memory that runs out, damaged files) with Clang and the address sanitizer
#
# RVQKV_GOLDEN_DIR    folder of golden files instead of tests/golden
# RVQKV_TEST_SEED     seed of the random inputs
# RVQKV_TEST_SIZE     percentage of the rounds that slow tests do (100; 5 when everything runs)
# RVQKV_BUILD_DIR     where to build (build)
set -u
if [ -n "${RVQKV_GOLDEN_DIR:-}" ]; then
    RVQKV_GOLDEN_DIR=$(realpath "$RVQKV_GOLDEN_DIR") && export RVQKV_GOLDEN_DIR
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
build=${RVQKV_BUILD_DIR:-$PWD/build}
logs=$build/logs
mkdir -p "$logs" || exit 1
jobs=$(nproc)

passed=0
failed=0
failures=()

# ---- Counting ----

# finish NAME SECONDS PASSED FAILED LOG: one line for a stage, and what its log says of failures.
finish() {
    passed=$((passed + $3))
    failed=$((failed + $4))
    if [ "$4" -eq 0 ]; then
        printf 'ok      %-24s %4d s  %d passed\n' "$1" "$2" "$3"
    else
        failures+=("$1")
        printf 'FAILED  %-24s %4d s  %d passed, %d failed; from %s:\n' "$1" "$2" "$3" "$4" "$5"
        { grep -E -B 4 -A 12 'FAILED|[Ee]rror: |ERROR: |WARNING: |\*\*\*' "$5" || cat "$5"; } | head -n 120 | sed 's/^/    /'
    fi
}

# check NAME COMMAND...: a stage that counts as one.
check() {
    local name=$1 log="$logs/$1.log" start=$SECONDS
    shift
    if "$@" >"$log" 2>&1 </dev/null; then
        finish "$name" $((SECONDS - start)) 1 0 "$log"
    else
        finish "$name" $((SECONDS - start)) 0 1 "$log"
        return 1
    fi
}

# Reads `ctest -V` or the test program itself; prints "PASSED FAILED". A CTest entry counts as its Catch2 test cases
# if it has any, as one otherwise; a failure that no test case explains (a crash, a sanitizer's report) counts as one.
count_tests() {
    awk '
        {
            entry = 0
            if ($1 ~ /^[0-9]+:$/) { entry = $1 + 0 }
        }
        /All tests passed \(/ { cases[entry] = 1; good[entry] += $(NF - 2) }
        /test cases: / {
            cases[entry] = 1
            for (i = 2; i <= NF; ++i) {
                if ($i == "passed") { good[entry] += $(i - 1) }
                if ($i == "failed") { bad[entry] += $(i - 1) }
            }
        }
        /No tests? (ran|cases? matched)/ { bad[entry] += 1 }
        / Test +#[0-9]+: / && !/\*\*\*Skipped/ {
            match($0, /#[0-9]+/)
            entry = substr($0, RSTART + 1, RLENGTH - 1) + 0
            if (/ Passed +[0-9.]+ sec/) { if (!cases[entry]) { good[entry] += 1 } }
            else if (!bad[entry]) { bad[entry] += 1 }
        }
        END {
            for (entry in good) { passed += good[entry] }
            for (entry in bad) { failed += bad[entry] }
            print passed + 0, failed + 0
        }' "$1"
}

# run_tests PRESET: a stage that runs CTest in a preset's build.
run_tests() {
    local log="$logs/tests-$1.log" start=$SECONDS status good bad
    ctest --test-dir "$build/$1" --parallel "$jobs" --verbose >"$log" 2>&1 </dev/null
    status=$?
    read -r good bad < <(count_tests "$log")
    if [ $status -ne 0 ] && [ "$bad" -eq 0 ]; then
        bad=1
    fi
    finish "tests $1" $((SECONDS - start)) "$good" "$bad" "$log"
}

close() {
    if [ ${#failures[@]} -gt 0 ]; then
        printf 'failed stages:\n'
        printf '    %s\n' "${failures[@]}"
    fi
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
    exit
}

# ---- Stages ----

# install_packages NAME...: those that are missing. Elsewhere than on Debian the user has brought them.
install_packages() {
    local missing=() package sudo=()
    command -v dpkg-query >/dev/null || return 0
    for package in "$@"; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    echo "installing: ${missing[*]}"
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

configure_and_build() {  # PRESET TARGET [FOLDER [OPTION...]]
    local preset=$1 target=$2 folder=$build/${3:-$1}
    shift $(($# < 3 ? $# : 3))
    cmake --preset "$preset" -B "$folder" "$@" && cmake --build "$folder" --parallel "$jobs" --target "$target"
}

# Formatting and findings differ between versions of the tools; the project holds to those of Debian 12.
has_version_14() {
    "$1" --version 2>/dev/null | grep -q 'version 14\.' && return 0
    echo "skipped $1: not version 14"
    return 1
}
sources() { find include tests benchmarks examples -name '*.[chi]pp' -o -name '*.inl' -o -name '*.[ch]' | sort; }
check_format() { sources | xargs clang-format --dry-run -Werror; }
check_scripts() {  # functions are called by name, which is what SC2317 does not see
    find tests benchmarks examples -name '*.sh' | sort | xargs shellcheck --exclude SC2317 .ci/run
}
# Debian has no ruff; the version is that of examples/python.
check_python() {
    local ruff
    ruff=$(grep -o 'ruff==[0-9.]*' examples/python/pyproject.toml) && python3 -m venv "$build/ruff" &&
        "$build/ruff/bin/pip" install -q "$ruff" && "$build/ruff/bin/ruff" check benchmarks examples/python &&
        "$build/ruff/bin/ruff" format --check benchmarks examples/python
}
check_docs() { cmake --build "$build/dev-gcc" --target docs; }

base_packages=(g++ cmake ninja-build ccache catch2 nlohmann-json3-dev libxxhash-dev libeigen3-dev)
more_packages=(clang libclang-rt-dev clang-format clang-tidy shellcheck python3-venv pkg-config doxygen libbenchmark-dev
    libcli11-dev qemu-user-static g++-aarch64-linux-gnu)
use_ccache() {
    if command -v ccache >/dev/null; then
        export CMAKE_CXX_COMPILER_LAUNCHER=ccache
    fi
}

known_tags() { grep -ohE '"(\[[a-z_]+\])+"' tests/test_*.cpp | grep -oE '\[[^]]+\]' | sort -u; }

run_tag() {
    local tag=$1 program="$build/tag-$1/tests/rvqkv_tests" log="$logs/$1.log" preset=dev-gcc status good bad
    local packages=("${base_packages[@]}")
    if [ "$tag" = fault ]; then  # whatever fails must leak nothing
        preset=asan-ubsan
        packages+=(clang libclang-rt-dev)
    fi
    if ! known_tags | grep -qxF "[$tag]"; then
        echo "no test carries the tag [$tag]; there are: $(known_tags | paste -s -d ' ')"
        failed=1
        close
    fi
    check install install_packages "${packages[@]}" || close
    use_ccache
    check build configure_and_build $preset rvqkv_tests "tag-$tag" -DRVQKV_TEST_TAGS="$tag" \
        -DRVQKV_BUILD_BENCHMARKS=OFF -DRVQKV_BUILD_EXAMPLES=OFF || close
    passed=0  # from here on only tests count
    "$program" "[$tag]" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    read -r good bad < <(count_tests "$log")
    if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then
        bad=1
    fi
    passed=$good
    failed=$bad
    close
}

run_everything() {
    local preset
    export RVQKV_TEST_SIZE=${RVQKV_TEST_SIZE:-5}
    check install install_packages "${base_packages[@]}" "${more_packages[@]}"
    use_ccache
    has_version_14 clang-format && check format check_format
    command -v shellcheck >/dev/null && check shellcheck check_scripts
    check ruff check_python
    for preset in dev-gcc dev-clang asan-ubsan tsan aarch64; do
        if [ $preset = aarch64 ] && [ ! -e /usr/include/catch2/catch.hpp ]; then
            echo "skipped aarch64: Catch2 3 is a library, and there is none for that processor here"
            continue
        fi
        check "build $preset" configure_and_build "$preset" all && run_tests "$preset"
    done
    has_version_14 clang-tidy && check clang-tidy configure_and_build tidy all
    check documentation check_docs
    close
}

if [ $# -gt 1 ] || ! [[ ${1:-any} =~ ^[a-z_]+$ ]]; then
    echo "usage: tests/run.sh [TAG], a tag being a word like golden" >&2
    exit 2
elif [ $# -eq 1 ]; then
    run_tag "$1"
else
    run_everything
fi
