"""The fast path: ``fast = accelerate(model, images)``, used like torch.compile and checked before use.

On the CPU all blocks run as one operator (``fused.py``); on CUDA a training step is recorded and replayed
(``graphs.py``). Both compute the mixer of model.py, but the given model may have been changed, and no list of possible
changes is complete. So model and fast path run on a few images, and their logits and all gradients are compared. If
they differ by more than rounding, the model itself is used.
"""

import copy
import logging
import math
import pickle
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mixer.kernels import fused
from mixer.kernels.dropout import Dropout
from mixer.kernels.graphs import Graphed
from mixer.model import MixerBlock, MlpMixer

PROOF_IMAGES = 2  # of a batch; enough for every parameter to have a gradient
# The fast path's error against float64 may be SLACK times eager PyTorch's, plus ROUNDING. On CPUs both errors are about
# 1e-6 and GELU's two forms differ by 1e-4, but in a deep network without skip connections both errors are about 1e-4.
SLACK, ROUNDING = 10, 1e-6
REPEATED = 0.3  # a larger error means that the random numbers do not repeat the answer; bfloat16's is 0.1
Forward = Callable[[Tensor], Tensor]
States = dict[torch.Generator, Tensor]

log = logging.getLogger("mixer")


@dataclass(frozen=True)
class Choice:
    """How a model is computed: ``path`` is "fused", "graphs" or "eager"; ``reason`` says why it is eager."""

    forward: Forward
    path: str
    reason: str = ""


def accelerate(model: nn.Module, images: Tensor) -> Forward:
    """Return a faster callable that computes the same as ``model``, or the model itself if there is none.

    images: a typical batch, normalised, on the model's device. Call this under the autocast context of the later calls.
    A log line says why a model stays in eager PyTorch. Model, gradients and generators are left unchanged.

    Accelerate again after changing the model, as with torch.compile. On the CPU the comparison runs in float32. It
    misses effects of another precision and side effects of ``forward``: a print in it runs only during the comparison.
    """
    choice = choose(model, images)
    if choice.path == "eager":
        log.warning("The model runs in eager PyTorch, which is slower, since %s.", choice.reason)
    return choice.forward


def choose(model: nn.Module, images: Tensor, before: Choice | None = None) -> Choice:
    """Like :func:`accelerate`, with the reason. ``before``: an earlier choice, whose CUDA graphs are reused."""
    try:
        if images.device.type == "cuda":
            return _graphed(model, images, before)
        if images.device.type == "cpu":
            return _fused(model, images)
        return Choice(model, "eager", f"there is no fast path on {images.device.type}")
    except NotServed as reason:
        return Choice(model, "eager", str(reason))


class NotServed(Exception):
    """A model has no fast path, for the reason given."""


class Fused:
    """A mixer whose blocks run in the CPU operator, under the caller's autocast."""

    def __init__(self, model: MlpMixer):
        blocks = list(model.blocks)
        other = next((block.dropout for block in blocks if type(block.dropout) is not Dropout), None)
        if other is not None:
            raise NotServed(f"a block has a different dropout: {other}")
        settings = {(b.skip_connections, b.gelu, b.dropout.p, b.dropout.generator, b.dropout.training) for b in blocks}
        if len(settings) != 1:
            raise NotServed("its blocks have different settings")
        self.model, self.dropout, self.count = model, blocks[0].dropout, len(blocks)
        ((self.skip, self.gelu, self.p, *_),) = settings
        self.parameters = fused.parameters_of(blocks)

    def __call__(self, images: Tensor) -> Tensor:
        bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        p = self.p if self.dropout.active else 0.0
        seeds = self.dropout.seeds(self.count, 4) if p else torch.zeros(self.count, 4, dtype=torch.int64, device="cpu")
        x = self.model.embed(images)
        x = fused.fused_blocks(x, self.parameters, seeds, p, bfloat16, self.skip, self.gelu)
        return self.model.classify(x)


def _fused(model: nn.Module, images: Tensor) -> Choice:
    _ask(model)
    if not fused.available(bfloat16=torch.is_autocast_enabled("cpu")):
        raise NotServed("the fused operator is not available" if fused.WANTED else "MIXER_FUSED=0 is set")
    try:
        if model.num_channels > fused.CHANNELS:
            raise NotServed(f"it has {model.num_channels} channels, and the operator takes 1 to {fused.CHANNELS}")
        fast = Fused(model)
        with torch.autocast("cpu", enabled=False), fused.threads_for_the_operator():
            _compare(model, fast, images[:PROOF_IMAGES].float())
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise NotServed(_first_line(error)) from None
    return Choice(fast, "fused")


def _graphed(model: nn.Module, images: Tensor, before: Choice | None) -> Choice:
    _ask(model)
    if before is not None and isinstance(before.forward, Graphed) and before.forward.is_current():
        return before  # an eager step takes as long as thirty recorded ones, so compare only once
    fast = Graphed(model)
    try:
        _compare(model, fast, images)
    except NotServed:
        fast.forget()
        raise
    except Exception as error:  # anything: no compiler, an old GPU, a block that cannot be recorded
        fast.forget()
        raise NotServed(f"its step could not be recorded ({type(error).__name__}: {_first_line(error)})") from None
    return Choice(fast, "graphs")


