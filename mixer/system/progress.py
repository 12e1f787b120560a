"""The progress bar of a run."""

import sys
import threading
import time

from torch import Tensor
from tqdm import tqdm


class Bar(tqdm):
    """A progress bar over the steps of a run. Numbers come first, since a notebook's output is narrow, and it is text
    everywhere: a widget's remains are unreadable in a notebook that was saved or exported."""

    monitor_interval = 0  # no thread of tqdm's own
    announced = ""

    def __init__(self, name: str, epochs: int, steps: int, done: int, shown: bool, position: int | None):
        """For a run of ``epochs`` epochs of ``steps`` steps each, of which ``done`` epochs are done."""
        self.run, self.epochs, self.steps, self.accuracies, self.last_look = name, epochs, steps, "", 0.0
        super().__init__(
            total=epochs * steps,
            initial=done * steps,
            disable=not shown or sys.stderr is None,
            position=position,
            smoothing=0,  # time left by the mean of all steps: testing after an epoch would make it jump
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {remaining} left |{bar:10}|{desc}",
        )

    def announce(self, how: str) -> None:
        """Say how runs compute, once in a process as long as it stays the same."""
        if not self.disable and how != Bar.announced:
            Bar.announced = how
            self.write(how, file=sys.stderr)

    def step(self, loss: Tensor) -> None:
        # Reading the loss waits for the device, so it is looked at twice a second, not at every step.
        if not self.disable and time.monotonic() - self.last_look > 0.5:
            self.last_look = time.monotonic()
            self._show(loss)
        self.update()

    def epoch_done(self, epoch: dict[str, float]) -> None:
        self.accuracies = f" train {epoch['train_accuracy']:.2%} test {epoch['test_accuracy']:.2%}"
        self._show(epoch["train_loss"])

    def _show(self, loss: Tensor | float) -> None:
        epoch = min(1 + self.n // self.steps, self.epochs)
        text = f" epoch {epoch}/{self.epochs} loss {float(loss):.4f}{self.accuracies} {self.run}"
        self.set_description_str(text)


Bar.set_lock(threading.RLock())  # tqdm's own would be a semaphore of the system, which a killed process leaves behind
