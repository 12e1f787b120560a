"""The mixer's baselines have about as many parameters and are trained as it is."""

import pytest
import torch
from conftest import first_images

from mixer.baselines.networks import ConvNet, PlainMlp
from mixer.config import Config
from mixer.model import MlpMixer
from mixer.training import train


@pytest.mark.parametrize("network", [PlainMlp(28 * 28), ConvNet()], ids=["mlp", "conv"])
def test_has_as_many_parameters_as_a_mixer_to_a_hundredth(network):
    ours, theirs = (sum(weight.numel() for weight in model.parameters()) for model in (MlpMixer(), network))
    assert 0.99 < theirs / ours < 1.01
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10) and logits.dtype == torch.float32


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_is_trained_as_any_run(data, network):
    few = first_images(data, 40, 20)
    recipe = {"optimiser": "muon", "schedule": "linear", "flip": True, "dropout_p": 0.1, "ema_decay": 0.5}
    config = Config(network=network, lr=0.02, batch_size=20, num_epochs=3, **recipe)
    options = {"data": few, "device": "cpu", "precision": "float32", "progress": False}
    record, model = train(config, return_model=True, **options)
    losses = [epoch["train_loss"] for epoch in record["history"]]
    assert record["environment"]["path"] == "eager" and losses[2] < losses[0]
    assert [epoch["train_loss"] for epoch in train(config, **options)["history"]] == losses
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, few.num_classes)
