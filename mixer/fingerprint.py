"""What a run computes, by its behaviour: numbers that follow from model, loss, augmentation and optimiser as they are.

A record says which config it is of; the code may have changed since. So every run is tried out on a few images of
noise, in eager PyTorch and float64, and the numbers go into the record. They are the same after comments, moves and
refactoring, on every processor, and others with ReLU in place of GELU, another eps or another initialisation.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixer.config import Config
from mixer.data import PIXEL_MEAN, PIXEL_STD, Data

Fingerprint = dict[str, float]

IMAGES, BATCH = 6, 2
# Relative tolerances: processors round the initial weights in float32, and Muon multiplies in bfloat16.
TOLERANCES = {"weights": 1e-4, "output": 1e-8, "gradient": 1e-8, "steps": 1e-8, "loss": 1e-8}
MUON = {"steps": 0.1, "loss": 0.1}


@dataclass(frozen=True)
class Kind:
    """What of a data set decides how a run computes: an image's shape, number of classes, statistics of the pixels."""

    image: tuple[int, ...]
    classes: int
    pixel_mean: float
    pixel_std: float

    @classmethod
    def of(cls, data: Data) -> "Kind":
        return cls(tuple(data.train_images.shape[1:]), data.num_classes, data.pixel_mean, data.pixel_std)


FASHION_MNIST = Kind((28, 28), 10, PIXEL_MEAN, PIXEL_STD)


def trial(config: Config, kind: Kind) -> tuple[Config, Data]:
    """Config and data of a run that is tried out: images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES + BATCH, *kind.image), generator=generator).to(torch.uint8)
    labels = kind.classes - 1 - torch.arange(IMAGES + BATCH) % kind.classes
    parts = images[:IMAGES], labels[:IMAGES], images[IMAGES:], labels[IMAGES:]
    noise = Data(*parts, name="noise", pixel_mean=kind.pixel_mean, pixel_std=kind.pixel_std)
    return replace(config, batch_size=BATCH, seed=0, limit=None, validation=False), noise


def try_out(run: Any) -> Fingerprint:
    """Try out a new ``training.Run`` of what :func:`trial` gives; it is of no further use."""
    numbers = {"weights": _projection([p.detach().double() for p in run.model.parameters()])}
    for model in {run.model, run.tested}:
        if "model" not in run.brought:  # which may make float32 tensors as it goes
            model.double()
            model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())  # and so it stays in eager PyTorch
        _set_weights(model)
    numbers["output"], _ = run.evaluate()
    before, gradients = [p.detach().clone() for p in run.model.parameters()], []

    def keep_first(loss: Tensor, images: int) -> None:
        if not gradients:
            gradients.extend(p.grad.clone() for p in run.model.parameters() if p.grad is not None)

    run.train_epoch(keep_first)
    after = [p.detach() for p in run.model.parameters()]
    numbers["gradient"] = _projection(gradients)
    numbers["steps"] = _projection([new - old for new, old in zip(after, before, strict=True)])
    numbers["loss"] = run.history[0]["test_loss"] if run.history else math.inf
    # JSON has no infinity, to which the steps of an absurd learning rate lead.
    return {name: float(f"{number:.12g}") if math.isfinite(number) else 0.0 for name, number in numbers.items()}


def differences(one: Fingerprint, other: Fingerprint, config: Config) -> list[str]:
    """The numbers in which two fingerprints of the same config differ, by their names."""
    tolerances = TOLERANCES | (MUON if config.optimiser == "muon" else {})
    return [name for name, close in tolerances.items() if not math.isclose(one[name], other[name], rel_tol=close)]


@torch.no_grad()
def _set_weights(model: nn.Module) -> None:
    """The same weights to the last bit on every processor, none of them zero: a zero head would hide the rest."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randint(-999, 1000, parameter.shape, generator=generator).double() / 1000
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.copy_(noise / fan_in**0.5 + (parameter.round() if parameter.ndim == 1 else 0))


def _projection(tensors: list[Tensor]) -> float:
    """Onto a fixed direction, since no rearrangement of the numbers keeps it; with the norm it is far from zero."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    direction = torch.randint(-999, 1000, flat.shape, generator=torch.Generator().manual_seed(1)).double() / 1000
    return float(flat @ direction + flat.norm())
