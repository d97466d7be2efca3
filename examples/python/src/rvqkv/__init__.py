# SPDX-License-Identifier: MIT
"""Residual vector quantization of key/value caches, for NumPy, PyTorch and Transformers.

The quantizers, trainers and files need NumPy alone. ``RvqCache``, ``Quantizer`` and what else needs PyTorch or
Transformers is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._rvqkv import (
    Codec,
    CodecSpec,
    CompressedTensor,
    EmaTrainer,
    KvCache,
    KvSequence,
    LayerConfig,
    ModelTrainer,
    ResidualQuantizer,
    compress,
    first_depths,
    kmeans,
    make_codec,
    new_sequence,
    set_threads,
    simd_level,
    threads,
)
from ._rvqkv import version as __version__
from .codecs import CodecSet

if TYPE_CHECKING:
    from .attention import register
    from .autograd import Quantizer, straight_through
    from .cache import RvqCache
    from .calibrate import Calibration, fingerprint

_LAZY = {
    "Calibration": "calibrate",
    "Quantizer": "autograd",
    "RvqCache": "cache",
    "fingerprint": "calibrate",
    "register": "attention",
    "straight_through": "autograd",
}

__all__ = [
    "Calibration",
    "Codec",
    "CodecSet",
    "CodecSpec",
    "CompressedTensor",
    "EmaTrainer",
    "KvCache",
    "KvSequence",
    "LayerConfig",
    "ModelTrainer",
    "Quantizer",
    "ResidualQuantizer",
    "RvqCache",
    "__version__",
    "compress",
    "fingerprint",
    "first_depths",
    "kmeans",
    "make_codec",
    "new_sequence",
    "register",
    "set_threads",
    "simd_level",
    "straight_through",
    "threads",
]


def __getattr__(name: str) -> Any:
    """Import the parts that need PyTorch or Transformers."""
    if name not in _LAZY:
        raise AttributeError(f"module 'rvqkv' has no attribute '{name}'")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
