# SPDX-License-Identifier: MIT
"""The codecs of a model, in memory and in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import _rvqkv
from ._rvqkv import Codec


@dataclass
class CodecSet:
    """Codecs of keys and values by layer, and free text about them.

    ``metadata`` is kept with the file; ``model.*`` keys say which model they were made for.
    """

    layers: dict[int, tuple[Codec, Codec]]
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> CodecSet:
        """Read a codec file; everything in it is checked. Raises ``ValueError`` or ``OSError``."""
        layers, metadata = _rvqkv.load_codecs(path)
        return cls(dict(layers), dict(metadata))

    def save(self, path: str | Path) -> None:
        """Write a codec file: all or nothing, so that an old file stays as it was when this fails."""
        _rvqkv.save_codecs(path, self.layers, self.metadata)

    @classmethod
    def of(cls, codecs: CodecSet | Mapping[int, tuple[Codec, Codec]] | str | Path) -> CodecSet:
        """Take codecs in any of the forms in which callers have them."""
        if isinstance(codecs, CodecSet):
            return codecs
        if isinstance(codecs, str | Path):
            return cls.load(codecs)
        return cls(dict(codecs))

    def first_depths(self, depths: int) -> CodecSet:
        """Return the same codecs with their first depths only; those that have fewer stay as they are."""
        layers = {}
        for layer, (key, value) in self.layers.items():
            cut = [_rvqkv.first_depths(codec, min(depths, codec.depths)) for codec in (key, value)]
            layers[layer] = (cut[0], cut[1])
        return CodecSet(layers, self.metadata)

    def in_half_split_order(self) -> CodecSet:
        """Return the same codecs for keys whose rotary pairs are (i, i + head_dim / 2).

        That is how Hugging Face stores keys; GGUF files of the Llama family have (2 i, 2 i + 1), and codecs of keys
        learned from such keep their groups as permutations.
        """
        layers = {}
        for layer, (key, value) in self.layers.items():
            fields = key.spec.fields()
            order = fields["permutation"] or range(key.head_dim)
            if fields["grouping"] not in ("permuted", "contiguous"):
                raise ValueError(
                    f"layer {layer}: keys are grouped {fields['grouping']}, which fits no interleaved pairs"
                )
            half = key.head_dim // 2
            fields.update(grouping="permuted", permutation=[c // 2 + c % 2 * half for c in order])
            layers[layer] = (_rvqkv.make_codec(_rvqkv.CodecSpec(**fields), key.weights()), value)
        return CodecSet(layers, self.metadata)

    @property
    def bits_per_value(self) -> float:
        """Bits stored for each number, keys and values of all layers alike."""
        codecs = [codec for pair in self.layers.values() for codec in pair]
        bits = sum(codec.bits_per_value * codec.head_dim for codec in codecs)
        return bits / sum(codec.head_dim for codec in codecs)
