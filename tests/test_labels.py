"""Which training images are disputed, and what is left of it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import first_images

from mixer.config import RECIPES, Config
from mixer.data import Data, normalise
from mixer.model import MlpMixer
from mixer.predict import load_model
from mixer.runner import weights_path
from mixer.runs import last_weights, train
from mixer.studies import label_errors as labels
from mixer.studies.label_errors import disputed

SMALL = {"num_blocks": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32}


@pytest.fixture(scope="module")
def shipped() -> MlpMixer:
    return load_model()


@pytest.fixture
def mislabelled(data) -> Data:
    """The shipped model knows the tenth training image, which is labelled as something else here."""
    few = first_images(data, 40, 10)
    wrong = few.train_labels.clone()
    wrong[10] = (wrong[10] + 1) % 10
    return replace(few, train_labels=wrong)


def test_a_wrong_label_is_found_with_its_mean_probability(shipped, mislabelled):
    other = load_model()
    other.head.weight.data *= 0.5
    frame = disputed([shipped, other], mislabelled)
    row = frame[frame["image"] == 10].iloc[0]
    right = int(mislabelled.train_labels[10] - 1) % 10
    assert (row["label"], row["answer"]) == ((right + 1) % 10, right)
    inputs = normalise(mislabelled.train_images[10:11])
    each = [float(model(inputs).softmax(1)[0, right].detach()) for model in (shipped, other)]
    assert row["probability"] == pytest.approx(sum(each) / 2, abs=0.01) and each[0] - each[1] > 0.02
    assert (frame["answer"] != frame["label"]).all() and frame["probability"].is_monotonic_decreasing


def test_an_image_on_which_the_models_differ_is_left_out(shipped, mislabelled):
    undecided = load_model()
    undecided.head.weight.data.zero_()
    undecided.head.bias.data = torch.eye(10)[int(mislabelled.train_labels[10] + 3) % 10]
    assert 10 in disputed([shipped, shipped], mislabelled)["image"].tolist()
    assert 10 not in disputed([shipped, undecided], mislabelled)["image"].tolist()


def test_the_file_is_made_of_the_last_epochs_weights_and_stays_where_they_are_not(data, tmp_path, monkeypatch, capsys):
    few = first_images(data, 200, 50)
    monkeypatch.setattr(labels, "FOLDER", tmp_path)
    monkeypatch.setattr(labels, "SEEDS", (0, 1))
    monkeypatch.setattr(labels.fashion_mnist, "load", lambda: few)
    monkeypatch.setitem(RECIPES, "modern", RECIPES["modern"] | SMALL | {"num_epochs": 2, "average": 0.5})
    with pytest.raises(SystemExit, match=r"There are no weights in .*\.last\.safetensors"):
        labels.main()
    models = []
    for seed in (0, 1):
        config = Config(**RECIPES["modern"], seed=seed)
        weights = weights_path(config, tmp_path)
        models.append(train(config, data=few, device="cpu", weights=weights, progress=False, return_model=True)[1])
    labels.main()
    expected = disputed(models, few)
    assert len(expected) > 5 and f"has {len(expected)} training images" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "labels.csv"), expected, atol=1e-4, check_dtype=False)

    content = (tmp_path / "labels.csv").read_bytes()
    last_weights(weights).unlink()
    labels.main()
    assert "stays as it is" in capsys.readouterr().out and (tmp_path / "labels.csv").read_bytes() == content
