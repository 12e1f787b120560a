"""The mixer's blocks as one operator on the CPU.

``MixerBlock`` in model.py is the formula in plain PyTorch, for every device and precision. On the CPU an operator of
our own does the same for all blocks in one call, forward and backward, without ever writing the wide hidden layers
to memory (``fused.cpp``). It is compiled on first use (``build.py``), which takes some seconds. Where it cannot be,
the plain formula stands in and one log line says why. ``MIXER_FUSED=0`` in the environment asks for the plain formula.
"""

import contextlib
import ctypes
import functools
import hashlib
import inspect
import io
import logging
import os
import tokenize
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import threadpoolctl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mixer.kernels import build
from mixer.kernels import dropout as dropout_module
from mixer.kernels.dropout import Dropout, threshold

CHANNELS = 16  # what the operator is written for
EPS = 1e-6  # of its LayerNorms
# What is written for it in MixerBlock.forward and dropout.py, as digests; to be changed with fused.cpp, never alone.
_FORWARD_AS_WRITTEN, _DROPOUT_AS_WRITTEN = "049a865b4f30fdfc", "31735e6868dbce19"
_WANTED = os.environ.get("MIXER_FUSED", "1") != "0"


def mixing(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """The blocks, one after the other: (B, S, C) -> (B, S, C).

    By the operator where every block is exactly what the operator computes, else by each block's own ``forward``.
    One call for all blocks, because what PyTorch does around a call takes a third of a millisecond while the
    processor's caches are full of images: with a call for each MLP that was a tenth of a training step.
    """
    if not isinstance(blocks, nn.ModuleList):  # nn.Sequential, say, has a forward of its own
        return blocks(x)
    blocks = list(blocks)
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    bfloat16 = precision == torch.bfloat16
    parameters = _parameters(blocks, bfloat16) if precision == torch.float32 or bfloat16 else None
    if parameters and _fits(x, parameters) and not (_is_transformed() or _is_recorded()) and _available(bfloat16):
        first, dropout, count = blocks[0], blocks[0].dropout, len(blocks)
        p = dropout.p if dropout.active else 0.0
        seeds = dropout.seeds(count, 4) if p else torch.zeros(count, 4, dtype=torch.int64, device="cpu")
        return fused(x, parameters, seeds, p, bfloat16, first.skip_connections, first.gelu)
    for block in blocks:
        x = block(x)
    return x


def fused(
    x: Tensor,
    parameters: list[Tensor],
    seeds: Tensor,
    p: float,
    bfloat16: bool,
    skip_connections: bool = True,
    gelu: str = "exact",
) -> Tensor:
    """The blocks by the operator, ``torch.ops.mixer.mixing``: (B, S, 16) -> (B, S, 16), float32 on the CPU.

    ``parameters``: twelve a block, in the order in which ``MixerBlock`` has them. ``p``: the probability with which
    dropout drops an element, 0 outside training; ``seeds``, int64 (blocks, 4), decide which: the same seeds give the
    same masks as in ``MixerBlock``.

    ``bfloat16`` multiplies in bfloat16 and adds in float32, where the CPU can; GELU is then within 1e-4, the gradients
    of each of a block's MLPs within 1 % (relative error of the norm). Otherwise within 1e-6, and gradients 1e-5.
    ``gelu`` is "exact" or, in bfloat16 only, "tanh".
    Output and gradients are the same bit for bit on any number of threads.

    Raises ValueError for tensors that do not fit together or are too large, RuntimeError where the operator cannot be
    had and for more than first derivatives.
    """
    if _is_transformed():
        _refuse()
    keep = torch.is_grad_enabled()
    return torch.ops.mixer.mixing(x, parameters, seeds, p, bfloat16, skip_connections, gelu, keep)[0]


def path(blocks: nn.ModuleList, device: torch.device, precision: str) -> str:
    """What ``mixing`` runs for these blocks on a device, in "float32" or "bfloat16": "fused" or "plain"."""
    bfloat16 = precision == "bfloat16"
    serves = device.type == "cpu" and isinstance(blocks, nn.ModuleList) and _parameters(list(blocks), bfloat16)
    return "fused" if serves and _available(bfloat16) else "plain"


def multiplies_in_bfloat16() -> bool:
    """Whether this machine's processor does, and the compiler has built the operator for it (or there is none)."""
    if not _WANTED or _library() is None:
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
    """Decorates the class of blocks that the operator computes: exactly this class with exactly this ``forward``.

    Where somebody has written something else in its place, in this file or in dropout.py, that is what runs.
    """
    if _is_the_formula(block.forward):
        _BLOCKS.add(block)
        for owner in (block, Dropout, dropout_module):
            _FUNCTIONS_AS_WRITTEN.extend(_functions(owner))
    else:
        _log.warning(
            "The mixer's blocks run as the plain formula, which is several times slower: %s or dropout.py has been "
            "changed, and fused.cpp has not.",
            block.__name__,
        )
    return block


def _is_the_formula(forward: FunctionType) -> bool:
    """Whether it and dropout.py are what fused.cpp was written for; comments and line breaks in it do not matter."""
    try:
        lines = io.StringIO(inspect.getsource(forward)).readline
        words = [token.string for token in tokenize.generate_tokens(lines) if token.type in _WORDS]
        of_dropout = inspect.getsource(dropout_module)
    except OSError:  # installed without its source, so not edited either
        return True
    return [_digest(" ".join(words)), _digest(of_dropout)] == [_FORWARD_AS_WRITTEN, _DROPOUT_AS_WRITTEN]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _functions(owner: type | ModuleType) -> list[tuple[type | ModuleType, str, FunctionType, CodeType]]:
    """With their code, which IPython's autoreload exchanges while the function stays."""
    return [(owner, name, f, f.__code__) for name, f in vars(owner).items() if inspect.isfunction(f)]


_log = logging.getLogger("mixer")
_WORDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
_BLOCKS: set[type[nn.Module]] = set()
_FUNCTIONS_AS_WRITTEN: list[tuple[type | ModuleType, str, FunctionType, CodeType]] = []
_FORWARD = {cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, Dropout)}
_CALL = nn.Module.__call__, nn.Module._call_impl
_FUNCTIONS = (F.linear, F.layer_norm, F.gelu)


