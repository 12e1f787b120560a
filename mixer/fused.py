"""The MLP of a mixer block, with its LayerNorm, dropout and skip connection: the plain formula."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Along = Literal["patches", "channels"]


def mixing(
    x: Tensor, norm: nn.LayerNorm, w_in: nn.Linear, w_out: nn.Linear, along: Along, p: float, seed: Tensor
) -> Tensor:
    """X + drop(W_out · drop(gelu(W_in · LayerNorm(X)))), half of equation (1) of the paper.

    x: (B, S, C). The MLP works along the patches S or along the channels C. ``p`` is the probability of dropping
    an element, 0 outside training; ``seed``, an int64 scalar tensor, decides which.
    """
    return plain(
        x,
        norm.weight,
        norm.bias,
        w_in.weight,
        w_in.bias,
        w_out.weight,
        w_out.bias,
        along == "patches",
        p,
        seed,
    )


def plain(x, gamma, beta, w1, b1, w2, b2, over_patches: bool, p: float, seed: Tensor) -> Tensor:
    """The formula in plain PyTorch, on any device and in any precision."""
    y = F.layer_norm(x, gamma.shape, gamma, beta, eps=1e-6)
    if over_patches:
        y = y.transpose(1, 2)
    hidden = F.gelu(F.linear(y, w1, b1))
    if p > 0:
        hidden = hidden * dropout_scale(hidden.shape, p, seed, stream=0).to(hidden.dtype)
    y = F.linear(hidden, w2, b2)
    if over_patches:
        y = y.transpose(1, 2)
    if p > 0:
        y = y * dropout_scale(y.shape, p, seed, stream=1).to(y.dtype)
    return x + y


def dropout_scale(shape: torch.Size, p: float, seed: Tensor, stream: int) -> Tensor:
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p), float32 of the given shape.

    A counter-based generator: the element's index and the seed, hashed to 16 bits, so the same mask comes out on
    every device, in every process, on any number of threads, and nothing has to be stored for the backward pass.
    """
    pairs = (shape[-1] + 1) // 2
    rows = math.prod(shape[:-1])
    word = torch.arange(rows * pairs, dtype=torch.int32, device=seed.device)
    key = seed + stream
    word = word ^ key.to(torch.int32)
    word = _mul(word ^ _shr(word, 16), 0x7FEB352D) ^ (key >> 32).to(torch.int32)
    word = _mul(word ^ _shr(word, 15), 0x846CA68B)
    word = word ^ _shr(word, 16)
    halves = torch.stack([word & 0xFFFF, _shr(word, 16)], dim=-1).view(rows, 2 * pairs)[:, : shape[-1]]
    threshold = round(p * 65536)
    return (halves >= threshold).to(torch.float32).mul_(65536 / (65536 - threshold)).view(shape)


def _shr(word: Tensor, bits: int) -> Tensor:
    """A logical shift right of 32-bit words that PyTorch keeps as signed."""
    return (word >> bits) & ((1 << (32 - bits)) - 1)


def _mul(word: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product."""
    return word * (factor - (1 << 32) if factor >= 1 << 31 else factor)
