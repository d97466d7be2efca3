#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Merges the raw results of benchmarks/run.sh into report.json and report.md."""

import json
import re
import sys
from pathlib import Path

COUNTERS = (("flops", "flop/s"), ("vectors", "vectors/s"), ("tokens", "tokens/s"), ("bytes_per_second", "B/s"))


def read_benchmark(path):
    """One row for each benchmark: its name, options and the median over the repetitions."""
    data = json.loads(path.read_text(encoding="utf-8"))
    medians, spreads = {}, {}
    for entry in data["benchmarks"]:
        if entry.get("aggregate_name") == "median":
            medians[entry["run_name"]] = entry
        elif entry.get("aggregate_name") == "cv":
            spreads[entry["run_name"]] = entry
    rows = []
    for name, entry in medians.items():
        parts = [part for part in name.split("/") if part != "real_time"]
        options = dict(part.split(":", 1) for part in parts[1:] if ":" in part)
        key, unit = next((k, u) for k, u in COUNTERS if k in entry)
        special = {"level", "threads", "rival"}
        rows.append({
            "name": parts[0],
            "shape": "/".join(p for p in parts[1:] if p.split(":")[0] not in special),
            "level": options.get("level", data["context"].get("rvqkv_simd", "")),
            "threads": int(options.get("threads", 1)),
            "value": entry[key],
            "unit": unit,
            "peak": None,
            "fraction_of_peak": None,
            "rival": options.get("rival"),
            "ratio": None,
            "rounds": entry["repetitions"],
            "spread": spreads.get(name, {}).get(key),
        })
    return rows, data["context"]


def main():
    out = Path(sys.argv[1])
    rows, context = read_benchmark(out / "one_core.json")
    rows += read_benchmark(out / "all_cores.json")[0]
    for peer in json.loads((out / "peers.json").read_text(encoding="utf-8")):
        rows.append({
            "name": peer["name"], "shape": peer["shape"], "level": "", "threads": 1, "value": peer["value"],
            "unit": peer["unit"], "peak": None, "fraction_of_peak": None,
            "rival": f"{peer['rival']} {peer['version']}", "ratio": None, "rounds": peer["rounds"],
            "spread": peer["spread"],
        })
    peaks = {row["level"]: row["value"] for row in rows if row["name"] == "fma_peak"}
    best = context.get("rvqkv_simd", "")
    ours = {(r["name"], r["shape"]): r["value"]
            for r in rows if not r["rival"] and r["threads"] == 1 and r["level"] == best}
    for row in rows:
        if row["unit"] == "flop/s" and not row["rival"] and row["level"] in peaks and row["name"] != "fma_peak":
            row["peak"] = peaks[row["level"]]
            row["fraction_of_peak"] = row["value"] / row["peak"]
        if row["rival"] and (row["name"], row["shape"]) in ours:
            row["ratio"] = ours[row["name"], row["shape"]] / row["value"]
    memory = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    rows.append(memory)

    rows.sort(key=lambda r: (r["name"], r["shape"], r["rival"] or "", r["level"], r["threads"]))
    (out / "report.json").write_text(json.dumps({"context": context, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    lines = [
        "# Benchmarks", "",
        f"{context.get('compiler', '')}, {context['num_cpus']} cores, library {context.get('rvqkv_version', '')}, "
        f"best level {best}, one core pinned unless threads say otherwise; medians. "
        "`ratio` is how many times faster we are than that rival.", "",
        "| name | shape | who | threads | value | of FMA peak | ratio | spread |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        value, unit = row["value"], row["unit"]
        for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)):
            if abs(value) >= factor or factor == 1:
                break
        shown = f"{value / factor:.3g} {prefix}{unit}"
        part = f"{100 * row['fraction_of_peak']:.0f} %" if row["fraction_of_peak"] else ""
        ratio = f"{row['ratio']:.2f}x" if row["ratio"] else ""
        spread = f"{100 * row['spread']:.0f} %" if row["spread"] is not None else ""
        who = row["rival"] or f"rvqkv {row['level']}".strip()
        shape = re.sub(r"/", " ", row["shape"])
        lines.append(f"| {row['name']} | {shape} | {who} | {row['threads']} | {shown} | {part} | {ratio} | {spread} |")
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nwritten: {out}/report.json, {out}/report.md", file=sys.stderr)


if __name__ == "__main__":
    main()
