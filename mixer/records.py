"""Records: what a finished run leaves, as JSON, and where it comes from. Written whole, checked when read."""

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

from mixer.config import Config
from mixer.files import write_whole
from mixer.kernels import fused

RECORD_FORMAT = 1

Record = dict[str, Any]  # config, history (a row an epoch), diverged, environment, format


def best_epoch(record: Record) -> dict[str, float]:
    """The epoch with the highest test accuracy, the first of equals."""
    return max(record["history"], key=lambda epoch: epoch["test_accuracy"])


class RecordError(ValueError):
    """A file in the results folder is not a record; the message says which and what to do."""


def read_record(path: Path) -> Record:
    """One record, its values checked. RecordError when the file is damaged or something else, FileNotFoundError."""
    try:
        if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is not a file")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        _check_record(record, path)
        return record
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except KeyError as error:
        reason = f"it lacks {error}"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
    raise RecordError(
        f"{path} is not a record of a finished run ({reason}): take it away or fetch it again with git."
    ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has a number that is {name}")


def _check_record(record: Any, path: Path) -> None:
    config = Config(**record["config"])
    if record["format"] != RECORD_FORMAT:
        raise ValueError(f"its format is {record['format']}, not {RECORD_FORMAT}")
    if path.name != f"{config.name}.json":
        raise ValueError(f"by its config it should be called {config.name}.json")
    history, diverged, environment = record["history"], record["diverged"], record["environment"]
    epochs = config.num_epochs
    if diverged is not None:
        epochs = diverged["epoch"] - 1
        if not (_is_count(diverged["epoch"]) and _is_count(diverged["step"]) and epochs < config.num_epochs):
            raise ValueError("it diverged where it cannot have")
    if len(history) != epochs:
        raise ValueError(f"it has {len(history)} of {epochs} epochs")
    for number, epoch in enumerate(history, start=1):
        if type(epoch["epoch"]) is not int or epoch["epoch"] != number:
            raise ValueError(f"its epoch {number} says that it is {epoch['epoch']}")
        for name, most in _RANGES.items():
            value = epoch[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"{name} of epoch {number} is {value!r}")
    for name, values in _ENVIRONMENT.items():
        value = environment[name]
        if not (type(value) is values if isinstance(values, type) else value in values):
            raise ValueError(f"its {name} is {value!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


_LARGEST = 1e300  # of what is finite
_RANGES = {
    "train_loss": _LARGEST,
    "train_accuracy": 1,
    "test_loss": _LARGEST,
    "test_accuracy": 1,
    "seconds": _LARGEST,
}
_ENVIRONMENT = {
    "torch": str,
    "device": str,
    "threads": int,
    "precision": ("float32", "bfloat16"),
    "path": ("fused", "replayed", "plain"),
    "commit": str,
    "data_sha256": dict,
}


def write_record(record: Record, path: Path) -> None:
    """Raises OSError in one sentence."""
    write_whole(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


# Where a record comes from

_PACKAGE = Path(__file__).parent
_CHANGES = ("status", "--porcelain", "--untracked-files=normal", "--", ".")
# What a run's bits depend on: the core and the kernels.
_DECISIVE = sorted(
    str(path.relative_to(_PACKAGE))
    for pattern in ("*.py", "kernels/*.py", "kernels/*.cpp")
    for path in _PACKAGE.glob(pattern)
)


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device, threads, precision, commit: what is the same for all that is run here and now."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "threads": fused.threads(),
        "precision": precision,
        "commit": _COMMIT,
        "code_sha256": _CODE,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        # Rented machines often hide the name's end; family and model tell the generation all the same.
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        cpu = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
        return f"cpu: {cpu['model name']}, family {cpu['cpu family']} model {cpu['model']}"
    except (OSError, KeyError):
        return f"{device.type}: {platform.processor() or platform.machine()}"


def _commit() -> str:
    """The commit of this package, with a + where the package differs from it; "unknown" where git does not have it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20, env=environment
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", *_DECISIVE)  # not those of a repository around an unpacked archive
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git(*_CHANGES) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Asked when the code is loaded: while a run is trained for hours, files and commits move on.
_COMMIT = _commit()
_CODE = hashlib.sha256(b"".join((_PACKAGE / name).read_bytes() for name in _DECISIVE)).hexdigest()
