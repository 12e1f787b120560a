"""The mixer's blocks as one operator on the CPU, and what dropout draws its masks from.

``MixerBlock`` in model.py is the formula in plain PyTorch, for every device and precision. On the CPU an operator of
our own does the same for all blocks in one call, forward and backward, without ever writing the wide hidden layers
to memory (``fused.cpp``). It is compiled on first use, which takes some seconds, and kept in the user's cache. Where
it cannot be, the plain formula stands in and one log line says why. ``MIXER_FUSED=0`` in the environment asks for
the plain formula.
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

import filelock
import torch
from torch import Tensor, nn

CHANNELS = 16  # what the operator is written for
log = logging.getLogger("mixer")


def mixing(blocks: nn.ModuleList, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """The ``MixerBlock``s, one after the other: (B, S, C) -> (B, S, C).

    ``p`` is the probability of dropping an element, 0 outside training; ``seeds``, int64 (blocks, 2), decide which:
    the same seeds give the same masks on every device, by the operator and by the plain formula.

    One call for all blocks, because what PyTorch does around a call takes a third of a millisecond while the
    processor's caches are full of images: with a call for each MLP that was a tenth of a training step.
    """
    parameters = list(blocks.parameters())
    if _operator_serves(x, parameters):
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return fused(x, parameters, seeds, p, bfloat16)
    for block, block_seeds in zip(blocks, seeds, strict=True):
        x = block(x, block_seeds, p)
    return x


def fused(x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool) -> Tensor:
    """The blocks by the operator, ``torch.ops.mixer.mixing``: float32 tensors on the CPU, 16 channels.

    ``parameters``: twelve a block, in the order in which ``MixerBlock`` has them.

    ``bfloat16`` multiplies in bfloat16 and adds in float32, where the CPU can; GELU is then within 1e-4, the gradients
    of each of a block's MLPs within 1 % (relative error of the norm). Otherwise within 1e-6, and gradients 1e-5.
    Output and gradients are the same bit for bit on any number of threads.
    """
    return torch.ops.mixer.mixing(x, parameters, seeds, p, bfloat16, torch.is_grad_enabled())[0]


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


def _operator_serves(x: Tensor, parameters: list[Tensor]) -> bool:
    return (
        _wanted
        and x.device.type == "cpu"
        and len(parameters) > 0
        and x.ndim == 3
        and x.shape[2] == CHANNELS
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, *parameters))
        and _available()
    )


@torch.compiler.assume_constant_result
def _available() -> bool:
    return library() is not None


# ---------------------------------------------------------------- dropout


def dropout(y: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """``y`` with elements dropped with probability ``p``, by ``seed`` and ``stream``, and the others scaled up."""
    return y * dropout_scale(y.shape, p, seed, stream).to(y.dtype) if p > 0 else y


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


class _Chain(ctypes.Structure):
    """``Chain`` in fused.cpp. It keeps its arrays alive, but not the tensors that they point to."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("hidden", ctypes.POINTER(ctypes.c_int64)),
        ("seeds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mixings", "batch", "patches")),
        *((name, ctypes.c_int32) for name in ("threshold", "threads", "bfloat16")),
    )

    def __init__(self, x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool):
        hidden = [w1.shape[0] for w1 in parameters[2::6]]
        super().__init__(
            x.data_ptr(),
            _pointers(parameters),
            (ctypes.c_int64 * len(hidden))(*hidden),
            seeds.data_ptr(),
            len(hidden),
            *x.shape[:2],
            _threshold(p),
            _threads or torch.get_num_threads(),
            bfloat16,
        )


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


@torch.library.custom_op("mixer::mixing", mutates_args=(), device_types="cpu")
def _mixing(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the outputs of all MLPs but the last, if they are to be kept for the backward pass."""
    x, seeds, *parameters = _contiguous([x, seeds, *parameters])
    output, stream = torch.empty_like(x), x.new_empty(_stream_shape(x, parameters, keep))
    if x.numel():
        chain = _Chain(x, parameters, seeds, p, bfloat16)
        library().mixing_forward(chain, stream.data_ptr() if keep else None, output.data_ptr())
    return output, stream


@torch.library.custom_op("mixer::mixing_backward", mutates_args=(), device_types="cpu")
def _mixing_backward(
    grad: Tensor, x: Tensor, stream: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool
) -> list[Tensor]:
    """The gradients of x and of the parameters."""
    grad, x, seeds, *parameters = _contiguous([grad, x, seeds, *parameters])
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    gradients = [torch.empty_like(t) for t in (x, *parameters)]
    chain = _Chain(x, parameters, seeds, p, bfloat16)
    library().mixing_backward(chain, stream.data_ptr(), grad.data_ptr(), _pointers(gradients))
    return gradients


@_mixing.register_fake
def _(x, parameters, seeds, p, bfloat16, keep):
    return x.new_empty(x.shape), x.new_empty(_stream_shape(x, parameters, keep))


@_mixing_backward.register_fake
def _(grad, x, stream, parameters, *_):
    return [t.new_empty(t.shape) for t in (x, *parameters)]


def _stream_shape(x: Tensor, parameters: list[Tensor], keep: bool) -> tuple[int, ...]:
    return (len(parameters) // 6 - 1 if keep else 0, *x.shape)


def _save(ctx, inputs, output) -> None:
    x, parameters, seeds, ctx.p, ctx.bfloat16, keep = inputs
    assert keep, "without the outputs that it was told not to keep, there is no backward pass"
    ctx.save_for_backward(x, output[1], seeds, *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    x, stream, seeds, *parameters = ctx.saved_tensors
    d_x, *gradients = torch.ops.mixer.mixing_backward(grad, x, stream, parameters, seeds, ctx.p, ctx.bfloat16)
    return d_x, gradients, None, None, None, None


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
    pointer, chain = ctypes.c_void_p, ctypes.POINTER(_Chain)
    library.mixing_forward.argtypes = [chain, pointer, pointer]
    library.mixing_backward.argtypes = [chain, pointer, pointer, pointer]
    library.mixing_gelu.argtypes = [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int]
    for function in (library.mixing_forward, library.mixing_backward, library.mixing_gelu):
        function.restype = None
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
