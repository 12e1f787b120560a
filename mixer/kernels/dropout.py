"""Dropout with the same masks on every device and every path.

A mask is a hash of each element's position and a seed. The fast path need not store it for the backward pass, and
``fused.cpp`` draws the same one, for eager PyTorch too. PyTorch's own dropout gives different masks on each device, and
on a CPU it takes longer than the rest of a training step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixer.kernels import fused


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): in training, sets elements to 0 with probability ``p``, scales the rest.

    Every call draws one seed from ``generator``, which is on the CPU whatever the model's device. If it is None,
    PyTorch's default generator is used. ``p`` is rounded to steps of 1/65536. Raises ValueError for p outside [0, 1).
    """

    drawn: list[Tensor] | tuple[()] = ()  # seeds of the next calls, on the device, if drawn in advance

    def __init__(self, p: float, generator: torch.Generator | None = None):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout_p must be at least 0 and below 1, not {p}")
        self.p = float(p)
        self.generator = generator

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def seeds(self, *shape: int) -> Tensor:
        """Draw the seeds of the next calls, int64, on the CPU: ``seeds(n)`` equals n calls of ``seeds()``."""
        return torch.randint(2**62, shape, generator=self.generator, device="cpu")

    def forward(self, y: Tensor) -> Tensor:
        if not self.active:
            return y
        seed = self.drawn.pop(0) if self.drawn else self.seeds().to(y.device)
        return y * _scale(y, self.p, seed)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout_scale(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """Return dropout's factors: 0 with probability p, else 1 / (1 - p), float32 of the given shape.

    ``seed``: an int64 scalar tensor on the result's device. This is a counter-based generator: two elements share a
    32-bit word, which mixes the sum of a row hash and a column hash.
    """
    key = seed
    for _ in range(2):
        key = (key ^ _shr(key, 32, 64)) * _signed(0xD6E8FEB86659FD93)
    rows, pairs = math.prod(shape[:-1]), (shape[-1] + 1) // 2
    index = torch.arange(max(rows, pairs), dtype=torch.int32, device=seed.device)
    row, column = _hash(index[:rows], key), _hash(index[:pairs] ^ _signed(1 << 31, 32), key)
    word = _mix(row[:, None] + column)
    halves = torch.stack([word & 0xFFFF, _shr(word, 16)], dim=-1).view(rows, 2 * pairs)[:, : shape[-1]]
    steps = fused.threshold(p)
    return (halves >= steps).to(torch.float32).mul_(65536 / (65536 - steps)).view(shape)


def _scale(y: Tensor, p: float, seed: Tensor) -> Tensor:
    """``dropout_scale`` for y. What exports or transforms a model needs PyTorch's operations."""
    transformed = torch._C._are_functorch_transforms_active() or torch.jit.is_tracing() or torch.compiler.is_exporting()
    if type(y) is not Tensor or y.device.type != "cpu" or transformed:
        return dropout_scale(y.shape, p, seed).to(y.dtype)
    return (_operator if torch.compiler.is_compiling() else _on_cpu)(seed, y.shape, p, y.dtype)


def _on_cpu(seed: Tensor, shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    shape = torch.Size(shape)
    return fused.dropout_scale(shape, p, seed, dtype) if fused.available() else dropout_scale(shape, p, seed).to(dtype)


_operator = torch.library.custom_op("mixer::dropout_scale", _on_cpu, mutates_args=())  # for torch.compile
_operator.register_fake(lambda seed, shape, p, dtype: torch.empty(shape, dtype=dtype))


def _hash(index: Tensor, key: Tensor) -> Tensor:
    word = index ^ key.to(torch.int32)
    return _mix((word ^ _shr(word, 16)) * 0x7FEB352D ^ (key >> 32).to(torch.int32))


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shr(word, 15)) * _signed(0x846CA68B, 32)
    return word ^ _shr(word, 16)


def _shr(word: Tensor, bits: int, width: int = 32) -> Tensor:
    """Shift right logically, although PyTorch's words are signed."""
    return (word >> bits) & ((1 << (width - bits)) - 1)


def _signed(factor: int, width: int = 64) -> int:
    """Reinterpret as signed; PyTorch's product then has the same low bits."""
    return factor - (1 << width) if factor >> (width - 1) else factor
