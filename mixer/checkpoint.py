"""What a run leaves on the disk beside its record: a checkpoint after every epoch, and weights at the end."""

import io
import json
from logging import getLogger
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mixer.system.files import seal, unseal, write_whole

log = getLogger("mixer")


def save(path: Path, key: str, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. ``key``: whatever decides a bit of the run. Raises OSError."""
    content = io.BytesIO()
    torch.save({"key": key, "state": state}, content)
    write_whole(path, seal(content.getbuffer()))  # PyTorch does not check the bytes that it reads


def load(path: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """The state of a checkpoint of this ``key``; None, and a log line with the reason, where it cannot be used."""
    try:
        kept = torch.load(io.BytesIO(unseal(path.read_bytes())), map_location=device, weights_only=True)
        if kept["key"] != key:
            raise ValueError("other code, data, settings, device or precision made it")
        return kept["state"]
    except FileNotFoundError:
        return None
    except Exception as error:  # there is no telling what a damaged or foreign file makes torch.load raise
        reason = str(error).partition("\n")[0].rstrip(".")
        log.warning("The checkpoint %s cannot be used, since %s: the run starts afresh.", path, reason)
        return None


def last_weights(path: Path) -> Path:
    """The file of the last epoch's weights, beside that of the best epoch's."""
    return path.with_suffix(f".last{path.suffix}")


def save_weights(path: Path, weights: dict[str, Tensor], origin: dict[str, Any]) -> None:
    """Write a safetensors file that says where its weights come from. Raises OSError."""
    # Copies, since safetensors takes no two tensors that share their memory, as tied layers do.
    weights = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    # One entry, because several would be written in an order that changes from call to call.
    write_whole(path, safetensors.torch.save(weights, {"mixer": json.dumps(origin)}))
