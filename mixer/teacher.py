"""A convolutional network that has seen the same training images, and its logits for every view of them.

A mixer can learn from it as in Beyer et al. 2021 (arXiv:2106.05237, "a good teacher is patient and consistent"): both
see the same view of an image, and what the teacher makes of it is the student's only target. Flips and shifts give an
image few views (50 with shifts of up to two pixels), so the teacher looks at each once and its logits are kept.

The teacher is trained as any run, ``Config(network="conv")``.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from tqdm import tqdm

from mixer.data import Data, normalise, view
from mixer.fetch import data_folder
from mixer.model import initialise, uninitialised
from mixer.records import seal, unseal, write_whole

WEIGHTS = Path(__file__).parent.parent / "results" / "teachers"
WIDTHS = (32, 64, 64, 128)  # channels of the residual blocks; where they change, the image is halved


def _convolution(channels_in: int, channels_out: int, size: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    layer = uninitialised(nn.Conv2d, channels_in, channels_out, size, stride, padding=size // 2)
    initialise(layer, "flax", generator)
    return layer


class ResidualBlock(nn.Module):
    """Pre-activation (He et al. 2016, arXiv:1603.05027): (B, C, H, W) -> (B, D, H / stride, W / stride)."""

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
    """0.38 million parameters: (B, 1, H, W) -> logits (B, num_classes), float32 under autocast too."""

    def __init__(self, num_classes: int = 10, generator: torch.Generator | None = None):
        super().__init__()
        self.num_classes = num_classes
        self.stem = _convolution(1, WIDTHS[0], 3, 1, generator)
        before = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.ModuleList(
            ResidualBlock(old, new, 1 if new == old else 2, generator) for old, new in zip(before, WIDTHS, strict=False)
        )
        self.norm = nn.BatchNorm2d(WIDTHS[-1])
        self.head = uninitialised(nn.Linear, WIDTHS[-1], num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).mean(dim=(2, 3))
        with torch.autocast(images.device.type, enabled=False):
            return self.head(x.to(images.dtype))


class Teacher:
    """The logits (views, N, num_classes) of a trained ConvNet for the training images, float16.

    name: of its weights, ``results/teachers/<name>.safetensors``. flip, shift: which views there are, in the order of
    ``data.view``. Computed once, which takes minutes, and kept in the data folder. Raises ValueError.
    """

    def __init__(self, name: str, data: Data, flip: bool, shift: int, device: torch.device, precision: str):
        path = WEIGHTS / f"{name}.safetensors"
        try:
            weights = path.read_bytes()
        except OSError as error:
            raise ValueError(f"there is no teacher {path} ({error.strerror}): train it first") from None
        views = (2 if flip else 1) * (2 * shift + 1) ** 2
        decisive = [weights, repr((views, shift, precision, data.sha256, data.pixel_mean, data.pixel_std)).encode()]
        kept = data_folder() / "teachers" / f"{name}-{hashlib.sha256(b''.join(decisive)).hexdigest()[:16]}.bin"
        shape = views, len(data.train_images), data.num_classes
        try:
            content = unseal(kept.read_bytes())
        except (OSError, ValueError):
            content = (
                _logits(_conv_net(path, weights, data.num_classes), data, views, shift, precision).numpy().tobytes()
            )
            write_whole(kept, seal(content))
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.logits = torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape).to(device)

    def loss(self, logits: Tensor, images: Tensor, views: Tensor, temperature: float) -> Tensor:
        """KL divergence from the teacher to the student, times the temperature's square (Hinton et al. 2015).

        ``images`` (B,): their numbers among the training images; ``views`` (B,): which one was seen.
        """
        target = self.logits[views.to(images.device), images].float() / temperature
        student = F.log_softmax(logits / temperature, dim=1)
        divergence = F.kl_div(student, F.log_softmax(target, dim=1), reduction="batchmean", log_target=True)
        return temperature**2 * divergence


def _conv_net(path: Path, weights: bytes, num_classes: int) -> ConvNet:
    model = ConvNet(num_classes)
    try:
        model.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError):
        raise ValueError(f"{path} does not hold a teacher of {num_classes} classes: train it again") from None
    return model.eval()


def _logits(model: ConvNet, data: Data, views: int, shift: int, precision: str) -> Tensor:
    device, batches = data.train_images.device, data.train_images.split(1000)
    model = model.to(device)
    logits = torch.empty(views, len(data.train_images), data.num_classes, dtype=torch.float16)
    for number in tqdm(range(views), desc="the teacher looks at every view", leave=False, disable=None):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            seen = (view(images, torch.full((len(images),), number), shift) for images in batches)
            answers = [model(normalise(images, data.pixel_mean, data.pixel_std)) for images in seen]
        logits[number] = torch.cat(answers).half()
    return logits
