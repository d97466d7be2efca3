# SPDX-License-Identifier: MIT
"""Calibration and finetuning of small models: what is caught, interrupted, refused and learned."""

import _thread

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

import rvqkv
from conftest import tiny_model
from rvqkv.calibrate import Calibration, fingerprint
from rvqkv.models import layer_shapes, turn
from rvqkv.training import LayerQuantizers


def small(model, **more):
    return Calibration(model, **{"depths": 2, "codewords": 16, "group_dim": 8, **more})


def test_caught_keys_are_those_before_rotary_embedding(model, tokens):
    found = small(model).capture(tokens[:50])
    caught = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: caught.append(out))
    with torch.no_grad():
        model(tokens[None, :50])
    hook.remove()
    torch.testing.assert_close(found[1][0].reshape(50, -1), caught[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_angles_are_the_model_s_own(tokens, parameters):
    model = tiny_model(rope_parameters=parameters)
    shape = layer_shapes(model)[0]
    x = torch.randn(1, 2, 50, 16)
    cosines, sines = model.model.rotary_emb(x, torch.arange(50)[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, expected = apply_rotary_pos_emb(x, x, cosines, sines)
    torch.testing.assert_close(turn(x, shape), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turn(turn(x, shape, 7), shape, 7, back=True), x, rtol=1e-4, atol=1e-4)
    made = small(model)
    made.observe([tokens[:512]])
    made.initialize()
    model.set_attn_implementation("rvqkv")
    cache = rvqkv.RvqCache(
        model, made.codecs(), recent_tokens=0, sink_tokens=0, prefill="codes", reading="reconstructed"
    )
    with torch.no_grad():
        codes = model(tokens[None, :256], past_key_values=cache).logits
        model.set_attn_implementation("eager")
        quantizers = LayerQuantizers(model, made.codecs()).eval()
        expected = model(tokens[None, :256], past_key_values=quantizers.cache(), use_cache=True).logits
    assert (codes - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_other_families(tokens, kind):
    common = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common)).eval()
    else:
        types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**common, sliding_window=64, layer_types=types, query_pre_attn_scalar=32)
        model = Gemma3ForCausalLM(config).eval()
    made = small(model, depths=8, codewords=32)
    made.observe([tokens[:1024]])
    made.initialize()
    ids = tokens[None, 2000:2250]
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        exact = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        model.set_attn_implementation("rvqkv")
        cache = rvqkv.RvqCache(model, made.codecs(), recent_tokens=500)
        found = [model(ids[:, :200], past_key_values=cache).logits]
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(200, 250)]
        torch.testing.assert_close(torch.cat(found, dim=1), exact, rtol=1e-2, atol=2e-2)
        cache = rvqkv.RvqCache(model, made.codecs(), sink_tokens=0, recent_tokens=0, prefill="codes")
        coded = model(ids[:, :192], past_key_values=cache).logits
    assert (coded - exact[:, :192]).abs().mean() < 0.3 * exact.std()


def test_an_interrupt_loses_nothing(model, tokens, tmp_path):
    def done(calibration):
        return [codec.fingerprint for pair in calibration.codecs().layers.values() for codec in pair]

    whole = small(model)
    whole.observe([tokens[:256], tokens[256:512]])
    assert whole.initialize()

    def interrupt(phase, at, total):
        if at == total // 2:
            _thread.interrupt_main()

    broken = small(model)
    with pytest.raises(KeyboardInterrupt):
        broken.observe([tokens[:256], tokens[256:512]], progress=lambda *at: _thread.interrupt_main())
    assert broken.tokens == 256
    broken.save(tmp_path / "state")
    broken = Calibration.resume(model, tmp_path / "state")
    broken.observe([tokens[256:512]])
    assert not broken.initialize(progress=interrupt)
    broken.save(tmp_path / "state")
    other = Calibration.resume(model, tmp_path / "state")
    assert other.initialize() and other.tokens == 512
    assert done(other) == done(whole)
    with pytest.raises(ValueError, match="another model"):
        Calibration.resume(tiny_model(seed=9), tmp_path / "state")


def test_ema_steps_lower_the_loss(model, tokens):
    made = small(model, iterations=1)
    made.observe([tokens[:512]])
    made.initialize()
    losses = [made.train([tokens[:512], tokens[512:1024]]) for _ in range(30)]
    assert losses[-1] < losses[0] and made.trainer.steps == 30


def test_bad_texts_and_models(tokens):
    model = tiny_model()
    with pytest.raises(ValueError, match="vectors"):
        few = small(model, codewords=64)
        few.observe([tokens[:3]])
        few.initialize()
    with pytest.raises(ValueError, match="key_coding"):
        small(model, key_coding="sometimes")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1: keys of the model hold numbers that are not finite"):
        small(model).observe([tokens[:64]])


def test_fingerprints_tell_models_but_not_types(model):
    assert fingerprint(model) != fingerprint(tiny_model(seed=3))
    for dtype in (torch.float16, torch.bfloat16):
        assert fingerprint(tiny_model().to(dtype)) == fingerprint(model)


def test_finetuning_brings_the_loss_down(tokens):
    model = tiny_model()
    made = small(model)
    made.observe([tokens[:1024]])
    made.initialize()
    quantizers = LayerQuantizers(model, made.codecs())
    before = [q.codec.fingerprint for q in quantizers.values()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids = tokens[:96].reshape(2, 48)
    mask = torch.ones_like(ids)
    losses = []
    for _ in range(20):
        cache = quantizers.cache(mask)
        out = model(ids, labels=ids, past_key_values=cache, use_cache=True)
        losses.append(out.loss.item())
        (out.loss + 0.25 * cache.commitment_loss()).backward()
        assert all(p.grad is not None for p in model.model.layers[0].self_attn.k_proj.parameters())
        optimizer.step()
        optimizer.zero_grad()
        quantizers.step()
    assert losses[-1] < 0.7 * losses[0]
    after = quantizers.codecs()
    assert "model.fingerprint" not in after.metadata
    assert all(a != b for a, b in zip(before, (q.codec.fingerprint for q in quantizers.values()), strict=True))
    rvqkv.RvqCache(model, after)
