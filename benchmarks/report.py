#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes report.json, report.md and two plots of the raw results that measure.py wrote."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import plots
from shapes import DENSE_BYTES, LONG_APPEND, SHORT_APPEND, sizes_of
from targets import target_rows

CEILINGS = ("fma_peak", "memory_read")
DENSE = "dense, float16"  # the rival that attention_dense is
LEVELS = ("generic", "neon", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi")
# What integer levels are compared with.
FLOAT32_OF = {"avxvnni": "avx2", "avx512vnni": "avx512", "avx512vbmi": "avx512"}


def level_order(level: str) -> tuple[int, str]:
    """Later levels of the library are better ones; those not known here are newer than those that are."""
    return (LEVELS.index(level) if level in LEVELS else len(LEVELS), level)


def make_row(series: dict) -> dict:
    values = sorted(series["values"])
    value = statistics.median(values)
    quarter = len(values) // 4
    return {
        "name": series["name"],
        "shape": series["shape"],
        "level": series["level"],
        "threads": series["threads"],
        "value": value,
        "unit": series["unit"],
        "peak": None,
        "fraction_of_peak": None,
        "rival": series["rival"],
        "ratio": None,
        "rounds": len(values),
        "spread": (values[-1 - quarter] - values[quarter]) / value if len(values) > 1 else None,
        "compiler": series["compiler"],
    }


class Ceilings:
    """What the machine can do, in the unit of each row."""

    def __init__(self, rows: list[dict]) -> None:
        self.flops: dict[str, float] = {}
        self.read: dict[str, float] = {}
        for row in rows:
            if row["name"] == "fma_peak":
                self.flops[row["level"]] = max(row["value"], self.flops.get(row["level"], 0.0))
            elif row["name"] == "memory_read":
                place = row["shape"].removeprefix("from:")
                self.read[place] = max(row["value"], self.read.get(place, 0.0))

    def fma(self, level: str) -> float | None:
        """A level's float32 ceiling: what integers save shows as more than 100 %."""
        return self.flops.get(FLOAT32_OF.get(level, level))

    def of(self, row: dict) -> float | None:
        shape = sizes_of(row["shape"])
        if row["name"] == "decode":
            return self.decode(row, shape)
        if row["name"] == "attention_dense":
            # Once its keys and values are well beyond the caches.
            fits = row["threads"] > 1 or shape["tokens"] * DENSE_BYTES < 64 << 20 or "dram" not in self.read
            return None if fits else self.read["dram"] / DENSE_BYTES
        flops = self.fma(row["level"])
        if flops is None or row["name"] in CEILINGS:
            return None
        if row["unit"] == "flop/s":
            return flops
        if row["unit"] == "vectors/s":
            searches = 1 + (shape.get("depths", 1) - 1) * shape.get("beam", 1)
            return flops * row["threads"] / (2.0 * searches * shape["codewords"] * shape["dim"])
        return None

    def decode(self, row: dict, shape: dict[str, int]) -> float | None:
        """Every depth reads a codeword from the innermost cache that holds the codebook; peak in bytes written."""
        size = 2 if "weights:bfloat16" in row["shape"] else 4
        depths = shape.get("used_depths", shape["depths"])
        weights = depths * shape["codewords"] * shape["dim"] * size
        place = next(
            (name for name, most in (("l1", 24 << 10), ("l2", 768 << 10), ("l3", 16 << 20)) if weights < most), "dram"
        )
        return self.read[place] * 4 / size / depths if place in self.read else None


def pick(rows: list[dict], **what: object) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in what.items())]


def own_row(rows: list[dict], name: str, shape: str) -> dict | None:
    """What the library does by itself on one thread: the best level, as GCC builds it."""
    found = pick(rows, name=name, shape=shape, rival=None, threads=1, compiler="gcc")
    return max(found, key=lambda row: level_order(row["level"]), default=None)


def attention_rows(rows: list[dict]) -> list[dict]:
    """Each of our rows beside dense attention of the same tokens and threads; the fast preset beside all that computes
    attention."""
    beside = []
    ours = [row for row in rows if row["name"].startswith(("attention_", "sequence_attend_")) and not row["rival"]]
    for row in ours:
        rivals = [] if row["name"] == "attention_dense" else pick(rows, name="attention_dense", rival=None)
        if row["name"] in ("attention_fast", "sequence_attend_fast"):
            rivals = rivals + pick(rows, name="attention")
        for rival in rivals:
            if (rival["shape"], rival["threads"]) == (row["shape"], row["threads"]):
                what = {"name": row["name"], "rival": rival["rival"] or DENSE, "ratio": row["value"] / rival["value"]}
                beside.append(rival | what)
    return beside


def cache_rows(rows: list[dict]) -> list[dict]:
    """A prompt beside its encoding alone; one more token after a long context beside a short one."""
    beside = []
    for row in pick(rows, name="cache_prefill", rival=None):
        for alone in pick(rows, name="cache_encode", shape=row["shape"]):
            what = {"name": "cache_prefill", "rival": "rvqkv, encoding alone", "ratio": row["value"] / alone["value"]}
            beside.append(alone | what)
    for row in pick(rows, name="append_one", shape=LONG_APPEND):
        for short in pick(rows, name="append_one", shape=SHORT_APPEND):
            what = {"shape": LONG_APPEND, "rival": f"rvqkv, {SHORT_APPEND}", "ratio": row["value"] / short["value"]}
            beside.append(short | what)
    return beside