def _parameters(blocks: list[nn.Module], bfloat16: bool) -> list[Tensor] | None:
    """The blocks' parameters, where the operator gives what the blocks' own ``forward`` would; else None.

    Asked at every call, since a model can be changed at any time. It looks into the modules' dictionaries, which takes
    half as long as asking for their attributes: a tenth of a millisecond for eight blocks.
    """
    if not blocks or _has_any_global_hook() or not _classes_are_as_written():
        return None
    first, parameters = None, []
    for block in blocks:
        if type(block) not in _BLOCKS or not _is_as_written(block):
            return None
        layer, own, dropout = block._modules.get, block.__dict__.get, block._modules.get("dropout")
        skip, gelu = own("skip_connections"), own("gelu")
        for mlp in ("patches", "channels"):
            of_mlp = _parameters_of_an_mlp(layer(f"{mlp}_norm"), layer(f"{mlp}_in"), layer(f"{mlp}_out"))
            if not of_mlp or (mlp == "channels" and of_mlp[5].shape[0] != CHANNELS):
                return None
            parameters += of_mlp
        if type(skip) is not bool or type(gelu) is not str or not _knows(gelu, bfloat16):
            return None
        if type(dropout) is not Dropout or not _is_as_written(dropout):
            return None
        settings = (skip, gelu, dropout.p, dropout.generator) if dropout.active else (skip, gelu, 0.0, None)
        first = first or settings
        if settings != first or type(settings[2]) is not float or settings[2] >= 1:
            return None
    # One parameter in two places is another model than the operator's, whatever else is as it was.
    return parameters if len(set(map(id, parameters))) == len(parameters) else None


def _knows(gelu: str, bfloat16: bool) -> bool:
    """Whether the operator computes it: in bfloat16 each is a table, in float32 there is one formula."""
    return gelu == "exact" or (gelu == "tanh" and bfloat16)


def _parameters_of_an_mlp(norm: nn.Module, into: nn.Module, out: nn.Module) -> list[Tensor] | None:
    """None unless the layers are exactly of the classes, sizes and settings that the operator knows."""
    if not (type(norm) is nn.LayerNorm and type(into) is nn.Linear and type(out) is nn.Linear):
        return None
    if not (_is_as_written(norm) and _is_as_written(into) and _is_as_written(out)):
        return None
    if norm.normalized_shape != (CHANNELS,) or norm.eps != EPS:
        return None
    tensors = [layer._parameters.get(name) for layer in (norm, into, out) for name in ("weight", "bias")]
    if not all(type(tensor) in (nn.Parameter, Tensor) and _is_plain(tensor) for tensor in tensors):
        return None
    return tensors if _fit_together(tensors) else None


