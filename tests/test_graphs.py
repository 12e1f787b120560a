"""The recorded step: what of it needs no GPU here, and on one what it computes."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer.config import Config
from mixer.data import normalise
from mixer.kernels.dropout import dropout_scale
from mixer.kernels.graphs import Replayed, draw_seeds, replayed, seeded_block
from mixer.model import MixerBlock, MlpMixer
from mixer.training import Training, autocast

CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def model(dropout_p: float, num_blocks: int = 2) -> MlpMixer:
    """With a head that is not zero, so that gradients reach the blocks."""
    model = MlpMixer(num_blocks=num_blocks, dropout_p=dropout_p, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))
    return model


class PlainBlock(MixerBlock):
    """A block that the operator for the CPU does not take."""


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_block_is_one_graph_with_the_seeds_that_it_draws_itself(dropout_p):
    alone, seeded = model(dropout_p), model(dropout_p)
    for block in alone.blocks:
        block.__class__ = PlainBlock
    images = torch.randn(4, 1, 28, 28)
    compiled = torch.compile(seeded_block, backend="eager", fullgraph=True)
    seeds = draw_seeds(seeded, CPU)

    def mixing(blocks, x: Tensor) -> Tensor:
        for block, of_block in zip(blocks, seeds, strict=True):
            x = compiled(block, x, of_block)
        return x

    assert torch.equal(seeded(images, mixing), alone(images))
    assert not any(block.dropout.drawn for block in seeded.blocks)
    # and both have taken as much from the generator
    assert torch.equal(seeded.blocks[0].dropout.seeds(), alone.blocks[0].dropout.seeds())


def test_what_cannot_be_recorded_trains_kernel_by_kernel_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="mixer"):
        assert replayed(model(0.1), torch.randn(4, 1, 28, 28)) is None
    [message] = caplog.messages
    assert message.startswith("The mixer trains kernel by kernel on this GPU") and "\n" not in message


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
def test_a_replayed_step_is_the_formula_in_float64(data, dropout_p, precision):
    ours = model(dropout_p, 8).cuda()
    theirs = copy.deepcopy(ours).double().cpu()
    recorded = Replayed(ours)
    for first in (0, 64):  # the first call records, the second only replays
        images = normalise(data.train_images[first : first + 64], data.pixel_mean, data.pixel_std)
        labels = data.train_labels[first : first + 64]
        ours.blocks[0].dropout.generator.manual_seed(first)
        with autocast(torch.device("cuda"), precision):
            logits = recorded(images.cuda())
        F.cross_entropy(logits, labels.cuda()).backward()
        theirs.zero_grad()
        theirs.blocks[0].dropout.generator.manual_seed(first)
        expected = theirs(images.double())
        F.cross_entropy(expected, labels).backward()
        within = 2e-2 if precision == "bfloat16" else 1e-4
        assert (logits.cpu() - expected).norm() < within * expected.norm()
        mine = torch.cat([weight.grad.flatten().cpu() for weight in ours.parameters()])
        right = torch.cat([weight.grad.flatten() for weight in theirs.parameters()])
        assert (mine - right).norm() < within * right.norm()


@on_cuda
def test_a_recorded_training_learns_as_one_that_is_not(few):
    config = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, num_blocks=2)
    recorded, eager = (Training(config, torch.device("cuda"), "float32", few.to("cuda")) for _ in range(2))
    assert recorded.path == "replayed"
    eager.network = eager.model
    for _ in range(3):
        ours, theirs = recorded.train_epoch(), eager.train_epoch()
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
