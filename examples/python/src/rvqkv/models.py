# SPDX-License-Identifier: MIT
"""What the package must know of a Transformers model: its layers, its heads, and how it turns keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Models whose rotary pairs are (i, i + dims / 2), as Hugging Face stores them.
HALF_SPLIT = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "olmo2", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
    }
)


@dataclass(frozen=True)
class LayerShape:
    """A layer's attention: heads, window, and the angles by which rotary embedding turns for each position."""

    heads: int
    query_heads: int
    head_dim: int
    sliding_window: int
    frequencies: tuple[float, ...]
    attention_factor: float


def text_config(model_or_config: Any) -> PreTrainedConfig:
    """Return the configuration of the decoder, of a model or a configuration."""
    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"a Transformers model or configuration is needed, not {type(model_or_config).__name__}")
    return config.get_text_config(decoder=True)


def _rope(config: PreTrainedConfig, head_dim: int, layer_type: str | None) -> tuple[tuple[float, ...], float]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = bool(parameters) and all(isinstance(each, dict) for each in parameters.values())
    if by_type and layer_type not in parameters:
        raise NotImplementedError(f"the model's rope_parameters say nothing of layers of type {layer_type!r}")
    of_layer = parameters[layer_type] if by_type else parameters
    kind = of_layer.get("rope_type", "default")
    if kind == "default":
        dims = int(head_dim * of_layer.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dims, 2, dtype=torch.float) / dims
        return tuple((1.0 / of_layer["rope_theta"] ** exponents).tolist()), 1.0
    if kind in ("dynamic", "longrope") or kind not in ROPE_INIT_FUNCTIONS:
        raise NotImplementedError(
            f"rope_type {kind!r} turns keys by more than their position: use key_coding='as_given', with codecs "
            "calibrated so"
        )
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type if by_type else None)
    return tuple(found.tolist()), float(factor)


def layer_shapes(model_or_config: Any, *, with_rope: bool = True) -> list[LayerShape]:
    """Describe every layer; raises ``NotImplementedError`` for models whose cache is of another kind.

    ``with_rope`` false leaves the angles out, which suits models that turn keys in ways unknown here.
    """
    config = text_config(model_or_config)
    if with_rope and config.model_type not in HALF_SPLIT:
        raise NotImplementedError(
            f"how model type {config.model_type!r} turns keys is not known (known: {', '.join(sorted(HALF_SPLIT))}): "
            "use key_coding='as_given', with codecs calibrated so"
        )
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None and window is not None and config.model_type == "mistral":
        types = ["sliding_attention"] * count
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = []
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(f"layer {layer} is of type {kind!r}, which has no cache of keys and values")
        frequencies, factor = _rope(config, head_dim, kind) if with_rope else ((), 1.0)
        shapes.append(
            LayerShape(
                heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
                query_heads=config.num_attention_heads,
                head_dim=head_dim,
                sliding_window=int(window or 0) if kind == "sliding_attention" else 0,
                frequencies=frequencies,
                attention_factor=factor,
            )
        )
    return shapes


def turn(keys: torch.Tensor, shape: LayerShape, first_position: int = 0, *, back: bool = False) -> torch.Tensor:
    """Turn keys ``[..., token, channel]`` as rotary embedding does, or ``back``, in float32."""
    frequencies = torch.tensor(shape.frequencies, dtype=torch.float64)
    positions = torch.arange(first_position, first_position + keys.shape[-2], dtype=torch.float64)
    angles = positions[:, None] * frequencies
    factor = 1.0 / shape.attention_factor if back else shape.attention_factor
    cosines = (angles.cos() * factor).float().to(keys.device)
    sines = (angles.sin() * (-factor if back else factor)).float().to(keys.device)
    half = len(shape.frequencies)
    first, second, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)
