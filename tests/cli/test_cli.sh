#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests of the program rvqkv: tests/cli/test_cli.sh PROGRAM CHECK TENSORS CASE. CTest runs each case; `all` runs all.
set -u
program=$(realpath "$1")
check=$(realpath "$2")
tensors=$(realpath "$3")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0

fail() {
    echo "FAILED: $*"
    failures=$((failures + 1))
}

# expect CODE COMMAND...: runs it, leaves stdout and stderr in `out` and `err`, complains about another exit code.
expect() {
    local wanted=$1 code
    shift
    "$@" >out 2>err </dev/null
    code=$?
    if [ $code -ne "$wanted" ]; then
        fail "exit code $code, not $wanted: $*"
        sed 's/^/    /' out err
    fi
}

# says TEXT: the last command's stderr has it (a fixed string). A failure's stdout is empty.
says() {
    grep -qF -- "$1" err || { fail "stderr lacks: $1"; sed 's/^/    /' err; }
    [ -s out ] && fail "a failed command wrote to stdout: $(head -c 200 out)"
}

# Small and fast: one layer, 400 tokens, codes of 4 bits.
small=(--layers 9 --tokens 0:400 --codewords 16 --group-dim 16)
train() { expect 0 "$program" train "$tensors" "${small[@]}" "$@"; }

case_help() {
    expect 0 "$program" --help
    grep -q 'Exit codes' out || fail "--help does not tell the exit codes"
    expect 0 "$program" --version
    grep -qE '^rvqkv [0-9]+\.[0-9]+\.[0-9]+$' out || fail "--version prints $(cat out)"
    for command in train compress reconstruct evaluate inspect; do
        expect 0 "$program" $command --help
        grep -q 'Example' out || fail "$command --help has no example"
    done
}

case_usage() {
    expect 2 "$program"
    expect 2 "$program" shrink
    expect 2 "$program" train
    expect 2 "$program" train "$tensors"
    expect 2 "$program" train "$tensors" -o x --colour red
    expect 2 "$program" train "$tensors" -o x --depths 0
    expect 2 "$program" train "$tensors" -o x --depths many
    expect 2 "$program" train "$tensors" -o x --codewords 65537
    expect 2 "$program" train "$tensors" -o x --scale median
    says median
    for range in 5 a:b 5:b -1:5 :: 5:6:7; do
        expect 2 "$program" train "$tensors" -o x "--tokens=$range"
        says "$range"
    done
    expect 2 "$program" train "$tensors" "$tensors" -o x
    expect 2 "$program" train k.npy -o x
    expect 2 "$program" evaluate "$tensors"
    says "--codecs"
    expect 2 "$program" evaluate "$tensors" -c x@0
    expect 2 "$program" reconstruct a -c b -o x.npy
    [ -e x ] && fail "a command line that makes no sense made a file"
}

