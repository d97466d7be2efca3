# SPDX-License-Identifier: MIT
"""Codecs for a Transformers model: its keys and values are caught as a cache would get them, and trained on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ._rvqkv import CodecSpec, ModelTrainer
from .codecs import CodecSet
from .models import LayerShape, layer_shapes, text_config, turn

Progress = Callable[[str, int, int], None]


def fingerprint(model: torch.nn.Module) -> str:
    """Tell a model from any other by the signs of what projects keys and values: no rounding changes them."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight", "qkv_proj.weight")):
            digest.update(np.packbits(torch.signbit(weight.detach()).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


class CaptureCache(DynamicCache):
    """A cache for one pass over a text, which shows every layer's new keys and values to a function and keeps none."""

    def __init__(self, see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        """Call ``see(layer, keys, values)`` with ``[batch, head, token, channel]`` of every layer."""
        super().__init__()
        self._see = see

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Show the tensors and hand them on."""
        self._see(layer_idx, key_states, value_states)
        return key_states, value_states


class Calibration:
    """Trains codecs for every layer of a model.

    Args:
        model: a causal language model on the CPU.
        depths: residual depth of keys and values; or the two apart.
        codewords: of each depth.
        group_dim: channels quantized together.
        key_coding: "before_rope" (the paper's) or "after_rope": in which state keys are coded.
        sample: most vectors that k-means sees of each layer and side; memory does not grow beyond it.
        iterations: of k-means.
        seed: of every random choice.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        depths: int | tuple[int, int] = 8,
        codewords: int = 2048,
        group_dim: int = 32,
        key_coding: str = "before_rope",
        sample: int = 100_000,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        """Make trainers for all layers."""
        if key_coding not in ("before_rope", "after_rope"):
            raise ValueError(f"key_coding is {key_coding!r}, must be one of: before_rope, after_rope")
        self.model = model
        self.key_coding = key_coding
        self.shapes: list[LayerShape] = layer_shapes(model, with_rope=key_coding == "before_rope")
        self.seconds = {"model": 0.0, "training": 0.0}
        self.tokens = 0
        self.notes: dict[str, str] = {}  # saved with the state: what else must be the same when training goes on
        of_keys, of_values = (depths, depths) if isinstance(depths, int) else depths
        specs = {}
        for layer, shape in enumerate(self.shapes):
            key = CodecSpec(shape.head_dim, group_dim, of_keys, codewords, grouping="strided")
            value = CodecSpec(shape.head_dim, group_dim, of_values, codewords, grouping="contiguous")
            specs[layer] = (key, value)
        self.settings = {
            "depths": [of_keys, of_values],
            "codewords": codewords,
            "group_dim": group_dim,
            "key_coding": key_coding,
            "sample": sample,
            "iterations": iterations,
            "seed": seed,
        }
        self.trainer = ModelTrainer(specs, sample=sample, iterations=iterations, seed=seed)

    def observe(self, windows: Iterable[torch.Tensor], *, progress: Progress | None = None) -> None:
        """Offer the keys and values of token windows ``[token]`` to the samples.

        Raises ``ValueError`` for activations that are not finite; the samples are as before that window then. An
        interrupt waits for the window at work: ``tokens`` says how many have been read, ``save`` keeps them.
        """
        batches = list(windows)
        for number, window in enumerate(batches):
            with _interrupts() as interrupted:
                found = self.capture(window)
                start = time.perf_counter()
                for layer, (keys, values) in enumerate(found):
                    self.trainer.observe(layer, keys, values)
                self.seconds["training"] += time.perf_counter() - start
                self.tokens += len(window)
            if progress is not None:
                progress("reading", number + 1, len(batches))
            if interrupted():
                raise KeyboardInterrupt

    def initialize(self, *, progress: Progress | None = None) -> bool:
        """Run k-means for all layers; whether it is through.

        An interrupt stops at the next point from which training can go on: call it again, or ``save``.
        """
        stopped = False

        def report(done: int, total: int, error: float) -> bool:
            nonlocal stopped
            try:
                if progress is not None:
                    progress("k-means", done, total)
            except KeyboardInterrupt:
                stopped = True
            return not stopped

        start = time.perf_counter()
        with _interrupts() as interrupted:
            through = self.trainer.initialize(lambda *args: report(*args) and not interrupted())
        self.seconds["training"] += time.perf_counter() - start
        return bool(through)

    def train(self, windows: Iterable[torch.Tensor]) -> float:
        """One EMA step over windows (micro-batches); the mean commitment loss of keys and values."""
        losses: list[float] = []
        for window in windows:
            for layer, (keys, values) in enumerate(self.capture(window)):
                losses.extend(self.trainer.accumulate(layer, keys, values))
        self.trainer.step()
        return sum(losses) / max(1, len(losses))

    def codecs(self, **metadata: str) -> CodecSet:
        """Return the codecs that training has arrived at, with the model's fingerprint."""
        config = text_config(self.model)
        text = {
            "model.type": str(config.model_type),
            "model.name": Path(getattr(config, "_name_or_path", "") or config.model_type).name,
            "model.fingerprint": fingerprint(self.model),
            "model.key_coding": self.key_coding,
            "calibration.tokens": str(self.tokens),
            **metadata,
        }
        return CodecSet(dict(self.trainer.make()), text)

    def save(self, path: str | Path) -> None:
        """Save the whole state of training, to go on later."""
        state = {"settings": self.settings, "tokens": self.tokens}
        about = {"calibration": json.dumps(state), "model.fingerprint": fingerprint(self.model)}
        self.trainer.save(path, {**about, **self.notes})

    @classmethod
    def resume(cls, model: torch.nn.Module, path: str | Path) -> Calibration:
        """Go on from a saved state. Raises ``ValueError`` if it belongs to another model."""
        trainer = ModelTrainer.resume(path)
        if trainer.metadata.get("model.fingerprint") != fingerprint(model):
            raise ValueError(f"{path}: this training belongs to another model")
        state = json.loads(trainer.metadata["calibration"])
        settings = dict(state["settings"])
        of_keys, of_values = settings.pop("depths")
        made = cls(model, depths=(of_keys, of_values), **settings)
        made.trainer = trainer
        made.tokens = state["tokens"]
        own = ("calibration", "model.fingerprint")
        made.notes = {name: text for name, text in trainer.metadata.items() if name not in own}
        return made

    def capture(self, window: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of all layers for one window of tokens, ``[token, head, channel]``, as codecs see them."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        ours = 0.0

        def see(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            nonlocal ours
            began = time.perf_counter()
            for name, each in (("keys", keys), ("values", values)):
                if not torch.isfinite(each).all():
                    raise ValueError(f"layer {layer}: {name} of the model hold numbers that are not finite")
            if self.key_coding == "before_rope":
                keys = turn(keys, self.shapes[layer], back=True)
            found.append((keys[0].transpose(0, 1).float().cpu(), values[0].transpose(0, 1).float().cpu()))
            ours += time.perf_counter() - began

        start = time.perf_counter()
        base = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model
        device = next(self.model.parameters()).device
        with torch.no_grad():
            base(window[None].to(device), past_key_values=CaptureCache(see), use_cache=True)
        self.seconds["model"] += time.perf_counter() - start - ours
        self.seconds["training"] += ours
        if len(found) != len(self.shapes):
            raise NotImplementedError(f"the model showed keys of {len(found)} layers, it has {len(self.shapes)}")
        return found


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a flag while a long call runs that can stop in order."""
    import signal
    import threading

    hit = False

    def note(number: int, frame: Any) -> None:
        nonlocal hit
        hit = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: hit
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
