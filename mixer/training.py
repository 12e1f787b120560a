"""Training: ``train()`` turns a config into a record; ``Run`` below it trains an epoch.

The coursework states neither optimiser, loss, schedule nor initialisation. We chose Adam with PyTorch's defaults,
cross-entropy, a constant learning rate and the initialisation of the paper's code (see ``model.py``).

Config and data alone determine a run. Its own generator is seeded anew for every epoch, from the seed and the epoch's
number. So an interrupted run needs no stored random state, and runs in threads of one process do not affect each other.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mixer import data as fashion_mnist
from mixer.augment import Batch, augmented
from mixer.baselines.distillation import Distillation, student_loss
from mixer.baselines.networks import build_network
from mixer.checkpoint import last_weights, resume, save, save_weights, tensors_of
from mixer.config import Config, check_configs
from mixer.data import Data, normalise, validation_split
from mixer.fingerprint import Fingerprint, Kind, trial, try_out
from mixer.kernels import fused
from mixer.kernels.acceleration import Choice, choose
from mixer.model import MlpMixer
from mixer.optim import optimisers, schedule, uphill
from mixer.prediction import EVAL_BATCH, predict
from mixer.records import RECORD_FORMAT, Record, environment, warn_of_edits
from mixer.system.buffers import keep_large_buffers
from mixer.system.device import autocast, by_itself, find_device, find_precision, seeded, threads_after_fork
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
    """Train one run and return its record; with ``return_model``, the record and the final model.

    model: a custom module, trained in place; by default the config's model. It maps normalised images (B, 1, H, W), or
    (B, 3, H, W) in colour, to logits (B, num_classes). The config's fields of the model and dropout_p then have no
    effect, and the seed does not cover the initial weights: call torch.manual_seed and build a new model for every run.
    optimiser: a function of the model's parameters, in place of the config's optimiser, lr, weight_decay and
    shared_filters. It is called twice, the second time for the training. The record names a custom model and optimiser;
    choose a file name for it yourself (``records.write_record``).
    data: Fashion-MNIST by default. ``limit`` and ``validation`` of the config apply to any data.
    device: by default CUDA, else Apple's MPS, else the CPU.
    precision: "bfloat16" (autocast) or "float32"; by default bfloat16 where the hardware supports it.
    checkpoint: a file written after every epoch, from which an interrupted run resumes. A learning-rate scheduler of
    your own is not in it.
    weights: a safetensors file for the weights of the epoch with the best test accuracy. Those of the last epoch go
    beside it (see ``last_weights``), unless the run diverged.
    on_epoch: called after every epoch with its row of the history and the model in evaluation mode.
    progress, position, turn: whether to show a progress bar, its line if runs share a terminal, and the run's place in
    the grid.

    A loss that is not finite ends the run: the record's ``diverged`` gives the epoch and the step, and the history
    holds the epochs before. Ctrl-C raises Interrupted, which carries the history. Invalid arguments raise DataError,
    TypeError, ValueError or OSError before training starts.
    """
    check_configs([config])
    warn_of_edits()
    for name, given, kind, advice in (
        ("model", model, nn.Module, "an nn.Module, such as MyModel()"),
        ("data", data, Data, "mixer.data.Data, such as Data.from_torchvision(train, test)"),
    ):
        if not isinstance(given, kind | None):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise TypeError(f"{name} is {what}, but it has to be {advice}")
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch is a {type(on_epoch).__name__}, but it has to be a function of a row and the model")
    if model is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter that requires a gradient, so there is nothing to train")
    threads_after_fork()
    if torch.get_default_dtype() != torch.float32:
        raise ValueError("PyTorch's default dtype was changed: torch.set_default_dtype(torch.float32) before training")
    device = find_device(device)
    precision = find_precision(device, precision)
    checkpoint, weights = (path if path is None else expand(path) for path in (checkpoint, weights))
    if checkpoint is not None and checkpoint == weights:
        raise ValueError(f"checkpoint and weights are both {weights}: give two files")
    for file in filter(None, (checkpoint, weights, weights and last_weights(weights))):
        check_writable(file)
    with by_itself(device):
        data = part_of(fashion_mnist.load(device) if data is None else data.to(device), config)
        fingerprint = fingerprint_of(config, Kind.of(data), model, optimiser)
        run = Run(config, device, precision, data, model, optimiser)  # last, so it has the optimiser made last
        run.fingerprint = fingerprint
        if checkpoint is not None:
            resume(run, checkpoint)
        try:
            images = len(data.train_labels), len(data.test_labels)
            with Bar(config, images, run.epoch, progress, position, turn) as bar:
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
    if run.diverged is not None:
        log.warning("%s diverged in epoch %d, step %d.", config.name, run.diverged["epoch"], run.diverged["step"])
    if weights is not None:
        try:
            save_weights(run, weights)
        except OSError as error:
            if checkpoint is not None:  # the same call resumes from it and gets straight back here
                raise
            log.warning("%s The record is returned nevertheless.", error)
    return (run.record(), run.tested.eval()) if return_model else run.record()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button. ``history``: the finished epochs of the interrupted run."""

    def __init__(self, message: str, history: list[dict[str, float]] | None = None):
        super().__init__(message)
        self.history = history or []  # pickling passes only the message, and restores the history afterwards

    def _render_traceback_(self) -> list[str]:
        """Show only the message in IPython: nothing went wrong, so no traceback."""
        return [str(self)]


