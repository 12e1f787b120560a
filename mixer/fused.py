"""The MLP of a mixer block, with its LayerNorm, dropout and skip connection.

The formula stands here in plain PyTorch, for every device and precision. On the CPU an operator of our own does the
same, forward and backward, without ever writing the wide hidden layer to memory (``fused.cpp``). It is compiled on
first use, which takes some seconds, and kept in the user's cache. Where it cannot be, the plain formula stands in
and one log line says why. ``MIXER_FUSED=0`` in the environment asks for the plain formula.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import filelock
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Along = Literal["patches", "channels"]
CHANNELS = 16  # what the operator is written for
log = logging.getLogger("mixer")


def mixing(
    x: Tensor, norm: nn.LayerNorm, w_in: nn.Linear, w_out: nn.Linear, along: Along, p: float, seed: Tensor
) -> Tensor:
    """X + drop(W_out · drop(gelu(W_in · LayerNorm(X)))), half of equation (1) of the paper.

    x: (B, S, C). The MLP works along the patches S or along the channels C. ``p`` is the probability of dropping
    an element, 0 outside training; ``seed``, an int64 scalar tensor, decides which: the same seed gives the same
    mask on every device, by the operator and by the plain formula.
    """
    parameters = (norm.weight, norm.bias, w_in.weight, w_in.bias, w_out.weight, w_out.bias)
    over_patches = along == "patches"
    if _operator_serves(x, parameters):
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return fused(x, *parameters, seed, over_patches, p, bfloat16)
    return plain(x, *parameters, seed, over_patches, p)


def plain(x, gamma, beta, w1, b1, w2, b2, seed: Tensor, over_patches: bool, p: float) -> Tensor:
    """The formula in plain PyTorch, on any device and in any precision."""
    y = F.layer_norm(x, gamma.shape, gamma, beta, eps=1e-6)
    if over_patches:
        y = y.transpose(1, 2)
    hidden = F.gelu(F.linear(y, w1, b1))
    if p > 0:
        hidden = hidden * dropout_scale(hidden.shape, p, seed, stream=0).to(hidden.dtype)
    y = F.linear(hidden, w2, b2)
    if over_patches:
        y = y.transpose(1, 2)
    if p > 0:
        y = y * dropout_scale(y.shape, p, seed, stream=1).to(y.dtype)
    return x + y


def fused(x, gamma, beta, w1, b1, w2, b2, seed: Tensor, over_patches: bool, p: float, bfloat16: bool) -> Tensor:
    """The formula as one operator, ``torch.ops.mixer.mixing``: float32 tensors on the CPU, 16 channels.

    ``bfloat16`` multiplies in bfloat16 and adds in float32, where the CPU can; GELU is then within 1e-4, a
    gradient within 1 % (relative error of its norm). Otherwise GELU is within 1e-6 and a gradient within 1e-5.
    Output and gradients are the same bit for bit on any number of threads.
    """
    return torch.ops.mixer.mixing(x.contiguous(), gamma, beta, w1, b1, w2, b2, seed, over_patches, p, bfloat16)


def path(device: torch.device | str, precision: str) -> str:
    """What ``mixing`` runs on a device in "float32" or "bfloat16": "fused" or "plain"."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is float32 or bfloat16, not {precision!r}")
    return "fused" if torch.device(device).type == "cpu" and _wanted and _available() else "plain"


@contextlib.contextmanager
def plain_only() -> Iterator[None]:
    """Within it, ``mixing`` is the plain formula."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


@contextlib.contextmanager
def threads_for_the_operator() -> Iterator[None]:
    """Within it, the operator keeps the threads that PyTorch had, and PyTorch's own operators take one.

    What is left to them is little, and some of it (the stem's and LayerNorm's gradients) would come out differently
    on another number of threads. GNU OpenMP's threads, besides, spin while they wait, which makes a step several
    times slower as soon as another process wants the core. Does nothing where the plain formula runs.
    """
    global _threads
    threads = torch.get_num_threads()
    if _threads is not None or path("cpu", "float32") == "plain":
        yield
        return
    _threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _threads = None
        torch.set_num_threads(threads)


_wanted = os.environ.get("MIXER_FUSED", "1") != "0"
_threads: int | None = None


def _operator_serves(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    return (
        _wanted
        and x.device.type == "cpu"
        and x.ndim == 3
        and x.shape[2] == CHANNELS
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, *parameters))
        and _available()
    )


@torch.compiler.assume_constant_result
def _available() -> bool:
    return library() is not None


# ---------------------------------------------------------------- dropout


def dropout_scale(shape: torch.Size, p: float, seed: Tensor, stream: int) -> Tensor:
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p), float32 of the given shape.

    A counter-based generator: two elements share a 32-bit word, which mixes the sum of a hash of the row and a hash
    of the column. So the same mask comes out on every device, in every process, on any number of threads, and
    nothing has to be stored for the backward pass. ``p`` is rounded to a multiple of 1/65536.
    """
    key = seed + stream * _signed(0x9E3779B97F4A7C15)
    for _ in range(2):
        key = (key ^ _shr(key, 32, 64)) * _signed(0xD6E8FEB86659FD93)
    rows, pairs = math.prod(shape[:-1]), (shape[-1] + 1) // 2
    index = torch.arange(max(rows, pairs), dtype=torch.int32, device=seed.device)
    row, column = _hash(index[:rows], key), _hash(index[:pairs] - (1 << 31), key)
    word = _mix(row[:, None] + column)
    halves = torch.stack([word & 0xFFFF, _shr(word, 16)], dim=-1).view(rows, 2 * pairs)[:, : shape[-1]]
    threshold = _threshold(p)
    return (halves >= threshold).to(torch.float32).mul_(65536 / (65536 - threshold)).view(shape)


