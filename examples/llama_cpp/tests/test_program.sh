#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tries the program on tiny models: test_program.sh RVQKV_LLAMA MAKE_MODEL CASE, in a folder of the case's own.
# shellcheck disable=SC2119,SC2120  # most cases calibrate without more options
set -euo pipefail

program=$1 make_model=$2 case=$3
rm -rf "test.$case"
mkdir "test.$case"
cd "test.$case"

"$make_model" model.gguf 1
for ((i = 0; i < 400; ++i)); do
    printf 'Number %d times %d is %d, as everybody knows; ' $i $((i + 7)) $((i * (i + 7)))
done >text.txt
small=(--window 128 --threads 1)

calibrate() {
    "$program" calibrate model.gguf "${small[@]}" --text text.txt --tokens 2048 --codewords 64 --depths 4 \
        --iterations 3 -o model.codecs "$@"
}
evaluate() {
    "$program" evaluate model.gguf "${small[@]}" --text text.txt --windows "${windows:-2}" "$@"
}
# fails CODE TEXT COMMAND...: it exits so, and says so on stderr.
fails() {
    local code=$1 text=$2 found=0
    shift 2
    "$@" >out.txt 2>err.txt || found=$?
    if [ "$found" -ne "$code" ] || ! grep -q -- "$text" err.txt; then
        printf 'wanted exit code %s and "%s", found %s and:\n' "$code" "$text" "$found" >&2
        cat err.txt >&2
        exit 1
    fi
}
# json EXPRESSION: it is true of results.json, as `r`; `rows` are its rows by method.
json() {
    python3 - "$1" <<'END'
import json, sys
r = json.load(open("results.json"))
rows = {row["method"]: row for row in r["rows"]} if "rows" in r else {}
assert eval(sys.argv[1]), sys.argv[1] + "\n" + json.dumps(r, indent=1)
END
}

