# SPDX-License-Identifier: MIT
"""Quantization that PyTorch can train through: straight-through gradient and commitment loss, as in the paper."""

from __future__ import annotations

from typing import Any

import torch

from ._rvqkv import Codec, CodecSpec, EmaTrainer, make_codec


def _on_host(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to("cpu")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codec: Codec, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        host = _on_host(x)
        out = torch.empty(host.shape, dtype=host.dtype)
        _, losses = codec.quantize(host, out)
        ctx.save_for_backward(host)
        ctx.codec = codec
        ctx.mask = mask
        return out.to(x.device), torch.from_numpy(losses).to(x.device)

    @staticmethod
    def backward(ctx: Any, by_out: torch.Tensor, by_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (host,) = ctx.saved_tensors
        gradient = torch.empty(host.shape, dtype=host.dtype)
        by_losses = _on_host(by_losses).float().contiguous()
        ctx.codec.straight_through_gradient(host, _on_host(by_out), gradient, by_losses, ctx.mask)
        return gradient.to(by_out.device), None, None


def straight_through(
    x: torch.Tensor, codec: Codec, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x`` ``[..., head, head_dim]``: the reconstruction, and each token's commitment loss ``[...]``.

    Gradients pass the quantizer as if it were not there (but for the scale, which is differentiated as it is); the
    commitment loss, weighted by 0.25 in the paper, draws ``x`` to its codewords. Tokens whose ``mask`` ``[...]`` is
    false get no gradient from their loss. Works on the CPU; tensors on other devices go there and back.
    """
    rows = x.reshape(-1, x.shape[-2], x.shape[-1])
    counted = None if mask is None else _on_host(mask).reshape(-1).to(torch.uint8)
    out, losses = _StraightThrough.apply(rows, codec, counted)
    return out.reshape(x.shape), losses.reshape(x.shape[:-2])


class Quantizer(torch.nn.Module):
    """The paper's quantizer of one layer's keys or values, to be put into a model that is finetuned.

    In training mode every call adds to the running averages of the codebooks, and ``step`` (once for each step of the
    optimizer) makes new codebooks of them. Its codebooks are no parameters: they follow the averages alone.
    """

    def __init__(self, codec: Codec, *, decay: float = 0.99, epsilon: float = 1e-5) -> None:
        """Begin with the codebooks of a codec."""
        super().__init__()
        self.spec: CodecSpec = codec.spec
        self.codec = codec
        self._trainer = EmaTrainer(self.spec, codec.weights(), decay=decay, epsilon=epsilon)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize ``x`` ``[..., head, head_dim]``; see ``straight_through``."""
        if self.training and torch.is_grad_enabled():
            rows = _on_host(x).reshape(-1, x.shape[-2], x.shape[-1])
            counted = None if mask is None else _on_host(mask).reshape(-1).to(torch.uint8)
            self._trainer.accumulate(rows, counted)
        return straight_through(x, self.codec, mask)

    def step(self) -> None:
        """Make new codebooks of the running averages."""
        self._trainer.step()
        self.codec = make_codec(self.spec, self._trainer.state()["weights"])

    def averages(self) -> dict[str, Any]:
        """Return copies of the weights and of the running sizes and sums that they come from."""
        return dict(self._trainer.state())
