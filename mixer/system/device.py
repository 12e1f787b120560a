"""A run's device and precision, and its isolation from the caller's PyTorch settings."""

import contextlib
import os
import threading
from collections.abc import Iterator
from logging import getLogger

import torch
from torch import nn

from mixer.kernels import fused

log = getLogger("mixer")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision on a device, without a cache of weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def find_device(name: torch.device | str | None = None) -> torch.device:
    """Return the named device; by default CUDA, else Apple's MPS, else the CPU. Raises ValueError if there is none.

    By default, a GPU that cannot compute (too old, busy, out of memory) is skipped with one log line.
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
    except (RuntimeError, AssertionError, TypeError):  # PyTorch's errors for a missing device
        pass
    raise ValueError(f"there is no device {str(name)!r} here: give cpu, cuda or mps, or none for the first available")


def find_precision(device: torch.device, wanted: str | None = None) -> str:
    """Return ``wanted``; by default "bfloat16" if the hardware computes in it without emulation, else "float32".

    Raises ValueError for any other precision, and for bfloat16 on a CPU without it.
    """
    if wanted not in (None, "bfloat16", "float32"):
        raise ValueError(f"precision must be bfloat16 or float32, not {wanted!r}")
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
    """Shield a run from its caller's no_grad, autocast and default device."""
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))  # allows gradients too
        # Autocast empties its cache only when the outermost context ends, so it would keep outdated weights here.
        contexts.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        if device.type == "cuda":  # deterministic convolutions, and float32 without TF32
            contexts.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if torch.get_default_device().type != "cpu":
            contexts.enter_context(torch.device("cpu"))  # where the run's generator is
        yield


_SHARED = threading.RLock()  # PyTorch's own generators, by all threads of the process


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed every generator that a custom model may draw from: its own ones, and PyTorch's, which are restored.

    One thread at a time, so that such models in several threads do not draw from each other's numbers.
    """
    with _SHARED, torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for value in (value for module in model.modules() for value in vars(module).values()):
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)
        yield


_IMPORTED_BY = os.getpid()


def threads_after_fork() -> None:
    """Use one thread in a forked process: GNU OpenMP's do not survive a fork, and waiting for them would never end."""
    if os.getpid() != _IMPORTED_BY:
        torch.set_num_threads(1)
