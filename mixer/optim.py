"""The optimisers and schedules that a config can name.

The coursework states neither; ours is Adam with PyTorch's defaults, at a constant learning rate.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

from mixer.baselines.filters import SharedFilters
from mixer.config import Config
from mixer.kernels.muon import FullMuon
from mixer.model import MlpMixer


def optimisers(config: Config, model: nn.Module, image: Sequence[int], precision: str) -> list[Optimizer]:
    """Return the optimisers that together train all parameters of ``model``. ``image``: height and width.

    "muon" is Muon (Jordan et al. 2024) for the matrices in the blocks, and AdamW with 0.15 of its learning rate for the
    rest. A run in float32 has :class:`FullMuon` in place of PyTorch's Muon. The blocks of a convolutional network have
    no matrices, so AdamW trains all of it.
    """
    several = _optimisers(config.optimiser, model, config.lr, config.weight_decay, precision)
    if config.shared_filters:
        if not isinstance(model, MlpMixer):
            raise ValueError(f"shared_filters need an MlpMixer, not a {type(model).__name__}: set it to 0")
        into, out = ([getattr(block, name).weight for block in model.blocks] for name in ("patches_in", "patches_out"))
        grid = [side // patch for side, patch in zip(image, model.patch_size, strict=True)]
        several.append(SharedFilters(into, out, grid, config.shared_filters, several[-1].defaults["lr"]))
    return several


def _optimisers(name: str, model: nn.Module, lr: float, weight_decay: float, precision: str) -> list[Optimizer]:
    fused = next(model.parameters()).device.type != "mps"
    settings = {"lr": lr, "weight_decay": weight_decay, "fused": fused}
    match name:
        case "adam":
            return [Adam(model.parameters(), **settings)]
        case "adamw":
            return [AdamW(model.parameters(), **settings)]
        case "sgd":
            return [SGD(model.parameters(), **settings)]
        case "momentum":
            return [SGD(model.parameters(), momentum=0.9, **settings)]
        case "rmsprop":
            return [RMSprop(model.parameters(), lr=lr, weight_decay=weight_decay)]
        case "muon":
            blocks = getattr(model, "blocks", None)
            if not isinstance(blocks, nn.Module):
                raise ValueError(
                    f"muon trains the matrices in model.blocks, and {type(model).__name__} has no blocks: choose "
                    "another optimiser, or put the layers into a module called blocks"
                )
            matrices = [weight for weight in blocks.parameters() if weight.ndim == 2]
            rest = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
            kind = Muon if precision == "bfloat16" else FullMuon
            muon = [kind(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
            return [*muon, AdamW(rest, lr=0.15 * lr, weight_decay=weight_decay, fused=fused)]


def schedule(name: str, done: float, first: float) -> float:
    """Learning-rate factor at the fraction ``done`` of the training; ``first`` is the first epoch's fraction."""
    if name == "constant":
        return 1.0
    if name == "decay":
        return 1 - done
    # linear: warm-up, then decay to 0
    return done / first if done <= first else (1 - done) / (1 - first)


@contextlib.contextmanager
def uphill(model: nn.Module, radius: float) -> Iterator[None]:
    """Inside, the weights are ``radius`` away along their gradients, where the loss is about the highest.

    Gradients computed there make the step of sharpness-aware minimisation (SAM, Foret et al. 2021, arXiv:2010.01412).
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        for weight in weights:
            weight.add_(weight.grad * (radius / norm.clamp(min=1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
