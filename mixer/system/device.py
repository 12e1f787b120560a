"""Where a run computes, in which precision, and apart from what its caller has set up."""

import contextlib
import os
from collections.abc import Iterator
from logging import getLogger

import torch

from mixer.kernels import fused

log = getLogger("mixer")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What a precision is on a device, with no weights cached."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of this name; without one CUDA, else Apple's MPS, else the CPU. ValueError when it is not there.

    A GPU that is found but cannot compute (too old, busy, out of memory) is passed over with one log line.
    """
    if name is None:
        for found in ("cuda",) * torch.cuda.is_available() + ("mps",) * torch.backends.mps.is_available():
            try:
                torch.zeros(1, device=found)
                return torch.device(found)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0].rstrip(".")
                log.warning("The GPU is not used, since it cannot compute (%s).", reason)
        return torch.device("cpu")
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


@contextlib.contextmanager
def by_itself(device: torch.device) -> Iterator[None]:
    """A no_grad, autocast or default device around ``train`` is the caller's, not the run's."""
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))  # allows gradients too
        # Autocast empties its cache only where the outermost context ends, so here it would keep weights of steps ago.
        contexts.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        if device.type == "cuda":  # convolutions give the same bits every time, and float32 is no TF32
            contexts.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if torch.get_default_device().type != "cpu":
            contexts.enter_context(torch.device("cpu"))  # where the run's generator is
        yield


def threads_after_fork() -> None:
    """One thread in a forked process: GNU OpenMP's do not survive a fork, and waiting for them would last for ever."""
    if _forked:
        torch.set_num_threads(1)


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
