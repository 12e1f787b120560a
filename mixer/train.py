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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mixer import fused
from mixer.data import Data, augment, normalise, validation_split
from mixer.model import MlpMixer

EVAL_BATCH = 1000  # images at a time, which keeps the plain formula's hidden layer near 100 MB


# Named configs: what differs from the coursework's.
RECIPES: dict[str, dict[str, Any]] = {
    "coursework": {},
    # The coursework's model trained as one would today; the dropout and batch size of its best set.
    "modern": {
        "lr": 0.02,
        "dropout_p": 0.1,
        "optimiser": "muon",
        "weight_decay": 0.01,
        "schedule": "linear",
        "flip": True,
        "shift": 2,
        "average": 0.998,
    },
}


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
    optimiser: str = "adam"  # one of OPTIMISERS
    weight_decay: float = 0.0
    schedule: str = "constant"  # or "linear": up during the first epoch, then down to 0
    flip: bool = False  # mirror half of the training images, drawn anew in every epoch
    shift: int = 0  # move each by up to so many pixels
    average: float = 0.0  # what is tested is the weights' moving average, which keeps so much of itself a step
    validation: bool = False  # a twelfth of the training images is held out, and stands for the test images

    def __post_init__(self) -> None:
        self._keep("lr", _real, lambda lr: 0 < lr < math.inf, "a positive number like 0.01")
        self._keep("dropout_p", _real, lambda p: 0 <= p < 1, "a number from 0.0 to below 1")
        for name in ("batch_size", "num_epochs", "num_blocks", "num_channels", "patches_mlp_dim", "channels_mlp_dim"):
            self._keep(name, _whole, lambda n: n > 0, "a whole number above 0")
        self._keep("seed", _whole, lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.limit is not None:
            self._keep("limit", _whole, lambda n: n > 0, "None or a whole number above 0")
        self._keep("patch_size", _pair, lambda pair: min(pair) > 0, "one or two whole numbers above 0")
        for name in ("skip_connections", "flip", "validation"):
            self._keep(name, _flag, lambda _: True, "True or False")
        self._keep("optimiser", str, lambda name: name in OPTIMISERS, f"one of {', '.join(OPTIMISERS)}")
        self._keep("weight_decay", _real, lambda decay: 0 <= decay < math.inf, "0 or a positive number")
        self._keep("schedule", str, lambda name: name in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._keep("shift", _whole, lambda pixels: pixels >= 0, "0 or a whole number of pixels")
        self._keep("average", _real, lambda share: 0 <= share < 1, "a number from 0.0 to below 1")

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
            "optimiser": self.optimiser,
            "weight_decay": f"decay{_digits(self.weight_decay)}",
            "schedule": self.schedule,
            "flip": "flip",
            "shift": f"shift{self.shift}",
            "average": f"average{_digits(self.average)}",
            "validation": "validation",
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


def _optimiser(kind: type[torch.optim.Optimizer], **settings: Any) -> Callable[..., list[torch.optim.Optimizer]]:
    return lambda model, lr, weight_decay, **fused: [
        kind(model.parameters(), lr=lr, weight_decay=weight_decay, **settings, **fused)
    ]


def _muon(model: MlpMixer, lr: float, weight_decay: float, **fused: bool) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW with 0.15 of its learning rate for the rest."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    rest = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=0.15 * lr, weight_decay=weight_decay, **fused),
    ]


OPTIMISERS = {
    "adam": _optimiser(torch.optim.Adam),
    "adamw": _optimiser(torch.optim.AdamW),
    "sgd": _optimiser(torch.optim.SGD),
    "momentum": _optimiser(torch.optim.SGD, momentum=0.9),
    "rmsprop": lambda model, lr, weight_decay, **_: [
        torch.optim.RMSprop(model.parameters(), lr=lr, weight_decay=weight_decay)
    ],
    "muon": _muon,
}
# The share of the learning rate by what is done of the training and the share of it that the first epoch is.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, first: 1.0,
    "linear": lambda done, first: done / first if done <= first else (1 - done) / (1 - first),
}


def part_of(data: Data, config: Config) -> Data:
    """What of the data a run is trained and tested on. Raises ValueError when there are fewer images than ``limit``."""
    data = validation_split(data) if config.validation else data
    return data if config.limit is None else data.first(config.limit)


class Training:
    """A run between two epochs: its model, optimisers and number of finished epochs.

    device, precision: as ``find_device`` and ``find_precision`` give them. data: what ``part_of`` gives, on the device.
    ``tested`` is the model that is tested and kept: the average, if there is one.
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
        fused = {"fused": device.type != "mps"}
        self.optimisers = OPTIMISERS[config.optimiser](self.model, config.lr, config.weight_decay, **fused)
        self.average, self.tested = None, self.model
        if config.average:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.average))
            self.tested = self.average.module

    def _start_generator(self) -> None:
        """What an epoch draws (its order, its dropout) follows from seed and epoch; before the first: the weights."""
        self.generator.manual_seed(self.config.seed * 1_000_003 + self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """What an epoch that follows depends on, but for config and data."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

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
            logits = self._logits(self._augmented(self.data.train_images[batch]))
            loss = F.cross_entropy(logits, labels[batch])
            self.model.zero_grad()
            loss.backward()
            self._set_learning_rate(step)
            for optimiser in self.optimisers:
                optimiser.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
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
        batches = predict(self.tested, data.test_images, self.precision, data.pixel_mean, data.pixel_std)
        for logits, labels in zip(batches, data.test_labels.split(EVAL_BATCH), strict=True):
            loss += F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            correct += int((logits.argmax(dim=1) == labels).sum())
        count = len(data.test_labels)
        return float(loss) / count, correct / count

    def _set_learning_rate(self, step: int) -> None:
        done = (self.epoch - 1 + (step + 1) / self.steps_per_epoch) / self.config.num_epochs
        share = SCHEDULES[self.config.schedule](done, 1 / self.config.num_epochs)
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])

    def _augmented(self, images: Tensor) -> Tensor:
        if not (self.config.flip or self.config.shift):
            return images
        return augment(images, self.generator, self.config.flip, self.config.shift)

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
