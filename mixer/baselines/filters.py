"""Filters that all patches share while a mixer trains: they give it an idea of neighbourhood, and cost it nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW


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
