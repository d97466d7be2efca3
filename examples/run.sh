#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The main job in one command: installs what is missing (Debian), builds the program, trains codecs on a real model's
# keys and values, compresses and reconstructs tokens that it did not train on, and prints what that costs and loses:
# a table on stdout; the same as JSON, and a plot of error against bits, in examples/out.
set -euo pipefail

usage() {
    cat <<'END'
usage: examples/run.sh [--data FILE] [--out DIR] [--quick]

  --data FILE   safetensors file with layers.N.key, layers.N.value, layers.N.query; default: the sample in examples/data
  --out DIR     where codecs, results.json and error_vs_bits.png go; default: examples/out
  --quick       only codebooks of 256 codewords

RVQKV_BUILD_DIR   where to build; default: build
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=$root/examples/data/smollm2_135m_kv.safetensors
out=$root/examples/out
build=${RVQKV_BUILD_DIR:-$root/build}/examples
quick=false
while [ $# -gt 0 ]; do
    case $1 in
        --data | --out)
            if [ $# -lt 2 ]; then
                echo "$1 needs a value" >&2
                usage >&2
                exit 2
            fi
            if [ "$1" = --data ]; then data=$2; else out=$2; fi
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
if [ ! -r "$data" ]; then
    echo "cannot read $data" >&2
    exit 1
fi

# step NAME COMMAND...: runs it, says how long it took on stderr; its output goes to a log, shown if it fails.
step() {
    local name=$1 start=$SECONDS
    shift
    printf '%s ... ' "$name" >&2
    if "$@" >"$out/$name.log" 2>&1 </dev/null; then
        printf '%d s\n' $((SECONDS - start)) >&2
    else
        printf 'failed; the end of %s:\n' "$out/$name.log" >&2
        tail -n 30 "$out/$name.log" >&2
        exit 1
    fi
}

install_missing() {
    local missing=() package sudo=()
    command -v dpkg-query >/dev/null || return 0  # not Debian: the user has brought them
    for package in g++ cmake ninja-build nlohmann-json3-dev libxxhash-dev libcli11-dev gnuplot-nox; do
        if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" != installed ]; then
            missing+=("$package")
        fi
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
}

build_program() {
    cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG" \
        -DRVQKV_BUILD_TESTS=OFF -DRVQKV_BUILD_BENCHMARKS=OFF -DRVQKV_INSTALL=OFF
    cmake --build "$build" --target rvqkv_program
}

# train NAME OPTION...: codecs named NAME, k-means and 50 EMA steps unless the options say otherwise.
train() {
    local name=$1
    shift
    step "train $name" "$rvqkv" train "$data" -o "$out/$name.codecs" --weight-type float16 "$@"
}

# Rows of the table whose setting matches: bits, key error, value error, attention error (NaN without queries), and
# their label: the depth or the format's name.
plot_rows() {
    awk -F '|' -v pattern="$1" '
        { gsub(/^ +| +$/, "", $2) }
        $2 ~ pattern {
            for (i = 3; i <= 7; ++i) { gsub(/ /, "", $i); if ($i == "-") { $i = "NaN" } }
            split($2, words, /[ ,]+/)
            print $3, $5, $6, $7, words[1] == "depth" ? words[2] : words[1]
        }' "$out/table.md"
}

plot() {
    cd "$out"
    plot_rows '^depth [468], 2048 codewords, strided keys$' >2048.txt
    plot_rows '^depth [468], 256 codewords, strided keys$' >256.txt
    plot_rows ', strided keys, groups of 16$' >strided.txt
    plot_rows ', contiguous keys, groups of 16$' >contiguous.txt
    plot_rows '^(q4_0|int3|int2), round to nearest$' >baselines.txt
    gnuplot <<'END'
set terminal pngcairo noenhanced size 1500,560 font "DejaVu Sans,12" background "white"
set output "error_vs_bits.png"
set multiplot layout 1,3 title "Error of reconstructed tokens that no codec was trained on (numbers at the lines: depth)" \
    font ",14" offset 0,-0.3
set logscale y
set xrange [0.8:5]
set yrange [0.002:1]
set xtics 1
set mxtics 2
set format y "%g"
set grid xtics ytics mytics lt 1 lc rgb "#c8c8c8" lw 0.8, lt 1 lc rgb "#e6e6e6" lw 0.6
set border 3
set tics nomirror out
set xlabel "bits per value, every byte of codes and scales counted"
set key bottom right Left reverse samplen 2 spacing 1.2 font ",11" box lc rgb "#d0d0d0" opaque
set style line 1 lc rgb "#0b6fa4" lw 2.5 pt 7 ps 1.3
set style line 2 lc rgb "#2f9e44" lw 2.5 pt 5 ps 1.2
set style line 3 lc rgb "#e07b00" pt 9 ps 1.6
set style line 4 lc rgb "#e07b00" lw 2 pt 8 ps 1.6
set style line 5 lc rgb "#666666" lw 2 pt 2 ps 1.2
titles = "Keys Values Attention"
filled(file) = int(system("test -s ".file." && echo 1 || echo 0"))
do for [panel = 1:3] {
    y = panel + 1
    set title (panel == 3 ? "Attention output" : word(titles, panel)) font ",13"
    set ylabel (panel == 1 ? "error energy / energy" : "")
    if (panel < 3) { unset key } else { set key }
    list = ""
    if (filled("2048.txt")) {
        list = list."'2048.txt' using 1:y with linespoints ls 1 title '2048 codewords', "
        list = list."'' using 1:y:5 with labels offset 0,-1.1 font ',10' tc ls 1 notitle, "
    }
    list = list."'256.txt' using 1:y with linespoints ls 2 title '256 codewords', "
    list = list."'' using 1:y:5 with labels offset 0.8,0.8 font ',10' tc ls 2 notitle, "
    if (panel != 2) {  # values are grouped alike in both
        list = list."'strided.txt' using 1:y with points ls 3 title '256, groups of 16: strided keys', "
        list = list."'contiguous.txt' using 1:y with points ls 4 title '256, groups of 16: contiguous keys', "
    }
    list = list."'baselines.txt' using 1:y with points ls 5 title 'round to nearest', "
    list = list."'' using 1:y:5 with labels offset 0,-1.1 font ',10' tc ls 5 notitle"
    eval("plot ".list)
}
unset multiplot
END
    rm -f 2048.txt 256.txt strided.txt contiguous.txt baselines.txt
}

start=$SECONDS
mkdir -p "$out"
out=$(cd "$out" && pwd)
rvqkv=$build/examples/rvqkv
step install install_missing
step build build_program

# One training gives both rows: the codecs as k-means leaves them, and, going on from there, as EMA leaves them.
rows=()
if ! $quick; then
    rm -f "$out/2048.state"
    train 2048_kmeans --ema-steps 0 --state "$out/2048.state"
    train 2048 --state "$out/2048.state"
    train 2048_contiguous --key-grouping contiguous
    rows+=(-c "$out/2048.codecs@8,6,4" -c "$out/2048_kmeans.codecs@8,6,4" -c "$out/2048_contiguous.codecs@8,6,4")
fi
rm -f "$out/256.state"
train 256_kmeans --codewords 256 --ema-steps 0 --state "$out/256.state"
train 256 --codewords 256 --state "$out/256.state"
train 256_contiguous --codewords 256 --key-grouping contiguous
train 256_groups_of_16 --codewords 256 --depths 4 --group-dim 16
train 256_groups_of_16_contiguous --codewords 256 --depths 4 --group-dim 16 --key-grouping contiguous
train 256_float32_scale --codewords 256 --scale-type float32
rows+=(-c "$out/256.codecs@8,6,4" -c "$out/256_kmeans.codecs@8,6,4" -c "$out/256_contiguous.codecs@8,6,4"
    -c "$out/256_groups_of_16.codecs" -c "$out/256_groups_of_16_contiguous.codecs" -c "$out/256_float32_scale.codecs")
rm -f "$out"/*.state

main=$out/2048.codecs
$quick && main=$out/256.codecs
held_out=$("$rvqkv" evaluate "$data" --baselines q8_0 --json | sed -n 's/.*"tokens": "\(.*\)".*/\1/p')
step compress "$rvqkv" compress "$data" -c "$main" --tokens "$held_out" -o "$out/held_out.rvq"
step reconstruct "$rvqkv" reconstruct "$out/held_out.rvq" -c "$main" -o "$out/held_out.safetensors"
printf 'evaluate ... ' >&2
evaluation=$SECONDS
"$rvqkv" evaluate "$data" "${rows[@]}" --baselines q8_0,q4_0,int3,int2 -o "$out/results.json" >"$out/table.md"
printf '%d s\n' $((SECONDS - evaluation)) >&2
step plot plot

cat "$out/table.md"
echo
cat "$out/compress.log"
echo "Errors are error energy / energy on tokens $held_out, which no codec was trained on; tokens/s are those of one"
echo "layer on one thread; bits with codebooks: with the codebooks' bytes spread over 32768 cached tokens."
echo "Plot: $out/error_vs_bits.png   Details: $out/results.json   Seconds in all: $((SECONDS - start))"
