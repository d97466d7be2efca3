# SPDX-License-Identifier: MIT
"""What the kernels are held to, and what a report's rows say of it. A target not met is said, never an error: it is a
property of the machine as well."""

from collections.abc import Callable

from shapes import CONTEXTS, EMA_ROWS, KMEANS_ROWS, LIGHT, LONG_APPEND, PAPER, SMALL, Shape

Test = Callable[[dict], bool]
FORMATS = {"%": (100, "{:.1f} %"), "x": (1, "{:.2f}x"), "GB/s": (1e-9, "{:.0f} GB/s")}

ATTENTION = (
    ("fast", 2.2, 3),
    ("fast_mean", 2, None),
    ("smallest", 3, 4),
    ("paper", 0.35, None),
    ("paper_tables", 0.5, 0.8),
)
"""Presets: wanted and stretch beside dense attention."""
SEQUENCES = ("fast", "smallest", "paper")


def own(name: str, shape: str, **more: object) -> Test:
    wanted = {"name": name, "shape": shape, "rival": None, "threads": 1} | more
    return lambda row: all(row[key] == value for key, value in wanted.items())


def beside(name: str, shape: str, rival: str, threads: int = 1) -> Test:
    """Rows of rivals whose names begin so."""
    wanted = {"name": name, "shape": shape, "threads": threads}
    return lambda row: (
        (row["rival"] or "").startswith(rival) and all(row[key] == value for key, value in wanted.items())
    )


def target_rows(rows: list[dict]) -> list[tuple[str, str, str, str, str]]:
    """Cells: target, wanted, stretch, reached, met?"""
    lines = []

    def find(test: Test, field: str) -> float | None:
        """The quickest rival's; of our rows, which come in the order of the levels, what the library takes by itself."""
        found = [row[field] for row in rows if test(row) and row[field] is not None]
        return None if not found else min(found) if field == "ratio" else found[-1]

    def add(what: str, reached: float | None, style: str, wanted: float, stretch: float | None = None) -> None:
        scale, text = FORMATS[style]

        def show(value: float | None) -> str:
            return "" if value is None else text.format(value * scale)

        if reached is None:
            met = "not measured"
        elif reached < wanted:
            met = f"no, by {show(wanted - reached)}"
        else:
            met = "yes" if stretch is None or reached < stretch else "yes, stretch too"
        lines.append((what, show(wanted), show(stretch), show(reached), met))

    for vectors in (32, 1024):
        for compiler in ("gcc", "clang"):
            for level, wanted, stretch in (("avx512", 0.92, 0.96), ("avx2", 0.90, None)):
                what = f"search_f32 2048 x 32, {vectors} vectors, {level}, {compiler}: of multiply-add peak"
                test = own("search_f32", PAPER.label(vectors, False), level=level, compiler=compiler)
                add(what, find(test, "fraction_of_peak"), "%", wanted, stretch)
    for vectors in (32, 1024):
        for depth in ("", "/depth:4"):
            what = f"search_exact 2048 x 32, {vectors} vectors{', depth 4' if depth else ''}: beside float32"
            test = beside("search_exact", PAPER.label(vectors, False) + depth, "rvqkv, float32")
            add(what, find(test, "ratio"), "x", 2.2, 3.0)
    for name, vectors, beam, rival, wanted, stretch in (
        ("encode_token", 64, "", "faiss RQ beam 1", 8, 10),
        ("encode_batch", 512, "", "faiss RQ beam 1", 13, 20),
        ("encode_beam", 512, "/beam:5", "faiss RQ beam 5", 8, 15),
    ):
        what = f"{name} 8 x 2048 x 32, {vectors} vectors: beside {rival}"
        add(what, find(beside(name, PAPER.label(vectors) + beam, rival), "ratio"), "x", wanted, stretch)
    # Large codebooks are best kept in 16 bits: half as much to read.
    for shape, weights, wanted in ((PAPER, "bfloat16", 30e9), *((shape, "float32", 60e9) for shape in SMALL)):
        test = own("decode", f"weights:{weights}/{shape.label(1024)}", compiler="gcc")
        add(f"decode {' x '.join(map(str, shape))}, {weights} weights", find(test, "value"), "GB/s", wanted)
    whole = find(own("decode", f"weights:bfloat16/{PAPER.label(1024)}", compiler="gcc"), "value")
    for depths, wanted in ((4, 1.8), (2, 3.2)):
        part = find(
            own("decode", f"weights:bfloat16/{PAPER.label(1024)}/used_depths:{depths}", compiler="gcc"), "value"
        )
        what = f"decode 8 x 2048 x 32, {depths} of the depths: beside all"
        add(what, part / whole if part and whole else None, "x", wanted)
    kmeans, ema = PAPER.label(KMEANS_ROWS, False), PAPER.label(EMA_ROWS)
    for what, name, sizes, rival, wanted in (
        ("train_kmeans 2048: beside faiss", "train_kmeans", kmeans, "faiss", 5),
        ("train_kmeans 2048: beside PyTorch", "train_kmeans", kmeans, "PyTorch, the paper's operations", 10),
        ("train_ema: beside PyTorch", "train_ema", ema, "PyTorch, the paper's operations", 10),
        ("train_kmeans 2048: two threads beside one", "train_kmeans", kmeans, "rvqkv, one thread", 1.8),
        ("train_ema: two threads beside one", "train_ema", ema, "rvqkv, one thread", 1.8),
    ):
        add(what, find(beside(name, sizes, rival), "ratio"), "x", wanted)
    for tokens in CONTEXTS[1:]:
        reached = find(own("attention_dense", f"tokens:{tokens}"), "fraction_of_peak")
        add(f"attention_dense, {tokens:,} tokens: of memory_read", reached, "%", 0.9)
    context = f"tokens:{CONTEXTS[1]}"
    for name, wanted, stretch in ATTENTION:
        for threads in (1, 2):
            reached = find(beside(f"attention_{name}", context, "dense", threads), "ratio")
            what = f"attention_{name}, {CONTEXTS[1]:,} tokens, {threads} thread{'s' * (threads > 1)}: beside dense"
            add(what, reached, "x", wanted, stretch)
        if name in SEQUENCES:
            reached = find(beside(f"sequence_attend_{name}", context, "dense"), "ratio")
            add(f"sequence_attend_{name}, {CONTEXTS[1]:,} tokens: beside dense", reached, "x", wanted, stretch)
    for rival, wanted in (("ggml f16", 5), ("ggml q8_0", 8), ("ggml q4_0", 15)):
        for tokens in CONTEXTS:
            reached = find(beside("attention_fast", f"tokens:{tokens}", rival), "ratio")
            add(f"attention_fast, {tokens:,} tokens: beside {rival}", reached, "x", wanted)
    for shape in (PAPER, LIGHT, Shape(3, 128, 8)):
        label = "/".join(shape.label(0).split("/")[:-1]) + "/tokens:256"
        reached = find(beside("cache_prefill", label, "rvqkv, encoding alone"), "ratio")
        add(f"cache_prefill {' x '.join(map(str, shape))}: of the encoding alone", reached, "%", 0.9)
    reached = find(beside("append_one", LONG_APPEND, "rvqkv"), "ratio")
    add("append_one after 32,768 tokens: beside after 1,024", reached, "x", 0.9)
    for name in SEQUENCES:
        over = find(beside(f"sequence_bytes_{name}", context, "formula"), "ratio")
        add(f"sequence_bytes_{name}: formula over bytes held", 1 / over if over else None, "%", 0.99)
    return lines
