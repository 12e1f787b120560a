"""Two equal configs are the same run, and two different ones never share a name."""

import dataclasses
import json
import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from mixer.config import Config
from mixer.optim import OPTIMISERS, SCHEDULES


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -0.1},
        {"lr": "fast"},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": 10**400},
        {"lr": True},
        {"lr": None},
        {"dropout_p": 1.0},
        {"dropout_p": -1e-9},
        {"batch_size": 0},
        {"batch_size": 256.5},
        {"batch_size": "256"},
        {"num_epochs": 2.5},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": False},
        {"limit": 0},
        {"num_blocks": 0},
        {"patch_size": (4, 4, 4)},
        {"patch_size": 0},
        {"patch_size": "44"},
        {"skip_connections": "no"},
        {"optimiser": "magic"},
        {"schedule": "cosine"},
        {"shift": -1},
        {"average": 1},
        {"erase": 2.5},
        {"mixup": 1.1},
        {"network": "transformer"},
        {"teacher": "../conv"},
        {"temperature": 0},
        {"label_smoothing": -0.1},
        {"flip": np.array([1, 0])},
        {"flip": torch.tensor([True, False])},
        {"lr": torch.rand(100)},
        {"gelu": "fast"},
        {"initialisation": None},
        {"inputs": "raw"},
    ],
    ids=str,
)
def test_an_impossible_config_names_the_field_and_the_value(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        Config(**wrong)
    assert repr(value)[:12] in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 150


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction, float])
def test_any_number_that_means_the_value_will_do(kind):
    config = Config(lr=kind(0.5), dropout_p=0, batch_size=np.int64(64), num_epochs=2.0, seed=np.uint8(3), patch_size=7)
    assert config == Config(0.5, 0.0, 64, 2, 3, patch_size=(7, 7))
    assert [type(value) for value in (config.lr, config.dropout_p, config.batch_size, config.num_epochs)] == [
        float,
        float,
        int,
        int,
    ]
    assert Config(lr=1) == Config(lr=1.0) and hash(Config(lr=1)) == hash(Config(lr=np.float32(1)))
    assert Config(dropout_p=-0.0).name == Config().name
    with pytest.raises(ValueError, match="lr is"):
        Config(lr=Decimal("0.5"))  # not a real number to Python


def test_names_are_readable_and_those_of_the_records_that_there_are():
    assert Config(0.01, 0.1, 256).name == "lr0.01_dropout0.1_batch256_seed0"
    assert Config(0.001, 0.0, 512, 2, 1, 100).name == "lr0.001_dropout0_batch512_seed1_epochs2_limit100"
    assert Config(1e-5).name == "lr1e-05_dropout0_batch256_seed0"
    assert Config(patch_size=(7, 4), skip_connections=False).name.endswith("_patch7x4_noskip")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"temperature": 2}, "temperature goes with a teacher"),
        ({"teacher": "conv", "erase": 8}, "teacher goes with flips, shifts and mixup, not with"),
        ({"teacher": "conv", "label_smoothing": 0.1}, "teacher goes with flips, shifts and mixup, not with"),
        ({"network": "conv", "num_blocks": 4}, "num_blocks is of a mixer"),
        ({"network": "mlp", "whiten": True}, "whiten is of a mixer"),
    ],
)
def test_fields_that_do_not_go_together_are_named(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Config(**fields)


def test_a_name_is_one_per_config():
    choose = random.Random(0)
    values = {
        "lr": [0.01, 0.0100001, 0.01000000001, 1e-5, 1.0, 1e16, 1e17],
        "dropout_p": [0, 0.1, 0.1 + 1e-12, 0.1 + 2e-16],
        "batch_size": [1, 11, 256],
        "num_epochs": [1, 60, 160],
        "seed": [0, 1, 11],
        "limit": [None, 1, 11],
        "num_blocks": [1, 8],
        "patch_size": [(1, 4), (4, 4), (4, 1), (14, 1)],
        "num_channels": [8, 16],
        "patches_mlp_dim": [8, 1024],
        "channels_mlp_dim": [8, 512],
        "skip_connections": [True, False],
        "gelu": ["exact", "tanh"],
        "initialisation": ["flax", "pytorch", "identity"],
        "whiten": [True, False],
        "inputs": ["normalised", "scaled"],
        "optimiser": list(OPTIMISERS),
        "weight_decay": [0, 0.01],
        "schedule": list(SCHEDULES),
        "flip": [True, False],
        "shift": [0, 1, 2],
        "erase": [0, 4],
        "mixup": [0, 0.5, 1],
        "label_smoothing": [0, 0.1],
        "network": ["mixer"],
        "teacher": ["", "conv", "conv-1"],
        "temperature": [1, 2.5],
        "average": [0, 0.9, 0.99],
        "validation": [True, False],
    }
    assert values.keys() == {field.name for field in dataclasses.fields(Config)}
    configs = {Config(network="mlp"), Config(network="conv")}
    for _ in range(20_000):
        drawn = {name: choose.choice(some) for name, some in values.items()}
        drawn |= {"erase": 0, "label_smoothing": 0} if drawn["teacher"] else {"temperature": 1}
        configs.add(Config(**drawn))
    for name, some in values.items():  # and all that differ in one field alone, but for a teacher's
        configs |= {Config(**{name: value}) for value in some if name != "temperature"}
    assert len({config.name for config in configs}) == len(configs) > 10_000
    assert all(set(config.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-") for config in configs)


def test_a_config_comes_back_from_json():
    config = Config(0.003, 0.2, patch_size=(7, 4), optimiser="muon", limit=5)
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
