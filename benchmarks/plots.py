# SPDX-License-Identifier: MIT
"""The plots of the report: a roofline, and bars of how much faster we are than each rival."""

from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt

from shapes import sizes_of

plt.switch_backend("svg")
plt.rcParams |= {
    "svg.hashsalt": "rvqkv",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

COLORS = {
    "search_f32": "#0b6fa4",
    "search_exact": "#7048a8",
    "encode_token": "#e07b00",
    "encode_batch": "#2f9e44",
    "encode_beam": "#c2255c",
    "decode": "#666666",
    "train_kmeans": "#0ca678",
    "train_ema": "#5c7cfa",
}


def short(shape: str) -> str:
    n = sizes_of(shape)
    sizes = [str(n[key]) for key in ("depths", "codewords", "dim") if key in n]
    return " x ".join(sizes) + f", {n['rows']} vectors"


def work_and_traffic(row: dict) -> tuple[float, float] | None:
    """Operations, and the bytes that must move at least: codebooks, vectors and codes once each."""
    n = sizes_of(row["shape"])
    if "rows" not in n or row["threads"] != 1:
        return None
    depths, vectors = n.get("depths", 1), n["rows"] * n["dim"] * 4
    if row["name"].startswith(("search", "encode")) and "beam" not in n:
        codebooks = depths * n["codewords"] * n["dim"] * 4
        return 2.0 * depths * n["codewords"] * n["dim"] * n["rows"], codebooks + vectors + 2 * depths * n["rows"]
    if row["name"] == "decode" and "float32" in row["shape"]:
        used = n.get("used_depths", depths)
        return float(used * n["rows"] * n["dim"]), used * vectors + vectors + 2 * used * n["rows"]
    return None


def roofline(path: Path, rows: list[dict], peaks: dict[str, float], reads: dict[str, float]) -> None:
    """`peaks`: flop/s of each level; `reads`: B/s of each cache."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    top = max(peaks.values(), default=1e11)
    left, right = 0.08, 3000.0
    for place, rate in reads.items():
        axes.plot([left, top / rate], [left * rate / 1e9, top / 1e9], color="#b0b0b0", lw=1)
        axes.annotate(
            f"{place.upper()} {rate / 1e9:.0f} GB/s",
            (left, left * rate / 1e9),
            xytext=(3, 4),
            textcoords="offset points",
            fontsize=7.5,
            color="#707070",
        )
    for level, peak in peaks.items():
        axes.axhline(peak / 1e9, color="#b0b0b0", lw=1)
        axes.text(right, peak / 1e9 * 1.03, f"{level} FMA {peak / 1e9:.0f}", ha="right", fontsize=7.5, color="#707070")
    for row in rows:
        work = work_and_traffic(row)
        if row["rival"] is not None or work is None or row["compiler"] != "gcc" or row["level"] == "generic":
            continue
        flops, traffic = work
        n = sizes_of(row["shape"])
        amount = {"flop/s": flops, "vectors/s": n["rows"], "B/s": 4.0 * n["rows"] * n["dim"]}[row["unit"]]
        axes.scatter(
            flops / traffic,
            row["value"] / amount * flops / 1e9,
            s=22,
            color=COLORS[row["name"]],
            marker="^" if row["level"] == "avx2" else "s" if row["level"] not in ("avx512", "neon") else "o",
            alpha=0.8,
            lw=0,
        )
    for name in ("search_f32", "search_exact", "encode_token", "encode_batch", "decode"):
        axes.scatter([], [], color=COLORS[name], label=name, s=22)
    for marker, label in (("^", "avx2"), ("o", "avx512, neon"), ("s", "above")):
        axes.scatter([], [], color="#909090", marker=marker, label=label, s=22)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        xlabel="operations for each byte that must move (codebooks, vectors and codes once each)",
        ylabel="GFLOP/s (float32 work; integer kernels: the float32 work they stand for)",
        title="Achieved beside this machine's ceilings, one core, same run",
    )
    axes.legend(fontsize=8, loc="lower right", frameon=False, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def rivals(path: Path, rows: list[dict]) -> None:
    wanted = (
        ("search_f32", "codewords:2048/dim:32/rows:32"),
        ("search_f32", "codewords:2048/dim:32/rows:1024"),
        ("encode_token", "depths:8/codewords:2048/dim:32/rows:64"),
        ("encode_batch", "depths:8/codewords:2048/dim:32/rows:512"),
        ("encode_beam", "depths:8/codewords:2048/dim:32/rows:512/beam:5"),
        ("decode", "weights:float32/depths:8/codewords:2048/dim:32/rows:1024"),
        ("train_kmeans", "codewords:2048/dim:32/rows:32768"),
        ("train_ema", "depths:8/codewords:2048/dim:32/rows:4096"),
    )
    panels = []
    for name, shape in wanted:
        found = [row for row in rows if row["name"] == name and row["shape"] == shape and row["rival"] and row["ratio"]]
        found = [row for row in found if not row["rival"].startswith("rvqkv")]
        if found:
            panels.append((name, shape, sorted(found, key=lambda row: row["ratio"])))
    if not panels:
        return
    heights = [len(found) + 1.6 for _, _, found in panels]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(9, 0.24 * sum(heights)), height_ratios=heights, sharex=True, layout="constrained"
    )
    most = max(row["ratio"] for _, _, found in panels for row in found)
    for axes, (name, shape, found) in zip(grid if len(panels) > 1 else [grid], panels, strict=True):
        places = range(len(found))[::-1]
        axes.barh(places, [row["ratio"] for row in found], color=COLORS[name], height=0.7)
        axes.set_yticks(places, [row["rival"] for row in found])
        for place, row in zip(places, found, strict=True):
            axes.text(row["ratio"] * 1.04, place, f"{row['ratio']:.1f}x", va="center", fontsize=8)
        axes.axvline(1, color="black", lw=0.8)
        axes.set(xscale="log", xlim=(0.2, most * 2))
        axes.set_title(f"{name}: {short(shape)}", loc="left", fontsize=9, fontweight="bold")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    figure.suptitle("How many times faster than each rival: same vectors, same codebooks, one core", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def attention(path: Path, rows: list[dict]) -> None:
    """Time of one decode step's attention against the context, one thread."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        is_ours = row["name"].startswith("attention_") and row["rival"] is None
        if row["threads"] == 1 and (is_ours or row["name"] == "attention"):
            tokens = sizes_of(row["shape"])["tokens"]
            name = row["rival"] or row["name"].removeprefix("attention_").replace("dense", "dense, float16")
            series.setdefault(name, []).append((tokens, 1e3 * tokens / row["value"]))
    if not series:
        return
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    ours = [name for name in series if not name.startswith(("dense", "ggml")) and "turboquant" not in name]
    colors = {True: cycle(plt.colormaps["tab10"].colors), False: cycle(plt.colormaps["Dark2"].colors)}
    for name, points in sorted(series.items(), key=lambda item: -max(item[1])[1]):
        contexts, times = zip(*sorted(points), strict=True)
        color = next(colors[name in ours])
        style, width = ("-", 2.0) if name in ours else ("--", 1.2)
        axes.plot(contexts, times, style, marker="o", ms=4, lw=width, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="milliseconds")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(
        "One decode step's attention in one layer, one core: 8 KV heads of 128 channels, 32 query heads", fontsize=10
    )
    ticks = sorted({tokens for points in series.values() for tokens, _ in points})
    axes.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks], minor=False)
    axes.minorticks_off()
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
