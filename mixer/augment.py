"""Augmented views of a batch of uint8 images: flips, shifts and cutout."""

import torch
import torch.nn.functional as F
from torch import Tensor


def draw_views(count: int, generator: torch.Generator, flip: bool, shift: int) -> Tensor:
    """Draw the number of a view for each of ``count`` images: mirrored or not, moved down and right by 0 to 2·shift."""
    side = 2 * shift + 1
    down, right = torch.randint(side, (2, count), generator=generator) if shift else torch.zeros(2, count).long()
    mirrored = (torch.rand(count, generator=generator) < 0.5).long() if flip else torch.zeros(count).long()
    return (mirrored * side + down) * side + right


def view(images: Tensor, views: Tensor, shift: int) -> Tensor:
    """Views of images (B, H, W): mirrored left to right, then moved by up to ``shift`` pixels.

    Pixels that move in are 0, like Fashion-MNIST's background.
    """
    count, height, width = images.shape
    side = 2 * shift + 1
    mirrored, down, right = (part[:, None] for part in (views // side**2, views // side % side, views % side))
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    return F.pad(images, (shift,) * 4)[tuple(part.to(images.device) for part in index)]


def cut_out(images: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Cut a square around a random pixel out of each image (B, H, W): cutout (DeVries and Taylor 2017)."""
    count, height, width = images.shape
    top, left = (torch.randint(size, (count, 1), generator=generator) - side // 2 for size in (height, width))
    down, right = torch.arange(height) - top, torch.arange(width) - left
    cut = ((down >= 0) & (down < side))[:, :, None] & ((right >= 0) & (right < side))[:, None, :]
    return images.masked_fill(cut.to(images.device), 0)
