"""Handles Ctrl-C while ``python -m mixer`` imports PyTorch for seconds: one line in place of a traceback."""

import os
import signal
import sys
from types import FrameType


def _stop(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"Stopped; the same command resumes from here.\n")
    os._exit(130)


# Python's sys.argv[0] is -m until it has found the module.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
