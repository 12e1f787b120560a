"""Baselines have about as many parameters as the mixer and train like it, in colour too."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import first_images

from mixer.baselines import distillation
from mixer.baselines.networks import ConvNet, PlainMlp
from mixer.config import Config
from mixer.data import Data, normalise
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.prediction import classify
from mixer.training import train


@pytest.fixture
def colours(data) -> Data:
    """The centres of a few images, each class in a different colour."""
    few, tint = first_images(data, 40, 20), torch.rand(10, 3, 1, 1)
    parts = {"train_images": few.train_labels, "test_images": few.test_labels}
    parts = {name: getattr(few, name)[:, None, 8:20, 8:20] * tint[labels] for name, labels in parts.items()}
    parts = {name: images.byte() for name, images in parts.items()}
    return replace(few, name="colours", pixel_mean=None, pixel_std=None, **parts)


@pytest.mark.parametrize("network", [PlainMlp(28 * 28), ConvNet()], ids=["mlp", "conv"])
def test_has_as_many_parameters_as_a_mixer_within_a_hundredth(network):
    ours, theirs = (sum(weight.numel() for weight in model.parameters()) for model in (MlpMixer(), network))
    assert 0.99 < theirs / ours < 1.01
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10) and logits.dtype == torch.float32


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_trains_like_any_run(colours, network):
    recipe = {"optimiser": "muon", "schedule": "linear", "flip": True, "dropout_p": 0.1, "ema_decay": 0.5}
    config = Config(network=network, lr=0.02, batch_size=20, num_epochs=3, **recipe)
    options = {"data": colours, "device": "cpu", "precision": "float32", "progress": False}
    record, model = train(config, return_model=True, **options)
    losses = [epoch["train_loss"] for epoch in record["history"]]
    assert record["environment"]["path"] == "eager" and losses[2] < losses[0]
    assert [epoch["train_loss"] for epoch in train(config, **options)["history"]] == losses
    assert model(torch.zeros(1, 3, 12, 12)).shape == (1, colours.num_classes)


def test_mixer_is_trained_distilled_and_classifies_in_colour(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "WEIGHTS", tmp_path)
    monkeypatch.setattr(distillation, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    options = {"data": colours, "device": "cpu", "progress": False}
    views, weights = {"batch_size": 20, "num_epochs": 1, "flip": True, "shift": 1}, tmp_path / "mixer.safetensors"
    train(Config(network="conv", erase=4, **views), weights=tmp_path / "conv.safetensors", **options)
    config = Config(teacher="conv", num_blocks=1, patches_mlp_dim=32, channels_mlp_dim=32, whiten=True, **views)
    record, model = train(config, weights=weights, return_model=True, **options)
    assert record["environment"]["path"] == ("fused" if fused.available() else "eager")
    assert record["environment"]["image"] == [3, 12, 12]
    image = colours.test_images[0]
    answer = classify(image, weights, show=True).sort_index()
    inputs = normalise(image[None], colours.pixel_mean, colours.pixel_std)
    assert abs(float(normalise(colours.train_images, colours.pixel_mean, colours.pixel_std).mean())) < 1e-3
    assert np.allclose(answer, model(inputs).softmax(dim=1)[0].detach(), atol=1e-6) and answer.std() > 0
    assert np.array_equal(plt.gca().images[0].get_array(), image.movedim(0, 2))
    plt.close()
