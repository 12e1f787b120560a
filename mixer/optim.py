"""The optimisers and schedules that a config can name.

The coursework states neither; ours is Adam with PyTorch's defaults, at a constant learning rate.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

from mixer.config import Config
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


class FullMuon(Muon):
    """PyTorch's Muon in the precision of the matrices, for all of a shape at once, with the same settings and state.

    PyTorch iterates in bfloat16. A processor that has to emulate it takes about as long for that as for the network.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in same.items():
                directions = torch.stack([self._direction(matrix, group["momentum"]) for matrix in matrices])
                steps = _orthogonalised(directions, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for matrix, step in zip(matrices, steps, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def _orthogonalised(x: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """Replace the singular values of matrices (N, rows, columns) by numbers near 1, by Newton and Schulz's method."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class SharedFilters(AdamW):
    """Trains convolutions beside the token-mixing matrices, and merges them at every step (RepMLP, arXiv:2105.01883).

    A matrix from S patches to H hidden units (or back) is trained as the sum of a free matrix and F = H // S filters
    that all patches share. Hidden unit f·S + p belongs to filter f at patch p, and reads (writes) the patches around p.
    The gradient of a filter's weight is the sum over all patches. Its step is added to the matrix where the filter
    stands, so the network is an ordinary mixer at all times. Another optimiser trains the free matrices.

    into, out: the matrices to the hidden units (H, S) and back (S, H). grid: rows and columns of patches. side: of the
    filters, in patches.
    """

    def __init__(self, into: Sequence[Tensor], out: Sequence[Tensor], grid: Sequence[int], side: int, lr: float):
        self.matrices = [(matrix, _same) for matrix in into] + [(matrix, torch.t) for matrix in out]
        self.places = [_places(len(turn(matrix)), grid, side).to(matrix.device) for matrix, turn in self.matrices]
        # What the filters themselves are does not matter, since they are merged: only their steps do.
        zeros = [matrix.new_zeros(len(places)) for (matrix, _), places in zip(self.matrices, self.places, strict=True)]
        super().__init__(zeros, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self) -> None:
        filters = self.param_groups[0]["params"]
        for (matrix, turn), places, weights in zip(self.matrices, self.places, filters, strict=True):
            gradient = torch.cat([turn(matrix.grad).flatten(), matrix.new_zeros(1)])
            weights.grad = gradient[places].sum(dim=1).to(weights.dtype)
        super().step()
        for (matrix, turn), places, weights in zip(self.matrices, self.places, filters, strict=True):
            change = matrix.new_zeros(matrix.numel() + 1)
            change[places] = weights[:, None].to(matrix.dtype).expand_as(places)
            turn(matrix).add_(change[:-1].view_as(turn(matrix)))
            weights.zero_()


def _same(matrix: Tensor) -> Tensor:
    return matrix


def _places(units: int, grid: Sequence[int], side: int) -> Tensor:
    """Where each weight of each filter stands in the flat (H, S) matrix: (weights, S). H · S: beside the image."""
    (height, width), reach = grid, side // 2
    patches = height * width
    if units < patches:
        wanted = "at least as many hidden units in token mixing as patches"
        raise ValueError(f"shared_filters need {wanted}, not {units} units for {patches} patches")
    unit = torch.arange(units // patches * patches).view(-1, 1, patches)  # (F, 1, S)
    down, right = torch.meshgrid(*2 * [torch.arange(-reach, reach + 1)], indexing="ij")
    row = torch.arange(patches) // width + down.reshape(1, -1, 1)
    column = torch.arange(patches) % width + right.reshape(1, -1, 1)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside, unit * patches + row * width + column, units * patches).flatten(0, 1)
