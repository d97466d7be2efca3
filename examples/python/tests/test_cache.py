# SPDX-License-Identifier: MIT
"""RvqCache in generation: what it holds, what attention makes of it, and every way in which a batch changes."""

import copy

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import rvqkv
from conftest import tiny_model
from rvqkv.cache import RvqCache


def forward(model, ids, cache=None, **more):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=cache is not None, **more).logits


def generate(model, ids, cache, count=24, **more):
    more.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False, **more
    )[:, ids.shape[1] :]


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture
def coded(model):
    model.set_attn_implementation("rvqkv")
    return model


def test_without_our_cache_it_is_plain_attention(coded, tokens):
    ids = tokens[None, :50]
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :20] = 0
    for implementation in ("sdpa", "eager", "rvqkv"):
        coded.set_attn_implementation(implementation)
        alone, cached = forward(coded, ids), forward(coded, ids, DynamicCache())
        padded = forward(coded, ids.expand(2, -1), attention_mask=mask)[:, 20:]
        cache = DynamicCache()
        forward(coded, ids[:, :30], cache)
        rest = forward(coded, ids[:, 30:], cache)
        if implementation == "sdpa":
            expected = (alone, cached, padded, rest)
        for found, each in zip((alone, cached, padded, rest), expected, strict=True):
            torch.testing.assert_close(found, each, rtol=1e-3, atol=1e-3)


def test_exact_tokens_give_what_a_dynamic_cache_gives(coded, codecs, tokens):
    ids = tokens[None, :200]
    cache = RvqCache(coded, codecs, recent_tokens=1000)
    assert (generate(coded, ids, cache) == generate(coded, ids, DynamicCache())).all()
    assert cache.memory()["codes"] == 0


def test_codes_are_held_and_read(coded, codecs, tokens):
    ids = tokens[None, :1024]
    exact = forward(coded, ids)
    cache = RvqCache(coded, codecs, sink_tokens=0, recent_tokens=0, prefill="codes")
    found = forward(coded, ids, cache)
    assert cache.get_seq_length() == 1024
    held = cache.memory()
    heads, layers = 2, 3
    assert held["exact"] == 0
    assert (held["codes"] + held["scales"]) * 8 == cache.bits_per_value * 1024 * 16 * heads * 2 * layers
    assert 0 < kl(exact, found) < 0.5
    # The same through reconstruction, for an attention that knows nothing of codes.
    cache = RvqCache(coded, codecs, sink_tokens=0, recent_tokens=0, prefill="codes", reading="reconstructed")
    slow = forward(coded, ids, cache)
    assert kl(slow, found) < 0.01
    coded.set_attn_implementation("eager")
    again = forward(coded, ids, RvqCache(coded, codecs, sink_tokens=0, recent_tokens=0, prefill="codes"))
    assert kl(again, slow) < 1e-4


@pytest.mark.parametrize("reading", ["quickest", "reconstructed"])
def test_generation_goes_on_past_the_window(coded, codecs, tokens, reading):
    ids = tokens[None, :150]
    cache = RvqCache(coded, codecs, recent_tokens=64, reading=reading)
    new = generate(coded, ids, cache, 200)
    assert cache.get_seq_length() == 349 and cache.memory()["codes"] > 0
    # Token by token, what it predicts stays near what the exact model does on the same text.
    whole = torch.cat([ids, new], dim=1)
    exact = forward(coded, whole)[0]
    cache = RvqCache(coded, codecs, recent_tokens=64, reading=reading)
    parts = [forward(coded, whole[:, :150], cache)]
    parts += [forward(coded, whole[:, i : i + 1], cache) for i in range(150, 350)]
    found = torch.cat(parts, dim=1)[0]
    assert kl(exact[:150], found[:150]) < 1e-5  # an exact prompt
    assert kl(exact[150:], found[150:]) < 0.2
    assert (found[149:-1].argmax(-1) == new[0]).float().mean() > 0.9


