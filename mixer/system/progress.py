"""The progress bar of a run."""

import contextlib
import sys
import threading
import time
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mixer.config import Config

TRAINING = 3  # times the work of testing: forward and backward instead of forward only
# A run's number among the grid's missing runs, from 1; how many there are; how many run at a time, if known.
Turn = tuple[int, int, int | None]


class _Terminal:
    """stderr, whose failures (a closed pipe, a full disk of logs) must not end a training."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


_TERMINAL = _Terminal()


class Bar(tqdm):
    """A progress bar over the images of a run. Numbers come first, since a notebook's output is narrow. It is always
    text, since a widget becomes unreadable in a saved or exported notebook."""

    monitor_interval = 0  # do not start tqdm's monitor thread
    announced = ""

    def __init__(
        self, config: Config, images: tuple[int, int], done: int, shown: bool, position: int | None, turn: Turn
    ):
        """``done`` of the run's epochs are finished; ``images``: training and test images per epoch."""
        self.config, self.turn, self.accuracies, self.last_look = config, turn, "", 0.0
        self.work = TRAINING * images[0] + images[1]
        super().__init__(
            total=config.num_epochs * self.work,
            initial=done * self.work,
            disable=not shown or sys.stderr is None,
            file=_TERMINAL,
            position=position,
            smoothing=0,  # estimate the time left from all work so far
            miniters=1,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {remaining} left{turn} |{bar:10}|{desc}",
        )

    def announce(self, how: str) -> None:
        """Print how runs compute, unless this process has just printed the same."""
        if not self.disable and how != Bar.announced:
            Bar.announced = how
            self.write(how, file=_TERMINAL)

    def trained(self, loss: Tensor, images: int) -> None:
        # Reading the loss waits for the device, so read it twice a second, not at every step.
        if not self.disable and time.monotonic() - self.last_look > 0.5:
            self.last_look = time.monotonic()
            self._show(loss)
        self.update(TRAINING * images)

    def epoch_done(self, epoch: dict[str, float]) -> None:
        tested_on = "held-out" if self.config.validation else "test"
        self.accuracies = f" train {epoch['train_accuracy']:.2%} {tested_on} {epoch['test_accuracy']:.2%}"
        self._show(epoch["train_loss"])

    def _show(self, loss: Tensor | float) -> None:
        epoch = min(1 + self.n // self.work, self.config.num_epochs)
        text = f" epoch {epoch}/{self.config.num_epochs} loss {float(loss):.4f}{self.accuracies} {self.config.name}"
        self.set_description_str(text)

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values for ``bar_format``."""
        values, text = super().format_dict, ""
        number, runs, jobs = self.turn
        if runs > 1:
            text = f", run {number}/{runs}"
        if runs > 1 and jobs and self.n > self.initial:
            # Assume that all runs take as long as this one, and that concurrent runs end with it.
            later = self.total - self.n + (runs - number) // jobs * self.total
            text += f", all ~{self.format_interval(values['elapsed'] / (self.n - self.initial) * later)}"
        return values | {"turn": text}


Bar.set_lock(threading.RLock())  # tqdm's own would be a system semaphore, which a killed process leaks
