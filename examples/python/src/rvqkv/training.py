# SPDX-License-Identifier: MIT
"""Finetuning a Transformers model together with its quantized cache, in the paper's manner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ._rvqkv import Codec
from .autograd import Quantizer
from .cache import check_codecs
from .codecs import CodecSet
from .models import LayerShape, layer_shapes, turn


class LayerQuantizers(torch.nn.ModuleDict):
    """The quantizers of a model's keys and values, which every query reads through while it is trained.

    Keys are quantized before rotary embedding: it is undone, and done again, both with their gradients.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        codecs: CodecSet | Mapping[int, tuple[Codec, Codec]] | str | Path,
        *,
        decay: float = 0.99,
    ) -> None:
        """Begin with the codebooks of ``codecs``; refuses those of another model."""
        super().__init__()
        given = CodecSet.of(codecs)
        self.metadata = given.metadata
        self.shapes: list[LayerShape] = layer_shapes(model)
        if given.metadata.get("model.key_coding", "before_rope") != "before_rope":
            raise ValueError("finetuning needs codecs of keys before rotary embedding")
        check_codecs(model, given, self.shapes)
        for layer, (key, value) in given.layers.items():
            self[f"{layer}_key"] = Quantizer(key, decay=decay)
            self[f"{layer}_value"] = Quantizer(value, decay=decay)

    def cache(self, mask: torch.Tensor | None = None) -> TrainingCache:
        """Return what to pass as ``past_key_values`` to one forward pass over whole sequences."""
        return TrainingCache(self, mask)

    def step(self) -> None:
        """Make new codebooks of the running averages, once for each step of the optimizer."""
        for quantizer in self.values():
            quantizer.step()

    def codecs(self) -> CodecSet:
        """Return the codecs as they are now. The model has changed with them, so its fingerprint is left out."""
        layers = {
            layer: (self[f"{layer}_key"].codec, self[f"{layer}_value"].codec) for layer in range(len(self.shapes))
        }
        kept = {name: text for name, text in self.metadata.items() if name != "model.fingerprint"}
        return CodecSet(layers, kept)


class TrainingCache(DynamicCache):
    """Keys and values of one forward pass, replaced by what their codes stand for before any query reads them."""

    def __init__(self, quantizers: LayerQuantizers, mask: torch.Tensor | None = None) -> None:
        """Begin a pass; ``mask`` ``[batch, token]`` says which tokens count."""
        super().__init__()
        self._quantizers = quantizers
        self._mask = mask
        self.losses: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize; ``[batch, head, token, channel]`` both ways."""
        shape = self._quantizers.shapes[layer_idx]
        keys = turn(key_states, shape, back=True)
        coded = []
        for name, each in (("key", keys), ("value", value_states.float())):
            out, losses = self._quantizers[f"{layer_idx}_{name}"](each.transpose(1, 2), self._mask)
            coded.append(out.transpose(1, 2))
            counted = losses if self._mask is None else losses[self._mask.bool()]
            self.losses.append(counted.mean())
        return turn(coded[0], shape).to(key_states.dtype), coded[1].to(value_states.dtype)

    def commitment_loss(self) -> torch.Tensor:
        """Return the mean over layers and sides of the tokens' commitment losses."""
        return torch.stack(self.losses).mean()
