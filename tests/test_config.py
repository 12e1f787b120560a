"""Equal configs describe the same run, and different configs never share a name."""

import dataclasses
import inspect
import itertools
import json
import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch

from mixer import Config, grid, run_grid, train

IMPOSSIBLE = {
    "lr": [-0.1, "fast", float("nan"), float("inf"), 10**400, True, None, torch.rand(100), Decimal("0.5")],
    **{"dropout_p": [1.0, -1e-9], "batch_size": [0, 256.5, "256"], "num_epochs": [2.5], "seed": [-1, 2**32, False]},
    **{"limit": [0], "num_blocks": [0], "patch_size": [(4, 4, 4), 0, "44"], "skip_connections": ["no"]},
    **{
        "shift": [-1],
        "erase": [2.5],
        "shared_filters": [2, -1],
        "flip": [np.array([1, 0]), torch.tensor([True, False])],
    },
    **{"mixup_prob": [1.1], "label_smoothing": [-0.1], "ema_decay": [1], "temperature": [0], "sam_radius": [-1]},
    **{"plain_epochs": [-1, 61], "token_labels": [-0.5, math.inf]},
    **{"optimiser": ["magic"], "schedule": ["cosine"], "network": ["transformer"], "teacher": ["../conv"]},
    **{"gelu": ["fast"], "initialisation": [None], "inputs": ["raw"]},
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in IMPOSSIBLE.items() for value in some])
def test_rejects_impossible_values_by_field_and_value(name, value):
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        Config(**{name: value})
    assert repr(value)[:12] in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 150


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction, float])
def test_accepts_any_numeric_type(kind):
    config = Config(lr=kind(0.5), dropout_p=0, batch_size=np.int64(64), num_epochs=2.0, seed=np.uint8(3), patch_size=7)
    assert config == Config(0.5, 0.0, 64, 2, 3, patch_size=(7, 7))
    assert list(map(type, dataclasses.astuple(config)[:5])) == [float, float, int, int, int]
    assert Config(lr=1) == Config(lr=1.0) and hash(Config(lr=1)) == hash(Config(lr=np.float32(1)))
    assert Config(dropout_p=-0.0).name == Config().name


def test_name_is_readable():
    assert Config(0.01, 0.1, 256).name == "lr0.01_dropout0.1_batch256_seed0"
    assert Config(0.001, 0.0, 512, 2, 1, 100).name == "lr0.001_dropout0_batch512_seed1_epochs2_limit100"
    assert Config(1e-5).name == "lr1e-05_dropout0_batch256_seed0"
    assert Config(patch_size=(7, 4), skip_connections=False).name.endswith("_patch7x4_noskip")


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2},
        {"teacher": "a", "label_smoothing": 0.1},
        {"whiten": 1, "network": "mlp"},
        {"plain_epochs": 1, "flip": True},
        {"token_labels": 0.5},
        {"token_labels": 0.5, "teacher": "a", "patch_size": 7},
        {"token_labels": 0.5, "teacher": "a", "network": "conv"},
    ],
)
def test_rejects_fields_that_cannot_be_combined(fields):
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} (applies|cannot be combined) "):
        Config(**fields)