def _hash(index: Tensor, key: Tensor) -> Tensor:
    word = index ^ key.to(torch.int32)
    return _mix((word ^ _shr(word, 16)) * 0x7FEB352D ^ (key >> 32).to(torch.int32))


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shr(word, 15)) * _signed(0x846CA68B, 32)
    return word ^ _shr(word, 16)


def _threshold(p: float) -> int:
    return min(round(p * 65536), 65535)


def _shr(word: Tensor, bits: int, width: int = 32) -> Tensor:
    """A logical shift right of words that PyTorch keeps as signed."""
    return (word >> bits) & ((1 << (width - bits)) - 1)


def _signed(factor: int, width: int = 64) -> int:
    """The signed number of the same bits, with which PyTorch's product has the same low bits."""
    return factor - (1 << width) if factor >> (width - 1) else factor


# ---------------------------------------------------------------- the operator


class _Call(ctypes.Structure):
    """``Call`` in fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "w1", "b1", "w2", "b2", "grad")),
        *((name, ctypes.c_void_p) for name in ("out", "d_gamma", "d_beta", "d_w1", "d_b1", "d_w2", "d_b2")),
        ("seed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "patches", "hidden")),
        *((name, ctypes.c_int32) for name in ("over_patches", "threshold", "threads")),
    )


def _run(inputs: tuple[Tensor, ...], seed: Tensor, over_patches: bool, p: float, bfloat16: bool, grad=None):
    inputs = [t.contiguous() for t in inputs]
    outputs = [torch.empty_like(t) for t in (inputs if grad is not None else inputs[:1])]
    x, w1 = inputs[0], inputs[3]
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in outputs]
    pointers = [t.data_ptr() for t in inputs]
    pointers += [None if grad is None else (grad := grad.contiguous()).data_ptr()]
    pointers += [t.data_ptr() for t in outputs] + [None] * (7 - len(outputs))
    sizes = (x.shape[0], x.shape[1], w1.shape[0])
    call = _Call(*pointers, seed.data_ptr(), *sizes, over_patches, _threshold(p), _threads or torch.get_num_threads())
    library().mixing_run(ctypes.byref(call), bfloat16, grad is not None)
    return outputs


@torch.library.custom_op("mixer::mixing", mutates_args=(), device_types="cpu")
def _mixing(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    seed: Tensor,
    over_patches: bool,
    p: float,
    bfloat16: bool,
) -> Tensor:
    return _run((x, gamma, beta, w1, b1, w2, b2), seed, over_patches, p, bfloat16)[0]


@torch.library.custom_op("mixer::mixing_backward", mutates_args=(), device_types="cpu")
def _mixing_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    seed: Tensor,
    over_patches: bool,
    p: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_run((x, gamma, beta, w1, b1, w2, b2), seed, over_patches, p, bfloat16, grad))


@_mixing.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@_mixing_backward.register_fake
def _(grad, x, gamma, beta, w1, b1, w2, b2, *_):
    return tuple(t.new_empty(t.shape) for t in (x, gamma, beta, w1, b1, w2, b2))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.over_patches, ctx.p, ctx.bfloat16 = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    gradients = torch.ops.mixer.mixing_backward(grad, *ctx.saved_tensors, ctx.over_patches, ctx.p, ctx.bfloat16)
    return *gradients, None, None, None, None


_mixing.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------- building


SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")  # whichever the compiler knows


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operator, built if need be; None, and a log line with the reason, when it cannot be had."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().rstrip(".")
        log.warning("The mixer's MLP runs as the plain formula, which is several times slower: %s.", reason)
        return None
    library.mixing_run.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.mixing_run.restype = None
    library.mixing_gelu.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
    library.mixing_gelu.restype = None
    return library


def _built() -> Path:
    """The library's file, named after all that decides what it is, so that it never goes stale."""
    compiler = _compiler()
    content = "\n".join([SOURCE.read_text(), compiler, *FLAGS, *NATIVE, _cpu()])
    name = f"fused-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixer"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if (cache / name).exists():
            return cache / name
        # Released by the system when its process dies, so a killed build holds nobody up.
        with filelock.FileLock(cache / f"{name}.lock"):
            if not (cache / name).exists():
                _compile(compiler, cache / name)
            return cache / name
    except OSError:  # no home, read-only, full: build for this process alone
        return _compile(compiler, Path(_temporary().name) / name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mixer-")


def _compile(compiler: str, target: Path) -> Path:
    incoming = target.with_suffix(".incoming")
    for native in NATIVE:
        command = [compiler, *FLAGS, native, str(SOURCE), "-o", str(incoming)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            incoming.replace(target)  # there is a whole library or none
            return target
    first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
    raise subprocess.SubprocessError(f"{compiler} cannot compile {SOURCE.name} ({first})")


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"there is no C++ compiler ({', '.join(names)})")


def _cpu() -> str:
    """What the compiler's "native" depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
