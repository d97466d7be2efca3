# SPDX-License-Identifier: MIT
"""The programs of this folder: what they refuse, what an interrupt leaves behind, what their rows say."""

import _thread
import json
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import calibrate
import common
import evaluate
import finetune
from conftest import tiny_model


class Tokenizer:
    """Makes a token of every letter."""

    bos_token_id = None

    def __call__(self, text, return_tensors=None, add_special_tokens=True):
        ids = [1 + ord(letter) % 96 for letter in text]
        if add_special_tokens and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]

        class Found:
            input_ids = torch.tensor([ids]) if return_tensors else ids

        return Found

    def save_pretrained(self, folder):
        (folder / "tokenizer").write_text("")


@pytest.fixture
def run(monkeypatch, tmp_path, model):
    """Run a program on the small model."""
    text = tmp_path / "text"
    text.write_text("".join(chr(33 + i * i % 89) for i in range(1200)))

    def with_arguments(program, *arguments, use=model):
        monkeypatch.setattr(common, "load_model", lambda path=None, dtype=None: (use, Tokenizer()))
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        program.main()

    monkeypatch.chdir(tmp_path)
    return with_arguments


LITTLE = ("--text", "text", "--window", 256, "--codewords", 16, "--depths", 2, "--group-dim", 8)


def test_windows_begin_as_the_model_wants():
    tokens = torch.arange(100, 130)
    none = common.prefix(Tokenizer())
    assert len(none) == 0
    assert [window.tolist() for window in common.windows(tokens, 10, 9, none)] == tokens.reshape(3, 10).tolist()
    gemma = Tokenizer()
    gemma.bos_token_id = 2
    cut = common.windows(tokens, 10, 2, common.prefix(gemma))
    assert [window.tolist() for window in cut] == [[2, *range(100, 109)], [2, *range(109, 118)]]
    with pytest.raises(SystemExit, match="30 tokens, fewer than one window of 31"):
        common.windows(tokens, 31, 1, none)
    with pytest.raises(SystemExit, match="at least 3"):
        common.windows(tokens, 2, 1, common.prefix(gemma))


def test_texts_and_models_that_cannot_be_read(run, tmp_path):
    with pytest.raises(SystemExit, match="fewer than one window of 2048"):
        run(calibrate, "c", "--text", "text", "--window", 2048)
    with pytest.raises(SystemExit, match="cannot be read as text"):
        run(calibrate, "c", "--text", "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SystemExit, match="cannot be read as text"):
        run(calibrate, "c", "--text", "bytes")
    with pytest.raises(NotImplementedError, match="gpt2"):
        run(calibrate, "c", *LITTLE, use=GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97)))
    damaged = tiny_model()
    damaged.model.layers[2].self_attn.v_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 2: values of the model hold numbers that are not finite"):
        run(calibrate, "c", *LITTLE, use=damaged)
    with pytest.raises(ValueError, match="training vectors for 4096 codewords"):
        run(calibrate, "c", "--text", "text", "--window", 64, "--tokens", 64, "--codewords", 4096, "--group-dim", 8)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("phase", ["reading", "k-means"])
def test_an_interrupted_calibration_goes_on(run, monkeypatch, tmp_path, phase):
    run(calibrate, "whole", *LITTLE)
    hit = []

    def interrupt(self, name, done, total):
        if name == phase and done == total // 2 and not hit:
            hit.append(done)
            _thread.interrupt_main()

    with monkeypatch.context() as patch:
        patch.setattr(common.Progress, "__call__", interrupt)
        with pytest.raises(SystemExit, match="--resume goes on"):
            run(calibrate, "broken", *LITTLE)
    assert hit and (tmp_path / "broken.state").exists() and not (tmp_path / "broken").exists()
    with pytest.raises(ValueError, match="another model"):
        run(calibrate, "broken", *LITTLE, "--resume", use=tiny_model(seed=9))
    with pytest.raises(ValueError, match="other settings"):
        run(calibrate, "broken", *LITTLE, "--resume", "--codewords", 32)
    (tmp_path / "other").write_text("x" * 1200)
    with pytest.raises(ValueError, match="another text"):
        run(calibrate, "broken", *LITTLE, "--resume", "--text", "other")
    run(calibrate, "broken", *LITTLE, "--resume")
    assert not (tmp_path / "broken.state").exists()
    codecs = [evaluate.CodecSet.load(tmp_path / name) for name in ("whole", "broken")]
    whole, broken = ([codec.fingerprint for pair in each.layers.values() for codec in pair] for each in codecs)
    assert whole == broken


def test_rows_tell_the_model_s_seconds_from_ours(run, tmp_path, capsys, model):
    run(calibrate, "codecs", *LITTLE, "--json", "calibration.json")
    row = json.loads((tmp_path / "calibration.json").read_text())
    assert row["tokens"] == 1024 and row["seconds_model"] > 0 and row["seconds_method"] > 0
    run(evaluate, "codecs", "--text", "text", "--window", 256, "--windows", 2, "--depths", 2, 1, "--json", "rows")
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows").read_text())}
    names = ["exact-float32", "paper-16x2", "paper-16x1", "rvqkv-16x2-recent64", "rvqkv-16x1-recent64"]
    assert list(rows) == names and all(name in capsys.readouterr().out for name in names[:1])
    assert rows["exact-float32"]["kl"] == 0 and rows["exact-float32"]["seconds_method"] == 0
    for name in names[1:]:
        assert rows[name]["kl"] > 0 and 0 < rows[name]["seconds_method"] < rows[name]["seconds"]
    assert rows["paper-16x1"]["kl"] > rows["paper-16x2"]["kl"] > rows["rvqkv-16x2-recent64"]["kl"]
    with pytest.raises(ValueError, match="two codec files"):
        run(evaluate, "codecs", "codecs", "--text", "text", "--window", 256)
    with pytest.raises(ValueError, match="another model"):
        run(evaluate, "codecs", "--text", "text", "--window", 256, use=tiny_model(seed=9))
    with pytest.raises(ValueError, match="another model"):
        run(finetune, "codecs", "tuned", "--text", "text", "--held-out", "text", use=tiny_model(seed=9))


def test_finetuning_reports_before_and_after(run, tmp_path, model):
    run(calibrate, "codecs", *LITTLE)
    tuned = tiny_model()
    few = ("--window", 64, "--steps", 15, "--learning-rate", 1e-3, "--json", "row")
    run(finetune, "codecs", "tuned", "--text", "text", "--held-out", "text", *few, use=tuned)
    row = json.loads((tmp_path / "row").read_text())
    assert row["exact"]["kl"] == 0 and row["quantized"]["kl"] > 0
    assert row["finetuned"]["ppl"] < row["quantized"]["ppl"] and row["finetuned_exact"]["kl"] > 0
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    evaluate.RvqCache(tuned, tmp_path / "tuned" / "model.codecs")