case_evaluate() {
    calibrate
    evaluate -c model.codecs --json results.json
    json 'all(set(row) >= {"method", "bits", "kl", "kl_p99", "ppl", "ppl_ratio", "top1_agreement", "seconds"}
              for row in r["rows"])'
    json 'rows["paper-64x4"]["bits"] == 24 / 32 + 16 / 32'
    json 'rows["paper-64x4"]["kl"] > rows["rvqkv-64x4-recent64"]["kl"] > rows["llama.cpp-f16"]["kl"]'
    json 'rows["llama.cpp-q4_0"]["kl"] > rows["llama.cpp-q8_0"]["kl"] > rows["llama.cpp-f16"]["kl"]'
    json 'all(0 <= row["top1_agreement"] <= 1 and row["kl"] <= row["kl_p99"] for row in r["rows"])'
    json 'len(r["rows"][0]["positions"]) == 2'
}
# With every token exact, nothing is left of the codes' error: scores and outputs are put right.
case_exact_tokens() {
    calibrate
    evaluate -c model.codecs --methods paper-64x4,rvqkv-64x1-recent128 --json results.json
    json 'rows["paper-64x4"]["kl"] > 1e-4'
    json 'rows["rvqkv-64x1-recent128"]["kl"] < 1e-7'
    json 'rows["rvqkv-64x1-recent128"]["top1_agreement"] == 1'
    json 'rows["rvqkv-64x1-recent128"]["bits"] == 16'
}
# Every family's keys are found, and turned as the model does it.
family() {
    "$make_model" model.gguf 3 "$1"
    calibrate
    evaluate -c model.codecs --methods paper-64x4,rvqkv-64x4-recent128 --json results.json
    json 'rows["paper-64x4"]["kl"] > 1e-5'
    json 'rows["rvqkv-64x4-recent128"]["kl"] < 1e-7'
    "$program" save model.gguf --threads 1 --text text.txt -c model.codecs --tokens 512 --following 32 -o chat.rvq \
        --json results.json
    json '0 <= r["kl"] < 0.5'
}
case_fused() { family fused; }
case_scaled() { family scaled; }
case_qwen_biases() { family qwen2; }
case_qwen_norms() { family qwen3; }
case_gemma() { family gemma3; }
# The plain forward pass predicts what llama.cpp does; the cache that its tokens are in costs what the codes cost there.
plain() {
    "$make_model" model.gguf 1 "$1"
    calibrate
    # A window ends with a page of the cache, or in the middle of one.
    local window windows=12 small
    for window in 256 200; do
        small=(--window "$window" --threads 1)
        evaluate -c model.codecs --engine plain --json results.json
        json 'r["engine"] == "plain"'
        json 'set(rows) == {"llama.cpp-f32", "paper-64x4", "rvqkv-64x4-recent64-paged"}'
        json 'rows["llama.cpp-f32"]["kl"] < 1e-6 and rows["llama.cpp-f32"]["top1_agreement"] > 0.999'
        mv results.json plain.json
        evaluate -c model.codecs --json results.json \
            --methods paper-64x4,rvqkv-64x4-recent64,rvqkv-64x4-recent64-paged
        json 'rows["rvqkv-64x4-recent64"]["kl"] > rows["rvqkv-64x4-recent64-paged"]["kl"] > 0'
        json 'all(abs(row["kl"] / rows[row["method"]]["kl"] - 1) < 0.05 and row["bits"] == rows[row["method"]]["bits"]
                  for row in json.load(open("plain.json"))["rows"][1:])'
    done
}
case_plain() { plain llama; }
case_plain_scaled() { plain scaled; }
case_plain_errors() {
    calibrate
    fails 2 'the plain engine has none of llama.cpp.s caches but llama.cpp-f32' evaluate -c model.codecs \
        --engine plain --methods llama.cpp-q8_0
    fails 2 'want such as rvqkv-2048x8-recent64-paged' evaluate -c model.codecs --engine plain \
        --methods rvqkv-64x4-recent64
    "$make_model" model.gguf 1 fused
    fails 1 'has no tensor blk.0.attn_q.weight; evaluate it without --engine plain' evaluate --engine plain
    "$make_model" model.gguf 1 qwen3
    fails 1 "architecture 'qwen3': the plain engine knows 'llama' alone" evaluate --engine plain
}
case_save() {
    calibrate
    "$program" save model.gguf --threads 1 --text text.txt -c model.codecs --tokens 512 --following 32 -o chat.rvq \
        --json results.json
    json 'r["file_bytes"] < r["state_bytes"] / 2 and r["tokens"] == 512 and 0 <= r["kl"] < 0.5'
}
case_memory() {
    calibrate
    "$program" memory model.gguf --threads 1 --text text.txt -c model.codecs --tokens 4096 --json results.json
    json 'len(r) == 2 and r[0]["resident_bytes"] > r[1]["resident_bytes"] > 0'
}
case_resume() {
    local long=("$program" calibrate model.gguf "${small[@]}" --text text.txt --tokens 8192 --codewords 256 --depths 4
        --iterations 120 -o)
    "${long[@]}" whole.codecs
    # Ctrl-C while it learns: it says so, and goes on from there; what comes out is the same.
    local code=0
    timeout -s INT 0.5 "${long[@]}" model.codecs 2>err.txt || code=$?
    [ "$code" -eq 124 ] && grep -q 'the same command goes on from model.codecs.state' err.txt
    [ -e model.codecs.state ] && [ ! -e model.codecs ]
    "${long[@]}" model.codecs 2>err.txt
    grep -q 'goes on from model.codecs.state' err.txt
    cmp model.codecs whole.codecs
    [ ! -e model.codecs.state ]
}
case_other_model() {
    calibrate
    "$make_model" model.gguf 2
    fails 1 'model.codecs: was made for the model tiny with fingerprint' evaluate -c model.codecs
    fails 1 'calibrate this model' evaluate -c model.codecs
}
case_other_state() {
    calibrate
    printf 'nonsense' >model.codecs.state
    fails 1 'model.codecs.state' calibrate
}
case_bad_model() {
    printf 'nonsense' >broken.gguf
    fails 1 'broken.gguf: is no GGUF model' "$program" evaluate broken.gguf --text text.txt
    fails 1 'none.gguf: cannot be read' "$program" evaluate none.gguf --text text.txt
    "$make_model" broken.gguf 1 unheard
    fails 1 "unknown model architecture: 'unheard-of'" "$program" evaluate broken.gguf --text text.txt
    head -c 100000 model.gguf >broken.gguf
    fails 1 'broken.gguf' "$program" evaluate broken.gguf --text text.txt
}
# A model whose keys have other names is not taken for one that has none to compress.
case_missing_tensors() {
    "$make_model" model.gguf 1 plm
    fails 1 "architecture 'plm' is not supported: its graph has no Kcur-0 before rotary embedding" calibrate
    fails 1 'give a model of the Llama, Qwen or Gemma families' evaluate
    [ ! -e model.codecs ]
}
case_not_finite() {
    "$make_model" model.gguf 1 nan
    fails 1 'layer 1: keys of token 0 of a window, head 0, are not finite' calibrate --as-it-is
    [ ! -e model.codecs ]
}
case_short_text() {
    printf 'Too short' >text.txt
    fails 1 'text.txt: has 9 tokens, a window needs 128' calibrate
    fails 1 'text.txt: has 9 tokens, a window needs 128' evaluate
    : >text.txt
    fails 1 'text.txt: is empty' evaluate
}
case_bad_methods() {
    calibrate
    fails 2 "method 'nonsense' is not known" evaluate -c model.codecs --methods nonsense
    fails 2 'no --codecs of 2048 codewords' evaluate -c model.codecs --methods paper-2048x8
    fails 2 'the codecs have 4 depths' evaluate -c model.codecs --methods paper-64x5
    fails 1 'model.gguf' evaluate -c model.gguf
}

"case_$case"
