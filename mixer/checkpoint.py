"""Checkpoints, written after every epoch, and the weights that a run leaves at its end.

``run`` is always a ``training.Run``.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mixer.fingerprint import differences
from mixer.prediction import WITHOUT_TRACE, answers
from mixer.records import best_epoch
from mixer.system.files import seal, unseal, write_whole

log = getLogger("mixer")


def save(run: Any, path: Path) -> None:
    """Write a checkpoint, complete or not at all. Raises OSError."""
    state = {
        "key": key(run),
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average is not None else None,
        "optimisers": [optimiser.state_dict() for optimiser in run.optimisers],
        "history": run.history,
        "diverged": run.diverged,
        "best_weights": run.best_weights,
        "fingerprint": run.fingerprint,
        "environments": json.dumps([*run.earlier, run.environment]),
    }
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, seal(content.getbuffer()))  # PyTorch does not verify the bytes it reads


def resume(run: Any, path: Path) -> None:
    """Restore a run from its checkpoint. One that cannot be used is kept beside it, and a log line says why.

    So a run that was interrupted, edited, started again and edited back resumes where it was.
    """
    try:
        state, others = _load(run, path)
    except FileNotFoundError:
        return
    except Exception as error:  # a damaged or foreign file can make torch.load raise anything
        reason = str(error).partition("\n")[0].rstrip(".")
        earlier = _set_aside(run, path)
        instead = "an earlier one resumes" if earlier else "it is kept as .old, and the run starts from the beginning"
        log.warning("The checkpoint %s cannot be used, since %s: %s.", path, reason, instead)
        if not earlier:
            return
        state, others = earlier
    if hasattr(run.optimisers[0].step, "_wrapped_by_lr_sched"):
        log.warning("A checkpoint does not hold learning-rate schedulers: yours starts anew.")
    run.model.load_state_dict(state["model"])
    if run.average is not None:
        run.average.load_state_dict(state["average"])
    for optimiser, saved in zip(run.optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    if others:
        log.warning("The checkpoint %s is of a run with other initial weights: that run resumes.", path)
    run.history, run.diverged, run.fingerprint = state["history"], state["diverged"], state["fingerprint"]
    if run.finished:
        log.warning("The checkpoint %s is of a finished run: nothing is trained.", path)
    run.best_weights = state["best_weights"] and {k: w.cpu() for k, w in state["best_weights"].items()}
    *run.earlier, last = json.loads(state["environments"])
    if last != run.environment:
        run.earlier.append({"epochs": run.epoch} | last)


def _set_aside(run: Any, path: Path) -> tuple[dict[str, Any], list[str]] | None:
    """Keep an unusable checkpoint as .old. If the one kept there before can be used, they change places."""
    aside, other = path.with_name(f"{path.name}.old"), path.with_name(f"{path.name}.swapped")
    try:
        earlier = _load(run, aside)
        aside.replace(other)
    except Exception:  # there is none, or it cannot be used either
        path.replace(aside)
        return None
    path.replace(aside)
    other.replace(path)
    return earlier


def _load(run: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a checkpoint, and in what it differs from the run. Raises ValueError if the run cannot resume from it."""
    state = torch.load(io.BytesIO(unseal(path.read_bytes())), map_location=run.device, weights_only=True)
    others = differences(run.fingerprint, state["fingerprint"], run.config)
    if state["key"] != key(run) or (others and ("model" not in run.brought or others != ["weights"])):
        raise ValueError("it was made with different code, data, settings, device or precision")
    if _layout(run.model.state_dict(), run.optimisers) != _layout(state["model"], state["optimisers"]):
        raise ValueError("the model or the optimiser has other parts")
    return state, others


def _layout(weights: dict[str, Any], optimisers: Sequence[Any]) -> tuple[list, list]:
    """Names and shapes of a model's tensors, and the sizes of the groups of optimisers or of their states."""
    groups = [each["param_groups"] if isinstance(each, dict) else each.param_groups for each in optimisers]
    sizes = [[len(group["params"]) for group in several] for several in groups]
    return [(name, getattr(value, "shape", None)) for name, value in weights.items()], sizes


def key(run: Any) -> str:
    """Collect what a run computes. Another processor, path or number of threads rounds otherwise and goes on with it.

    The record then lists the environments before.
    """
    decisive = ["torch", "precision", "data_sha256", "pixel_mean", "pixel_std", "teacher_sha256"]
    values = {name: run.environment.get(name) for name in decisive} | run.brought | {"kind": run.device.type}
    return json.dumps([dataclasses.asdict(run.config), values])


def last_weights(path: Path) -> Path:
    """Path of the last epoch's weights, beside ``path`` of the best epoch's."""
    return path.with_suffix(f".last{path.suffix}")


def save_weights(run: Any, path: Path) -> None:
    """Write the weights of the best and of the last epoch as safetensors files. Raises OSError.

    A run that diverged has no last weights, and without a finished epoch no best ones; files of an earlier run go.
    """
    best = (run.best_weights, best_epoch({"history": run.history})) if run.history else None
    last = (tensors_of(run.tested), run.history[-1]) if run.history and run.diverged is None else None
    for file, kept in ((path, best), (last_weights(path), last)):
        if kept is None:
            file.unlink(missing_ok=True)
        else:
            write_whole(file, _safetensors(run, *kept))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers, without any extra state."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _safetensors(run: Any, weights: dict[str, Tensor], epoch: dict[str, float]) -> bytes:
    """Serialise the weights with their origin, which holds the model's answers on two images where it can give them."""
    model = run.tested
    image = list(run.data.train_images.shape[1:])
    known = {}
    with contextlib.suppress(RuntimeError):  # nn.DataParallel's, say
        known["answers"] = answers(model, weights, image, run.data.pixel_mean, run.data.pixel_std).tolist()
    origin = {
        "name": run.config.name,
        "epoch": epoch["epoch"],
        "measured": {name: value for name, value in epoch.items() if name != "seconds"},
        "data": run.data.name,
        "config": dataclasses.asdict(run.config),
        **run.brought,
        "settings": {n: x for n in WITHOUT_TRACE if isinstance(x := getattr(model, n, None), bool | str)},
        **known,
        "image": image,
        "data_sha256": run.data.sha256,
        "pixel_mean": run.data.pixel_mean,
        "pixel_std": run.data.pixel_std,
    }
    # Copies, since safetensors rejects tensors that share memory, as tied layers do.
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    # One entry, since the order of several would change from call to call.
    return safetensors.torch.save(weights, {"mixer": json.dumps(origin)})
