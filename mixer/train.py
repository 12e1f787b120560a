"""One run: a config in, a record out, on whatever device there is.

The coursework states neither optimiser, loss, schedule nor initialisation. We chose Adam with PyTorch's defaults,
cross-entropy, a constant learning rate and the initialisation of the paper's code (see ``mixer.model``).

A run is decided by its config alone. Its shuffles and dropout follow from the seed and the epoch, so an
interrupted run needs no stored random state: weights, optimiser and history are enough to go on bit for bit.
"""

import contextlib
import dataclasses
import io
import logging
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from tqdm.auto import tqdm

from mixer import data as fashion_mnist
from mixer import fused
from mixer.data import Data
from mixer.model import MlpMixer

RECORD_FORMAT = 1
CHECKPOINT_FORMAT = 1
EVAL_BATCH = 1000  # images at a time, which keeps the plain formula's hidden layer near 100 MB

Record = dict[str, Any]
log = logging.getLogger("mixer")


@dataclass(frozen=True)
class Config:
    """One point of the grid. Two equal configs are the same run. Raises ValueError for impossible values."""

    lr: float = 0.01
    dropout_p: float = 0.0
    batch_size: int = 256
    num_epochs: int = 60
    seed: int = 0
    limit: int | None = None  # train on the first so many images only

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it has to be {wanted}")

        check(isinstance(self.lr, float) and 0 < self.lr < math.inf, "lr", "a positive number like 0.01")
        check(
            isinstance(self.dropout_p, float) and 0 <= self.dropout_p < 1,
            "dropout_p",
            "a number from 0.0 to below 1",
        )
        for name in ("batch_size", "num_epochs"):
            check(type(getattr(self, name)) is int and getattr(self, name) > 0, name, "a whole number above 0")
        check(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "a whole number from 0 to 2**32 - 1")
        check(
            self.limit is None or (type(self.limit) is int and 0 < self.limit <= 60_000),
            "limit",
            "None or a whole number from 1 to 60000",
        )

    @property
    def name(self) -> str:
        """A readable name, one per config: what differs from the coursework's setting is added to its end."""
        name = f"lr{self.lr:g}_dropout{self.dropout_p:g}_batch{self.batch_size}_seed{self.seed}"
        if self.num_epochs != Config.num_epochs:
            name += f"_epochs{self.num_epochs}"
        if self.limit is not None:
            name += f"_limit{self.limit}"
        return name


def train(
    config: Config,
    *,
    device: torch.device | str | None = None,
    precision: str | None = None,
    checkpoint: Path | None = None,
    weights: Path | None = None,
    data: Data | None = None,
    progress: bool = True,
    position: int | None = None,
) -> Record:
    """Train one run and return its record.

    device: found when not given: CUDA, else Apple's MPS, else the CPU.
    precision: "bfloat16" (autocast) or "float32"; when not given, bfloat16 where the hardware computes in it.
    checkpoint: a file that is written after every epoch, and from which a run that was cut off goes on.
    weights: a safetensors file for the weights of the epoch with the best test accuracy.
    data: the data set on the device, when the caller has it already.
    progress, position: a progress bar, and its line where several runs share a terminal.

    A loss that is not finite ends the run: ``diverged`` in the record then says at which step of which epoch, and
    the history holds the epochs before. Raises DataError, ValueError, OSError.
    """
    device = torch.device(device) if device is not None else find_device()
    precision = precision or find_precision(device)
    if precision not in ("bfloat16", "float32"):
        raise ValueError(f"precision is bfloat16 or float32, not {precision!r}")
    if precision == "bfloat16" and device.type == "cpu" and find_precision(device) != precision:
        raise ValueError("this processor does not compute in bfloat16: train in float32")
    data = data or fashion_mnist.load(device, config.limit)
    with (
        torch.random.fork_rng(devices=[]),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        fused.threads_for_the_operator() if device.type == "cpu" else contextlib.nullcontext(),
    ):
        run = _Run(config, device, precision, data)
        if checkpoint is not None:
            run.resume(checkpoint)
        with _Bar(run, progress, position) as bar:
            while run.epoch < config.num_epochs and run.diverged is None:
                run.train_epoch(bar)
                if checkpoint is not None:
                    run.save(checkpoint)
    record = {
        "format": RECORD_FORMAT,
        "config": dataclasses.asdict(config),
        "history": run.history,
        "diverged": run.diverged,
        "environment": environment(device, precision),
    }
    if weights is not None and run.best_weights is not None:
        origin = {"config": config.name, "epoch": str(best_epoch(record)["epoch"])}
        write_whole(weights, safetensors.torch.save(run.best_weights, origin))
    return record


def best_epoch(record: Record) -> dict[str, float]:
    """The epoch with the highest test accuracy, the first of equals."""
    return max(record["history"], key=lambda epoch: epoch["test_accuracy"])


