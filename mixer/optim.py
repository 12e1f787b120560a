"""The optimisers and schedules that a config can name.

The coursework states neither; ours is Adam with PyTorch's defaults, at a constant learning rate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _optimiser(kind: type[torch.optim.Optimizer], **settings: Any) -> Callable[..., list[torch.optim.Optimizer]]:
    return lambda model, lr, weight_decay, **fused: [
        kind(model.parameters(), lr=lr, weight_decay=weight_decay, **settings, **fused)
    ]


def _muon(model: nn.Module, lr: float, weight_decay: float, **fused: bool) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW with 0.15 of its learning rate for the rest.

    The blocks of a convolutional network have no matrices: all of it is the rest.
    """
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    rest = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    muon = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
    return [*muon, torch.optim.AdamW(rest, lr=0.15 * lr, weight_decay=weight_decay, **fused)]


OPTIMISERS = {
    "adam": _optimiser(torch.optim.Adam),
    "adamw": _optimiser(torch.optim.AdamW),
    "sgd": _optimiser(torch.optim.SGD),
    "momentum": _optimiser(torch.optim.SGD, momentum=0.9),
    "rmsprop": lambda model, lr, weight_decay, **_: [
        torch.optim.RMSprop(model.parameters(), lr=lr, weight_decay=weight_decay)
    ],
    "muon": _muon,
}
# The share of the learning rate by what is done of the training and the share of it that the first epoch is.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, first: 1.0,
    "linear": lambda done, first: done / first if done <= first else (1 - done) / (1 - first),
}