class Run:
    """The state of a run between two epochs: model, optimisers, history and everything else a checkpoint holds.

    device, precision: from ``find_device`` and ``find_precision``. data: from ``part_of``, on the device.
    model, optimiser: custom ones, as in :func:`train`. loss: replaces the config's. eager: do without the fast path.
    ``tested`` is the model that is tested and saved: the moving average, if there is one.
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
        self.earlier: list[dict[str, Any]] = []  # earlier environments, with the epochs finished by their end
        self.fingerprint: Fingerprint = {}
        self.generator = torch.Generator()
        self._seed(0)
        self.brought = {}
        if model is not None:
            count = sum(parameter.numel() for parameter in model.parameters())
            self.brought["model"] = f"{type(model).__module__}.{type(model).__qualname__}, {count:,} parameters"
        self.model = (build_network(config, data, self.generator) if model is None else model).to(device)
        if config.token_labels:
            if not isinstance(self.model, MlpMixer) or self.model.patch_size != config.patch_size:
                raise ValueError("token_labels need an MlpMixer with patches of 4×4: give one, or set it to 0")
            self.model.per_patch = True
        if optimiser is None:
            self.optimisers = optimisers(config, self.model, data.train_images.shape[-2:], precision)
        elif not callable(optimiser):
            raise ValueError("optimiser has to be a function, like lambda parameters: SGD(parameters, lr=0.1)")
        else:
            self.optimisers = [optimiser(self.model.parameters())]
            if not isinstance(self.optimisers[0], Optimizer):
                raise ValueError(f"optimiser has to return a torch.optim.Optimizer, not {self.optimisers[0]!r:.100}")
            if isinstance(self.optimisers[0], LBFGS):
                raise ValueError("LBFGS needs a closure, which train() does not give it: choose another optimiser")
            own = {id(parameter) for parameter in self.model.parameters()}
            given = [parameter for group in self.optimisers[0].param_groups for parameter in group["params"]]
            if own.isdisjoint(map(id, given)):
                raise ValueError("optimiser has to train the parameters that it is called with, not another model's")
            settings = {name: value for name, value in self.optimisers[0].defaults.items() if value is not None}
            self.brought["optimiser"] = f"{type(self.optimisers[0]).__name__} {settings}"
        if loss is None:
            loss = Distillation(config, data, device, precision) if config.teacher else partial(label_loss, config)
        for each in self.optimisers if device.type == "cpu" else ():
            each._accelerator_graph_capture_health_check = lambda: None  # it would query a GPU that may be broken
        self.loss = loss
        self.average, self.tested = None, self.model
        if config.ema_decay:
            # Buffers too: BatchNorm's statistics have to match the averaged weights.
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self.tested = self.average.module
        self.choice = Choice(self.model, "eager") if eager else None
        self.eager = eager
        self._choose()
        self.environment = {} if eager else self._environment()

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
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

        A row has epoch, train_loss, train_accuracy, test_loss, test_accuracy and seconds. Accuracies are fractions;
        the training ones are running averages over the epoch's batches. ``on_step`` receives each step's loss, on the
        device, and number of images; ``on_test`` the number of images in each test batch.
        """
        start = time.perf_counter()
        if self._choose():
            self.earlier.append({"epochs": self.epoch} | self.environment)
            self.environment = self._environment()
        with contextlib.ExitStack() as contexts:
            if self.choice.path == "fused":  # the eager model uses all of PyTorch's threads
                contexts.enter_context(fused.threads_for_the_operator())
            elif self.device.type == "cpu" and not self.eager:
                keep_large_buffers()
            if "model" in self.brought:
                contexts.enter_context(seeded(self.model, self._seed(self.epoch + 1)))
            losses, sizes, correct = self._train_on_every_image(on_step)
            train_loss = float((losses.double() * sizes).sum() / sizes.sum())
            test_loss, test_accuracy = self.evaluate(on_test)
        if not (math.isfinite(train_loss) and math.isfinite(test_loss)):
            finite = [*losses.isfinite().tolist(), False]
            step = min(finite.index(False) + 1, self.steps_per_epoch)
            self.diverged = {"epoch": self.epoch + 1, "step": step}
            return
        if test_accuracy > max((epoch["test_accuracy"] for epoch in self.history), default=-1.0):
            self.best_weights = {k: w.to("cpu", copy=True) for k, w in tensors_of(self.tested).items()}
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
        """Return each step's loss and number of images, and the number of images classified correctly."""
        self._seed(self.epoch + 1)
        data, config = self.data, self.config.of_epoch(self.epoch + 1)
        if isinstance(self.loss, Distillation):
            data, config = self.loss.see(self.epoch + 1)
        order = torch.randperm(len(self.data.train_labels), generator=self.generator).to(self.device)
        batches = order.split(self.config.batch_size)
        losses = torch.zeros(len(batches), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for step, index in enumerate(batches):
            batch = augmented(index, data, config, self.generator)
            logits, loss = self._backward(batch)
            if self.config.sam_radius:
                with uphill(self.model, self.config.sam_radius):
                    self._backward(batch)
            self.set_learning_rate(step)
            for optimiser in self.optimisers:
                optimiser.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            losses[step] = loss
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            on_step(losses[step], len(index))
        return losses.cpu(), torch.tensor([len(index) for index in batches]), int(correct)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the gradients for a batch; return its logits and its loss."""
        with autocast(self.device, self.precision):
            logits = _float32(self.choice.forward(batch.inputs))
        loss = self.loss(logits, batch)
        self.model.zero_grad()
        loss.backward()
        return logits.mean(dim=1) if self.config.token_labels else logits, loss.detach()

    def evaluate(self, on_test: Callable[[int], object] = lambda images: None) -> tuple[float, float]:
        """Return mean loss and accuracy on the test images."""
        data, loss, correct = self.data, torch.zeros((), dtype=torch.float64), 0
        batches = predict(self.tested, data.test_images, self.precision, data.pixel_mean, data.pixel_std)
        for logits, labels in zip(batches, data.test_labels.split(EVAL_BATCH), strict=True):
            shape, wanted = tuple(getattr(logits, "shape", ())), (len(labels), data.num_classes)
            if len(shape) != 2 or shape < wanted:  # more logits than classes do no harm
                found = shape or type(logits).__name__
                raise ValueError(f"the model has to return logits of shape {wanted}, not {found}")
            logits = _float32(logits)
            loss += F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            correct += int((logits.argmax(dim=1) == labels).sum())
            on_test(len(labels))
        count = len(data.test_labels)
        return float(loss) / count, correct / count

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rates for this step of the present epoch."""
        if self.config.schedule == "constant" and "optimiser" in self.brought:  # which may have a scheduler of its own
            return
        done = (self.epoch + (step + 1) / self.steps_per_epoch) / self.config.num_epochs
        factor = schedule(self.config.schedule, done, 1 / self.config.num_epochs)
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def _seed(self, epoch: int) -> int:
        """Seed the generator for an epoch's random numbers (order, dropout); epoch 0 draws the initial weights."""
        seed = self.config.seed * 1_000_003 + epoch
        self.generator.manual_seed(seed)
        return seed

    def _choose(self) -> bool:
        """Choose the path again, since the model may have changed (a hook, say); return whether the path changed."""
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
        """Path, precision, threads and device in one sentence, for the progress bar."""
        words = {"fused": "the fused operator", "graphs": "CUDA graphs", "eager": "eager PyTorch"}[self.choice.path]
        count = self.environment["threads"]
        threads = f" on {count} thread{'s' * (count > 1)}" if self.device.type == "cpu" else ""
        return f"Trains with {words} in {self.precision}{threads} ({self.environment['device']})."

    def record(self) -> Record:
        """Return the record of the epochs finished so far."""
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
    kind: Kind,
    model: nn.Module | None = None,
    optimiser: Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
) -> Fingerprint:
    """Compute a run's fingerprint with the present code. With a teacher, it covers only the loss."""
    config, noise = trial(config, kind)
    noise = part_of(noise, config)
    patches = [math.prod(kind.image[-2:]) // math.prod(config.patch_size)] if config.token_labels else []
    shape = len(noise.train_labels), *patches, kind.classes
    targets = torch.linspace(-2, 2, math.prod(shape), dtype=torch.float64).view(shape)

    def soft_targets(logits: Tensor, batch: Batch) -> Tensor:
        return student_loss(config, logits, targets[batch.index])

    loss = soft_targets if config.teacher else None
    try:
        cpu, model = torch.device("cpu"), copy.deepcopy(model).cpu() if model is not None else None
    except (RuntimeError, TypeError) as error:
        hint = "keep no computed tensors in it (activations, pruned weights) and no open files"
        raise ValueError(f"the model cannot be copied ({str(error).partition('.')[0]}): {hint}") from None
    with fused.threads_for_the_operator():  # one thread: more are slower on so little work
        return try_out(Run(config, cpu, "float32", noise, model, optimiser, loss, eager=True))


def _float32(logits: Tensor) -> Tensor:
    """At least float32: in bfloat16 the two largest logits of a custom model are often equal."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def label_loss(config: Config, logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the labels, with the config's label smoothing and the batch's mixup."""
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=config.label_smoothing)
    if batch.share < 1:
        other = F.cross_entropy(logits, batch.labels.flip(0), label_smoothing=config.label_smoothing)
        loss = batch.share * loss + (1 - batch.share) * other
    return loss


def part_of(data: Data, config: Config) -> Data:
    """Select the part of the data that a run uses. Raises ValueError if there are fewer images than ``limit``."""
    data = validation_split(data) if config.validation else data
    data = replace(data, pixel_mean=0.0, pixel_std=1.0) if config.inputs == "scaled" else data
    if config.limit is not None:
        data, few = data.first(config.limit), slice(config.limit)
        data = replace(data, test_images=data.test_images[few], test_labels=data.test_labels[few])
    return data
