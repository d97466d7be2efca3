# SPDX-License-Identifier: MIT
"""``RvqCache``: a Transformers cache that holds codes.

With ``model.set_attn_implementation("rvqkv")`` attention reads the codes as they are. With any other implementation the
cache still holds codes, but every call of ``update`` reconstructs all tokens for it, which is slow.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from . import _rvqkv
from ._rvqkv import Codec, KvCache, KvSequence
from .attention import NAME, exact_attention, visible
from .codecs import CodecSet
from .models import LayerShape, layer_shapes, text_config


class _Store:
    """The sequences of a batch, and how far each layer has come; what layers and handles share."""

    def __init__(
        self,
        config: PreTrainedConfig,
        shapes: list[LayerShape],
        cache: KvCache,
        prefill: str,
        reading: str,
        knows_positions: bool,
    ) -> None:
        self.config = config
        self.shapes = shapes
        self.cache = cache
        self.prefill = prefill
        self.reading = reading
        self.knows_positions = knows_positions
        self.sequences: list[KvSequence] = []
        self.columns = [0] * len(shapes)  # tokens and padding
        self.waiting = [False] * len(shapes)
        self.nonfinite = 0
        self.seconds = 0.0
        self._plan: tuple[Any, list[int]] | None = None
        self._before: tuple[list[KvSequence], list[int]] | None = None  # while a pass of several tokens runs

    @property
    def reads_codes(self) -> bool:
        return bool(self.config._attn_implementation == NAME)

    def take(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Check new keys and values ``[batch, head, token, channel]``, and begin a batch with the first ones."""
        shape = self.shapes[layer]
        expected = (shape.heads, shape.head_dim)
        for name, each in (("keys", keys), ("values", values)):
            if each.device.type != "cpu":
                raise NotImplementedError(f"{name} are on {each.device}: RvqCache holds codes in host memory only")
            if each.ndim != 4 or (each.shape[1], each.shape[3]) != expected:
                raise ValueError(
                    f"layer {layer}: {name} have the shape {tuple(each.shape)}, must be "
                    f"[batch, {expected[0]}, token, {expected[1]}]"
                )
        if layer != 0 and self.waiting[layer - 1]:
            self.restore()
            raise RuntimeError(
                f"layer {layer - 1}: its keys were taken, but no attention has read them: this model does not hand the "
                "cache's tensors to its attention function as they are"
            )
        if layer == 0 and (self.waiting[0] or min(self.columns) != max(self.columns)):
            self.restore()  # the last pass was broken off outside of the cache
        if not self.sequences:
            self.sequences = [_rvqkv.new_sequence(self.cache) for _ in range(keys.shape[0])]
        if keys.shape[0] != len(self.sequences):
            raise ValueError(
                f"layer {layer}: a batch of {keys.shape[0]} came, the cache holds one of {len(self.sequences)}: "
                "reset() it first"
            )

    def append(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store one sequence's keys and values ``[head, token, channel]``."""
        found = self.sequences[row].append(layer, keys.detach().transpose(0, 1), values.detach().transpose(0, 1))
        if found:
            self.nonfinite += found
            warnings.warn(
                f"layer {layer}: {found} numbers among the keys and values of sequence {row} are not finite; they are "
                "stored as 0",
                RuntimeWarning,
                stacklevel=2,
            )

    def begin(self, layer: int, tokens: int) -> None:
        """Note where a pass of several tokens began, of which each may make pages codes."""
        if layer == 0:
            self._plan = self._before = None
            if tokens > 1:
                self._before = ([sequence.fork() for sequence in self.sequences], list(self.columns))

    def end(self, layer: int) -> None:
        """Note that a layer has its tokens, the last one of all."""
        self.waiting[layer] = False
        if layer == len(self.shapes) - 1:
            self._before = None

    def restore(self) -> None:
        """Undo a forward pass that failed, in all layers that it has come to.

        A pass of one token is taken back, but a page that it made codes stays so.
        """
        self.waiting = [False] * len(self.shapes)
        self._plan = None
        if self._before is not None:
            (self.sequences, self.columns), self._before = self._before, None
            self.sequences = self.sequences if self.columns[0] else []
            return
        self.columns = [min(self.columns)] * len(self.columns)
        for sequence in self.sequences:
            sequence.truncate(min(sequence.tokens(layer) for layer in range(len(self.shapes))))
        if self.columns[0] == 0:
            self.sequences = []

    def padding_of(
        self, layer: int, padding: torch.Tensor | None, tokens: int, position_ids: torch.Tensor | None
    ) -> list[int]:
        """How many of each sequence's new columns are padding; looked at once for all layers of a pass."""
        columns = self.columns[layer]
        key = (id(padding), tokens, columns)
        if self._plan is not None and self._plan[0] == key:
            return self._plan[1]
        rows = len(self.sequences)
        held = [sequence.tokens(layer) for sequence in self.sequences]
        starts = [0] * rows
        if padding is not None:
            if padding.shape != (rows, columns):
                raise ValueError(
                    f"attention_mask has the shape {tuple(padding.shape)}, must be [batch, tokens so far] = "
                    f"{[rows, columns]}"
                )
            mask = padding.bool()
            fresh = mask[:, -tokens:]
            starts = (tokens - fresh.sum(dim=1)).tolist()
            if (fresh[:, 1:] < fresh[:, :-1]).any():
                raise ValueError("attention_mask has padding behind tokens: RvqCache takes padding on the left only")
            seen = mask[:, :-tokens].sum(dim=1).tolist()
            if seen != held:
                raise ValueError(
                    f"attention_mask counts {seen} earlier tokens, the cache holds {held}: it must not change"
                )
        elif any(count != columns - tokens for count in held):
            raise ValueError("the cache holds sequences with padding: attention_mask is needed")
        if self.knows_positions and position_ids is not None and position_ids.ndim == 2:
            last = position_ids[:, -1].expand(rows).tolist()
            for row in range(rows):
                expected = held[row] + tokens - starts[row] - 1
                if starts[row] != tokens and last[row] != expected:
                    raise ValueError(
                        f"position_ids end with {last[row]} in sequence {row}, whose last token is number {expected}: "
                        "positions must count tokens from 0, padding left out (as generate does), or key_coding be "
                        "'as_given'"
                    )
        self._plan = (key, starts)
        return starts


@dataclass
class Handle:
    """What ``update`` hands to the attention function: where the keys belong that it comes with."""

    store: _Store
    layer: int

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        scaling: float | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """Store new keys and values ``[batch, head, token, channel]`` and attend on all.

        Gives ``[batch, token, head, channel]``. When this fails, the forward pass is undone.
        """
        store, layer = self.store, self.layer
        began = time.perf_counter()
        try:
            tokens = key.shape[2]
            starts = store.padding_of(layer, padding, tokens, position_ids)
            if store.prefill == "exact" and tokens > 1 and store.columns[layer] == tokens:
                mask = visible(padding, tokens, tokens, store.shapes[layer].sliding_window, key.device)
                out = exact_attention(query, key, value, mask, scaling, soft_cap)
                for row, start in enumerate(starts):
                    store.append(layer, row, key[row, :, start:], value[row, :, start:])
            else:
                out = self._attend_on_codes(query, key, value, starts, scaling, soft_cap)
        except BaseException:
            store.restore()
            raise
        store.end(layer)
        store.seconds += time.perf_counter() - began
        return out

    def _attend_on_codes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: list[int],
        scaling: float | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        store, layer = self.store, self.layer
        batch, heads, tokens, channels = query.shape
        out = torch.empty((batch, tokens, heads, channels), dtype=query.dtype)
        for row, start in enumerate(starts):
            if start != 0:
                out[row, :start] = 0
            store.append(layer, row, key[row, :, start:], value[row, :, start:])
            store.sequences[row].attend(
                layer,
                query[row, :, start:].detach().transpose(0, 1),
                out[row, start:],
                scale=scaling or 0.0,
                soft_cap=soft_cap or 0.0,
                reading=store.reading,
            )
        return out


class RvqLayer(CacheLayerMixin):
    """One layer of an ``RvqCache``, as Transformers asks for it."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, store: _Store, layer: int) -> None:
        """Take a place in the cache's store."""
        super().__init__()
        self._store = store
        self._layer = layer
        self.is_sliding = store.shapes[layer].sliding_window != 0

    @property
    def batch_size(self) -> int:
        """Sequences that the cache holds."""
        return len(self._store.sequences)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do: the codecs said it all."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; see ``RvqCache.update``."""
        store, layer = self._store, self._layer
        began = time.perf_counter()
        store.take(layer, key_states, value_states)
        tokens = key_states.shape[2]
        store.begin(layer, tokens)
        store.columns[layer] += tokens
        if store.reads_codes:
            store.waiting[layer] = True
            key_states.rvqkv = Handle(store, layer)
            store.seconds += time.perf_counter() - began
            return key_states, value_states
        try:
            found = self._reconstruct(key_states, value_states)
        except BaseException:
            store.restore()
            raise
        store.end(layer)
        store.seconds += time.perf_counter() - began
        return found

    def _reconstruct(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        store, layer = self._store, self._layer
        if self.is_sliding:
            raise NotImplementedError(
                f"layer {layer} has a sliding window: choose the attention implementation {NAME!r}"
            )
        is_first = store.columns[layer] == keys.shape[2]
        for row in range(len(store.sequences)):
            store.append(layer, row, keys[row], values[row])
        if is_first and store.prefill == "exact":
            return keys, values
        shape = (keys.shape[0], store.columns[layer], keys.shape[1], keys.shape[3])
        all_keys, all_values = (torch.empty(shape, dtype=each.dtype) for each in (keys, values))
        for row, sequence in enumerate(store.sequences):
            sequence.reconstruct(layer, 0, all_keys[row], all_values[row])
        return all_keys.transpose(1, 2), all_values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask must cover, and from which on."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens that every layer holds, padding included: those of passes that were not broken off."""
        return min(self._store.columns)

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def __repr__(self) -> str:
        """Name the layer and what it holds."""
        return f"RvqLayer({self._layer}, tokens={self.get_seq_length()})"


class RvqCache(Cache):
    """A cache that holds the first tokens and the latest ones exactly, and those between as codes.

    Args:
        model: the model, or its configuration. A model is compared with the one that the codecs were made for.
        codecs: a codec file, a ``CodecSet``, or the codecs of keys and values by layer.
        key_coding: "before_rope", the paper's way: rotary embedding is undone before keys are coded; "after_rope" and
            "as_given": they are coded as they come. Codecs must have been calibrated in the same way.
        sink_tokens: the first tokens, which stay exact.
        recent_tokens: the latest tokens, exact at least as long as so many are no later.
        page_tokens: tokens that become codes together; a multiple of 64.
        exact_type: "float16" or "bfloat16", in which exact tokens are held.
        prefill: "exact": the first tokens to come (a prompt) attend to each other as they are, and are coded after;
            "codes": every token attends to codes from the start, as in the paper's evaluation.
        reading: "quickest" or "reconstructed" (slower, without the rounding of lookup tables).
        page_budget: most bytes of pages; more raises ``MemoryError`` and leaves the cache as it was.

    Raises ``ValueError`` for codecs of another model, ``NotImplementedError`` for models whose cache is of another
    kind.

    """

    def __init__(
        self,
        model: Any,
        codecs: CodecSet | Mapping[int, tuple[Codec, Codec]] | str | Path,
        *,
        key_coding: str | None = None,
        sink_tokens: int = 4,
        recent_tokens: int = 64,
        page_tokens: int = 64,
        exact_type: str = "float16",
        prefill: str = "exact",
        reading: str = "quickest",
        page_budget: int | None = None,
    ) -> None:
        """Make an empty cache."""
        if prefill not in ("exact", "codes"):
            raise ValueError(f"prefill is {prefill!r}, must be one of: exact, codes")
        given = CodecSet.of(codecs)
        made_so = given.metadata.get("model.key_coding")
        coding = key_coding or made_so or "before_rope"
        if made_so is not None and (coding == "before_rope") != (made_so == "before_rope"):
            raise ValueError(f"key_coding is {coding!r}, the codecs were calibrated for {made_so!r}")
        shapes = layer_shapes(model, with_rope=coding == "before_rope")
        check_codecs(model, given, shapes)
        layers = [
            _rvqkv.LayerConfig(
                *given.layers[i],
                shape.heads,
                query_heads=shape.query_heads,
                sliding_window=shape.sliding_window,
                # What comes turned and stays turned needs no angles.
                key_coding="as_given" if coding == "after_rope" else coding,
                frequencies=shape.frequencies,
                attention_factor=shape.attention_factor,
            )
            for i, shape in enumerate(shapes)
        ]
        cache = KvCache(
            layers,
            page_tokens=page_tokens,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            exact_type=exact_type,
            page_budget=page_budget,
        )
        self._store = _Store(text_config(model), shapes, cache, prefill, reading, coding == "before_rope")
        self.bits_per_value = given.bits_per_value
        super().__init__(layers=[RvqLayer(self._store, i) for i in range(len(shapes))])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values ``[batch, head, token, channel]``.

        For the attention implementation "rvqkv" they are handed on as they came, with a handle of this cache: it stores
        them, since it knows what is padding, and attends on codes. For all others, gives all tokens reconstructed.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(f"layer is {layer_idx}, the cache has {len(self.layers)}")
        taken: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(key_states, value_states)
        return taken

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> None:
        """Store a layer's new keys and values ``[batch, head, token, channel]``, and let nothing attend on them now.

        For tokens that come from elsewhere than a forward pass; all of them count, there is no padding.
        """
        store = self._store
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer is {layer_idx}, the cache has {len(self.layers)}")
        store.take(layer_idx, key_states, value_states)
        store.begin(layer_idx, key_states.shape[2])
        store.columns[layer_idx] += key_states.shape[2]
        try:
            for row in range(len(store.sequences)):
                store.append(layer_idx, row, key_states[row], value_states[row])
        except BaseException:
            store.restore()
            raise
        store.end(layer_idx)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence ``i`` what sequence ``beam_idx[i]`` was; copies share their pages."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence ``repeats`` times; copies share their pages."""
        self._select(row for row in range(len(self._store.sequences)) for _ in range(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some sequences only, by number or by a mask."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(chosen.tolist())

    def _select(self, rows: Iterable[int]) -> None:
        old = self._store.sequences
        if not old:
            return
        taken: set[int] = set()
        chosen: list[KvSequence] = []
        for row in rows:
            if not 0 <= row < len(old):
                raise IndexError(f"sequence {row} is asked for, the cache holds {len(old)}")
            chosen.append(old[row].fork() if row in taken else old[row])
            taken.add(row)
        self._store.sequences = chosen

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the latest tokens: as many as the negative number says."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        store = self._store
        left = [sequence.tokens(0) + tokens_to_remove for sequence in store.sequences]
        if any(tokens < 0 for tokens in left):
            raise ValueError(
                f"{-tokens_to_remove} tokens are to be removed, the cache holds {min(left) - tokens_to_remove}"
            )
        for sequence, tokens in zip(store.sequences, left, strict=True):
            sequence.truncate(tokens)
        store.columns = [columns + tokens_to_remove for columns in store.columns] if store.sequences else store.columns

    def reset(self) -> None:
        """Drop all sequences; the next batch may have another size."""
        store = self._store
        store.sequences = []
        store.columns = [0] * len(store.columns)
        store.waiting = [False] * len(store.waiting)
        store.cache.release_free_pages()

    def fork(self) -> RvqCache:
        """Return another cache with the same tokens, which shares all pages with this one."""
        store = self._store
        made = RvqCache.__new__(RvqCache)
        copy = _Store(store.config, store.shapes, store.cache, store.prefill, store.reading, store.knows_positions)
        copy.sequences = [sequence.fork() for sequence in store.sequences]
        copy.columns = list(store.columns)
        made._store = copy
        made.bits_per_value = self.bits_per_value
        Cache.__init__(made, layers=[RvqLayer(copy, i) for i in range(len(store.shapes))])
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> RvqCache:
        """Fork: tokens are never changed, so sharing them is a copy."""
        return self.fork()

    @property
    def batch_size(self) -> int:
        """Sequences held; -1 before the first."""
        return len(self._store.sequences) or -1

    @property
    def seconds(self) -> float:
        """Spent in this cache so far: storing tokens and attending on them; the rest of a pass is the model's."""
        return self._store.seconds

    @property
    def nonfinite_values(self) -> int:
        """Numbers that came and were not finite, each stored as 0."""
        return self._store.nonfinite

    def memory(self) -> dict[str, int]:
        """Bytes held by what they are for.

        ``codes``, ``scales`` and ``exact`` count pages that sequences share once for each; ``total`` is what the cache
        has allocated, without the codecs, which are listed apart.
        """
        found = dict.fromkeys(("codes", "scales", "exact"), 0)
        tables = 0
        for sequence in self._store.sequences:
            held = sequence.bytes()
            tables += held["page_tables"]
            for name in found:
                found[name] += held[name]
        of_cache = self._store.cache.bytes()
        found["total"] = sum(of_cache[name] for name in ("pages", "free_pages", "layers", "scratch")) + tables
        found["codecs"] = of_cache["codecs"]
        return found


def check_codecs(model: Any, codecs: CodecSet, shapes: list[LayerShape]) -> None:
    """Refuse codecs that do not fit a model. Raises ``ValueError`` naming what differs."""
    missing = [layer for layer in range(len(shapes)) if layer not in codecs.layers]
    if missing:
        raise ValueError(f"the model has {len(shapes)} layers, the codecs lack those of {missing}")
    if len(codecs.layers) > len(shapes):
        raise ValueError(f"there are codecs for {len(codecs.layers)} layers, the model has {len(shapes)}")
    for layer, shape in enumerate(shapes):
        for name, codec in zip(("keys", "values"), codecs.layers[layer], strict=True):
            if codec.head_dim != shape.head_dim:
                raise ValueError(
                    f"layer {layer}: the codec of {name} is for head_dim {codec.head_dim}, the model's is "
                    f"{shape.head_dim}"
                )
    made_for = codecs.metadata.get("model.fingerprint")
    if made_for is not None and isinstance(model, torch.nn.Module):
        from .calibrate import fingerprint

        if fingerprint(model) != made_for:
            raise ValueError(
                f"the codecs were made for another model, {codecs.metadata.get('model.name', 'unnamed')!r} with "
                f"fingerprint {made_for}; this one's is {fingerprint(model)}"
            )
