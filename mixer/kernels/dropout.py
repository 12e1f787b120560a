"""Dropout whose masks are the same on every device and by every path.

A mask is a hash of each element's place and one seed, so it does not have to be stored for the backward pass, and
``fused.cpp`` draws the very same. PyTorch's own dropout gives other masks on every device, and on a CPU takes longer
than all the rest of a training step.
"""

import math

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): in training, an element is 0 with probability ``p``, else times 1 / (1 - p).

    Every call draws one seed from ``generator``, a generator of the CPU whatever the model's device; from PyTorch's
    default one when it is None. ``p`` counts in steps of 1/65536. Raises ValueError when it is no probability below 1.
    """

    drawn: list[Tensor] | tuple[()] = ()  # seeds of the next calls, on the device, where somebody has drawn them ahead

    def __init__(self, p: float, generator: torch.Generator | None = None):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout_p is a probability below 1, not {p}")
        self.p = float(p)
        self.generator = generator

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    def seeds(self, *shape: int) -> Tensor:
        """The seeds of the next calls, int64, on the CPU: ``seeds(n)`` are those of n times ``seeds()``."""
        return torch.randint(2**62, shape, generator=self.generator, device="cpu")

    def forward(self, y: Tensor) -> Tensor:
        if not self.active:
            return y
        seed = self.drawn.pop(0) if self.drawn else self.seeds().to(y.device)
        return y * dropout_scale(y.shape, self.p, seed).to(y.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout_scale(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p), float32 of the given shape.

    ``seed``: int64, without dimensions, on the device of the result. A counter-based generator: two elements share a
    32-bit word, which mixes the sum of a hash of the row and a hash of the column.
    """
    key = seed
    for _ in range(2):
        key = (key ^ _shr(key, 32, 64)) * _signed(0xD6E8FEB86659FD93)
    rows, pairs = math.prod(shape[:-1]), (shape[-1] + 1) // 2
    index = torch.arange(max(rows, pairs), dtype=torch.int32, device=seed.device)
    row, column = _hash(index[:rows], key), _hash(index[:pairs] ^ _signed(1 << 31, 32), key)
    word = _mix(row[:, None] + column)
    halves = torch.stack([word & 0xFFFF, _shr(word, 16)], dim=-1).view(rows, 2 * pairs)[:, : shape[-1]]
    steps = threshold(p)
    return (halves >= steps).to(torch.float32).mul_(65536 / (65536 - steps)).view(shape)


def threshold(p: float) -> int:
    """Of 65536 random numbers, how many drop an element."""
    return min(round(p * 65536), 65535)


def _hash(index: Tensor, key: Tensor) -> Tensor:
    word = index ^ key.to(torch.int32)
    return _mix((word ^ _shr(word, 16)) * 0x7FEB352D ^ (key >> 32).to(torch.int32))


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shr(word, 15)) * _signed(0x846CA68B, 32)
    return word ^ _shr(word, 16)


def _shr(word: Tensor, bits: int, width: int = 32) -> Tensor:
    """A logical shift right of words that PyTorch keeps as signed."""
    return (word >> bits) & ((1 << (width - bits)) - 1)


def _signed(factor: int, width: int = 64) -> int:
    """The signed number of the same bits, with which PyTorch's product has the same low bits."""
    return factor - (1 << width) if factor >> (width - 1) else factor
