"""The mixer's blocks as one operator on the CPU.

``MixerBlock`` in model.py is the formula in plain PyTorch, for every device and precision. On the CPU an operator of
our own does the same for all blocks in one call, forward and backward, without ever writing the wide hidden layers
to memory (``fused.cpp``). It is compiled on first use (``build.py``), which takes some seconds. Where it cannot be,
the plain formula stands in and one log line says why. ``MIXER_FUSED=0`` in the environment asks for the plain formula.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import threadpoolctl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mixer import build
from mixer.dropout import Dropout, threshold

CHANNELS = 16  # what the operator is written for
EPS = 1e-6  # of its LayerNorms
_WANTED = os.environ.get("MIXER_FUSED", "1") != "0"


def mixing(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """The blocks, one after the other: (B, S, C) -> (B, S, C).

    By the operator where every block is exactly what the operator computes, else by each block's own ``forward``.
    One call for all blocks, because what PyTorch does around a call takes a third of a millisecond while the
    processor's caches are full of images: with a call for each MLP that was a tenth of a training step.
    """
    bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    parameters = _what_the_operator_serves(blocks, x)
    if parameters and _available(bfloat16):
        dropout, count = blocks[0].dropout, len(blocks)
        p = dropout.p if dropout.active else 0.0
        seeds = dropout.seeds(count, 4) if p else torch.zeros(count, 4, dtype=torch.int64)
        return fused(x, parameters, seeds, p, bfloat16, blocks[0].skip_connections)
    for block in blocks:
        x = block(x)
    return x


def fused(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip_connections: bool = True
) -> Tensor:
    """The blocks by the operator, ``torch.ops.mixer.mixing``: (B, S, 16) -> (B, S, 16), float32 on the CPU.

    ``parameters``: twelve a block, in the order in which ``MixerBlock`` has them. ``p``: the probability with which
    dropout drops an element, 0 outside training; ``seeds``, int64 (blocks, 4), decide which: the same seeds give the
    same masks as in ``MixerBlock``.

    ``bfloat16`` multiplies in bfloat16 and adds in float32, where the CPU can; GELU is then within 1e-4, the gradients
    of each of a block's MLPs within 1 % (relative error of the norm). Otherwise within 1e-6, and gradients 1e-5.
    Output and gradients are the same bit for bit on any number of threads.

    Raises ValueError for tensors that do not fit together, RuntimeError where the operator cannot be had.
    """
    keep = torch.is_grad_enabled()
    return torch.ops.mixer.mixing(x, parameters, seeds, p, bfloat16, skip_connections, keep)[0]


def path(blocks: nn.ModuleList, device: torch.device, precision: str) -> str:
    """What ``mixing`` runs for these blocks on a device, in "float32" or "bfloat16": "fused" or "plain"."""
    if device.type != "cpu" or not _available(precision == "bfloat16"):
        return "plain"
    patches = blocks[0].patches_in.in_features
    return "fused" if _what_the_operator_serves(blocks, torch.zeros(1, patches, CHANNELS)) else "plain"


def multiplies_in_bfloat16() -> bool:
    """Whether this machine's processor does, and the compiler has built the operator for it (or there is none)."""
    if _library() is None or not _WANTED:
        return torch.cpu._is_avx512_bf16_supported()
    return bool(_library().mixing_has_bfloat16())


# ---------------------------------------------------------------- threads


_threads: ContextVar[int | None] = ContextVar("mixer's threads", default=None)


def threads() -> int:
    """On how many threads the operator runs."""
    return _threads.get() or torch.get_num_threads()


@contextlib.contextmanager
def threads_for_the_operator() -> Iterator[None]:
    """Within it, the operator keeps the threads that PyTorch had, and PyTorch's own operators take one.

    What is left to them is little, and some of it (the stem's and LayerNorm's gradients) would come out differently
    on another number of threads. GNU OpenMP's threads, besides, spin while they wait, which makes a step several
    times slower as soon as another process wants the core. Only the calling thread is concerned:
    ``torch.set_num_threads`` would reach all those that are started meanwhile. Does nothing without the operator.
    """
    if not _available(False):
        yield
        return
    before = _threads.set(threads())  # asking PyTorch also makes it set up this thread, which would undo the limit
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
    """What sets the calling thread's number of threads in OpenMP, and in MKL where PyTorch is built with it."""
    set_mkl = None
    with contextlib.suppress(OSError, AttributeError):
        set_mkl = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    return threadpoolctl.ThreadpoolController(), set_mkl or (lambda _: 0)


# ---------------------------------------------------------------- what the operator serves


def operator_computes(block: type[nn.Module]) -> type[nn.Module]:
    """Decorates the class of blocks that the operator computes: exactly this class with exactly this ``forward``."""
    _FORWARD[block] = block.forward
    return block


_FORWARD = {cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, Dropout)}
_GELU = F.gelu


