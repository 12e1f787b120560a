"""The optimisers and schedules that a config can name.

The coursework states neither; ours is Adam with PyTorch's defaults, at a constant learning rate.
"""

from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop


def optimisers(name: str, model: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    """Return the optimisers that together train all parameters of ``model``, for ``name`` as in ``Config.optimiser``.

    "muon" is Muon (Jordan et al. 2024) for the matrices in the blocks, and AdamW with 0.15 of its learning rate for the
    rest. The blocks of a convolutional network have no matrices, so AdamW trains all of it.
    """
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
            muon = [Muon(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
            return [*muon, AdamW(rest, lr=0.15 * lr, weight_decay=weight_decay, fused=fused)]
    raise ValueError(f"there is no optimiser {name!r}")


def schedule(name: str, done: float, first: float) -> float:
    """Learning-rate factor at the fraction ``done`` of the training; ``first`` is the first epoch's fraction."""
    if name == "constant":
        return 1.0
    return done / first if done <= first else (1 - done) / (1 - first)  # linear: warm-up, then decay to 0