case_bad_input() {
    expect 1 "$program" train nowhere -o x
    says "nowhere: cannot open the file: No such file or directory"
    expect 1 "$program" train . -o x
    says "not a regular file"
    head -c 100000 "$tensors" >short
    expect 1 "$program" train short -o x
    says "short: "
    echo "these are no tensors" >text
    expect 1 "$program" inspect text
    says "text: "
    printf '\x93NUMPY\x01\x00\x46\x00%-69s\n' "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }" >line.npy
    printf '0123456789abcdef' >>line.npy
    expect 1 "$program" train line.npy line.npy -o x
    says "line.npy: has shape [4]"
    expect 1 "$program" train "$tensors" -o x --group-dim 5
    says "group_dim is 5, must divide head_dim 64"
    expect 1 "$program" train "$tensors" -o x --tokens 0:10
    says "training vectors for 2048 codewords"
    expect 1 "$program" train "$tensors" -o x --tokens 0:5000
    says "0:4096"
    expect 1 "$program" train "$tensors" -o x --layers 9,10
    says "layers.10.key"
    expect 1 "$program" train "$tensors" -o x --sample 100
    says "sample is 100"
    expect 1 "$program" train "$tensors" -o x --ema-decay 1.5
    says "decay is 1.5"
    expect 1 "$program" train "$tensors" -o nowhere/x
    says "nowhere/x"
    cp "$tensors" mine
    expect 1 "$program" train mine -o mine
    says "mine: is read by this command"
    cmp -s "$tensors" mine || fail "the input was written to"
    expect 1 "$program" train mine -o x --state mine
    says "mine: is read by this command"
    [ -e x ] && fail "a failed training left a file"

    train -o good.codecs
    train -o other.codecs --seed 1
    expect 0 "$program" compress "$tensors" --layers 9 --tokens 400:500 -c good.codecs -o good.rvq
    expect 1 "$program" reconstruct good.rvq -c other.codecs -o x
    says "layers.9.key: was compressed with codec"
    expect 1 "$program" compress "$tensors" -c good.codecs -o x
    says "layer 19"
    expect 1 "$program" reconstruct good.codecs -c good.codecs -o x
    says "'format' is 'rvqkv.codec'"
    expect 1 "$program" reconstruct good.rvq -c good.codecs -o x --depths 9
    says "8 depths"
    expect 1 "$program" evaluate "$tensors" --layers 9 -c good.codecs@9
    says "8 depths"
    expect 1 "$program" evaluate "$tensors" -c good.codecs
    says "layer 19"
    for file in good.codecs good.rvq; do
        cp "$file" flipped
        printf '\xa5' | dd of=flipped bs=1 seek=$(($(wc -c <flipped) - 9)) conv=notrunc status=none
        expect 1 "$program" inspect flipped
        says "flipped: checksum"
        head -c 1000 "$file" >short
        expect 1 "$program" inspect short
        says "short: "
    done
    if [ -e /dev/full ]; then
        "$program" inspect "$tensors" >/dev/full 2>err
        [ $? -eq 1 ] || fail "a full disk went unnoticed"
    fi
    [ -e x ] && fail "a failed command left a file"
}

case_pipe() {
    train -o quiet.codecs
    [ -s err ] && fail "progress in a pipe: $(head -c 200 err)"
    expect 0 "$program" evaluate "$tensors" --layers 9 -c quiet.codecs --baselines q4_0,int2
    [ -s err ] && fail "progress in a pipe: $(head -c 200 err)"
    grep -q $'\r\|\x1b' out && fail "control characters on stdout"
    if command -v script >/dev/null; then
        script -qec "'$program' train '$tensors' ${small[*]} -o shown.codecs" /dev/null >terminal </dev/null
        grep -q '%' terminal || fail "no progress on a terminal"
        cmp -s quiet.codecs shown.codecs || fail "the progress bar changes the result"
    fi
}

case_json() {
    train --json -o a.codecs --state a.state
    "$check" json <out || fail "train --json"
    expect 0 "$program" compress "$tensors" --layers 9 -c a.codecs -o a.rvq --json
    "$check" json <out || fail "compress --json"
    expect 0 "$program" reconstruct a.rvq -c a.codecs -o a.safetensors --json
    "$check" json <out || fail "reconstruct --json"
    expect 0 "$program" evaluate "$tensors" --layers 9 -c a.codecs@1,8 --baselines int3 --json -o report.json
    "$check" json <out || fail "evaluate --json"
    cmp -s out report.json || fail "evaluate --json and --output differ"
    grep -q '"tokens": "3276:4096"' out || fail "not the last 20 % are evaluated"
    for file in a.codecs a.rvq a.state a.safetensors "$tensors"; do
        expect 0 "$program" inspect "$file" --json
        "$check" json <out || fail "inspect $file --json"
    done
    expect 0 "$program" inspect a.rvq -c a.codecs
    grep -q '^codes: ok' out || fail "inspect does not check codes"
    expect 0 "$program" evaluate "$tensors" --layers 9 --tokens 3300:3350 -c a.codecs --per-layer
    grep -q 'layer 9' out || fail "--per-layer"
    expect 0 "$program" evaluate "$tensors" --layers 9 --tokens 300:350 -c a.codecs
    grep -q 'was trained on tokens 0:400' err || fail "no warning about trained tokens"
}