class _Run:
    """The state of a run between two epochs."""

    def __init__(self, config: Config, device: torch.device, precision: str, data: Data):
        self.config, self.device, self.precision, self.data = config, device, precision, data
        torch.manual_seed(config.seed)
        self.model = MlpMixer(dropout_p=config.dropout_p).to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=device.type != "mps")
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.diverged: dict[str, int] | None = None
        self.best_weights: dict[str, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train_labels) / self.config.batch_size)

    def train_epoch(self, bar: "_Bar") -> None:
        start = time.perf_counter()
        # Shuffles and dropout of an epoch follow from seed and epoch alone.
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch + 1)
        labels = self.data.train_labels
        order = torch.randperm(len(labels)).to(self.device)
        losses = torch.zeros(self.steps_per_epoch, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.train()
        for step, batch in enumerate(order.split(self.config.batch_size)):
            logits = self._logits(self.data.train_images[batch])
            loss = F.cross_entropy(logits.float(), labels[batch])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            losses[step] = loss.detach()
            correct += (logits.argmax(dim=1) == labels[batch]).sum()
            bar.step(self.epoch + 1, losses[step])
        sizes = torch.tensor([len(batch) for batch in order.split(self.config.batch_size)])
        train_loss = float((losses.cpu().double() * sizes).sum() / len(labels))
        test_loss, test_accuracy = self.evaluate()
        if not (math.isfinite(train_loss) and math.isfinite(test_loss)):
            finite = [*losses.isfinite().tolist(), False]
            self.diverged = {"epoch": self.epoch + 1, "step": min(finite.index(False) + 1, self.steps_per_epoch)}
            return
        self.epoch += 1
        if test_accuracy > max((epoch["test_accuracy"] for epoch in self.history), default=-1.0):
            self.best_weights = {name: w.to("cpu", copy=True) for name, w in self.model.state_dict().items()}
        self.history.append(
            {
                "epoch": self.epoch,
                "train_loss": train_loss,
                "train_accuracy": int(correct) / len(labels),
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        bar.epoch_done(self.history[-1])

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images."""
        loss = torch.zeros((), dtype=torch.float64)
        correct = 0
        for logits, labels in zip(
            predict(self.model, self.data.test_images, self.precision),
            self.data.test_labels.split(EVAL_BATCH),
            strict=True,
        ):
            loss += F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            correct += int((logits.argmax(dim=1) == labels).sum())
        count = len(self.data.test_labels)
        return float(loss) / count, correct / count

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(fashion_mnist.normalise(images))

    @property
    def _key(self) -> dict[str, Any]:
        """What has to be equal for a checkpoint to go on as if never interrupted."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": dataclasses.asdict(self.config),
            "path": [self.device.type, self.precision, fused.path(self.device, self.precision)],
        }

    def save(self, checkpoint: Path) -> None:
        state = {
            "key": self._key,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
            "diverged": self.diverged,
            "best_weights": self.best_weights,
        }
        content = io.BytesIO()
        torch.save(state, content)
        if checkpoint.exists():
            checkpoint.replace(_before(checkpoint))
        write_whole(checkpoint, content.getbuffer())

    def resume(self, checkpoint: Path) -> None:
        """Go on from the checkpoint, else from the one before it, else start afresh."""
        for path in (checkpoint, _before(checkpoint)):
            try:
                self._restore(torch.load(path, map_location=self.device, weights_only=True))
                return
            except FileNotFoundError:
                continue
            # What a damaged or foreign file makes of torch.load is anybody's guess; the run must go on all the same.
            except Exception as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                log.warning("The checkpoint %s cannot be used and is passed over: %s.", path, reason)
                self.__init__(self.config, self.device, self.precision, self.data)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["key"] != self._key:
            raise ValueError("it is of another config, format, device or precision")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.history, self.diverged = state["history"], state["diverged"]
        self.best_weights = state["best_weights"] and {k: w.cpu() for k, w in state["best_weights"].items()}
        self.epoch = len(self.history)


def predict(model: MlpMixer, images: Tensor, precision: str = "float32") -> Iterator[Tensor]:
    """The model's logits, float32 (up to EVAL_BATCH, num_classes) at a time, for uint8 images (N, 28, 28)."""
    model.eval()
    for batch in images.split(EVAL_BATCH):
        with torch.inference_mode(), autocast(images.device, precision):
            yield model(fashion_mnist.normalise(batch)).float()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def find_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def find_precision(device: torch.device) -> str:
    """bfloat16 where the hardware computes in it, not merely emulates it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Where a record comes from: versions, device, precision and path, commit, data."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "path": fused.path(device, precision),
        "commit": _commit(),
        "data_sha256": fashion_mnist.SHA256,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, KeyError):
        # Rented machines often hide the name's end; family and model tell the generation all the same.
        lines = re.findall(r"^(model name|cpu family|model)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = dict(lines)
        return f"cpu: {cpu['model name']}, family {cpu['cpu family']} model {cpu['model']}"
    return f"{device.type}: {platform.processor() or platform.machine()}"


def _commit() -> str:
    """The commit of the code, with a + where the package differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, also when the disk is full or the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = _incoming(path)
    try:
        with incoming.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        incoming.replace(path)
    except OSError as error:
        incoming.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error.strerror or error}): make room and run again.") from error


def _incoming(path: Path) -> Path:
    return path.with_name(f".{path.name}.incoming")


def _before(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.before")


class _Bar(tqdm):
    """A progress bar over the steps of a run: epoch, loss, accuracies of the last epoch, time left."""

    def __init__(self, run: _Run, shown: bool, position: int | None):
        self.run, self.accuracies, self.last_look = run, "", 0.0
        super().__init__(
            desc=run.config.name,
            total=run.config.num_epochs * run.steps_per_epoch,
            initial=run.epoch * run.steps_per_epoch,
            disable=not shown,
            position=position,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left",
        )

    def step(self, epoch: int, loss: Tensor) -> None:
        # Reading the loss waits for the device, so it is looked at twice a second, not at every step.
        if not self.disable and time.monotonic() - self.last_look > 0.5:
            self.last_look = time.monotonic()
            self._show(epoch, float(loss))
        self.update()

    def epoch_done(self, epoch: dict[str, float]) -> None:
        self.accuracies = f", train {epoch['train_accuracy']:.2%}, test {epoch['test_accuracy']:.2%}"
        self._show(epoch["epoch"], epoch["train_loss"])

    def _show(self, epoch: int, loss: float) -> None:
        config = self.run.config
        self.set_description_str(f"{config.name} epoch {epoch}/{config.num_epochs}, loss {loss:.4f}{self.accuracies}")
