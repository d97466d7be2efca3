# SPDX-License-Identifier: MIT
"""The attention implementation "rvqkv" of Transformers, which reads the codes of an ``RvqCache``.

Importing this module registers it; ``model.set_attn_implementation("rvqkv")`` chooses it. With any other cache, and
without one, it is plain scaled dot-product attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

if TYPE_CHECKING:
    from .cache import Handle

NAME = "rvqkv"


def visible(
    padding: torch.Tensor | None, queries: int, keys: int, window: int, device: torch.device
) -> torch.Tensor | None:
    """Return which keys the last ``queries`` tokens see, ``[batch or 1, 1, query, key]``; None: all before them."""
    if padding is None and window == 0 and (queries == 1 or queries == keys):
        return None
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = key <= query
    if window != 0:
        seen &= key > query - window
    if padding is not None:
        # A padding token sees itself alone, so that its softmax is one of something.
        return (seen & padding[:, None, None, :]) | (key == query)
    return seen[None, None]


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    soft_cap: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend on exact tensors ``[batch, head, token, channel]``; gives ``[batch, token, head, channel]``."""
    causal = mask is None and query.shape[2] > 1
    if soft_cap is None:
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if causal:
        mask = visible(None, query.shape[2], key.shape[2], key.shape[2] + 1, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = functional.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2)


def rvqkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend on the codes that an ``RvqCache`` holds, or on plain tensors.

    The cache hands over what it holds with the keys that it returns: see ``RvqCache.update``.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError("the attention implementation 'rvqkv' does not give attention weights")
    handle: Handle | None = getattr(key, "rvqkv", None)
    padding = getattr(attention_mask, "rvqkv_padding", attention_mask)
    if handle is not None:
        if padding is not None and padding.ndim != 2:
            raise NotImplementedError("RvqCache needs the two-dimensional attention mask: 1 for tokens, 0 for padding")
        return handle.attend(query, key, value, padding, position_ids, scaling, softcap), None
    if attention_mask is not None and attention_mask.ndim == 2:
        mask = visible(attention_mask, query.shape[2], key.shape[2], sliding_window or 0, key.device)
    elif attention_mask is None:
        mask = visible(None, query.shape[2], key.shape[2], sliding_window or 0, key.device)
    else:
        mask = attention_mask
    return exact_attention(query, key, value, mask, scaling, softcap, dropout), None


def rvqkv_mask(
    *,
    attention_mask: torch.Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Hand the two-dimensional padding mask on: the cache leaves padding out, and knows what a query sees."""
    padding = attention_mask
    if padding is not None:
        padding = padding[:, -kwargs["kv_length"] :]
        if padding.shape[1] == kwargs["kv_length"] and bool(padding.all()):
            padding = None
    if mask_function is causal_mask_function:
        return padding
    mask = sdpa_mask(attention_mask=attention_mask, mask_function=mask_function, **kwargs)
    if mask is not None:
        mask.rvqkv_padding = padding  # a sliding layer's cache needs this part alone
    return mask


def register() -> None:
    """Make "rvqkv" known to Transformers; done once on import."""
    AttentionInterface.register(NAME, rvqkv_attention)
    AttentionMaskInterface.register(NAME, rvqkv_mask)


register()
