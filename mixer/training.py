"""What happens in an epoch.

The coursework states neither optimiser, loss, schedule nor initialisation. We chose Adam with PyTorch's defaults,
cross-entropy, a constant learning rate and the initialisation of the paper's code (see ``mixer.model``).

A run is decided by its config and data alone. It has a generator of its own, which starts every epoch from seed and
epoch, so an interrupted run needs no stored random state, and runs in threads of one process leave each other alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mixer.augment import cut_out, draw_views, view
from mixer.baselines import ConvNet, PlainMlp
from mixer.config import Config
from mixer.data import Data, normalise, validation_split
from mixer.distillation import Teacher, distillation
from mixer.kernels import fused
from mixer.kernels.graphs import Replayed, replayed
from mixer.model import MlpMixer, count_patches
from mixer.optim import OPTIMISERS, SCHEDULES

WHITEN_BY = 5000  # images
EVAL_BATCH = 1000  # images at a time, which keeps the plain formula's hidden layer near 100 MB


def part_of(data: Data, config: Config) -> Data:
    """What of the data a run is trained and tested on. Raises ValueError when there are fewer images than ``limit``."""
    data = validation_split(data) if config.validation else data
    data = replace(data, pixel_mean=0.0, pixel_std=1.0) if config.inputs == "scaled" else data
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
        self.model = _network(config, data, self.generator).to(device)
        self.teacher = None
        if config.teacher:
            self.teacher = Teacher(config.teacher, data, config.flip, config.shift, device, precision)
        fused = {"fused": device.type != "mps"}
        self.optimisers = OPTIMISERS[config.optimiser](self.model, config.lr, config.weight_decay, **fused)
        self.average, self.tested = None, self.model
        if config.average:
            # With its buffers: BatchNorm's statistics have to be those of the weights that are tested.
            average = get_ema_multi_avg_fn(config.average)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.tested = self.average.module
        self.network = self._replayed() or self.model

    def _replayed(self) -> Replayed | None:
        """The model as it is trained on CUDA, where that can be had."""
        if self.device.type != "cuda" or not isinstance(self.model, MlpMixer):
            return None
        images = self.data.train_images[: self.config.batch_size]
        with autocast(self.device, self.precision):
            return replayed(self.model, normalise(images, self.data.pixel_mean, self.data.pixel_std))

    @property
    def path(self) -> str:
        """What computes the blocks in training: "replayed" (``mixer.kernels.graphs``), or as ``fused.path`` says."""
        if self.network is not self.model:
            return "replayed"
        return fused.path(self.model.blocks, self.device, self.precision)

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
            logits, loss = self._forward(batch)
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

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss of a batch of training images, by their numbers, augmented as the config says."""
        config, images, labels = self.config, self.data.train_images[batch], self.data.train_labels[batch]
        views = torch.zeros_like(batch)
        if config.flip or config.shift:
            views = draw_views(len(batch), self.generator, config.flip, config.shift)
            images = view(images, views, config.shift)
        if config.erase:
            images = cut_out(images, self.generator, config.erase)
        inputs, share = normalise(images, self.data.pixel_mean, self.data.pixel_std), 1.0
        if config.mixup and self._uniform() < config.mixup:  # with the batch in reverse, whose order is random
            share -= self._uniform() / 2
            inputs = inputs.flip(0).lerp(inputs, share)
        with autocast(self.device, self.precision):
            logits = self.network(inputs)
        if self.teacher is not None:
            with autocast(self.device, self.precision):
                of_teacher = self.teacher.kept(batch, views) if share == 1 else self.teacher.model(inputs)
            return logits, distillation(logits, of_teacher, config.temperature)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if share < 1:
            other = F.cross_entropy(logits, labels.flip(0), label_smoothing=config.label_smoothing)
            loss = share * loss + (1 - share) * other
        return logits, loss

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))


Network = MlpMixer | PlainMlp | ConvNet


def _network(config: Config, data: Data, generator: torch.Generator) -> Network:
    if config.network == "conv":
        return ConvNet(data.num_classes, config.dropout_p, generator)
    if config.network == "mlp":
        return PlainMlp(data.train_images[0].numel(), data.num_classes, config.dropout_p, generator)
    model = MlpMixer(
        num_classes=data.num_classes,
        num_blocks=config.num_blocks,
        patch_size=config.patch_size,
        num_patches=count_patches(tuple(data.train_images.shape[1:]), config.patch_size),
        num_channels=config.num_channels,
        patches_mlp_dim=config.patches_mlp_dim,
        channels_mlp_dim=config.channels_mlp_dim,
        dropout_p=config.dropout_p,
        skip_connections=config.skip_connections,
        gelu=config.gelu,
        initialisation=config.initialisation,
        generator=generator,
    )
    if config.whiten:
        first = data.train_images[:WHITEN_BY].to("cpu")
        model.stem.whiten(normalise(first, data.pixel_mean, data.pixel_std))
    return model


class Diverged(ArithmeticError):
    """A loss is not finite, first in this step of this epoch; both count from 1."""

    def __init__(self, epoch: int, step: int):
        super().__init__(f"the loss is not finite in step {step} of epoch {epoch}")
        self.epoch, self.step = epoch, step


def predict(
    model: Network,
    images: Tensor,
    precision: str = "float32",
    mean: float | None = None,
    std: float | None = None,
) -> Iterator[Tensor]:
    """The model's logits, float32 (up to EVAL_BATCH, num_classes) at a time, for uint8 images (N, H, W).

    ``mean`` and ``std`` of the pixels: Fashion-MNIST's when not given.
    """
    statistics = {} if mean is None else {"mean": mean, "std": std}
    model.eval()
    for batch in images.split(EVAL_BATCH):
        with torch.inference_mode(), autocast(images.device, precision):
            logits = model(normalise(batch, **statistics))
        yield logits  # out here, since what a generator is in the midst of holds for its caller too


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


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
