"""One run's config, and what happens in an epoch.

The coursework states neither optimiser, loss, schedule nor initialisation. We chose Adam with PyTorch's defaults,
cross-entropy, a constant learning rate and the initialisation of the paper's code (see ``mixer.model``).

A run is decided by its config and data alone. It has a generator of its own, which starts every epoch from seed and
epoch, so an interrupted run needs no stored random state, and runs in threads of one process leave each other alone.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixer import fused
from mixer.data import Data, normalise
from mixer.model import MlpMixer

EVAL_BATCH = 1000  # images at a time, which keeps the plain formula's hidden layer near 100 MB


@dataclass(frozen=True)
class Config:
    """One point of the grid. Two equal configs are the same run. Raises ValueError for impossible values.

    Every field defaults to the coursework's setting; any number that means the value will do (0, NumPy's).
    """

    lr: float = 0.01
    dropout_p: float = 0.0
    batch_size: int = 256
    num_epochs: int = 60
    seed: int = 0
    limit: int | None = None  # train on the first so many images only
    num_blocks: int = 8
    patch_size: tuple[int, int] = (4, 4)
    num_channels: int = 16
    patches_mlp_dim: int = 1024
    channels_mlp_dim: int = 512
    skip_connections: bool = True

    def __post_init__(self) -> None:
        self._keep("lr", _real, lambda lr: 0 < lr < math.inf, "a positive number like 0.01")
        self._keep("dropout_p", _real, lambda p: 0 <= p < 1, "a number from 0.0 to below 1")
        for name in ("batch_size", "num_epochs", "num_blocks", "num_channels", "patches_mlp_dim", "channels_mlp_dim"):
            self._keep(name, _whole, lambda n: n > 0, "a whole number above 0")
        self._keep("seed", _whole, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.limit is not None:
            self._keep("limit", _whole, lambda n: n > 0, "None or a whole number above 0")
        self._keep("patch_size", _pair, lambda pair: min(pair) > 0, "one or two whole numbers above 0")
        self._keep("skip_connections", _flag, lambda _: True, "True or False")

    def _keep(self, name: str, kind: Callable[[Any], Any], fits: Callable[[Any], bool], wanted: str) -> None:
        given = getattr(self, name)
        try:
            value = kind(given)
        except (TypeError, ValueError, OverflowError):
            value = None
        if value is None or not fits(value):
            raise ValueError(f"{name} is {given!r}, but it has to be {wanted}")
        object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """A readable name, one per config: what differs from the coursework's setting is added to its end."""
        parts = [f"lr{_digits(self.lr)}", f"dropout{_digits(self.dropout_p)}"]
        parts += [f"batch{self.batch_size}", f"seed{self.seed}"]
        labels = {
            "num_epochs": f"epochs{self.num_epochs}",
            "limit": f"limit{self.limit}",
            "num_blocks": f"blocks{self.num_blocks}",
            "patch_size": "patch{}x{}".format(*self.patch_size),
            "num_channels": f"channels{self.num_channels}",
            "patches_mlp_dim": f"tokenmlp{self.patches_mlp_dim}",
            "channels_mlp_dim": f"channelmlp{self.channels_mlp_dim}",
            "skip_connections": "noskip",
        }
        return "_".join(parts + [label for field, label in labels.items() if getattr(self, field) != _DEFAULTS[field]])


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def _real(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError
    return float(value) + 0.0  # which makes one zero of the two


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, Integral):
        return operator.index(value)
    if int(_real(value)) != value:
        raise ValueError
    return int(value)


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, Real) else value
    return _whole(height), _whole(width)


def _flag(value: Any) -> bool:
    if value not in (True, False):
        raise TypeError
    return bool(value)


def _digits(value: float) -> str:
    """The fewest digits that stand for this number and no other."""
    return repr(value).removesuffix(".0")


