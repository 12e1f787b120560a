"""Baselines for the mixer: a plain MLP and a convolutional network with about as many parameters.

Both are trained like any run, with ``Config(network="mlp")`` or ``Config(network="conv")``; the latter can teach.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.config import Config
from mixer.data import Data, normalise
from mixer.kernels.dropout import Dropout
from mixer.model import MlpMixer, count_patches, initialise, uninitialised

WHITEN_BY = 5000  # images
HIDDEN = 654  # 948,310 parameters for Fashion-MNIST
WIDTHS = (64, 64, 128, 128, 128)  # channels of the residual blocks, after a stem with half as many: 955,210 parameters


def _drawn(layer: nn.Module, generator: torch.Generator | None) -> nn.Module:
    initialise(layer, "flax", generator)
    return layer


def _head(fan_in: int, num_classes: int) -> nn.Linear:
    """A zero head, as in the mixer."""
    head = uninitialised(nn.Linear, fan_in, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _logits(head: nn.Linear, x: Tensor) -> Tensor:
    """Logits in float32 even under autocast, as in the mixer."""
    with torch.autocast(x.device.type, enabled=False):
        return head(x.to(head.weight.dtype))


class PlainMlp(nn.Module):
    """Two hidden layers on all pixels of all channels: (B, in_channels, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, pixels: int, num_classes: int = 10, dropout_p: float = 0.0, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.num_classes = num_classes
        self.blocks = nn.ModuleList(
            _drawn(uninitialised(nn.Linear, size, HIDDEN), generator) for size in (pixels, HIDDEN)
        )
        self.dropout = Dropout(dropout_p, generator)
        self.head = _head(HIDDEN, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.blocks:
            x = self.dropout(F.gelu(layer(x)))
        return _logits(self.head, x)


class ResidualBlock(nn.Module):
    """Pre-activation block (He et al. 2016, arXiv:1603.05027): (B, C, H, W) -> (B, D, H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, generator: torch.Generator | None):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)
        self.conv1 = _convolution(channels_in, channels_out, 3, stride, generator)
        self.conv2 = _convolution(channels_out, channels_out, 3, 1, generator)
        self.skip = None if stride == 1 else _convolution(channels_in, channels_out, 1, stride, generator)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        x = x if self.skip is None else self.skip(y)
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


class ConvNet(nn.Module):
    """A residual network whose blocks halve the image wherever they double the channels.

    ``forward``: (B, in_channels, H, W) -> logits (B, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 10,
        dropout_p: float = 0.0,
        generator: torch.Generator | None = None,
        in_channels: int = 1,
    ):
        super().__init__()
        self.num_classes = num_classes
        before = (WIDTHS[0] // 2, *WIDTHS)
        self.stem = _convolution(in_channels, before[0], 3, 1, generator)
        self.blocks = nn.ModuleList(
            ResidualBlock(old, new, 1 if new == old else 2, generator) for old, new in zip(before, WIDTHS, strict=False)
        )
        self.norm = nn.BatchNorm2d(WIDTHS[-1])
        self.dropout = Dropout(dropout_p, generator)
        self.head = _head(WIDTHS[-1], num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return _logits(self.head, self.dropout(self._features(images).mean(dim=(2, 3))))

    def of_patches(self, images: Tensor) -> Tensor:
        """Logits for every patch of 4 × 4 pixels (B, S, num_classes), whose mean are those of the image."""
        return _logits(self.head, self._features(images).flatten(2).transpose(1, 2))

    def _features(self, images: Tensor) -> Tensor:
        """Images -> the last layer (B, C, H / 4, W / 4)."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.relu(self.norm(x))


def _convolution(channels_in: int, channels_out: int, size: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    return _drawn(uninitialised(nn.Conv2d, channels_in, channels_out, size, stride, padding=size // 2), generator)


def build_network(config: Config, data: Data, generator: torch.Generator | None = None) -> nn.Module:
    """Build the config's network for the images and classes of ``data``, with its initial weights."""
    if config.network == "conv":
        return ConvNet(data.num_classes, config.dropout_p, generator, data.in_channels)
    if config.network == "mlp":
        return PlainMlp(data.train_images[0].numel(), data.num_classes, config.dropout_p, generator)
    model = MlpMixer(
        num_classes=data.num_classes,
        num_blocks=config.num_blocks,
        patch_size=config.patch_size,
        num_patches=count_patches(tuple(data.train_images.shape[-2:]), config.patch_size),
        num_channels=config.num_channels,
        patches_mlp_dim=config.patches_mlp_dim,
        channels_mlp_dim=config.channels_mlp_dim,
        dropout_p=config.dropout_p,
        skip_connections=config.skip_connections,
        gelu=config.gelu,
        initialisation=config.initialisation,
        generator=generator,
        in_channels=data.in_channels,
    )
    if config.whiten:
        first = data.train_images[:WHITEN_BY].to("cpu")
        model.stem.whiten(normalise(first, data.pixel_mean, data.pixel_std))
    return model