def test_a_batch_is_its_sequences(coded, codecs, tokens):
    ids = torch.stack([tokens[:130], tokens[130:260], tokens[260:390]])
    together = generate(coded, ids, RvqCache(coded, codecs), 40)
    for row in range(3):
        alone = generate(coded, ids[row : row + 1], RvqCache(coded, codecs), 40)
        assert (alone[0] == together[row]).float().mean() > 0.95


@pytest.mark.parametrize("prefill", ["exact", "codes"])
def test_padding_on_the_left_is_left_out(coded, codecs, tokens, prefill):
    short, long = tokens[:40], tokens[100:240]
    ids = torch.stack([torch.cat([torch.zeros(100, dtype=torch.long), short]), long])
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    cache = RvqCache(coded, codecs, prefill=prefill)
    both = generate(coded, ids, cache, 30, attention_mask=mask)
    assert cache._store.sequences[0].tokens(0) == 69 and cache._store.sequences[1].tokens(0) == 169
    for row, alone in enumerate((short, long)):
        expected = generate(coded, alone[None], RvqCache(coded, codecs, prefill=prefill), 30)[0]
        assert (expected == both[row]).float().mean() > 0.9


def test_masks_and_positions_that_make_no_sense_are_refused(coded, codecs, tokens):
    ids = tokens[None, :20]
    right = torch.ones_like(ids)
    right[0, 15:] = 0
    cache = RvqCache(coded, codecs)
    with pytest.raises(ValueError, match="padding on the left only"):
        forward(coded, ids, cache, attention_mask=right)
    left = 1 - right
    with pytest.raises(ValueError, match="position_ids"):
        forward(coded, ids, cache, attention_mask=left)  # whose positions count the padding
    with pytest.raises(NotImplementedError, match="two-dimensional"):
        forward(coded, ids, cache, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="attention weights"):
        forward(coded, ids, cache, output_attentions=True)
    forward(coded, ids, cache)
    assert cache.get_seq_length() == 20
    changed = torch.ones(1, 21, dtype=torch.long)
    changed[0, 0] = 0
    with pytest.raises(ValueError, match="must not change"):
        forward(coded, ids[:, :1], cache, attention_mask=changed, position_ids=torch.tensor([[20]]))
    assert cache.get_seq_length() == 20


def test_beams_share_pages_and_follow_their_parents(coded, codecs, tokens):
    ids = torch.stack([tokens[:300], tokens[300:600]])
    exact = RvqCache(coded, codecs, recent_tokens=1000)
    found = generate(coded, ids, exact, 20, num_beams=3)
    assert (found == generate(coded, ids, DynamicCache(), 20, num_beams=3)).all()
    cache = RvqCache(coded, codecs)
    generate(coded, ids, cache, 20, num_beams=3)
    assert cache.batch_size == 6

    cache = RvqCache(coded, codecs)
    forward(coded, ids, cache)
    before = cache.memory()["total"]
    cache.reorder_cache(torch.tensor([1, 1, 1, 0]))
    assert cache.memory()["total"] < 1.1 * before
    logits = forward(coded, tokens[None, :1].expand(4, 1), cache)
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[3])
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    assert cache.batch_size == 2
    cache.batch_repeat_interleave(2)
    again = forward(coded, tokens[None, 1:2].expand(4, 1), cache)
    torch.testing.assert_close(again[0], again[1])
    with pytest.raises(IndexError, match="sequence 7"):
        cache.reorder_cache(torch.tensor([7]))


def test_assisted_generation_crops(coded, codecs, tokens):
    ids = tokens[:40].repeat(5)[None]
    plain = generate(coded, ids, RvqCache(coded, codecs, recent_tokens=1000), 40)
    cache = RvqCache(coded, codecs, recent_tokens=1000)
    assisted = generate(coded, ids, cache, 40, prompt_lookup_num_tokens=5)
    assert (plain == assisted).all() and cache.get_seq_length() == 239