class Training:
    """A run between two epochs: its model, optimiser and number of finished epochs.

    device, precision: as ``find_device`` and ``find_precision`` give them. data: on the device.
    Raises ValueError when the patches do not tile the images.
    """

    def __init__(self, config: Config, device: torch.device, precision: str, data: Data):
        self.config, self.device, self.precision, self.data = config, device, precision, data
        self.epoch = 0
        self.generator = torch.Generator()
        self._start_generator()
        (height, width), (ph, pw) = data.train_images.shape[1:], config.patch_size
        self.model = MlpMixer(
            num_classes=data.num_classes,
            num_blocks=config.num_blocks,
            patch_size=config.patch_size,
            num_patches=(height // ph) * (width // pw),
            num_channels=config.num_channels,
            patches_mlp_dim=config.patches_mlp_dim,
            channels_mlp_dim=config.channels_mlp_dim,
            dropout_p=config.dropout_p,
            skip_connections=config.skip_connections,
            generator=self.generator,
        ).to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=device.type != "mps")

    def _start_generator(self) -> None:
        """What an epoch draws (its order, its dropout) follows from seed and epoch; before the first: the weights."""
        self.generator.manual_seed(self.config.seed * 1_000_003 + self.epoch)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train_labels) / self.config.batch_size)

    def train_epoch(self, on_step: Callable[[Tensor], None] = lambda loss: None) -> dict[str, float]:
        """Train once on every image, then test. ``on_step`` is given each step's loss, on the device.

        Gives epoch, train_loss, train_accuracy (running: of the batches as they are trained on), test_loss and
        test_accuracy; accuracies are fractions. Raises Diverged when a loss is not finite.
        """
        self.epoch += 1
        self._start_generator()
        labels = self.data.train_labels
        order = torch.randperm(len(labels), generator=self.generator).to(self.device)
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for step, batch in enumerate(order.split(self.config.batch_size)):
            logits = self._logits(self.data.train_images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            losses[step] = loss.detach()
            correct += (logits.argmax(dim=1) == labels[batch]).sum()
            on_step(losses[step])
        sizes = torch.tensor([len(batch) for batch in order.split(self.config.batch_size)])
        train_loss = float((losses.cpu().double() * sizes).sum() / len(labels))
        test_loss, test_accuracy = self.evaluate()
        if not (math.isfinite(train_loss) and math.isfinite(test_loss)):
            finite = [*losses.isfinite().tolist(), False]
            raise Diverged(self.epoch, min(finite.index(False) + 1, self.steps_per_epoch))
        return {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "train_accuracy": int(correct) / len(labels),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
        }

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images."""
        data, loss, correct = self.data, torch.zeros((), dtype=torch.float64), 0
        batches = predict(self.model, data.test_images, self.precision, data.pixel_mean, data.pixel_std)
        for logits, labels in zip(batches, data.test_labels.split(EVAL_BATCH), strict=True):
            loss += F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            correct += int((logits.argmax(dim=1) == labels).sum())
        count = len(data.test_labels)
        return float(loss) / count, correct / count

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(normalise(images, self.data.pixel_mean, self.data.pixel_std))


class Diverged(ArithmeticError):
    """A loss is not finite, first in this step of this epoch; both count from 1."""

    def __init__(self, epoch: int, step: int):
        super().__init__(f"the loss is not finite in step {step} of epoch {epoch}")
        self.epoch, self.step = epoch, step


def predict(
    model: MlpMixer, images: Tensor, precision: str = "float32", mean: float | None = None, std: float | None = None
) -> Iterator[Tensor]:
    """The model's logits, float32 (up to EVAL_BATCH, num_classes) at a time, for uint8 images (N, H, W).

    ``mean`` and ``std`` of the pixels: Fashion-MNIST's when not given.
    """
    statistics = {} if mean is None else {"mean": mean, "std": std}
    model.eval()
    for batch in images.split(EVAL_BATCH):
        with torch.inference_mode(), autocast(images.device, precision):
            yield model(normalise(batch, **statistics))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of this name; without one CUDA, else Apple's MPS, else the CPU. ValueError when it cannot be had."""
    if name is None:
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda", "mps"):
            torch.zeros(1, device=device)
            return device
    except (RuntimeError, AssertionError, TypeError):  # PyTorch's ways of saying that there is none
        pass
    raise ValueError(f"there is no device {str(name)!r} here: give cpu, cuda or mps, or none to take what there is")


def find_precision(device: torch.device, wanted: str | None = None) -> str:
    """ "bfloat16" where the hardware computes in it, not merely emulates it, else "float32".

    ValueError when another one is ``wanted``, or bfloat16 on a CPU that has none.
    """
    if wanted not in (None, "bfloat16", "float32"):
        raise ValueError(f"precision is bfloat16 or float32, not {wanted!r}")
    if wanted == "bfloat16" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError("this processor does not compute in bfloat16: train in float32")
    if wanted is not None:
        return wanted
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_it = device.type == "cpu" and fused.multiplies_in_bfloat16()
    return "bfloat16" if has_it else "float32"
