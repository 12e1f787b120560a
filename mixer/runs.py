"""A run that lasts: from its config to its record, whatever befalls it on the way.

After every epoch it leaves a *checkpoint*, from which it goes on when it was cut off; the record that it ends with is
the one of a run that was not.
"""

import contextlib
import dataclasses
import io
import json
import os
import threading
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from mixer import data as fashion_mnist
from mixer.config import Config
from mixer.data import Data
from mixer.distillation import Teacher
from mixer.files import check_writable, seal, unseal, write_whole
from mixer.kernels import fused
from mixer.records import RECORD_FORMAT, Record, best_epoch, environment
from mixer.training import Diverged, Network, Training, find_device, find_precision, part_of

CHECKPOINT_FORMAT = 3

log = getLogger("mixer")


def train(
    config: Config,
    *,
    device: torch.device | str | None = None,
    precision: str | None = None,
    data: Data | None = None,
    checkpoint: Path | str | None = None,
    weights: Path | str | None = None,
    on_epoch: Callable[[dict[str, float], Network], None] | None = None,
    progress: bool = True,
    position: int | None = None,
    return_model: bool = False,
) -> Record | tuple[Record, Network]:
    """Train one run and return its record; with ``return_model``, the record and the model as it ended.

    device: CUDA when not given, else Apple's MPS, else the CPU.
    precision: "bfloat16" (autocast) or "float32"; when not given, bfloat16 where the hardware computes in it.
    data: Fashion-MNIST when not given; of any, what ``config`` says (``limit``, ``validation``).
    checkpoint: a file that is written after every epoch, and from which a run that was cut off goes on.
    weights: a safetensors file for the weights of the epoch with the best test accuracy; those of the last epoch are
    put beside it, as ``last_weights`` says, where no loss diverged.
    on_epoch: called after every epoch with its row of the history, and the model, in evaluation mode.
    progress, position: a progress bar, and its line where several runs share a terminal.

    A loss that is not finite ends the run: ``diverged`` in the record then says at which step of which epoch, and
    the history holds the epochs before. Ctrl-C raises Interrupted, which has the history. Before anything is trained,
    DataError, ValueError or OSError say what is wrong with the arguments.
    """
    if _forked:  # GNU OpenMP's threads do not survive a fork, and waiting for them would last for ever
        torch.set_num_threads(1)
    if torch.get_default_dtype() != torch.float32:
        raise ValueError("PyTorch's default dtype was changed: torch.set_default_dtype(torch.float32) before training")
    device = find_device(device)
    precision = find_precision(device, precision)
    checkpoint, weights = (path if path is None else Path(path) for path in (checkpoint, weights))
    for file in (checkpoint, weights):
        if file is not None:
            check_writable(file)
    if checkpoint is not None:
        check_writable(_before(checkpoint))
    with contextlib.ExitStack() as contexts:
        # A no_grad or autocast around is the caller's, not the run's. The first of these allows gradients too. Autocast
        # empties its cache only where the outermost context ends, so in here it would keep weights of steps ago.
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        if device.type == "cuda":  # convolutions give the same bits every time, and float32 is no TF32
            contexts.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if torch.get_default_device().type != "cpu":  # nor does its default device; the generator is the CPU's
            contexts.enter_context(torch.device("cpu"))
        data = part_of(fashion_mnist.load(device) if data is None else data.to(device), config)
        run = _Run(Training(config, device, precision, data))
        if run.environment["path"] == "fused":  # the plain formula takes all of PyTorch's threads
            contexts.enter_context(fused.threads_for_the_operator())
        if checkpoint is not None:
            run.resume(checkpoint)
        try:
            with _Bar(run, progress, position) as bar:
                while not run.finished:
                    run.train_epoch(bar)
                    if checkpoint is not None:
                        run.save(checkpoint)
                    if on_epoch is not None and run.diverged is None:
                        on_epoch(dict(run.history[-1]), run.training.tested.eval())
        except KeyboardInterrupt:
            count = f"{len(run.history)} of {config.num_epochs}"
            where = "`import sys; sys.last_value.history` has them"
            raise Interrupted(f"Interrupted after {count} epochs; {where}.", run.history) from None
        record = {
            "format": RECORD_FORMAT,
            "config": dataclasses.asdict(config),
            "history": run.history,
            "diverged": run.diverged,
            "environment": run.environment | ({"earlier": run.earlier} if run.earlier else {}),
        }
    if weights is not None:
        try:
            _keep_weights(run, weights)
        except OSError as error:
            if checkpoint is not None:  # the same call goes on from it to here
                raise
            log.warning("%s The record is returned all the same.", error)
    return (record, run.training.tested.eval()) if return_model else record


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a notebook's stop button. ``history``: the finished epochs of the run that was trained here."""

    def __init__(self, message: str, history: list[dict[str, float]] | None = None):
        super().__init__(message)
        self.history = history or []  # a process hands on the message first, and the history after it

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: no traceback, since nothing went wrong."""
        return [str(self)]


class _Run:
    """A training with all that outlives a kill: history, best weights, checkpoint."""

    def __init__(self, training: Training):
        self.training = training
        self.environment = _environment(training)
        self._start()

    def _start(self) -> None:
        self.history: list[dict[str, float]] = []
        self.diverged: dict[str, int] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.earlier: list[dict[str, Any]] = []  # environments in which the run was cut off, and after how many epochs

    @property
    def finished(self) -> bool:
        return self.diverged is not None or len(self.history) == self.training.config.num_epochs

    def train_epoch(self, bar: "_Bar") -> None:
        start = time.perf_counter()
        try:
            epoch = self.training.train_epoch(bar.step)
        except Diverged as reason:
            self.diverged = {"epoch": reason.epoch, "step": reason.step}
            return
        if epoch["test_accuracy"] > max((e["test_accuracy"] for e in self.history), default=-1.0):
            state = self.training.tested.state_dict()
            self.best_weights = {name: weight.to("cpu", copy=True) for name, weight in state.items()}
        self.history.append(epoch | {"seconds": round(time.perf_counter() - start, 3)})
        bar.epoch_done(epoch)

    @property
    def _key(self) -> str:
        """What has to be equal for a checkpoint to go on as if never interrupted: all that decides a single bit."""
        environment = self.environment
        decisive = ["torch", "precision", "path", "code_sha256"]
        decisive += ["data_sha256", "pixel_mean", "pixel_std", "teacher_sha256"]
        if environment["path"] != "fused":
            decisive += ["device"]
        if environment["path"] == "plain" and self.training.device.type == "cpu":
            decisive += ["threads"]
        key = {name: environment.get(name) for name in decisive}
        key |= {"kind": self.training.device.type, "capability": torch.backends.cpu.get_cpu_capability()}
        return json.dumps([CHECKPOINT_FORMAT, dataclasses.asdict(self.training.config), key])

    def save(self, checkpoint: Path) -> None:
        state = {
            "key": self._key,
            "training": self.training.state_dict(),
            "history": self.history,
            "diverged": self.diverged,
            "best_weights": self.best_weights,
            "environments": json.dumps([*self.earlier, self.environment]),
        }
        content = io.BytesIO()
        torch.save(state, content)
        if checkpoint.exists():
            checkpoint.replace(_before(checkpoint))
        write_whole(checkpoint, seal(content.getbuffer()))

    def resume(self, checkpoint: Path) -> None:
        """Go on from the checkpoint, else from the one before it, else start afresh."""
        training, reasons = self.training, []
        for path in (checkpoint, _before(checkpoint)):
            try:
                self._restore(path.read_bytes())
                break
            except FileNotFoundError:
                continue
            # What a damaged or foreign file makes of torch.load is anybody's guess; the run must go on all the same.
            except Exception as error:
                reasons.append(str(error).partition("\n")[0].rstrip("."))
                self.training = Training(training.config, training.device, training.precision, training.data)
                self._start()
        if reasons:
            then = f"goes on after epoch {len(self.history)}" if self.history else "starts afresh"
            log.warning("The checkpoint %s is passed over, since %s; the run %s.", checkpoint, reasons[0], then)

    def _restore(self, content: bytes) -> None:
        state = torch.load(io.BytesIO(unseal(content)), map_location=self.training.device, weights_only=True)
        if state["key"] != self._key:
            raise ValueError("it was made by other code, data, config, device or precision")
        self.training.load_state_dict(state["training"])
        self.history, self.diverged = state["history"], state["diverged"]
        self.best_weights = state["best_weights"] and {k: w.cpu() for k, w in state["best_weights"].items()}
        *self.earlier, last = json.loads(state["environments"])
        if last != self.environment:
            self.earlier.append({"epochs": len(self.history)} | last)


def _before(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.before")


def last_weights(weights: Path) -> Path:
    """Where the weights of the last epoch lie, which nobody picked, beside those of the best."""
    return weights.with_suffix(f".last{weights.suffix}")


def _keep_weights(run: _Run, weights: Path) -> None:
    """Those of the best epoch and of the last. Raises OSError.

    A run that diverged has no last ones, and without a whole epoch no best ones: then another training's do not stay.
    """
    best = last = None
    if run.history:
        best = _safetensors(run, run.best_weights, best_epoch({"history": run.history}))
    if run.diverged is None:
        last = _safetensors(run, run.training.tested.state_dict(), run.history[-1])
    for path, content in ((weights, best), (last_weights(weights), last)):
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, content)


def _safetensors(run: _Run, weights: dict[str, Tensor], epoch: dict[str, float]) -> bytes:
    config, data = run.training.config, run.training.data
    origin = {
        "name": config.name,
        "epoch": epoch["epoch"],
        "measured": {name: value for name, value in epoch.items() if name != "seconds"},
        "data": data.name,
        "config": dataclasses.asdict(config),
        "image": list(data.train_images.shape[1:]),
        "data_sha256": data.sha256,
        "pixel_mean": data.pixel_mean,
        "pixel_std": data.pixel_std,
    }
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    # One entry, because several would be written in an order that changes from call to call.
    return safetensors.torch.save(weights, {"mixer": json.dumps(origin)})


def _environment(training: Training) -> dict[str, Any]:
    return (
        environment(training.device, training.precision)
        | {
            "path": training.path,
            "data": training.data.name,
            "data_sha256": training.data.sha256,
            "pixel_mean": training.data.pixel_mean,
            "pixel_std": training.data.pixel_std,
        }
        | _teacher(training.teacher)
    )


def _teacher(teacher: Teacher | None) -> dict[str, str]:
    if teacher is None:
        return {}
    return {"teacher_sha256": teacher.sha256, "teacher_weights_sha256": teacher.weights_sha256}


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class _Bar(tqdm):
    """A progress bar over the steps of a run: per cent, time left, accuracies of the last epoch, loss.

    Numbers come first, since a notebook's output is narrow, and it is text everywhere: a widget's remains are
    unreadable in a notebook that was saved or exported.
    """

    monitor_interval = 0  # no thread of tqdm's own

    def __init__(self, run: _Run, shown: bool, position: int | None):
        config, steps = run.training.config, run.training.steps_per_epoch
        self.config, self.accuracies, self.last_look = config, "", 0.0
        super().__init__(
            total=config.num_epochs * steps,
            initial=len(run.history) * steps,
            disable=not shown,
            position=position,
            smoothing=0,  # time left by the mean of all steps: testing after an epoch would make it jump
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {remaining} left |{bar:10}|{desc}",
        )

    def step(self, loss: Tensor) -> None:
        # Reading the loss waits for the device, so it is looked at twice a second, not at every step.
        if not self.disable and time.monotonic() - self.last_look > 0.5:
            self.last_look = time.monotonic()
            self._show(1 + self.n * self.config.num_epochs // self.total, float(loss))
        self.update()

    def epoch_done(self, epoch: dict[str, float]) -> None:
        self.accuracies = f" train {epoch['train_accuracy']:.2%} test {epoch['test_accuracy']:.2%}"
        self._show(int(epoch["epoch"]), epoch["train_loss"])

    def _show(self, epoch: int, loss: float) -> None:
        self.set_description_str(
            f" epoch {epoch}/{self.config.num_epochs} loss {loss:.4f}{self.accuracies} {self.config.name}"
        )


_Bar.set_lock(threading.RLock())  # tqdm's own would be a semaphore of the system, which a killed process leaves behind
