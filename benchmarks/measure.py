#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs the benchmark programs and the Python rivals in turn, round after round, and writes every value to one file of
raw results. report.py makes the report of it."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

UNITS = {"flops": "flop/s", "vectors": "vectors/s", "bytes": "B/s", "tokens": "tokens/s"}
# Attention has its own stage: what it reads takes a while to make, so that rounds are repetitions in one program.
ATTENTION = "^(attention.*threads:1|sequence_|append_one|cache_(prefill|encode)|memory_read/from:dram)"
ATTENTION_TWO = "^attention.*threads:2"
NOT_IN_ROUNDS = "-(threads:2|^attention|^sequence_|^append_one|^cache_(prefill|encode))"
OWN_ROWS = "^(fma_peak|memory_read|decode|search_exact|search_f32/level|encode_[a-z]*/level)"


class Failed(Exception):
    pass


class Progress:
    """One line on a terminal, nothing in a pipe."""

    def __init__(self, stages: int) -> None:
        self.stages, self.stage, self.begun = stages, 0, time.monotonic()

    def next(self, what: str) -> None:
        self.stage += 1
        if not sys.stderr.isatty():
            return
        left = ""
        if self.stage > 4:
            seconds = (time.monotonic() - self.begun) / (self.stage - 1) * (self.stages - self.stage + 1)
            left = f", about {seconds:.0f} s left"
        print(f"\r\x1b[Kstage {self.stage} of {self.stages}: {what}{left}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Results:
    """Values of each series over the rounds."""

    def __init__(self) -> None:
        self.series: dict[tuple, dict] = {}
        self.failures: list[str] = []

    def add(self, value: float, **what: object) -> None:
        key = tuple(what.values())
        self.series.setdefault(key, {**what, "values": []})["values"].append(value)

    def fail(self, text: str) -> None:
        if text not in self.failures:
            self.failures.append(text)


def environment() -> dict[str, str]:
    """Rivals at their best: some systems force old kernels on OpenBLAS by these variables."""
    unwanted = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "RVQKV_SIMD")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run_program(program: Path, data: Path, options: list[str], core: int | None) -> dict:
    pin = [] if core is None else ["taskset", "-c", str(core)]
    command: list[str | Path] = [*pin, program, "--data", data, "--benchmark_format=json", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{program} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def collect(results: Results, found: dict, *, wall_clock: bool = False) -> None:
    """Takes one run of a benchmark program. `wall_clock` turns rates over processor time into such over real time."""
    context = found["context"]
    for entry in found["benchmarks"]:
        parts = [part for part in entry["run_name"].split("/") if part != "real_time"]
        options = dict(part.split(":", 1) for part in parts[1:])
        if entry.get("run_type") == "aggregate":
            continue
        if entry.get("error_occurred"):
            results.fail(f"{entry['run_name']}: {entry['error_message']}")
            continue
        counter = next(name for name in UNITS if name in entry)
        value = entry[counter]
        threads = int(options.get("threads", 1))
        if wall_clock and threads == 1:
            value *= entry["cpu_time"] / entry["real_time"]
        rival = options.get("rival")
        row = {
            "name": parts[0],
            "shape": "/".join(part for part in parts[1:] if part.split(":")[0] not in ("level", "threads", "rival")),
            "level": "" if rival else options.get("level", context["rvqkv_simd"]),
            "threads": threads,
            "unit": UNITS[counter],
            "rival": rival,
            "compiler": context["compiler"].split()[0],
            "pinned": not wall_clock,
        }
        results.add(value, **row)
        if "held" in entry:  # what the sequence takes, beside what it should
            row |= {"name": row["name"].replace("attend", "bytes"), "unit": "B"}
            results.add(entry["held"], **row)
            results.add(entry["formula"], **row | {"rival": "formula", "level": ""})


class Peers:
    """peers.py, kept alive from round to round."""

    def __init__(self, arguments: argparse.Namespace, seconds: float) -> None:
        command = ["taskset", "-c", str(arguments.core), sys.executable, str(Path(__file__).with_name("peers.py"))]
        command += ["--data", str(arguments.data), "--seconds", str(seconds)]
        command += ["--without-torch"] if arguments.without_torch else []
        self.log = arguments.out.with_suffix(".peers.log")
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.described = self.answer()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text(encoding="utf-8").strip()[-500:]
            raise Failed(f"peers.py ended with {self.process.wait()}: {end}")
        return json.loads(line)

    def round(self, results: Results) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        for key, value in self.answer().items():
            results.add(value, **self.described["cases"][key], level="", threads=1, compiler="", pinned=True)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def peak(program: Path, data: Path, core: int) -> float:
    found = run_program(program, data, ["--benchmark_filter=^fma_peak", "--benchmark_min_time=0.1"], core)
    return max((entry["flops"] for entry in found["benchmarks"]), default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gcc", type=Path, required=True, help="rvqkv_benchmarks, built with GCC")
    parser.add_argument("--clang", type=Path, help="the same, built with Clang")
    parser.add_argument("--program", type=Path, required=True, help="the program rvqkv")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py filled")
    parser.add_argument("--out", type=Path, required=True, help="file for the raw results (JSON)")
    parser.add_argument("--core", type=int, required=True, help="core that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each benchmark and round")
    parser.add_argument("--without-torch", action="store_true", help="leave the PyTorch rivals out")
    parser.add_argument("--missing", action="append", default=[], help="a rival that is not there, for the report")
    arguments = parser.parse_args()
    begun = time.monotonic()
    results = Results()
    programs = [("GCC", arguments.gcc, NOT_IN_ROUNDS)] + (
        [("Clang", arguments.clang, OWN_ROWS)] if arguments.clang else []
    )
    progress = Progress(arguments.rounds * (len(programs) + 2) + 6)
    options = [f"--benchmark_min_time={arguments.seconds}", "--benchmark_enable_random_interleaving=true"]
    peers = None
    try:
        progress.next("rivals from Python get ready")
        peers = Peers(arguments, arguments.seconds)
        results.failures += peers.described["failures"]
        progress.next("multiply-add peak, before")
        before = peak(arguments.gcc, arguments.data, arguments.core)
        context: dict = {}
        for number in range(1, arguments.rounds + 1):
            in_round = f"round {number} of {arguments.rounds}"
            for compiler, program, rows in programs:
                progress.next(f"{in_round}, {compiler} build")
                found = run_program(program, arguments.data, [*options, f"--benchmark_filter={rows}"], arguments.core)
                collect(results, found)
                context.setdefault("compilers", {})[compiler] = found["context"]["compiler"]
                context |= {key: found["context"][key] for key in ("rvqkv_version", "rvqkv_simd", "num_cpus")}
            progress.next(f"{in_round}, rivals from Python")
            peers.round(results)
            progress.next(f"{in_round}, two threads")
            if (os.cpu_count() or 1) > 1:
                found = run_program(arguments.gcc, arguments.data, [*options, "--benchmark_filter=^train_"], None)
                collect(results, found, wall_clock=True)
        repeated = [*options, f"--benchmark_repetitions={arguments.rounds}"]
        progress.next("attention")
        found = run_program(
            arguments.gcc, arguments.data, [*repeated, f"--benchmark_filter={ATTENTION}"], arguments.core
        )
        collect(results, found)
        progress.next("attention, two threads")
        if (os.cpu_count() or 1) > 1:
            found = run_program(arguments.gcc, arguments.data, [*repeated, f"--benchmark_filter={ATTENTION_TWO}"], None)
            collect(results, found, wall_clock=True)
        progress.next("multiply-add peak, after")
        after = peak(arguments.gcc, arguments.data, arguments.core)
        progress.next("memory of training")
        memory = subprocess.run(
            [sys.executable, Path(__file__).with_name("train_memory.py"), "--program", arguments.program],
            capture_output=True,
            text=True,
            check=False,
        )
        if memory.returncode != 0:
            results.fail(f"train_memory.py: {memory.stderr.strip()[-500:]}")
        else:
            results.add(**json.loads(memory.stdout))
    except KeyboardInterrupt:
        return 130
    except (Failed, OSError) as problem:
        progress.clear()
        print(f"measure.py: error: {problem}", file=sys.stderr)
        return 1
    finally:
        if peers is not None:
            peers.stop()
        progress.clear()
    context |= {
        "processor": processor(),
        "system": system(),
        "core": arguments.core,
        "rounds": arguments.rounds,
        "versions": peers.described["versions"],
        "errors": peers.described["errors"],
        "without_torch": arguments.without_torch,
        "missing": arguments.missing + peers.described["missing"],
        "fma_peak_before": before,
        "fma_peak_after": after,
        "seconds": round(time.monotonic() - begun),
        "date": time.strftime("%Y-%m-%d"),
    }
    raw = {"context": context, "failures": results.failures, "series": list(results.series.values())}
    arguments.out.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
