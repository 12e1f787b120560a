"""Training: ``train()`` takes a config to its record; below it, what happens in an epoch.

The coursework states neither optimiser, loss, schedule nor initialisation. We chose Adam with PyTorch's defaults,
cross-entropy, a constant learning rate and the initialisation of the paper's code (see ``model.py``).

A run is decided by its config and data alone. It has a generator of its own, which starts every epoch from seed and
epoch, so an interrupted run needs no stored random state, and runs in threads of one process leave each other alone.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mixer import data as fashion_mnist
from mixer.augment import Batch, augmented
from mixer.baselines.distillation import Distillation, soft_target_loss
from mixer.baselines.networks import build_network
from mixer.checkpoint import last_weights, resume, save, save_weights
from mixer.config import Config, check_configs
from mixer.data import Data, normalise, validation_split
from mixer.fingerprint import FASHION_MNIST, Fingerprint, Kind, trial, try_out
from mixer.kernels import fused
from mixer.kernels.acceleration import Choice, choose
from mixer.model import MlpMixer
from mixer.optim import optimisers, schedule
from mixer.prediction import EVAL_BATCH, predict
from mixer.records import RECORD_FORMAT, Record, environment
from mixer.system.device import autocast, by_itself, find_device, find_precision, threads_after_fork
from mixer.system.files import check_writable, expand
from mixer.system.progress import Bar, Turn

log = getLogger("mixer")


def train(
    config: Config,
    *,
    model: nn.Module | None = None,
    optimiser: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
    data: Data | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    checkpoint: Path | str | None = None,
    weights: Path | str | None = None,
    on_epoch: Callable[[dict[str, float], nn.Module], None] | None = None,
    progress: bool = True,
    position: int | None = None,
    turn: Turn = (1, 1, 1),
    return_model: bool = False,
) -> Record | tuple[Record, nn.Module]:
    """Train one run and return its record; with ``return_model``, the record and the model as it ended.

    model: any module from normalised images (B, 1, H, W), or (B, 3, H, W) of data in colour, to logits (B,
    num_classes), trained in place; the config's own when not given. optimiser: a function of the model's parameters, in
    place of the config's optimiser, lr and weight_decay. The record names both; give its file a name of your own.
    data: Fashion-MNIST when not given; of any, what ``config`` says (``limit``, ``validation``).
    device: CUDA when not given, else Apple's MPS, else the CPU.
    precision: "bfloat16" (autocast) or "float32"; when not given, bfloat16 where the hardware computes in it.
    checkpoint: a file that is written after every epoch, and from which an interrupted run resumes.
    weights: a safetensors file for the weights of the epoch with the best test accuracy; those of the last epoch are
    put beside it, as ``last_weights`` says, where no loss diverged.
    on_epoch: called after every epoch with its row of the history, and the model, in evaluation mode.
    progress, position, turn: a progress bar, its line where several runs share a terminal, and the run's place in a
    grid, as the bar shows it.

    A loss that is not finite ends the run: ``diverged`` in the record then says at which step of which epoch, and
    the history holds the epochs before. Ctrl-C raises Interrupted, which has the history. Before anything is trained,
    DataError, TypeError, ValueError or OSError say what is wrong with the arguments.
    """
    check_configs([config])
    threads_after_fork()
    if torch.get_default_dtype() != torch.float32:
        raise ValueError("PyTorch's default dtype was changed: torch.set_default_dtype(torch.float32) before training")
    device = find_device(device)
    precision = find_precision(device, precision)
    checkpoint, weights = (path if path is None else expand(path) for path in (checkpoint, weights))
    for file in filter(None, (checkpoint, weights, weights and last_weights(weights))):
        check_writable(file)
    with by_itself(device):
        data = part_of(fashion_mnist.load(device) if data is None else data.to(device), config)
        run = Run(config, device, precision, data, model, optimiser)
        run.fingerprint = fingerprint_of(config, Kind.of(data), model, optimiser)
        if checkpoint is not None:
            resume(run, checkpoint)
        try:
            images = len(data.train_labels), len(data.test_labels)
            with Bar(config.name, config.num_epochs, images, run.epoch, progress, position, turn) as bar:
                bar.announce(run.how)
                while not run.finished:
                    run.train_epoch(bar.trained, bar.update)
                    if checkpoint is not None:
                        save(run, checkpoint)
                    if run.diverged is None:
                        bar.epoch_done(run.history[-1])
                        if on_epoch is not None:
                            on_epoch(dict(run.history[-1]), run.tested.eval())
        except KeyboardInterrupt:
            count = f"{len(run.history)} of {config.num_epochs}"
            where = "`import sys; sys.last_value.history` has them"
            raise Interrupted(f"Interrupted after {count} epochs; {where}.", run.history) from None
    if weights is not None:
        try:
            save_weights(run, weights)
        except OSError as error:
            if checkpoint is not None:  # the same call resumes from it and comes here at once
                raise
            log.warning("%s The record is returned all the same.", error)
    return (run.record(), run.tested.eval()) if return_model else run.record()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button. ``history``: the finished epochs of the run that was trained here."""

    def __init__(self, message: str, history: list[dict[str, float]] | None = None):
        super().__init__(message)
        self.history = history or []  # pickling hands over the message first, and the history after it

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: no traceback, since nothing went wrong."""
        return [str(self)]


class Run:
    """A run between two epochs: model, optimisers, history, and everything else that a checkpoint keeps.

    device, precision: as ``find_device`` and ``find_precision`` give them. data: what ``part_of`` gives, on the device.
    model, optimiser: of one's own, as for :func:`train`. loss: in place of the config's. eager: without the fast path.
    ``tested`` is the model that is tested and kept: the moving average, if there is one.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        precision: str,
        data: Data,
        model: nn.Module | None = None,
        optimiser: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
        loss: Callable[[Tensor, Batch], Tensor] | None = None,
        eager: bool = False,
    ):
        self.config, self.device, self.precision, self.data = config, device, precision, data
        self.history: list[dict[str, float]] = []
        self.diverged: dict[str, int] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.earlier: list[dict[str, Any]] = []  # other environments of the run, and after how many epochs they ended
        self.fingerprint: Fingerprint = {}
        self.generator = torch.Generator()
        self._seed(0)
        self.brought = {}
        if model is not None:
            count = sum(parameter.numel() for parameter in model.parameters())
            self.brought["model"] = f"{type(model).__module__}.{type(model).__qualname__}, {count:,} parameters"
        self.model = (build_network(config, data, self.generator) if model is None else model).to(device)
        if optimiser is None:
            self.optimisers = optimisers(config.optimiser, self.model, config.lr, config.weight_decay)
        elif not callable(optimiser):
            raise ValueError("optimiser has to be a function, like lambda parameters: SGD(parameters, lr=0.1)")
        else:
            self.optimisers = [optimiser(self.model.parameters())]
            settings = {name: value for name, value in self.optimisers[0].defaults.items() if value is not None}
            self.brought["optimiser"] = f"{type(self.optimisers[0]).__name__} {settings}"
        if loss is None:
            loss = Distillation(config, data, device, precision) if config.teacher else LabelLoss(config)
        for each in self.optimisers if device.type == "cpu" else ():
            each._accelerator_graph_capture_health_check = lambda: None  # it would ask a GPU that may be out of order
        self.loss = loss
        self.average, self.tested = None, self.model
        if config.ema_decay:
            # With its buffers: BatchNorm's statistics have to be those of the weights that are tested.
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.tested = self.average.module
        self.choice = Choice(self.model, "eager") if eager else None
        self.eager = eager
        self._choose()
        self.environment = {} if eager else self._environment()

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        return self.diverged is not None or self.epoch == self.config.num_epochs

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train_labels) / self.config.batch_size)

    def train_epoch(
        self,
        on_step: Callable[[Tensor, int], object] = lambda loss, images: None,
        on_test: Callable[[int], object] = lambda images: None,
    ) -> None:
        """Train once on every image, test, and add a row to the history; or set ``diverged``.

        A row has epoch, train_loss, train_accuracy (running: of the batches as they are trained on), test_loss and
        test_accuracy; accuracies are fractions. ``on_step`` is given each step's loss, on the device, and number
        of images; ``on_test`` the number of test images, a batch at a time.
        """
        start = time.perf_counter()
        if self._choose():
            self.earlier.append({"epochs": self.epoch} | self.environment)
            self.environment = self._environment()
        with contextlib.ExitStack() as contexts:
            if self.choice.path == "fused":  # the eager model takes all of PyTorch's threads
                contexts.enter_context(fused.threads_for_the_operator())
            if "model" in self.brought:  # whose dropout may draw from PyTorch's own generators
                contexts.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
                torch.manual_seed(self._seed(self.epoch + 1))
            losses, sizes, correct = self._train_on_every_image(on_step)
            train_loss = float((losses.double() * sizes).sum() / sizes.sum())
            test_loss, test_accuracy = self.evaluate(on_test)
        if not (math.isfinite(train_loss) and math.isfinite(test_loss)):
            finite = [*losses.isfinite().tolist(), False]
            step = min(finite.index(False) + 1, self.steps_per_epoch)
            self.diverged = {"epoch": self.epoch + 1, "step": step}
            return
        if test_accuracy > max((epoch["test_accuracy"] for epoch in self.history), default=-1.0):
            self.best_weights = {k: w.to("cpu", copy=True) for k, w in self.tested.state_dict().items()}
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "train_loss": train_loss,
                "train_accuracy": correct / len(self.data.train_labels),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": round(time.perf_counter() - start, 3),
            }
        )

    def _train_on_every_image(self, on_step: Callable[[Tensor, int], object]) -> tuple[Tensor, Tensor, int]:
        """The steps' losses and numbers of images, and how many images were classified correctly."""
        self._seed(self.epoch + 1)
        order = torch.randperm(len(self.data.train_labels), generator=self.generator).to(self.device)
        batches = order.split(self.config.batch_size)
        losses = torch.zeros(len(batches), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for step, index in enumerate(batches):
            batch = augmented(index, self.data, self.config, self.generator)
            with autocast(self.device, self.precision):
                logits = self.choice.forward(batch.inputs)
            loss = self.loss(logits, batch)
            self.model.zero_grad()
            loss.backward()
            self._set_learning_rate(step)
            for optimiser in self.optimisers:
                optimiser.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            losses[step] = loss.detach()
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            on_step(losses[step], len(index))
        return losses.cpu(), torch.tensor([len(index) for index in batches]), int(correct)

    def evaluate(self, on_test: Callable[[int], object] = lambda images: None) -> tuple[float, float]:
        """Mean loss and accuracy on the test images."""
        data, loss, correct = self.data, torch.zeros((), dtype=torch.float64), 0
        batches = predict(self.tested, data.test_images, self.precision, data.pixel_mean, data.pixel_std)
        for logits, labels in zip(batches, data.test_labels.split(EVAL_BATCH), strict=True):
            loss += F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            correct += int((logits.argmax(dim=1) == labels).sum())
            on_test(len(labels))
        count = len(data.test_labels)
        return float(loss) / count, correct / count

    def _set_learning_rate(self, step: int) -> None:
        done = (self.epoch + (step + 1) / self.steps_per_epoch) / self.config.num_epochs
        factor = schedule(self.config.schedule, done, 1 / self.config.num_epochs)
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def _seed(self, epoch: int) -> int:
        """What an epoch draws (its order, its dropout) follows from seed and epoch; before the first: the weights."""
        seed = self.config.seed * 1_000_003 + epoch
        self.generator.manual_seed(seed)
        return seed

    def _choose(self) -> bool:
        """Ask again for the fast path, which a hook or another change of the model may have closed; True if it has."""
        if self.eager:
            return False
        images = self.data.train_images[: self.config.batch_size]
        before = self.choice
        with autocast(self.device, self.precision):
            self.choice = choose(self.model, normalise(images, self.data.pixel_mean, self.data.pixel_std), before)
        moved = before is None or before.path != self.choice.path
        if moved and self.choice.path == "eager" and isinstance(self.model, MlpMixer):
            log.warning("The model trains in eager PyTorch, several times slower, since %s.", self.choice.reason)
        return moved

    @property
    def how(self) -> str:
        """How the run computes, in a few words."""
        words = {"fused": "the fused operator", "graphs": "CUDA graphs", "eager": "eager PyTorch"}[self.choice.path]
        threads = f" on {self.environment['threads']} threads" if self.device.type == "cpu" else ""
        return f"Trains by {words} in {self.precision}{threads} ({self.environment['device']})."

    def record(self) -> Record:
        """The record of the run, of as many epochs as there are."""
        return {
            "format": RECORD_FORMAT,
            "config": dataclasses.asdict(self.config),
            **self.brought,
            "fingerprint": self.fingerprint,
            "history": self.history,
            "diverged": self.diverged,
            "environment": self.environment | ({"earlier": self.earlier} if self.earlier else {}),
        }

    def _environment(self) -> dict[str, Any]:
        data, teacher = self.data, self.loss if self.config.teacher else None
        return {
            **environment(self.device, self.precision),
            "path": self.choice.path,
            "data": data.name,
            "data_sha256": data.sha256,
            "image": list(data.train_images.shape[1:]),
            "pixel_mean": data.pixel_mean,
            "pixel_std": data.pixel_std,
            **({"teacher_sha256": teacher.sha256, "teacher_weights_sha256": teacher.weights_sha256} if teacher else {}),
        }


def fingerprint_of(
    config: Config,
    kind: Kind = FASHION_MNIST,
    model: nn.Module | None = None,
    optimiser: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
) -> Fingerprint:
    """The fingerprint of a run by the code as it is now. Of a teacher only the loss is in it."""
    config, noise = trial(config, kind)
    noise = part_of(noise, config)
    targets = torch.linspace(-2, 2, len(noise.train_labels) * kind.classes).view(-1, kind.classes)

    def soft_targets(logits: Tensor, batch: Batch) -> Tensor:
        return soft_target_loss(logits, targets[batch.index], config.temperature)

    loss = soft_targets if config.teacher else None
    cpu, model = torch.device("cpu"), copy.deepcopy(model).cpu() if model is not None else None
    with fused.threads_for_the_operator():  # one thread, since several get in each other's way with so little to do
        return try_out(Run(config, cpu, "float32", noise, model, optimiser, loss, eager=True))


class LabelLoss:
    """Cross-entropy with the labels, smoothed and mixed as the config says."""

    def __init__(self, config: Config):
        self.label_smoothing = config.label_smoothing

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        if batch.share < 1:
            other = F.cross_entropy(logits, batch.labels.flip(0), label_smoothing=self.label_smoothing)
            loss = batch.share * loss + (1 - batch.share) * other
        return loss


def part_of(data: Data, config: Config) -> Data:
    """What of the data a run is trained and tested on. Raises ValueError when there are fewer images than ``limit``."""
    data = validation_split(data) if config.validation else data
    data = replace(data, pixel_mean=0.0, pixel_std=1.0) if config.inputs == "scaled" else data
    if config.limit is not None:
        data, few = data.first(config.limit), slice(config.limit)
        data = replace(data, test_images=data.test_images[few], test_labels=data.test_labels[few])
    return data
