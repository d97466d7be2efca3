# SPDX-License-Identifier: MIT
"""Quantizers and codecs: codes as a plain implementation finds them, tensors of both libraries, bad input."""

import gc

import numpy as np
import pytest
import torch

import rvqkv


def make(rng, head_dim=32, group_dim=16, depths=3, codewords=32, **options):
    weights = rng.standard_normal((depths, codewords, group_dim)).astype(np.float32) * 0.5
    return rvqkv.make_codec(rvqkv.CodecSpec(head_dim, group_dim, depths, codewords, **options), weights)


def plain_encode(vectors, weights):
    rest = vectors.copy()
    codes = np.empty((len(vectors), len(weights)), np.uint16)
    for depth, book in enumerate(weights):
        codes[:, depth] = ((rest[:, None] - book[None]) ** 2).sum(-1).argmin(-1)
        rest = rest - book[codes[:, depth]]
    return codes, rest


@pytest.mark.parametrize("grouping", ["strided", "contiguous", "permuted"])
def test_codes_are_those_of_a_plain_implementation(rng, grouping):
    order = rng.permutation(32).tolist() if grouping == "permuted" else []
    codec = make(rng, grouping=grouping, permutation=order, scale_type="float32")
    x = rng.standard_normal((20, 3, 32)).astype(np.float32)
    codes, scales = codec.encode(x)
    np.testing.assert_allclose(scales, x.std(-1, ddof=1), rtol=1e-5)
    scaled = x / scales[..., None]
    if grouping == "strided":
        grouped = scaled.reshape(20, 3, 16, 2).swapaxes(-1, -2)
    else:
        grouped = (scaled[..., order] if order else scaled).reshape(20, 3, 2, 16)
    expected, rest = plain_encode(grouped.reshape(-1, 16), codec.weights())
    assert (codes.reshape(-1, 3) == expected).mean() > 0.999
    out = codec.decode(codes, scales)
    error = ((out - x) / scales[..., None]).reshape(-1, 32)
    np.testing.assert_allclose((error**2).sum(), (rest**2).sum(), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_type_and_stride_are_read_and_written_in_place(rng, dtype):
    codec = make(rng)
    x = torch.randn(2, 5, 9, 32).to(dtype)  # [batch, head, token, channel]
    view = x[1].transpose(0, 1)
    codes, scales = codec.encode(view)
    again, same = codec.encode(view.contiguous())
    assert (codes == again).all() and (scales == same).all()
    out = torch.zeros_like(x)
    assert codec.decode(codes, scales, out[1].transpose(0, 1)) is not None
    assert (out[0] == 0).all()
    exact = torch.from_numpy(codec.decode(codes, scales))
    torch.testing.assert_close(out[1].transpose(0, 1), exact.to(dtype))


def test_packed_tensors_hold_what_bits_per_value_says(rng):
    codec = make(rng, 64, 16, 4, 64)
    x = torch.randn(128, 2, 64)
    packed = rvqkv.compress(codec, x)
    assert packed.shape == (128, 2, 64)
    assert packed.nbytes * 8 == codec.bits_per_value * x.numel()
    codes, scales = codec.encode(x)
    np.testing.assert_array_equal(packed.reconstruct(), codec.decode(codes, scales))
    np.testing.assert_array_equal(
        packed.reconstruct(first_token=100, depths=2), codec.decode(codes, scales, depths=2)[100:]
    )


def test_a_packed_tensor_keeps_its_codec(rng):
    packed = rvqkv.compress(make(rng), torch.randn(8, 2, 32))
    gc.collect()
    assert np.isfinite(packed.reconstruct()).all()


def test_residual_quantizer_takes_plain_vectors(rng):
    weights = rng.standard_normal((3, 16, 8)).astype(np.float32)
    quantizer = rvqkv.ResidualQuantizer(weights)
    x = rng.standard_normal((50, 8)).astype(np.float32)
    codes, rest = quantizer.encode(x)
    expected, left = plain_encode(x, weights)
    assert (codes == expected).all()
    np.testing.assert_allclose(rest, left, atol=1e-5)
    np.testing.assert_allclose(quantizer.decode(codes) + rest, x, atol=1e-5)
    np.testing.assert_allclose(quantizer.decode(codes, 1), weights[0][codes[:, 0]])


def test_kmeans_lowers_the_error(rng):
    x = rng.standard_normal((2000, 4)).astype(np.float32)
    first, many = (rvqkv.kmeans(x, 16, iterations=n)[1] for n in (1, 20))
    assert many < first < x.var()


def test_files_bring_back_the_same_codecs(rng, tmp_path):
    made = rvqkv.CodecSet({0: (make(rng), make(rng)), 4: (make(rng), make(rng))}, {"note": "a model's"})
    made.save(tmp_path / "a.codecs")
    loaded = rvqkv.CodecSet.load(tmp_path / "a.codecs")
    assert loaded.metadata == made.metadata and set(loaded.layers) == {0, 4}
    assert all(
        a.fingerprint == b.fingerprint
        for layer in loaded.layers
        for a, b in zip(loaded.layers[layer], made.layers[layer], strict=True)
    )
    damaged = bytearray((tmp_path / "a.codecs").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "b.codecs").write_bytes(damaged)
    with pytest.raises(ValueError, match="checksum"):
        rvqkv.CodecSet.load(tmp_path / "b.codecs")
    with pytest.raises(OSError, match=r"c\.codecs"):
        rvqkv.CodecSet.load(tmp_path / "c.codecs")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: c.encode(np.zeros((4, 32), np.float32)), "2 dimensions, must have 3"),
        (lambda c: c.encode(np.zeros((4, 1, 31), np.float32)), "31 channels"),
        (lambda c: c.encode(np.zeros((4, 1, 32))), "float32, float16 or bfloat16"),
        (lambda c: c.decode(np.full((1, 1, 2, 3), 99, np.uint16), np.ones((1, 1), np.float32)), "code is 99"),
        (lambda c: c.decode(np.zeros((1, 1, 2, 3), np.uint16), np.ones((1, 1), np.float32), depths=4), "depths"),
        (lambda c: c.decode(np.zeros((9,), np.uint16), np.ones((1, 1), np.float32)), "head vectors"),
        (lambda c: rvqkv.CodecSpec(32, 5), "group_dim is 5"),
        (lambda c: rvqkv.CodecSpec(32, grouping="round"), "must be one of: contiguous, strided, permuted"),
        (lambda c: rvqkv.make_codec(c.spec, np.zeros((3, 32, 15), np.float32)), r"\[3, 32, 16\]"),
        (lambda c: rvqkv.make_codec(c.spec, np.full((3, 32, 16), np.nan, np.float32)), "finite"),
    ],
)
def test_bad_input_is_named(rng, wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(make(rng))


def test_gpu_and_lists_are_refused(rng):
    with pytest.raises(TypeError):
        make(rng).encode([[1.0]])
    readonly = np.zeros((1, 1, 32), np.float32)
    readonly.flags.writeable = False
    codes, scales = make(rng).encode(readonly)  # reading is fine
    with pytest.raises(ValueError, match="writable"):
        make(rng).decode(codes, scales, readonly)


def test_codecs_of_interleaved_keys_are_those_of_half_split_ones(rng):
    weights = rng.standard_normal((3, 32, 16)).astype(np.float32)
    x = rng.standard_normal((10, 1, 32)).astype(np.float32)
    split = rvqkv.make_codec(rvqkv.CodecSpec(32, 16, 3, 32, grouping="strided"), weights)
    # Channel 2 i of interleaved keys is channel i of half-split ones.
    interleaved = np.empty_like(x)
    interleaved[..., 0::2], interleaved[..., 1::2] = x[..., :16], x[..., 16:]
    strided = [i * 2 + g for g in range(2) for i in range(16)]
    order = [2 * c if c < 16 else 2 * (c - 16) + 1 for c in strided]
    other = rvqkv.make_codec(rvqkv.CodecSpec(32, 16, 3, 32, grouping="permuted", permutation=order), weights)
    assert (other.encode(interleaved)[0] == split.encode(x)[0]).all()
    turned = rvqkv.CodecSet({0: (other, split)}).in_half_split_order().layers[0][0]
    assert (turned.encode(x)[0] == split.encode(x)[0]).all()
