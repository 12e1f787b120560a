"""Muon (Jordan et al. 2024) without bfloat16."""

import torch
from torch import Tensor
from torch.optim import Muon


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
