"""PyTorch binding of ``fused.cpp``: all blocks of a mixer, forward and backward, as one CPU operator.

``MIXER_FUSED=0`` in the environment switches it off.
"""

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import threadpoolctl
import torch
from torch import Tensor, nn

from mixer.kernels import build

CHANNELS = 64  # of the residual stream, at most; as in fused.cpp
EPS = 1e-6  # of fused.cpp's LayerNorms
PARAMETERS = 12  # per block
_LAYERS = ("patches_norm", "patches_in", "patches_out", "channels_norm", "channels_in", "channels_out")
WANTED = os.environ.get("MIXER_FUSED", "1").strip().lower() not in ("0", "no", "off", "false")


def parameters_of(blocks: Sequence[nn.Module]) -> list[Tensor]:
    """List the blocks' parameters in the operator's order: weight and bias of each layer, PARAMETERS per block.

    Raises ValueError naming a layer that the operator does not support.
    """
    parameters = []
    for number, block in enumerate(blocks):
        for name in _LAYERS:
            layer, where = getattr(block, name), f"blocks.{number}.{name}"
            if type(layer) is not (nn.LayerNorm if "norm" in name else nn.Linear):
                raise ValueError(f"{where} is a {type(layer).__name__}")
            if "norm" in name and layer.eps != EPS:
                raise ValueError(f"{where} has an eps of {layer.eps:g}, not {EPS:g}")
            if layer.bias is None:
                raise ValueError(f"{where} has no bias")
            parameters += [layer.weight, layer.bias]
    return parameters


def fused_blocks(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip: bool = True, gelu: str = "exact"
) -> Tensor:
    """Compute all blocks: (B, S, C) -> (B, S, C), float32 on the CPU, with first derivatives, C <= CHANNELS.

    ``parameters``: from :func:`parameters_of`. ``p``: dropout probability, 0 outside training. ``seeds``: int64
    (blocks, 4), for the same masks as in ``MixerBlock``. ``gelu``: "exact" or "tanh". ``bfloat16``: multiply in
    bfloat16 and add in float32. GELU is then within 1e-4 and each MLP's gradients within 1 % (relative error of the
    norm); in float32, within 1e-6 and 1e-5.

    Output and gradients are bit-identical on any number of threads. Raises ValueError for tensors that do not fit
    together or are too large, RuntimeError if the operator is not available.
    """
    check(x, parameters, seeds)
    if not available(bfloat16):
        raise RuntimeError("the fused operator is not available here: call the model itself")
    return _Blocks.apply((p, bfloat16, skip, gelu), torch.is_grad_enabled(), x, seeds, *parameters)


def threshold(p: float) -> int:
    """Number of the 65536 random values that drop an element."""
    return min(round(p * 65536), 65535)


