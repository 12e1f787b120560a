from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import first_images

from mixer.checkpoint import last_weights
from mixer.config import RECIPES, Config
from mixer.data import Data, normalise
from mixer.prediction import load_model
from mixer.records import weights_path
from mixer.studies import label_errors
from mixer.studies.label_errors import disputed
from mixer.training import train

SMALL = {"num_blocks": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32, "num_epochs": 2, "ema_decay": 0.5}


@pytest.fixture
def mislabelled(data) -> Data:
    """The tenth image has a wrong label; the shipped model predicts its original one."""
    few = first_images(data, 40, 10)
    labels = few.train_labels.clone()
    labels[10] = (labels[10] + 1) % 10
    return replace(few, train_labels=labels)


def test_finds_a_wrong_label_with_the_mean_probability(mislabelled):
    models = [load_model(), load_model()]
    models[1].head.weight.data *= 0.5  # less confident
    frame = disputed(models, mislabelled)
    row, label = frame[frame["image"] == 10].iloc[0], int(mislabelled.train_labels[10])
    assert (row["label"], row["answer"]) == (label, (label - 1) % 10)
    inputs = normalise(mislabelled.train_images[10:11])
    one, other = (float(model(inputs).softmax(1)[0, (label - 1) % 10].detach()) for model in models)
    assert row["probability"] == pytest.approx((one + other) / 2, abs=0.01) and one - other > 0.02
    assert (frame["answer"] != frame["label"]).all() and frame["probability"].is_monotonic_decreasing


def test_leaves_out_images_on_which_models_differ(mislabelled):
    other = load_model()
    other.head.weight.data.zero_()
    other.head.bias.data = torch.eye(10)[int(mislabelled.train_labels[10] + 3) % 10]
    assert 10 not in disputed([load_model(), other], mislabelled)["image"].tolist()


def test_writes_the_table_from_last_weights_and_keeps_it_without_them(data, tmp_path, monkeypatch, capsys):
    few, models = first_images(data, 200, 50), []
    monkeypatch.setattr(label_errors, "FOLDER", tmp_path)
    monkeypatch.setattr(label_errors, "SEEDS", (0, 1))
    monkeypatch.setattr(label_errors.fashion_mnist, "load", lambda: few)
    monkeypatch.setitem(RECIPES, "modern", RECIPES["modern"] | SMALL)
    with pytest.raises(SystemExit, match=r"There is no weights file .*\.last\.safetensors"):
        label_errors.main()
    for seed in (0, 1):
        config = Config(**RECIPES["modern"], seed=seed)
        weights = weights_path(config, tmp_path)
        models.append(train(config, data=few, device="cpu", weights=weights, progress=False, return_model=True)[1])
    label_errors.main()
    expected, written = disputed(models, few), pd.read_csv(tmp_path / "labels.csv")
    assert len(expected) > 5 and f"lists {len(expected)} training images" in capsys.readouterr().out
    pd.testing.assert_frame_equal(written, expected, atol=1e-4, check_dtype=False)

    last_weights(weights).unlink()
    label_errors.main()
    assert "is kept" in capsys.readouterr().out and pd.read_csv(tmp_path / "labels.csv").equals(written)
