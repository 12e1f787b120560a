"""Augmentation of a batch: flips, shifts, affine maps, cutout and mixup."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixer.config import Config
from mixer.data import Data, normalise


@dataclass(frozen=True)
class Batch:
    """A batch of B augmented training images.

    ``index``: their indices (B,). ``views``: the number of each image's view (B,), as in :func:`draw_views`;
    0 where there are too many to number.
    ``inputs``: normalised (B, in_channels, H, W). With mixup, each is ``share`` of its image plus 1 - ``share`` of the
    image at the same position in the reversed batch.
    """

    index: Tensor
    views: Tensor
    inputs: Tensor
    labels: Tensor
    share: float = 1.0


def augmented(index: Tensor, data: Data, config: Config, generator: torch.Generator) -> Batch:
    """Augment the training images with these indices (B,), as the config says."""
    images, views = augmented_images(data.train_images[index], config, generator)
    inputs, share = normalise(images, data.pixel_mean, data.pixel_std), 1.0
    if config.mixup_prob and _uniform(generator) < config.mixup_prob:
        share -= _uniform(generator) / 2
        inputs = inputs.flip(0).lerp(inputs, share)  # a batch is in random order, so the pairs are random too
    return Batch(index, views, inputs, data.train_labels[index], share)


def augmented_images(images: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augment images (B, H, W) or (B, 3, H, W), before mixup; returns them and their ``views`` (B,)."""
    views = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    if config.affine:
        images = warp(images, generator, config.flip, config.shift, config.affine)
    elif config.flip or config.shift:
        views = draw_views(len(images), generator, config.flip, config.shift)
        images = view(images, views, config.shift)
    if config.erase:
        images = cut_out(images, generator, config.erase)
    return images, views


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def draw_views(count: int, generator: torch.Generator, flip: bool, shift: int) -> Tensor:
    """Draw a view's number for each of ``count`` images: mirrored or not, moved down and right by 0 to 2·shift."""
    side = 2 * shift + 1
    down, right = torch.randint(side, (2, count), generator=generator) if shift else torch.zeros(2, count).long()
    mirrored = (torch.rand(count, generator=generator) < 0.5).long() if flip else torch.zeros(count).long()
    return (mirrored * side + down) * side + right


def view(images: Tensor, views: Tensor, shift: int) -> Tensor:
    """Render views of images (B, H, W) or (B, 3, H, W): mirrored left to right, then moved by up to ``shift`` pixels.

    Pixels that move in are 0, like Fashion-MNIST's background.
    """
    count, (height, width) = len(images), images.shape[-2:]
    side = 2 * shift + 1
    mirrored, down, right = (part[:, None] for part in (views // side**2, views // side % side, views % side))
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    padded = F.pad(images, (shift,) * 4).movedim(0, -3)  # channels first
    return padded[..., *(part.to(images.device) for part in index)].movedim(-3, 0)


def warp(images: Tensor, generator: torch.Generator, flip: bool, shift: int, strength: float) -> Tensor:
    """Apply a random affine map to each image, (B, H, W) or (B, 3, H, W), with bilinear interpolation.

    The map is the identity plus a number between ±``strength`` in each entry of its matrix, which rotates, scales and
    shears; it is mirrored with probability 0.5 if ``flip``, and shifts by any fraction of up to ``shift`` pixels.
    Returns float32 on the same scale. Pixels that move in are 0.
    """
    count, (height, width) = len(images), images.shape[-2:]

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(count, *shape, generator=generator) - 1

    matrices = torch.eye(2) + strength * uniform(2, 2)
    if flip:
        matrices[:, 0] *= uniform(1).sign()
    moves = uniform(2, 1) * torch.tensor([[2 * shift / width], [2 * shift / height]])  # an image is 2 wide and high
    maps = torch.cat([matrices, moves], dim=2).to(images.device)
    pixels = images.reshape(count, -1, height, width).float()
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False).view(images.shape)


def cut_out(images: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Cut a square around a random pixel out of each image, (B, H, W) or (B, 3, H, W) (DeVries and Taylor 2017)."""
    count, (height, width) = len(images), images.shape[-2:]
    top, left = (torch.randint(size, (count, 1), generator=generator) - side // 2 for size in (height, width))
    down, right = torch.arange(height) - top, torch.arange(width) - left
    cut = ((down >= 0) & (down < side))[:, :, None] & ((right >= 0) & (right < side))[:, None, :]
    return images.movedim(0, -3).masked_fill(cut.to(images.device), 0).movedim(-3, 0)  # in all channels