def make_rows(raw: dict) -> tuple[list[dict], Ceilings]:
    rows = [make_row(series) for series in raw["series"] if series["pinned"] or series["name"] == "train_memory"]
    unpinned = [make_row(series) for series in raw["series"] if not series["pinned"]]
    # Two threads beside one thread of the same rounds, both on any core and by the clock on the wall.
    for row in pick(unpinned, threads=2):
        rows.append(row)
        for alone in pick(unpinned, name=row["name"], shape=row["shape"], threads=1):
            rows.append(alone | {"rival": "rvqkv, one thread", "ratio": row["value"] / alone["value"]})
    # The exact search beside the float32 search it stands for.
    for shape in {row["shape"] for row in pick(rows, name="search_exact")}:
        exact = own_row(rows, "search_exact", shape)
        plain = own_row(rows, "search_f32", re.sub("/depth:.*", "", shape))
        if exact is not None and plain is not None:
            names = {"name": "search_exact", "shape": shape, "rival": "rvqkv, float32"}
            rows.append(plain | names | {"ratio": exact["value"] / plain["value"]})
    rows += attention_rows(rows) + cache_rows(rows)
    ceilings = Ceilings(rows)
    for row in rows:
        if row["rival"] is None:
            row["peak"] = ceilings.of(row)
            row["fraction_of_peak"] = row["value"] / row["peak"] if row["peak"] else None
        elif row["ratio"] is None:
            own = own_row(rows, row["name"], row["shape"])
            row["ratio"] = own["value"] / row["value"] if own else None
    rows.sort(
        key=lambda row: (
            row["name"],
            [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row["shape"])],
            row["rival"] is not None,
            row["rival"] or "",
            level_order(row["level"]),
            row["threads"],
            row["compiler"],
        )
    )
    return rows, ceilings


def shown(value: float, unit: str) -> str:
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def write_markdown(path: Path, rows: list[dict], raw: dict) -> None:
    context = raw["context"]
    compilers = ", ".join(sorted(version.strip() for version in context["compilers"].values()))
    packages = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    before, after = context["fma_peak_before"], context["fma_peak_after"]
    during = [value / 1e9 for series in raw["series"] if series["name"] == "fma_peak" for value in series["values"]]
    lines = [
        "# Benchmark report",
        "",
        f"{context['processor']}, {context['num_cpus']} cores, {context['system']}; {context['date']}.",
        f"rvqkv {context['rvqkv_version']}, best level {context['rvqkv_simd']}; {compilers}; {packages}.",
        "",
        f"Everything on core {context['core']}, but for rows of two threads; medians of {context['rounds']} rounds, in",
        f"each of which every program runs once; {context['seconds']} s in all. README.md says what each row is.",
        "",
        f"Multiply-add peak before {before / 1e9:.0f}, after {after / 1e9:.0f} GFLOP/s: drift"
        f" {100 * (after / before - 1):+.1f} %"
        + (" **- the machine was disturbed; take no figure for granted**" if abs(after / before - 1) > 0.05 else "")
        + f". In the rounds it was at most {max(during, default=0.0):.0f}.",
        "",
    ]
    if context["without_torch"]:
        lines += ["**PyTorch was left out** (`--without-torch`): no rows of it and of vector-quantize-pytorch.", ""]
    for failure in raw["failures"]:
        lines += [f"**Failed:** {failure}", ""]
    if context["missing"]:
        lines += [f"**Rivals that are not here:** {'; '.join(context['missing'])}.", ""]
    if context["errors"]:
        errors = ", ".join(f"{who} {100 * error:.2f} %" for who, error in context["errors"].items())
        lines += [f"Error energy of the encoders, at 88 bits a vector, of vectors not trained on: {errors}.", ""]
    lines += ["![Roofline](roofline.svg)", "", "![Beside rivals](rivals.svg)", ""]
    lines += ["![Attention](attention.svg)", ""]
    names = dict.fromkeys(row["name"] for row in rows)
    for name in names:
        lines += [
            f"## {name}",
            "",
            "| shape | who | threads | value | of peak | faster than it | spread | rounds |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in pick(rows, name=name):
            who = row["rival"] or f"{'machine' if name in CEILINGS else '**rvqkv**'} {row['level']} {row['compiler']}"
            if name == "attention_dense":
                who = DENSE
            ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
            lines.append(
                f"| {row['shape'].replace('/', ' ')} | {who} | {row['threads']} | {shown(row['value'], row['unit'])}"
                f" | {percent(row['fraction_of_peak'])} | {ratio} | {percent(row['spread'])} | {row['rounds']} |"
            )
        lines.append("")
    lines += ["## Targets", "", "| target | wanted | stretch | reached | met? |", "| --- | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(cells)} |" for cells in target_rows(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="what measure.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    arguments = parser.parse_args()
    raw = json.loads(arguments.raw.read_text(encoding="utf-8"))
    rows, ceilings = make_rows(raw)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"context": raw["context"], "failures": raw["failures"], "rows": rows}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_markdown(arguments.out / "report.md", rows, raw)
    plots.roofline(arguments.out / "roofline.svg", rows, ceilings.flops, ceilings.read)
    plots.rivals(arguments.out / "rivals.svg", rows)
    plots.attention(arguments.out / "attention.svg", rows)
    for failure in raw["failures"]:
        print(f"report.py: failed to run: {failure}", file=sys.stderr)
    return 1 if raw["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
