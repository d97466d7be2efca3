# SPDX-License-Identifier: MIT
"""The package against the paper's own implementation: codes, outputs, losses, state, and gradients through PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import rvqkv
from rvqkv.autograd import Quantizer, straight_through

FOLDER = Path(__file__).resolve().parents[3] / "tests" / "golden"
FILES = sorted(FOLDER.glob("*.safetensors"))


def load(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def setup(path):
    tensors, metadata = load(path)
    weights = tensors["codebook.before"]
    depths, codewords, dim = weights.shape
    grouping = "strided" if metadata.get("grouping", "").startswith(("strided", "key", "non")) else "contiguous"
    spec = rvqkv.CodecSpec(
        tensors["step0.input"].shape[-1], dim, depths, codewords, grouping=grouping, scale_type="float32"
    )
    return tensors, metadata, spec


def rows(x):
    return np.ascontiguousarray(x.reshape(-1, *x.shape[2:]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_training_follows_the_paper(path):
    tensors, metadata, spec = setup(path)
    decay = float(metadata["decay"])
    quantizer = Quantizer(rvqkv.make_codec(spec, tensors["codebook.before"]), decay=decay)
    steps = sorted({int(name[4:].split(".")[0]) for name in tensors if name.startswith("step")})
    assert steps
    for step in steps:
        x = tensors[f"step{step}.input"]
        mask = tensors.get(f"step{step}.mask")
        codes, scales = quantizer.codec.encode(rows(x))
        np.testing.assert_allclose(scales, rows(tensors[f"step{step}.scale"]), rtol=1e-5)
        expected = rows(tensors[f"step{step}.codes"])
        assert (codes == expected).mean() > 0.9999
        out, losses = quantizer(torch.from_numpy(x), None if mask is None else torch.from_numpy(mask))
        near = {"rtol": 1e-4, "atol": 1e-5}
        same = (codes == expected).all(axis=(1, 2, 3))
        np.testing.assert_allclose(rows(out.numpy())[same], rows(tensors[f"step{step}.output"])[same], **near)
        expected_losses = tensors[f"step{step}.commitment_loss"]
        np.testing.assert_allclose(losses.numpy().ravel()[same], expected_losses.ravel()[same], **near)
        quantizer.step()
        state = quantizer.averages()
        if same.all():
            np.testing.assert_allclose(state["cluster_sizes"], tensors[f"step{step}.cluster_size"], **near)
            np.testing.assert_allclose(state["embedding_sums"], tensors[f"step{step}.embed_avg"], **near)
            np.testing.assert_allclose(state["weights"], tensors[f"step{step}.codebook"], **near)


def reference(x, spec, weights):
    """The paper's quantizer in PyTorch operations alone: what autograd makes of it is the gradient."""
    fields = spec.fields()
    dim = fields["group_dim"]
    groups = x.shape[-1] // dim
    scale = x.std(dim=-1, keepdim=True)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    z = x / scale
    if fields["grouping"] == "strided":
        grouped = z.reshape(*z.shape[:-1], dim, groups).transpose(-1, -2)
    else:
        grouped = z.reshape(*z.shape[:-1], groups, dim)
    rest, total, loss = grouped, torch.zeros_like(grouped), 0.0
    for book in weights:
        words = book[torch.cdist(rest.detach().reshape(-1, dim), book).argmin(-1)].reshape(rest.shape)
        loss = loss + (rest - words).pow(2).mean(dim=(-1, -2, -3))
        rest, total = rest - words, total + words
    out = grouped + (total - grouped).detach()
    out = out.transpose(-1, -2).reshape(x.shape) if fields["grouping"] == "strided" else out.reshape(x.shape)
    return out * scale, loss


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_gradients_are_those_of_the_paper(path):
    tensors, _, spec = setup(path)
    weights = torch.from_numpy(tensors["codebook.before"])
    codec = rvqkv.make_codec(spec, tensors["codebook.before"])
    x = torch.from_numpy(tensors["step0.input"])[:, :64]
    generator = torch.Generator().manual_seed(3)
    by_out = torch.randn(x.shape, generator=generator)
    by_loss = torch.rand(x.shape[:2], generator=generator)
    found = []
    for run in (lambda v: straight_through(v, codec), lambda v: reference(v, spec, weights)):
        leaf = x.clone().requires_grad_()
        out, loss = run(leaf)
        ((out * by_out).sum() + (loss * by_loss).sum()).backward()
        found.append((out.detach(), loss.detach(), leaf.grad))
    (out, loss, gradient), (expected_out, expected_loss, expected) = found
    # A code that rounding decides otherwise moves its own vector only.
    same = ((out - expected_out).abs() <= 1e-4 + 1e-3 * expected_out.abs()).all(dim=-1).all(dim=-1)
    assert same.float().mean() > 0.99
    # Where a vector has no variance, the reference divides by it, and its gradient is no number.
    same &= torch.isfinite(expected).all(dim=-1).all(dim=-1)
    assert same.any() and torch.isfinite(gradient).all()
    torch.testing.assert_close(loss[same], expected_loss[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient[same], expected[same], rtol=1e-3, atol=1e-4)


def test_masked_tokens_get_no_commitment_gradient(rng):
    spec = rvqkv.CodecSpec(16, 8, 2, 8)
    codec = rvqkv.make_codec(spec, rng.standard_normal((2, 8, 8)).astype(np.float32))
    x = torch.randn(1, 4, 2, 16, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 0]])
    _, losses = straight_through(x, codec, mask)
    losses.sum().backward()
    gone = x.grad.abs().sum(dim=(-1, -2))[0]
    assert (gone[1::2] == 0).all() and (gone[0::2] > 0).all()


def test_residual_codes_are_those_of_vector_quantize_pytorch(rng):
    library = pytest.importorskip("vector_quantize_pytorch")
    other = library.ResidualVQ(dim=8, num_quantizers=3, codebook_size=32, rotation_trick=False).eval()
    x = torch.randn(200, 8)
    with torch.no_grad():
        other.train()
        other(x[None])  # its first call sets the codebooks up
        other.eval()
        out, indices, _ = other(x[None])
    weights = other.codebooks.detach().numpy().astype(np.float32)
    quantizer = rvqkv.ResidualQuantizer(weights)
    codes, _ = quantizer.encode(x.numpy())
    assert (codes == indices[0].numpy()).mean() > 0.99
    np.testing.assert_allclose(quantizer.decode(indices[0].numpy().astype(np.uint16)), out[0].numpy(), atol=1e-4)


def test_state_goes_on_where_it_was(rng):
    spec = rvqkv.CodecSpec(16, 8, 2, 8)
    weights = rng.standard_normal((2, 8, 8)).astype(np.float32)
    x = [rng.standard_normal((50, 2, 16)).astype(np.float32) for _ in range(2)]
    whole = rvqkv.EmaTrainer(spec, weights)
    for each in x:
        whole.accumulate(each)
        whole.step()
    first = rvqkv.EmaTrainer(spec, weights)
    first.accumulate(x[0])
    first.step()
    saved = first.state()
    second = rvqkv.EmaTrainer(
        spec, saved["weights"], cluster_sizes=saved["cluster_sizes"], embedding_sums=saved["embedding_sums"]
    )
    second.accumulate(x[1])
    second.step()
    for name, value in whole.state().items():
        np.testing.assert_array_equal(second.state()[name], value)