def _what_the_operator_serves(blocks: nn.ModuleList, x: Tensor) -> list[Tensor] | None:
    """The blocks' parameters, where the operator gives what the blocks' own ``forward`` would; else None.

    Asked at every call, since a model can be changed at any time; it takes a tenth of a millisecond.
    """
    if not (
        _WANTED
        and type(x) is Tensor
        and x.ndim == 3
        and _is_plain(x)
        and len(blocks) > 0
        and F.gelu is _GELU
        and not _has_any_global_hook()
        and not _is_transformed()
    ):
        return None
    first, parameters = blocks[0], []
    for block in blocks:
        of_block = _parameters_of_a_block_as_written(block, x.shape[1])
        if not of_block or block.skip_connections is not first.skip_connections:
            return None
        if not _drop_alike(block.dropout, first.dropout):
            return None
        parameters += of_block
    # One parameter in two places is another model than the operator's, whatever else is as it was.
    return parameters if len(set(parameters)) == len(parameters) else None


def _parameters_of_a_block_as_written(block: nn.Module, patches: int) -> list[Tensor] | None:
    """None unless block and layers are exactly of the classes, sizes and settings that the operator knows."""
    if type(block) not in _FORWARD or not _is_untouched(block) or type(block.skip_connections) is not bool:
        return None
    parameters = []
    for features, norm, into, out in (
        (patches, block.patches_norm, block.patches_in, block.patches_out),
        (CHANNELS, block.channels_norm, block.channels_in, block.channels_out),
    ):
        if not (type(norm) is nn.LayerNorm and type(into) is nn.Linear and type(out) is nn.Linear):
            return None
        if not (_is_untouched(norm) and _is_untouched(into) and _is_untouched(out)):
            return None
        if norm.normalized_shape != (CHANNELS,) or norm.eps != EPS:
            return None
        of_mlp = [norm.weight, norm.bias, into.weight, into.bias, out.weight, out.bias]
        if not all(type(tensor) in (nn.Parameter, Tensor) and _is_plain(tensor) for tensor in of_mlp):
            return None
        hidden = out.weight.shape[-1:].numel()
        shapes = ((CHANNELS,), (CHANNELS,), (hidden, features), (hidden,), (features, hidden), (features,))
        if hidden == 0 or any(tensor.shape != shape for tensor, shape in zip(of_mlp, shapes, strict=True)):
            return None
        parameters += of_mlp
    return parameters


def _is_untouched(module: nn.Module) -> bool:
    """Whether nothing stands in for the ``forward`` of its class, and no hook hangs on it (pruning, say, is a hook)."""
    own = module.__dict__
    return (
        type(module).forward is _FORWARD[type(module)]
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
        and not own["_backward_pre_hooks"]
    )