def test_cropped_tokens_leave_no_trace(coded, codecs, tokens):
    ids = tokens[None, :400]
    cache = RvqCache(coded, codecs, prefill="codes")
    forward(coded, ids[:, :300], cache)
    forward(coded, tokens[None, 1000:1010], cache)
    cache.crop(-10)
    other = RvqCache(coded, codecs, prefill="codes")
    forward(coded, ids[:, :300], other)
    torch.testing.assert_close(
        forward(coded, ids[:, 300:310], cache), forward(coded, ids[:, 300:310], other), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    with pytest.raises(ValueError, match="the cache holds 310"):
        cache.crop(-311)
    assert cache.get_seq_length() == 310


def test_tokens_from_elsewhere(coded, codecs, tokens):
    found = rvqkv.Calibration(coded, codewords=64, depths=6, group_dim=8, key_coding="after_rope").capture(tokens[:150])
    cache, other = RvqCache(coded, codecs, prefill="codes"), RvqCache(coded, codecs)
    for layer, pair in enumerate(found):
        cache.append(*(each.transpose(0, 1)[None] for each in pair), layer)
    assert cache.get_seq_length() == 150
    forward(coded, tokens[None, :150], other)
    torch.testing.assert_close(
        forward(coded, tokens[None, 150:151], cache), forward(coded, tokens[None, 150:151], other), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="layer is 3"):
        cache.append(*(each.transpose(0, 1)[None] for each in found[0]), 3)


def test_forks_and_deep_copies_go_their_own_way(coded, codecs, tokens):
    cache = RvqCache(coded, codecs)
    forward(coded, tokens[None, :200], cache)
    other = copy.deepcopy(cache)
    first = forward(coded, tokens[None, 200:201], cache)
    torch.testing.assert_close(forward(coded, tokens[None, 200:201], other), first)
    forward(coded, tokens[None, 201:202], cache)
    assert (cache.get_seq_length(), other.get_seq_length()) == (202, 201)


def test_reset_makes_room_for_another_batch(coded, codecs, tokens):
    cache = RvqCache(coded, codecs)
    assert cache.batch_size == -1
    first = generate(coded, tokens[None, :100], cache)
    with pytest.raises(ValueError, match="batch of 2"):
        forward(coded, tokens[:20].reshape(2, 10), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory()["exact"] == 0
    assert generate(coded, tokens[:200].reshape(2, 100), cache).shape[0] == 2
    cache.reset()
    assert (generate(coded, tokens[None, :100], cache) == first).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(codecs, tokens, dtype):
    model = tiny_model().to(dtype)
    ids = tokens[None, :150]
    expected = forward(model, ids).float()
    model.set_attn_implementation("rvqkv")
    cache = RvqCache(model, codecs, prefill="codes", exact_type=str(dtype).removeprefix("torch."))
    found = forward(model, ids, cache)
    assert found.dtype == dtype and kl(expected, found.float()) < 0.2


def test_sliding_windows(tokens, codecs):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    source = tiny_model()
    fields = source.config.to_dict()
    config = MistralConfig(
        **{name: fields[name] for name in fields if name in MistralConfig().to_dict()} | {"model_type": "mistral"}
    )
    config.sliding_window = 96
    model = MistralForCausalLM(config).eval()
    model.load_state_dict(source.state_dict())
    ids = tokens[None, :300]
    model.set_attn_implementation("sdpa")
    expected = forward(model, ids)
    assert kl(forward(source, ids), expected) > 1e-4
    model.set_attn_implementation("rvqkv")
    torch.testing.assert_close(forward(model, ids), expected, rtol=1e-3, atol=1e-3)
    cache = RvqCache(model, codecs.layers, recent_tokens=1000)
    found = [forward(model, ids[:, :150], cache)] + [forward(model, ids[:, i : i + 1], cache) for i in range(150, 300)]
    assert kl(expected, torch.cat(found, dim=1)) < 1e-4
    model.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match="sliding window"):
        forward(model, ids, RvqCache(model, codecs.layers))


def test_numbers_that_are_not_finite_are_counted(coded, codecs, tokens):
    cache = RvqCache(coded, codecs)
    forward(coded, tokens[None, :70], cache)
    weight = coded.model.layers[1].self_attn.v_proj.weight
    kept = weight.data[0, 0].item()
    weight.data[0, 0] = torch.inf
    try:
        with pytest.warns(RuntimeWarning, match="layer 1: 1 numbers"):
            forward(coded, tokens[None, 70:71], cache)
    finally:
        weight.data[0, 0] = kept
    assert cache.nonfinite_values >= 1 and cache.get_seq_length() == 71


def test_a_pass_that_fails_leaves_the_cache_as_it_was(coded, codecs, tokens):
    cache = RvqCache(coded, codecs, page_budget=300_000)
    forward(coded, tokens[None, :100], cache)
    with pytest.raises(MemoryError):
        forward(coded, tokens[None, :3000], cache)
    assert cache.get_seq_length() == 100
    found = forward(coded, tokens[None, 100:101], cache)
    other = RvqCache(coded, codecs)
    forward(coded, tokens[None, :100], other)
    torch.testing.assert_close(found, forward(coded, tokens[None, 100:101], other))


def test_a_pass_that_is_broken_off_outside_is_undone(coded, codecs, tokens):
    cache = RvqCache(coded, codecs)
    forward(coded, tokens[None, :100], cache)

    def stop(*args):
        raise KeyboardInterrupt

    hook = coded.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(coded, tokens[None, 100:400], cache)
    hook.remove()
    found = forward(coded, tokens[None, 100:110], cache)
    other = RvqCache(coded, codecs)
    forward(coded, tokens[None, :100], other)
    torch.testing.assert_close(found, forward(coded, tokens[None, 100:110], other))
    assert cache.get_seq_length() == 110


def test_codecs_of_another_model_are_refused(coded, codecs, tokens):
    with pytest.raises(ValueError, match="made for another model"):
        RvqCache(tiny_model(seed=5), codecs)
    with pytest.raises(ValueError, match=r"lack those of \[3\]"):
        RvqCache(tiny_model(num_hidden_layers=4), codecs)
    with pytest.raises(ValueError, match="head_dim 16"):
        RvqCache(tiny_model(head_dim=32), codecs)
    with pytest.raises(ValueError, match="calibrated for"):
        RvqCache(coded, codecs, key_coding="as_given")
    with pytest.raises(NotImplementedError, match="gpt2"):
        RvqCache(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97)), codecs)
    with pytest.raises(TypeError, match="str"):
        RvqCache("model", codecs)
    with pytest.raises(ValueError, match="prefill"):
        RvqCache(coded, codecs, prefill="none")
    with pytest.raises(ValueError, match="page_tokens"):
        RvqCache(coded, codecs, page_tokens=10)


def test_sequences_alone(codecs):
    layer = rvqkv.LayerConfig(*codecs.layers[0], 2, query_heads=4)
    cache = rvqkv.KvCache([layer], sink_tokens=0, recent_tokens=0)
    sequence = rvqkv.new_sequence(cache)
    keys, values, queries = torch.randn(128, 2, 16), torch.randn(128, 2, 16), torch.randn(1, 4, 16)
    assert sequence.append(0, keys, values) == 0
    k, v = torch.empty_like(keys), torch.empty_like(values)
    sequence.reconstruct(0, 0, k, v)
    out = torch.empty_like(queries)
    sequence.attend(0, queries, out, reading="reconstructed")
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="layer is 1"):
        sequence.append(1, keys, values)
    with pytest.raises(ValueError, match="layer is 1"):
        sequence.tokens(1)
    with pytest.raises(ValueError, match="reading"):
        sequence.attend(0, queries, out, reading="slow")
