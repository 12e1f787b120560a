"""Fingerprints of a run: a few numbers that its model, loss, augmentation and optimiser compute.

A record names its config, but the code may have changed since. So every run is tried on a few noise images, in eager
PyTorch and float64, and the resulting numbers go into its record. Comments, moves and refactoring leave them unchanged,
as does another processor. ReLU in place of GELU, another eps or another initialisation changes them.
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
# Relative tolerances. Processors round float32 differently: initial weights, and the images that affine maps and mixup
# interpolate. Adam's steps along tiny gradients amplify that.
TOLERANCES = dict.fromkeys(["output", "accuracy", "gradient", "loss", "schedule"], 1e-8) | {
    "weights": 1e-4,
    "steps": 1e-6,
}
INTERPOLATED = {"gradient": 1e-5, "steps": 1e-2, "loss": 1e-5}


@dataclass(frozen=True)
class Kind:
    """The properties of a data set that affect a run's code: image shape, number of classes, pixel statistics."""

    image: tuple[int, ...]
    classes: int
    pixel_mean: float
    pixel_std: float

    @classmethod
    def of(cls, data: Data) -> "Kind":
        return cls(tuple(data.train_images.shape[1:]), data.num_classes, data.pixel_mean, data.pixel_std)


FASHION_MNIST = Kind((28, 28), 10, PIXEL_MEAN, PIXEL_STD)


def trial(config: Config, kind: Kind) -> tuple[Config, Data]:
    """Return the config and the data, noise images, of a trial run."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES + BATCH, *kind.image), generator=generator).to(torch.uint8)
    labels = kind.classes - 1 - torch.arange(IMAGES + BATCH) % kind.classes
    parts = images[:IMAGES], labels[:IMAGES], images[IMAGES:], labels[IMAGES:]
    noise = Data(*parts, name="noise", pixel_mean=kind.pixel_mean, pixel_std=kind.pixel_std)
    return replace(config, batch_size=BATCH, seed=0, limit=None, validation=False), noise


def try_out(run: Any) -> Fingerprint:
    """Compute the fingerprint with a new ``training.Run`` made from :func:`trial`, which cannot be used afterwards."""
    numbers = {"weights": _projection([p.detach().double() for p in run.model.parameters()])}
    for model in {run.model, run.tested}:
        if "model" not in run.brought:  # a custom model may create float32 tensors in forward
            model.double()
            model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())  # keeps it in eager PyTorch too
        _set_weights(model)
    numbers["output"], _ = run.evaluate()
    numbers["accuracy"] = _accuracy(run)
    before, gradients = [p.detach().clone() for p in run.model.parameters()], []

    def keep_first(loss: Tensor, images: int) -> None:
        if not gradients:
            gradients.extend(p.grad.clone() for p in run.model.parameters() if p.grad is not None)

    run.train_epoch(keep_first)
    if not gradients:  # a forward set on the object belongs to the model that was copied for this trial
        raise ValueError("no parameter of a copy of the model gets a gradient: define forward in the model's class")
    after = [p.detach() for p in run.model.parameters()]
    numbers["gradient"] = _projection(gradients)
    numbers["steps"] = _projection([new - old for new, old in zip(after, before, strict=True)])
    numbers["loss"] = run.history[0]["test_loss"] if run.history else math.inf
    numbers["schedule"] = _schedule(run)
    # JSON has no infinity, which an absurd learning rate can lead to.
    return {name: float(f"{number:.12g}") if math.isfinite(number) else 0.0 for name, number in numbers.items()}


def differences(one: Fingerprint, other: Fingerprint, config: Config) -> list[str]:
    """Name the numbers in which two fingerprints of the same config differ. Early records have fewer of them."""
    tolerances = TOLERANCES | (INTERPOLATED if config.affine or config.mixup_prob else {})
    pairs = {name: (one.get(name, 0), other.get(name, 0)) for name in tolerances}
    for name in {"accuracy", "schedule"} - (one.keys() & other.keys()):
        del pairs[name]
    return [name for name, pair in pairs.items() if not math.isclose(*pair, rel_tol=tolerances[name])]


def _accuracy(run: Any) -> float:
    """Sum the accuracies over all classes that the test images could be of; 1, unless an image has several answers."""
    data, total = run.data, 0.0
    for label in range(data.num_classes):
        run.data = replace(data, test_labels=torch.full_like(data.test_labels, label))
        total += run.evaluate()[1]
    run.data = data
    return total


def _schedule(run: Any) -> float:
    """Combine the learning rates at the start of every epoch."""
    history, total = run.history, 0.0
    for epoch in range(run.config.num_epochs):
        run.history = history[:1] * epoch
        run.set_learning_rate(0)
        total += (1 + epoch) * sum(float(group["lr"]) for each in run.optimisers for group in each.param_groups)
    return total


@torch.no_grad()
def _set_weights(model: nn.Module) -> None:
    """Set weights that are bit-identical on every processor, with a non-zero head: a zero head would hide the rest."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randint(-999, 1000, parameter.shape, generator=generator).double() / 1000
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.copy_(noise / fan_in**0.5 + (parameter.round() if parameter.ndim == 1 else 0))


def _projection(tensors: list[Tensor]) -> float:
    """Project onto a fixed direction, which detects reordered numbers; adding the norm keeps it away from zero."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).double()
    direction = torch.randint(-999, 1000, flat.shape, generator=torch.Generator().manual_seed(1)).double() / 1000
    return float(flat @ direction + flat.norm())