def _drop_alike(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not Dropout or type(other) is not Dropout or not _is_untouched(one):
        return False
    if not (one.active or other.active):
        return True
    return one.active == other.active and one.p == other.p and one.p < 1 and one.generator is other.generator


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided


def _is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which the operator has no rules for."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _available(bfloat16: bool) -> bool:
    """Whether there is an operator, and one that really multiplies in bfloat16 where that is asked for."""
    return _WANTED and _library() is not None and (not bfloat16 or bool(_library().mixing_has_bfloat16()))


# ---------------------------------------------------------------- the operator


class _Chain(ctypes.Structure):
    """``Chain`` in fused.cpp. It keeps its arrays alive, but not the tensors that they point to."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("hidden", ctypes.POINTER(ctypes.c_int64)),
        ("seeds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mixings", "batch", "patches")),
        *((name, ctypes.c_int32) for name in ("threshold", "skip", "threads", "bfloat16")),
    )

    def __init__(self, x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip: bool):
        hidden = [w1.shape[0] for w1 in parameters[2::6]]
        super().__init__(
            x.data_ptr(),
            _pointers(parameters),
            (ctypes.c_int64 * len(hidden))(*hidden),
            seeds.data_ptr(),
            len(hidden),
            *x.shape[:2],
            threshold(p),
            skip,
            threads(),
            bfloat16,
        )


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _check(x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool) -> None:
    """Raises ValueError unless everything is what the library takes it to be."""

    def check(tensor: Tensor, name: str, *shape: int) -> None:
        if not _is_plain(tensor):
            raise ValueError(f"{name} has to be float32 on the CPU, not {tensor.dtype} on {tensor.device}")
        if tensor.shape != shape:
            raise ValueError(f"{name} has to be {shape}, not {tuple(tensor.shape)}")

    if x.ndim != 3:
        raise ValueError(f"x has to be (batch, patches, {CHANNELS}), not {tuple(x.shape)}")
    check(x, "x", *x.shape[:2], CHANNELS)
    if not parameters or len(parameters) % 12:
        raise ValueError(f"there have to be twelve parameters a block, not {len(parameters)} in all")
    for i in range(0, len(parameters), 6):
        features, names = (CHANNELS, "channel") if i % 12 else (x.shape[1], "token")
        block = f"of block {i // 12}'s {names} mixing"
        gamma, beta, w1, b1, w2, b2 = parameters[i : i + 6]
        if w1.ndim != 2 or w1.shape[0] == 0 or features == 0:
            raise ValueError(f"W1 {block} has to be (hidden units, {features}), not {tuple(w1.shape)}")
        hidden = w1.shape[0]
        check(gamma, f"LayerNorm's weight {block}", CHANNELS)
        check(beta, f"LayerNorm's bias {block}", CHANNELS)
        check(w1, f"W1 {block}", hidden, features)
        check(b1, f"b1 {block}", hidden)
        check(w2, f"W2 {block}", features, hidden)
        check(b2, f"b2 {block}", features)
    if seeds.dtype != torch.int64 or seeds.device.type != "cpu" or seeds.shape != (len(parameters) // 12, 4):
        raise ValueError(f"seeds have to be int64 (blocks, 4) on the CPU, not {seeds.dtype} {tuple(seeds.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p is a probability below 1, not {p}")
    if _library() is None:
        raise RuntimeError("the operator could not be built here: use MixerBlock, the plain formula")
    if bfloat16 and not _library().mixing_has_bfloat16():
        raise ValueError("the operator was built without bfloat16, which this compiler or processor lacks")


@torch.library.custom_op("mixer::mixing", mutates_args=(), device_types="cpu")
def _mixing(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the outputs of all MLPs but the last, if they are to be kept for the backward pass."""
    _check(x, parameters, seeds, p, bfloat16)
    x, seeds, *parameters = _contiguous([x, seeds, *parameters])
    output, stream = torch.empty_like(x), x.new_empty(_stream_shape(x, parameters, keep))
    if x.numel():
        chain = _Chain(x, parameters, seeds, p, bfloat16, skip)
        _library().mixing_forward(chain, stream.data_ptr() if keep else None, output.data_ptr())
    return output, stream


@torch.library.custom_op("mixer::mixing_backward", mutates_args=(), device_types="cpu")
def _mixing_backward(
    grad: Tensor,
    x: Tensor,
    stream: Tensor,
    parameters: list[Tensor],
    seeds: Tensor,
    p: float,
    bfloat16: bool,
    skip: bool,
) -> list[Tensor]:
    """The gradients of x and of the parameters."""
    _check(x, parameters, seeds, p, bfloat16)
    for name, tensor, shape in (("grad", grad, x.shape), ("stream", stream, _stream_shape(x, parameters, True))):
        if not _is_plain(tensor) or tensor.shape != shape:
            raise ValueError(f"{name} has to be float32 {tuple(shape)} on the CPU, not {tuple(tensor.shape)}")
    grad, x, stream, seeds, *parameters = _contiguous([grad, x, stream, seeds, *parameters])
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    gradients = [torch.empty_like(t) for t in (x, *parameters)]
    chain = _Chain(x, parameters, seeds, p, bfloat16, skip)
    _library().mixing_backward(chain, stream.data_ptr(), grad.data_ptr(), _pointers(gradients))
    return gradients


@_mixing.register_fake
def _(x, parameters, seeds, p, bfloat16, skip, keep):
    return x.new_empty(x.shape), x.new_empty(_stream_shape(x, parameters, keep))


@_mixing_backward.register_fake
def _(grad, x, stream, parameters, *_):
    return [t.new_empty(t.shape) for t in (x, *parameters)]


def _stream_shape(x: Tensor, parameters: list[Tensor], keep: bool) -> tuple[int, ...]:
    return (len(parameters) // 6 - 1 if keep else 0, *x.shape)


def _save(ctx, inputs, output) -> None:
    x, parameters, seeds, ctx.p, ctx.bfloat16, ctx.skip, keep = inputs
    if not keep:
        raise ValueError("mixing has to be told to keep what its backward pass needs")
    ctx.save_for_backward(x, output[1], seeds, *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return None, [None] * len(ctx.saved_tensors[3:]), None, None, None, None, None
    x, stream, seeds, *parameters = ctx.saved_tensors
    d_x, *gradients = torch.ops.mixer.mixing_backward(grad, x, stream, parameters, seeds, ctx.p, ctx.bfloat16, ctx.skip)
    return d_x, gradients, None, None, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError("the operator has no second derivatives: set MIXER_FUSED=0 for the plain formula, which has")


_mixing.register_autograd(_differentiate, setup_context=_save)
_mixing_backward.register_autograd(_refuse)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled operator with its functions' types; None where it cannot be had."""
    library = build.library()
    if library is None:
        return None
    pointer, chain = ctypes.c_void_p, ctypes.POINTER(_Chain)
    library.mixing_forward.argtypes = [chain, pointer, pointer]
    library.mixing_backward.argtypes = [chain, pointer, pointer, pointer]
    library.mixing_gelu.argtypes = [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int]
    for function in (library.mixing_forward, library.mixing_backward, library.mixing_gelu):
        function.restype = None
    return library