# Training in two goes, or stopped by Ctrl-C, or on another number of threads, ends in the same bytes.
case_resume() {
    train -o whole.codecs
    train -o half.codecs --ema-steps 0 --state two.state
    cmp -s whole.codecs half.codecs && fail "EMA steps change nothing"
    train -o half.codecs --state two.state
    cmp -s whole.codecs half.codecs || fail "trained in two goes, other codecs"
    train -o again.codecs --state two.state
    cmp -s whole.codecs again.codecs || fail "a finished training gone on with, other codecs"
    train -o one.codecs --threads 1
    cmp -s whole.codecs one.codecs || fail "another number of threads, other codecs"
    expect 1 "$program" train "$tensors" "${small[@]}" -o x --state two.state --ema-steps 2
    says "50 EMA steps"
    expect 1 "$program" train "$tensors" "${small[@]}" -o x --state two.state --seed 7
    says "two.state: this training was begun with another"
    expect 1 "$program" train "$tensors" "${small[@]}" -o x --state two.state --depths 2
    says "depths"
    expect 1 "$program" train "$tensors" --layers 9 --tokens 0:300 --ema-batch 400 --codewords 16 --group-dim 16 \
        -o x --state two.state
    says "trained_tokens"

    local long=(--layers 9 --codewords 128 --depths 4 --ema-steps 60) code pid
    expect 0 "$program" train "$tensors" "${long[@]}" -o whole.codecs
    (exec "$program" train "$tensors" "${long[@]}" -o x --state stopped.state >out 2>err </dev/null) &
    pid=$!
    sleep 0.7
    kill -INT $pid
    wait $pid
    code=$?
    if [ $code -eq 130 ]; then
        grep -q 'stopped.state holds the training so far' err || fail "no word about the saved state"
        [ -e x ] && fail "an interrupted training left codecs"
        expect 0 "$program" inspect stopped.state
    elif [ $code -ne 0 ]; then
        fail "interrupted: exit code $code"
        cat err
    fi
    expect 0 "$program" train "$tensors" "${long[@]}" -o x --state stopped.state
    cmp -s whole.codecs x || fail "trained on after Ctrl-C, other codecs"
}

case_round_trip() {
    train -o a.codecs
    expect 0 "$program" compress "$tensors" --layers 9 --tokens 400: -c a.codecs -o a.rvq
    expect 0 "$program" compress "$tensors" --layers 9 --tokens 400: -c a.codecs -o one.rvq --threads 1
    cmp -s a.rvq one.rvq || fail "another number of threads, other codes"
    expect 0 "$program" reconstruct a.rvq -c a.codecs -o back.safetensors --type float32
    expect 0 "$check" round_trip "$tensors" a.codecs 400 back.safetensors
    # 4 groups x 8 depths x 4 bits, and a scale of 16.
    expect 0 "$program" compress "$tensors" --layers 9 -c a.codecs -o b.rvq --json
    grep -q '"bits_per_value": 2.25,' out || fail "bits per value: $(grep bits out)"
}

case_npy() {
    train -o a.codecs
    expect 0 "$program" compress "$tensors" --layers 9 --tokens :400 -c a.codecs -o a.rvq
    expect 0 "$program" reconstruct a.rvq -c a.codecs -o k.npy v.npy --type float32
    expect 0 "$program" inspect k.npy
    grep -q '400 x 3 x 64' out || fail "k.npy: $(cat out)"
    expect 0 "$program" train k.npy v.npy -o b.codecs --codewords 16 --group-dim 16
    expect 0 "$program" evaluate k.npy v.npy -c b.codecs
    grep -q ' - ' out || fail "attention error without queries"
    expect 0 "$program" compress k.npy v.npy -c b.codecs -o b.rvq
    expect 0 "$program" reconstruct b.rvq -c b.codecs -o b.safetensors
    expect 1 "$program" train k.npy v.npy -o x --heads 2
    says "has 3 heads, not 2"
}

# What lets one training give the rows of all depths: a codec cut to its first depths is the codec trained with them.
case_depths() {
    train -o deep.codecs --depths 4
    train -o flat.codecs --depths 2
    expect 0 "$program" evaluate "$tensors" --layers 9 -c deep.codecs@2 --json
    grep '_error' out >deep
    expect 0 "$program" evaluate "$tensors" --layers 9 -c flat.codecs --json
    grep '_error' out >flat
    cmp deep flat || fail "cut to 2 depths, a codec of 4 differs from one of 2"
    [ -s deep ] || fail "no errors in the report"
}

cases=$(declare -F | sed -n 's/^declare -f case_//p')
if [ "$4" != all ]; then
    cases=$4
fi
for each in $cases; do
    mkdir "$folder/$each" && cd "$folder/$each" && "case_$each"
done
if [ $failures -ne 0 ]; then
    echo "$failures failures"
    exit 1
fi
