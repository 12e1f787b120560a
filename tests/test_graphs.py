"""The recorded step: what can be tested without a GPU, and on a GPU its answers against float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixer import Config, MlpMixer, train
from mixer.data import normalise
from mixer.kernels import acceleration
from mixer.kernels.acceleration import Choice, NotServed, choose
from mixer.kernels.dropout import dropout_scale
from mixer.kernels.graphs import Graphed, draw_seeds, seeded_block
from mixer.system.device import autocast

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def mixer(dropout_p=0.1, num_blocks=2) -> MlpMixer:
    """A mixer with a non-zero head, so that gradients reach the blocks."""
    model = MlpMixer(num_blocks=num_blocks, dropout_p=dropout_p, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_block_is_one_graph_with_the_seeds_it_would_draw(dropout_p):
    alone, seeded = mixer(dropout_p), mixer(dropout_p)
    compiled = torch.compile(seeded_block, backend="eager", fullgraph=True)
    x = seeded.embed(IMAGES)
    for block, seeds in zip(seeded.blocks, draw_seeds(seeded, torch.device("cpu")), strict=True):
        x = compiled(block, x, seeds)
        assert not block.dropout.drawn
    assert torch.equal(seeded.classify(x), alone(IMAGES))
    assert torch.equal(seeded.blocks[0].dropout.generator.get_state(), alone.blocks[0].dropout.generator.get_state())


def test_outside_training_the_model_itself_is_called():
    model = mixer()
    with torch.no_grad():
        assert torch.equal(Graphed(model)(IMAGES), mixer()(IMAGES))
    model.eval()
    assert torch.equal(Graphed(model)(IMAGES), model(IMAGES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records it")
def test_a_step_that_cannot_be_recorded_says_why_and_leaves_no_seeds():
    model = mixer()
    with pytest.raises(NotServed, match=r"^its step could not be recorded \(\w+: [^\n]+\)$"):
        acceleration._graphed(model, IMAGES, None)
    assert not any(block.dropout.drawn for block in model.blocks)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[1].requires_grad_(False),
        lambda model: [setattr(block.dropout, "p", 0.5) for block in model.blocks],
        lambda model: [setattr(block, "skip_connections", False) for block in model.blocks],
        lambda model: setattr(model, "head", nn.Linear(16, 10)),
    ],
    ids=["frozen", "another dropout", "without skip connections", "another head"],
)
def test_recordings_are_kept_until_the_model_changes(change):
    model = mixer()
    before = Choice(Graphed(model), "graphs")
    model.head.weight.data.mul_(2)  # as an optimiser does
    assert acceleration._graphed(model, IMAGES, before) is before
    change(model)
    assert not before.forward.is_current()


@on_cuda
def test_cuda_draws_the_masks_of_the_cpu_eagerly_and_compiled():
    shape, seed = torch.Size((33, 49, 16)), torch.tensor(123456789012345)
    masks = dropout_scale(shape, 0.1, seed)
    compiled = torch.compile(dropout_scale, dynamic=False)
    assert torch.equal(dropout_scale(shape, 0.1, seed.cuda()).cpu(), masks)
    assert torch.equal(compiled(shape, 0.1, seed.cuda()).cpu(), masks)


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_replayed_step_agrees_with_float64(data, dropout_p, precision):
    ours = mixer(dropout_p, 8).cuda()
    exact, fast = copy.deepcopy(ours).double().cpu(), Graphed(ours)
    within = 2e-2 if precision == "bfloat16" else 1e-4
    for first in (0, 64):  # the first call records, the second only replays
        images, labels = normalise(data.train_images[first : first + 64]), data.train_labels[first : first + 64]
        for model in (ours, exact):
            model.blocks[0].dropout.generator.manual_seed(first)
        with autocast(torch.device("cuda"), precision):
            logits = fast(images.cuda())
        F.cross_entropy(logits, labels.cuda()).backward()
        exact.zero_grad()
        wanted = exact(images.double())
        F.cross_entropy(wanted, labels).backward()
        assert (logits.cpu() - wanted).norm() < within * wanted.norm()
        got, right = (torch.cat([p.grad.cpu().flatten() for p in model.parameters()]) for model in (ours, exact))
        assert (got - right).norm() < within * right.norm()


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_edited_forward_or_a_hook_is_eager_on_cuda(precision, monkeypatch):
    images, model = IMAGES.cuda(), mixer().cuda()
    with autocast(images.device, precision):
        assert choose(model, images).path == "graphs"
        with model.head.register_forward_hook(lambda *_: None):
            assert choose(model, images).path == "eager"
        monkeypatch.setattr(MlpMixer, "forward", lambda self, images: 2 * self.classify(self.embed(images)))
        assert choose(model, images).path == "eager"


@on_cuda
def test_recorded_training_learns_like_eager_training(few, monkeypatch):
    config = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, num_blocks=2)
    how = {"data": few, "device": "cuda", "precision": "float32", "progress": False}
    recorded = train(config, **how)
    monkeypatch.setattr(Graphed, "__call__", lambda self, images: self.model(images))
    eager = train(config, **how)
    assert recorded["environment"]["path"] == "graphs"
    for ours, theirs in zip(recorded["history"], eager["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
