"""MLP-Mixer on Fashion-MNIST: a model, its training, a parameter grid.

from mixer import Config, MlpMixer, train
"""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _ctrl_c_stops_at_once() -> Iterator[None]:
    """While a command of ours is still importing PyTorch, which takes seconds and swallows a KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    if sys.argv[0] != "-m" or before is not signal.default_int_handler:
        yield
        return

    def stop(*_: object) -> None:
        os.write(2, b"Stopped before anything was done.\n")
        os._exit(1)

    signal.signal(signal.SIGINT, stop)
    yield
    signal.signal(signal.SIGINT, before)


# `python -m mixer.runner` runs a module that is imported here already; Python warns of it, and it does no harm.
warnings.filterwarnings("ignore", r"'mixer\.\w+' found in sys.modules", RuntimeWarning)

with _ctrl_c_stops_at_once():
    from mixer.config import Config
    from mixer.model import MixerBlock, MlpMixer
    from mixer.predict import classify
    from mixer.runner import grid, histories, run_grid
    from mixer.runs import train

__all__ = ["Config", "MixerBlock", "MlpMixer", "classify", "grid", "histories", "run_grid", "train"]