def _ask(model: nn.Module) -> None:
    """Check what numbers may not show: the model has our classes, and no hooks, which would have to be called."""
    if type(model) is not MlpMixer:
        raise NotServed(f"{type(model).__name__} is not MlpMixer")
    other = next((block for block in model.blocks if type(block) is not MixerBlock), None)
    if other is not None or not len(model.blocks):
        raise NotServed(f"a block is {type(other).__name__}, not MixerBlock")
    hooked = next((name for name, module in model.named_modules() if _has_hooks(module)), None)
    if hooked is not None or _has_any_global_hook():
        raise NotServed(f"a hook is registered on {hooked or 'the model'}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _compare(model: nn.Module, fast: Forward, images: Tensor) -> None:
    """Raise NotServed if logits, a gradient or the random numbers drawn differ; on the CPU in evaluation mode too.

    The reference is the model in float64. The error of each of ``fast``'s answers may be SLACK times eager PyTorch's
    for that answer, or SLACK times eager PyTorch's median error.
    """
    with _restored(model) as start, torch.inference_mode(False), torch.enable_grad():
        model.train()
        with torch.autocast(images.device.type, enabled=False):
            exact = copy.deepcopy(model).double()
            truth = _answers(exact, exact, images.double(), start)
        outside = _outside_generators(model, start)
        at_first = [get() for get, _ in outside]
        for _ in range(3):  # another thread may draw from them too, but not every time
            before = pickle.dumps([get() for get, _ in outside])
            eager = _errors(_answers(model, model, images, start), truth)
            if pickle.dumps([get() for get, _ in outside]) == before:
                break
        else:
            for (_, put), state in zip(outside, at_first, strict=True):
                put(state)
            raise NotServed("it draws random numbers from generators of its own")
        drawn = [generator.get_state() for generator in start]
        errors = _errors(_answers(model, fast, images, start), truth)
        usual = statistics.median([error for error in eager if error] or [0.0])  # without those of frozen layers
        if not usual <= REPEATED:
            raise NotServed("its answers are not finite, or differ from call to call")
        close = all(one <= SLACK * max(other, usual) + ROUNDING for one, other in zip(errors, eager, strict=True))
        if not close or not all(map(torch.equal, drawn, (generator.get_state() for generator in start))):
            raise NotServed("its answers differ from the fast path's")
        if images.device.type == "cpu":  # elsewhere the model itself is tested
            model.eval()
            exact.eval()
            with torch.no_grad():
                tested = exact(images.double())
                one, other = (_error(forward(images.clone()), tested, 1e-30) for forward in (fast, model))
            if not one <= SLACK * max(other, usual) + ROUNDING:
                raise NotServed("its answers in evaluation mode differ from the fast path's")


def _answers(model: nn.Module, forward: Forward, images: Tensor, start: States) -> list[Tensor | None]:
    """Compute the logits and all parameters' gradients, with the generators reset to ``start``."""
    _rewind(start)
    logits = forward(images.detach().clone())
    (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return [logits.detach(), *gradients]


def _errors(answers: list[Tensor | None], truth: list[Tensor | None]) -> list[float]:
    """Norms of the errors, relative to the answer's norm or a hundredth of all gradients', whichever is larger."""
    least = max(math.hypot(*(float(gradient.norm()) for gradient in truth[1:] if gradient is not None)) / 100, 1e-30)
    return [_error(one, other, least) for one, other in zip(answers, truth, strict=True)]


def _error(one: Tensor | None, other: Tensor | None, least: float) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return float((one - other).norm()) / max(float(other.norm()), least)


def _outside_generators(model: nn.Module, known: States) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How to get and set the state of each generator, besides the known ones, that a ``forward`` may draw from.

    These are Python's and NumPy's, and those that a module holds or that its ``forward`` finds by name.
    """
    found: list = [(random.getstate, random.setstate), (np.random.get_state, np.random.set_state)]
    held = [value for module in model.modules() for value in vars(module).values()]
    for forward in {type(module).forward for module in model.modules()}:
        held += getattr(forward, "__globals__", {}).values()
        held += [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    for value in {id(value): value for value in held}.values():
        if type(value) is random.Random:
            found.append((value.getstate, value.setstate))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            found.append((partial(getattr, bits, "state"), partial(setattr, bits, "state")))
        elif isinstance(value, torch.Generator) and value not in known:
            found.append((value.get_state, value.set_state))
    return found


def _rewind(states: States) -> None:
    for generator, state in states.items():
        generator.set_state(state)


@contextmanager
def _restored(model: nn.Module) -> Iterator[States]:
    """Restore model and generators at the end; yields the states of the model's and PyTorch's generators.

    Meanwhile all-zero parameters, such as the initial head, are random, since they would hide everything before them.
    """
    tensors = [*chain(model.parameters(), model.buffers())]
    kept = [tensor.detach().clone() for tensor in tensors]
    gradients = [parameter.grad for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    generators = {vars(module).get("generator") or torch.default_generator for module in model.modules()}
    start = {generator: generator.get_state() for generator in generators}
    try:
        for parameter in model.parameters():
            parameter.grad = None  # or the new gradient would be added to it
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1, generator=torch.Generator(parameter.device).manual_seed(0))
        yield start
    finally:
        _rewind(start)
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