def _fit_together(of_mlp: list[Tensor]) -> bool:
    gamma, beta, w1, b1, w2, b2 = [tensor.shape for tensor in of_mlp]
    return len(w1) == 2 and 0 not in w1 and gamma == beta == (CHANNELS,) and (b1, w2, b2) == (w1[:1], w1[::-1], w1[1:])


def _classes_are_as_written() -> bool:
    """Whether nobody has put something in place of a function or method that the operator stands for."""
    return (
        (F.linear, F.layer_norm, F.gelu) == _FUNCTIONS
        and all(cls.forward is forward and (cls.__call__, cls._call_impl) == _CALL for cls, forward in _FORWARD.items())
        and all(
            getattr(owner, name, None) is f and f.__code__ is code for owner, name, f, code in _FUNCTIONS_AS_WRITTEN
        )
    )


def _is_as_written(module: nn.Module) -> bool:
    """Whether nothing of the module's own hides what its class does, and no hook hangs on it (pruning, say, is one)."""
    own = module.__dict__
    return (
        not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])
        and "forward" not in own
        and "_call_impl" not in own
        and not own.keys() & own["_modules"].keys()
        and not own.keys() & own["_parameters"].keys()
    )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided


def _fits(x: Tensor, parameters: list[Tensor]) -> bool:
    return (
        type(x) is Tensor
        and _is_plain(x)
        and x.ndim == 3
        and x.shape[2] == CHANNELS
        and all(w1.shape[1] == x.shape[1] for w1 in parameters[2::12])
        and not _is_too_large(x, parameters)
    )