def dropout_scale(shape: torch.Size, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``dropout.dropout_scale`` in this dtype on the CPU, many times as fast; needs the operator."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return dropout_scale(shape, p, seed, torch.float32).to(dtype)
    scale, steps = torch.empty(shape, dtype=dtype), threshold(p)
    kept = torch.tensor(65536 / (65536 - steps), dtype=dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    if scale.numel():
        sizes = math.prod(shape[:-1]), shape[-1], steps
        library().mixing_dropout(scale.data_ptr(), *sizes, int(seed), int(kept), dtype.itemsize, threads())
    return scale


def check(x: Tensor, parameters: list[Tensor], seeds: Tensor) -> None:
    """Raise ValueError unless all tensors have the shape and type that the compiled code assumes."""
    count, rest = divmod(len(parameters), PARAMETERS)
    if rest or not count:
        raise ValueError(f"each block has {PARAMETERS} parameters, so {len(parameters)} do not make up whole blocks")
    if seeds.dtype is not torch.int64 or seeds.shape != (count, 4) or not seeds.is_cpu:
        raise ValueError(f"seeds have to be int64 ({count}, 4) on the CPU, not {seeds.dtype} {tuple(seeds.shape)}")
    for tensor in (x, *parameters):
        if tensor.dtype is not torch.float32 or tensor.layout is not torch.strided or not tensor.is_cpu:
            raise ValueError(f"tensors have to be float32 on the CPU, not {tensor.dtype} on {tensor.device}")
    if x.ndim != 3 or not 1 <= x.shape[2] <= CHANNELS:
        raise ValueError(f"x has to be (batch, patches, 1 to {CHANNELS} channels), not {tuple(x.shape)}")
    patches, channels = x.shape[1:]
    for i in range(0, len(parameters), 6):
        shapes = [tuple(tensor.shape) for tensor in parameters[i : i + 6]]
        size, hidden = channels if i % PARAMETERS else patches, shapes[2][0]
        if shapes != [(channels,), (channels,), (hidden, size), (hidden,), (size, hidden), (size,)]:
            raise ValueError(f"the parameters of an MLP do not fit {size} features: {shapes}")
        # Counts in fused.cpp and dropout's row numbers have 32 bits.
        if max(size, CHANNELS) * max(hidden, 128) >= 2**30 or max(size, CHANNELS) * x.shape[0] >= 2**31:
            raise ValueError(f"{tuple(x.shape)} with {hidden} hidden units is too large")


def available(bfloat16: bool = False) -> bool:
    """Whether the operator is available, and with ``bfloat16`` also multiplies in bfloat16."""
    return WANTED and library() is not None and (not bfloat16 or bool(library().mixing_has_bfloat16()))


def multiplies_in_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16, and so does the operator if there is one."""
    if not available():
        return torch.cpu._is_avx512_bf16_supported()
    return available(bfloat16=True)


# Threads

_threads: ContextVar[int | None] = ContextVar("mixer's threads", default=None)


def threads() -> int:
    """Number of threads of the operator."""
    return _threads.get() or torch.get_num_threads()


@contextlib.contextmanager
def threads_for_the_operator() -> Iterator[None]:
    """Leave PyTorch's threads to the operator and limit PyTorch's own operators to one thread.

    Little work is left to those, and some of it (the stem's and LayerNorm's gradients) would be rounded differently on
    another number of threads. Moreover, GNU OpenMP's threads spin while they wait, which makes a step several times
    slower once another process needs the core. The limit applies to the calling thread only; ``torch.set_num_threads``
    would affect every thread started meanwhile. Does nothing without the operator.
    """
    if not available():
        yield
        return
    before = _threads.set(threads())  # first, since asking PyTorch sets up this thread, which would undo the limit
    openmp, set_mkl = _thread_pools()
    mkl = set_mkl(1)
    try:
        with openmp.limit(limits=1, user_api="openmp"):
            yield
    finally:
        set_mkl(mkl)
        _threads.reset(before)


@functools.cache
def _thread_pools() -> tuple[threadpoolctl.ThreadpoolController, Callable[[int], int]]:
    """Return the setters of the calling thread's number of threads in OpenMP and, if PyTorch has it, in MKL."""
    set_mkl = None
    with contextlib.suppress(OSError, AttributeError):
        set_mkl = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    return threadpoolctl.ThreadpoolController(), set_mkl or (lambda _: 0)


# The compiled code


class _Chain(ctypes.Structure):
    """``Chain`` in fused.cpp. It keeps its arrays alive, but not the tensors they point to."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("hidden", ctypes.POINTER(ctypes.c_int64)),
        ("seeds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mixings", "batch", "patches", "channels")),
        *((name, ctypes.c_int32) for name in ("threshold", "skip", "tanh", "threads", "bfloat16")),
    )


def _chain(settings: tuple[float, bool, bool, str], x: Tensor, seeds: Tensor, parameters: Sequence[Tensor]) -> _Chain:
    p, bfloat16, skip, gelu = settings
    hidden = [w1.shape[0] for w1 in parameters[2::6]]
    sizes = (ctypes.c_int64 * len(hidden))(*hidden)
    counts = len(hidden), *x.shape
    switches = threshold(p), skip, gelu == "tanh", threads(), bfloat16
    return _Chain(x.data_ptr(), _pointers(parameters), sizes, seeds.data_ptr(), *counts, *switches)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


class _Blocks(torch.autograd.Function):
    """One call for all blocks. PyTorch's overhead per call is a third of a millisecond while the caches are full of
    images; with one call per MLP it was a tenth of a training step."""

    @staticmethod
    def forward(ctx: Any, settings: tuple, keep: bool, x: Tensor, seeds: Tensor, *parameters: Tensor) -> Tensor:
        x, seeds, *parameters = (tensor.contiguous() for tensor in (x, seeds, *parameters))
        # The outputs of all MLPs but the last, from which the backward pass recomputes the rest.
        stream = x.new_empty((len(parameters) // 6 - 1, *x.shape)) if keep else None
        output = torch.empty_like(x)
        if x.numel():
            chain = _chain(settings, x, seeds, parameters)
            library().mixing_forward(chain, stream.data_ptr() if keep else None, output.data_ptr())
        if keep:
            ctx.settings = settings
            ctx.save_for_backward(x, stream, seeds, *parameters)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: once_differentiable would return 0 for a constant grad
            raise RuntimeError("the fused operator has first derivatives only: call the model itself for higher ones")
        x, stream, seeds, *parameters = ctx.saved_tensors
        grad = grad.contiguous()
        if not x.numel():
            return None, None, torch.zeros_like(x), None, *map(torch.zeros_like, parameters)
        d_x, *gradients = (torch.empty_like(tensor) for tensor in (x, *parameters))
        chain = _chain(ctx.settings, x, seeds, parameters)
        library().mixing_backward(chain, stream.data_ptr(), grad.data_ptr(), _pointers([d_x, *gradients]))
        return None, None, d_x, None, *gradients


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operator with its functions' types; None if it cannot be built."""
    compiled = build.library()
    if compiled is None:
        return None
    pointer, chain = ctypes.c_void_p, ctypes.POINTER(_Chain)
    compiled.mixing_forward.argtypes = [chain, pointer, pointer]
    compiled.mixing_backward.argtypes = [chain, pointer, pointer, pointer]
    count, number = ctypes.c_int64, ctypes.c_int
    compiled.mixing_dropout.argtypes = [pointer, count, count, number, ctypes.c_int64, ctypes.c_uint32, number, number]
    compiled.mixing_gelu.argtypes = [pointer, pointer, pointer, count, number, number]
    for function in (compiled.mixing_forward, compiled.mixing_backward, compiled.mixing_dropout, compiled.mixing_gelu):
        function.restype = None
    return compiled
