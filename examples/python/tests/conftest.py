# SPDX-License-Identifier: MIT
"""Small models and codecs made up for tests: nothing is downloaded."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the programs are

import rvqkv
from rvqkv.calibrate import Calibration

torch.set_num_threads(1)
rvqkv.set_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it


def tiny_config(**changes):
    fields = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # sharper than a fresh model, so that attention matters
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(1, 97, (4096,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def codecs(model, tokens):
    calibration = Calibration(model, depths=6, codewords=64, group_dim=8)
    calibration.observe([tokens[:1024], tokens[1024:2048]])
    assert calibration.initialize()
    return calibration.codecs()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def plain_attention(model):
    yield
    model.set_attn_implementation("sdpa")