def _is_too_large(x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether some count in fused.cpp would not fit into its 32 bits, or the rows of dropout.py into theirs."""
    features = max(x.shape[1], CHANNELS)
    hidden = max(w1.shape[0] for w1 in parameters[2::6])
    return features * max(hidden, 128) >= 2**30 or features * x.shape[0] >= 2**31


def _is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which the operator has no rules for."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _is_recorded() -> bool:
    """Whether the model is being written down for another place, which may not have the operator."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


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
        *((name, ctypes.c_int32) for name in ("threshold", "skip", "tanh", "threads", "bfloat16")),
    )

    def __init__(
        self, x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip: bool, gelu: str
    ):
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
            gelu == "tanh",
            threads(),
            bfloat16,
        )


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _check(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, gelu: str, *likes: Tensor
) -> None:
    """Raises ValueError unless everything is what the library takes it to be."""
    for tensor in (x, *parameters, *likes):
        if not _is_plain(tensor):
            raise ValueError(f"tensors have to be float32 on the CPU, not {tensor.dtype} on {tensor.device}")
    if x.ndim != 3 or x.shape[2] != CHANNELS:
        raise ValueError(f"x has to be (batch, patches, {CHANNELS}), not {tuple(x.shape)}")
    if not parameters or len(parameters) % 12:
        raise ValueError(f"there have to be twelve parameters a block, not {len(parameters)} in all")
    for i in range(0, len(parameters), 6):
        of_mlp, features = parameters[i : i + 6], CHANNELS if i % 12 else x.shape[1]
        if not _fit_together(of_mlp) or of_mlp[5].shape[0] != features:
            mlp, shapes = "channel" if i % 12 else "token", [tuple(tensor.shape) for tensor in of_mlp]
            raise ValueError(
                f"the parameters of block {i // 12}'s {mlp} mixing have to be LayerNorm's ({CHANNELS},) and"
                f" ({CHANNELS},), W1 (hidden, {features}), b1 (hidden,), W2 ({features}, hidden), b2 ({features},),"
                f" not {', '.join(map(str, shapes))}"
            )
    if _is_too_large(x, parameters):
        raise ValueError("the operator is not made for so many patches, hidden units or images at once")
    if seeds.dtype != torch.int64 or not seeds.is_cpu or seeds.shape != (len(parameters) // 12, 4):
        raise ValueError(f"seeds have to be int64 (blocks, 4) on the CPU, not {seeds.dtype} {tuple(seeds.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p is a probability below 1, not {p}")
    if not _knows(gelu, bfloat16):
        raise ValueError(f"gelu has to be exact or, in bfloat16 only, tanh, not {gelu}")
    if forward_ad._current_level >= 0:
        _refuse()
    if _library() is None:
        raise RuntimeError("the operator could not be built here: use MixerBlock, the plain formula")
    if bfloat16 and not _library().mixing_has_bfloat16():
        raise ValueError("the operator was built without bfloat16, which this compiler or processor lacks")


@torch.library.custom_op("mixer::mixing", mutates_args=(), device_types="cpu")
def _mixing(
    x: Tensor, parameters: list[Tensor], seeds: Tensor, p: float, bfloat16: bool, skip: bool, gelu: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the outputs of all MLPs but the last, if they are to be kept for the backward pass."""
    _check(x, parameters, seeds, p, bfloat16, gelu)
    x, seeds, *parameters = _contiguous([x, seeds, *parameters])
    output, stream = torch.empty_like(x), x.new_empty(_stream_shape(x, parameters, keep))
    if x.numel():
        chain = _Chain(x, parameters, seeds, p, bfloat16, skip, gelu)
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
    gelu: str,
) -> list[Tensor]:
    """The gradients of x and of the parameters."""
    _check(x, parameters, seeds, p, bfloat16, gelu, grad, stream)
    for name, tensor, shape in (("grad", grad, x.shape), ("stream", stream, _stream_shape(x, parameters, True))):
        if tensor.shape != shape:
            raise ValueError(f"{name} has to be {tuple(shape)}, not {tuple(tensor.shape)}")
    grad, x, stream, seeds, *parameters = _contiguous([grad, x, stream, seeds, *parameters])
    if not x.numel():
        return [torch.zeros_like(t) for t in (x, *parameters)]
    gradients = [torch.empty_like(t) for t in (x, *parameters)]
    chain = _Chain(x, parameters, seeds, p, bfloat16, skip, gelu)
    _library().mixing_backward(chain, stream.data_ptr(), grad.data_ptr(), _pointers(gradients))
    return gradients


@_mixing.register_fake
def _(x, parameters, seeds, p, bfloat16, skip, gelu, keep):
    _check_devices(x, seeds, *parameters)
    return x.new_empty(x.shape), x.new_empty(_stream_shape(x, parameters, keep))


@_mixing_backward.register_fake
def _(grad, x, stream, parameters, seeds, *_):
    _check_devices(grad, x, stream, seeds, *parameters)
    return [t.new_empty(t.shape) for t in (x, *parameters)]


def _check_devices(first: Tensor, *others: Tensor) -> None:
    """ValueError where one is elsewhere: PyTorch asks for shapes alone, and would take them for an answer."""
    if any(tensor.device != first.device for tensor in others):
        raise ValueError("the operator takes tensors of the CPU only")


def _stream_shape(x: Tensor, parameters: list[Tensor], keep: bool) -> tuple[int, ...]:
    return (len(parameters) // 6 - 1 if keep else 0, *x.shape)


def _save(ctx, inputs, output) -> None:
    x, parameters, seeds, *ctx.settings, keep = inputs
    if not keep:
        raise ValueError("mixing has to be told to keep what its backward pass needs")
    ctx.save_for_backward(x, output[1], seeds, *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return None, [None] * len(ctx.saved_tensors[3:]), None, None, None, None, None, None
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # torch.autograd.grad(..., is_grads_batched=True)
        _refuse()
    x, stream, seeds, *parameters = ctx.saved_tensors
    d_x, *gradients = torch.ops.mixer.mixing_backward(grad, x, stream, parameters, seeds, *ctx.settings)
    return d_x, gradients, None, None, None, None, None, None


def _refuse(*_):
    raise RuntimeError(
        "the operator has first derivatives only, and none of torch.func's transforms or forward mode:"
        " set MIXER_FUSED=0 for the plain formula, which has them all"
    )


_mixing.register_autograd(_differentiate, setup_context=_save)
_mixing_backward.register_autograd(_refuse)
_mixing.register_vmap(_refuse)
_mixing_backward.register_vmap(_refuse)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled operator with its functions' types; None where it cannot be had."""
    library = build.library()
    if library is None:
        return None
    pointer, chain = ctypes.c_void_p, ctypes.POINTER(_Chain)
    library.mixing_forward.argtypes = [chain, pointer, pointer]
    library.mixing_backward.argtypes = [chain, pointer, pointer, pointer]
    library.mixing_gelu.argtypes = [pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for function in (library.mixing_forward, library.mixing_backward, library.mixing_gelu):
        function.restype = None
    return library