def test_no_two_configs_share_a_name():
    choose = random.Random(0)
    values = {
        "lr": [0.01, 0.0100001, 0.01000000001, 1e-5, 1.0, 1e16, 1e17],
        "dropout_p": [0, 0.1, 0.1 + 1e-12, 0.1 + 2e-16],
        "batch_size": [1, 11, 256],
        **{"num_epochs": [1, 60, 160], "seed": [0, 1, 11], "limit": [None, 1, 11], "num_blocks": [1, 8]},
        "patch_size": [(1, 4), (4, 4), (4, 1), (14, 1)],
        **{"num_channels": [8, 16], "patches_mlp_dim": [8, 1024], "channels_mlp_dim": [8, 512]},
        **{"weight_decay": [0, 0.01], "shift": [0, 1, 2], "erase": [0, 4], "mixup_prob": [0, 0.5, 1]},
        **{"affine": [0, 0.1], "shared_filters": [0, 3], "sam_radius": [0, 0.1], "plain_epochs": [0, 1]},
        **{"label_smoothing": [0, 0.1], "temperature": [1, 2.5], "ema_decay": [0, 0.9, 0.99], "token_labels": [0, 0.5]},
        **{"network": ["mixer"], "teacher": ["", "conv", "conv-1"]},
    }
    for field in dataclasses.fields(Config):
        values.setdefault(field.name, get_args(field.type) or [True, False])
    configs = {Config(network="mlp"), Config(network="conv")}
    for _ in range(20_000):
        drawn = {name: choose.choice(some) for name, some in values.items()}
        drawn |= {"label_smoothing": 0} if drawn["teacher"] else {"temperature": 1}
        drawn |= {"plain_epochs": drawn["plain_epochs"] if drawn["shift"] else 0}
        drawn |= {} if drawn["teacher"] and drawn["patch_size"] == (4, 4) else {"token_labels": 0}
        configs.add(Config(**drawn))
    for name, some in values.items():  # and all that differ in one field only, unless it needs another
        needy = "temperature", "plain_epochs", "token_labels"
        configs |= {Config(**{name: value}) for value in some if name not in needy}
    assert len({config.name for config in configs}) == len(configs) > 10_000
    assert all(set(config.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._+-") for config in configs)


def test_survives_a_round_trip_through_json():
    config = Config(0.003, 0.2, patch_size=(7, 4), optimiser="muon", limit=5)
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_grid_without_arguments_is_the_coursework():
    lists = (0.01, 0.001), (0.0, 0.1), (256, 512)
    assert grid() == [Config(lr, dropout_p, batch_size) for lr, dropout_p, batch_size in itertools.product(*lists)]


def test_grid_varies_any_field():
    configs = grid([0.01], [0.0], [256], np.arange(2), num_epochs=3, num_blocks=range(1, 3), patch_size=[(7, 7), 14])
    assert configs == [
        Config(seed=seed, num_epochs=3, num_blocks=blocks, patch_size=size)
        for seed, blocks, size in itertools.product((0, 1), (1, 2), (7, 14))
    ]


@pytest.mark.parametrize("several", [range(1, 4), np.arange(1, 4), (1, 2, 3), (n for n in (1, 2, 3))], ids=type)
def test_grid_accepts_one_value_or_several(several):
    configs = grid(lrs=0.1, dropouts=np.float64(0.2), batch_sizes=64, patch_size=(7, 4), num_blocks=several)
    assert configs == [Config(0.1, 0.2, 64, patch_size=(7, 4), num_blocks=blocks) for blocks in (1, 2, 3)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: grid(num_epoch=2), "grid does not accept num_epoch; did you mean num_epochs?"),
        (lambda: grid(seed=3), "grid does not accept seed; did you mean seeds?"),
        (lambda: grid(recipe="modern", lr=3), "grid does not accept lr; did you mean lrs?"),
        (lambda: grid(seeds=3), "seeds is 3, but it has to be a list of seeds: range(3), or [3]"),
        (lambda: grid(recipe="secret"), "recipe is 'secret', but it has to be one of coursework, "),
        (lambda: Config(optimizer="adam"), "Config does not accept optimizer; did you mean optimiser?"),
        (lambda: Config(learning_rate=0.1), "Config does not accept learning_rate; did you mean lr?"),
        (lambda: Config(xyzzy=1), "Config does not accept xyzzy"),
        (lambda: dataclasses.replace(Config(), average=0.9), "Config does not accept average; did you mean ema_decay?"),
        (lambda: train({"lr": 0.1}), "config is a dict, but it has to be a Config: Config(**config)"),
        (lambda: train([Config()]), "config is a list, but it has to be a Config"),
        (lambda: run_grid([Config(), None]), "config is a NoneType, but it has to be a Config"),
        (lambda: run_grid({"lr": 0.1}), "config is a dict, but it has to be a Config: Config(**config)"),
    ],
)
def test_names_the_wrong_argument_and_suggests_the_right_one(make, sentence):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_help_lists_every_field_with_its_choices():
    text = inspect.getdoc(Config)
    assert all(f"\n{field.name}: " in text for field in dataclasses.fields(Config))
    assert "\ngelu: exact, tanh; tanh: the approximation" in text
    assert str(inspect.signature(Config)).startswith("(lr: float = 0.01, dropout_p: float = 0.0, ")
