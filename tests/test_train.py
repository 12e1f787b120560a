"""The loop: it learns, draws from its own generator alone, and says where a loss is not finite."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import first_images

from mixer.config import Config
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.training import Diverged, Training, find_device, find_precision, part_of, predict

CPU = torch.device("cpu")
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, num_blocks=2)


def training(few, config=SHORT, precision=None) -> Training:
    return Training(config, CPU, find_precision(CPU, precision), part_of(few, config))


def test_it_learns_real_images(data):
    run = training(first_images(data, 1500, 1000), Config(lr=0.005, batch_size=25, num_epochs=2, num_blocks=2))
    first, second = run.train_epoch(), run.train_epoch()
    assert second["test_accuracy"] > 0.6 and second["train_loss"] < first["train_loss"]
    assert (first["epoch"], second["epoch"]) == (1, 2)


def test_losses_and_accuracies_are_those_of_the_model(few):
    run = training(few)
    epoch = run.train_epoch()
    logits = torch.cat(list(predict(run.model, few.test_images, run.precision)))
    assert logits.dtype == torch.float32 and logits.shape == (100, 10)
    loss = torch.nn.functional.cross_entropy(logits, few.test_labels)
    assert float(loss) == pytest.approx(epoch["test_loss"], rel=1e-5)
    assert float((logits.argmax(dim=1) == few.test_labels).double().mean()) == epoch["test_accuracy"]


def test_predictions_half_taken_leave_the_callers_modes_alone(few):
    logits = predict(MlpMixer(num_blocks=1), few.test_images.repeat(20, 1, 1), "bfloat16")
    next(logits)
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(find_precision(CPU) != "bfloat16", reason="no bfloat16 here")
def test_no_two_classes_tie_for_the_first_place(data):
    """In bfloat16 the head gave 19 of the 10,000 test images two best classes."""
    run = training(first_images(data, 1000, 3000), Config(lr=0.01, batch_size=50, num_epochs=1, num_blocks=2))
    run.train_epoch()
    logits = torch.cat(list(predict(run.model, run.data.test_images, "bfloat16")))
    best, second = logits.topk(2).values.T
    assert (best > second).all()
    best, second = logits.bfloat16().topk(2).values.T
    assert not (best > second).all()


def test_what_it_draws_is_its_own(few):
    """Weights, order and dropout follow from the seed, whatever PyTorch's own generator has been used for."""
    first, second = training(few), training(few)
    torch.manual_seed(5)
    one = [first.train_epoch(), first.train_epoch()]
    state = torch.random.get_rng_state()
    two = [second.train_epoch(on_step=lambda loss: torch.rand(3)), second.train_epoch()]
    assert one == two
    torch.random.set_rng_state(state)
    training(few).train_epoch()
    assert torch.equal(torch.random.get_rng_state(), state), "training must leave the caller's random state alone"
    other = training(few, replace(SHORT, seed=1))
    assert other.train_epoch() != one[0]


def test_a_loss_that_is_not_finite_names_the_step(few, monkeypatch):
    run = training(few)
    forward, calls = run._forward, []

    def spoilt(batch):
        calls.append(batch)
        logits, loss = forward(batch)
        return logits, loss * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(run, "_forward", spoilt)
    run.train_epoch()  # five steps an epoch
    with pytest.raises(Diverged, match="step 2 of epoch 2"):
        run.train_epoch()


def test_an_absurd_learning_rate_really_diverges(few):
    with pytest.raises(Diverged):
        training(few, Config(lr=1e30, batch_size=64, num_epochs=2, num_blocks=1)).train_epoch()


def test_limit_and_validation_say_what_is_trained_on(few):
    assert len(part_of(few, Config(limit=64)).train_labels) == 64
    assert part_of(few, Config()) is few
    with pytest.raises(ValueError, match=r"301.*300"):
        part_of(few, Config(limit=301))


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:77", "", "cpu:x", 5.5])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=r"^there is no device '.*' here: give cpu, cuda or mps"):
        find_device(name)


def test_devices_that_are_there():
    assert find_device("cpu") == find_device(CPU) == CPU
    assert find_device().type in ("cpu", "cuda", "mps")


def test_wrong_precisions_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="float16"):
        find_precision(CPU, "float16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="train in float32"):
        find_precision(CPU, "bfloat16")


def test_a_model_that_the_operator_does_not_serve_is_said_to_be_plain(few):
    for config, path in ((Config(num_blocks=1), None), (Config(num_blocks=1, num_channels=8), "plain")):
        run = training(few, config)
        expected = path or ("fused" if fused._library() is not None else "plain")
        assert fused.path(run.model.blocks, CPU, run.precision) == expected
