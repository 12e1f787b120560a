"""Records: one JSON file per finished run, with its results and its provenance."""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import pandas as pd
import torch

from mixer.config import Config, grid
from mixer.kernels import fused
from mixer.system.files import PROJECT, expand, write_whole

log = logging.getLogger("mixer")
RECORD_FORMAT = 1
RESULTS = PROJECT / "results"
MEASURED = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")

Record = dict[str, Any]  # config, history (one row per epoch), diverged, environment, format


class RecordError(ValueError):
    """A file in the results folder is not the expected record; the message says which one and what to do."""


def record_path(config: Config, results: Path | str = RESULTS) -> Path:
    """Path of a run's record."""
    return expand(results) / f"{config.name}.json"


def weights_path(config: Config, results: Path | str = RESULTS) -> Path:
    """Path of the weights of a run's best epoch, which are too large for the repository."""
    return expand(results) / "weights" / f"{config.name}.safetensors"


def write_record(record: Record, path: Path | str) -> None:
    """Write a record. Raises OSError in one sentence."""
    write_whole(expand(path), (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_record(path: Path | str) -> Record:
    """Read one record. Raises RecordError if the file is damaged or no record, FileNotFoundError if there is none."""
    path = expand(path)
    try:
        if os.path.lexists(path) and not path.is_file():  # reading a pipe would block
            raise ValueError("it is not a regular file")
        record = json.loads(path.read_text(encoding="utf-8"))
        config = Config.from_record(record["config"])
        record["config"] = dataclasses.asdict(config)
        if record["format"] != RECORD_FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {RECORD_FORMAT}")
        if path.name != f"{config.name}.json" and not brought(record):
            raise RecordError(f"{path} is the record of {config.name}: rename it to {config.name}.json.")
        epochs = record["diverged"]["epoch"] - 1 if record["diverged"] else config.num_epochs
        if record["diverged"] and not isinstance(record["diverged"]["step"], int):
            raise ValueError("it does not say at which step it diverged")
        numbers = [[float(epoch[name]) for name in MEASURED] for epoch in record["history"]]
        if [epoch for epoch, *_ in numbers] != [*range(1, epochs + 1)]:
            raise ValueError(f"its epochs are not those from 1 to {epochs}")
        if wrong := [x for epoch in record["history"] for x in map(epoch.get, MEASURED) if not _number(x)]:
            raise ValueError(f"{wrong[0]!r} is not a number")
        if not all(0 <= epoch[name] <= 1 for epoch in record["history"] for name in MEASURED if "accuracy" in name):
            raise ValueError("an accuracy is not between 0 and 1")
        if not all(map(_number, record.get("fingerprint", {"none": 0.0}).values())):
            raise ValueError("its fingerprint does not consist of numbers")
        environment = record["environment"]
        environment["path"] = _OLD_PATHS.get(environment["path"], environment["path"])
        return record
    except (FileNotFoundError, RecordError):
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except KeyError as error:
        reason = f"{error} is missing"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
    raise RecordError(
        f"{path} is not a record of a finished run ({reason}): remove it or restore it with git."
    ) from None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_OLD_PATHS = {"plain": "eager", "replayed": "graphs"}


def read_records(results: Path | str = RESULTS) -> list[Record]:
    """Read all records of a folder, in the order of their names. Raises RecordError."""
    return [read_record(path) for path in sorted(expand(results).glob("*.json"))]


def histories(records: Iterable[Record] | Record) -> pd.DataFrame:
    """Tabulate one record or several, a row per epoch: the config's columns, ``model``, then the history's.

    ``model`` and ``optimiser`` name what was given to ``train``. Accuracies are fractions. The epoch in which a run
    diverged has no row.
    """
    records = [records] if isinstance(records, dict) else records
    rows = []
    for record in records:
        rows += [record["config"] | {"model": ""} | brought(record) | epoch for epoch in record["history"]]
    return pd.DataFrame(rows, columns=[*(field.name for field in dataclasses.fields(Config)), "model", *MEASURED])


def brought(record: Record) -> dict[str, str]:
    """What was given to ``train`` in place of the config's: model and optimiser."""
    return {name: record[name] for name in ("model", "optimiser") if name in record}


def best_epoch(record: Record) -> dict[str, float]:
    """The epoch with the highest test accuracy; of several, the first."""
    return max(record["history"], key=lambda epoch: epoch["test_accuracy"])


def best(records: Iterable[Record]) -> Record:
    """The record with the highest test accuracy of any epoch; of several, the first. Raises ValueError for none."""
    return max((r for r in records if r["history"]), key=lambda record: best_epoch(record)["test_accuracy"])


def coursework(records: Iterable[Record], seed: int = 0) -> list[Record]:
    """The coursework's eight runs with this seed, in grid order, from the longest training that has all eight.

    Raises RecordError if no training has all eight.
    """
    found = {Config(**record["config"]): record for record in records if not brought(record)}
    for num_epochs in sorted({config.num_epochs for config in found}, reverse=True):
        configs = grid(num_epochs=num_epochs, seeds=[seed])
        if all(config in found for config in configs):
            return [found[config] for config in configs]
    raise RecordError("The results folder does not hold the eight runs of the coursework: run `make grid`.")


# Provenance

_PACKAGE = Path(__file__).parent
_CHANGES = ("status", "--porcelain", "--untracked-files=normal", "--", ".")
# The files that can change a run's bits: all but reporting and studies.
_DECISIVE = sorted(
    str(path.relative_to(_PACKAGE))
    for pattern in ("*.py", "kernels/*.py", "kernels/*.cpp", "baselines/*.py", "system/*.py")
    for path in _PACKAGE.glob(pattern)
)


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device, threads, precision and commit, which are the same for every run in this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
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
        # Rented machines often hide the end of the name; family and model still identify the generation.
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        cpu = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
        return f"cpu: {cpu['model name']}, family {cpu['cpu family']} model {cpu['model']}"
    except (OSError, KeyError):
        return f"{device.type}: {platform.processor() or platform.machine()}"


def _commit() -> str:
    """The package's commit, with a + if its files differ from it; "unknown" if git does not track the package."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20, env=environment
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", *_DECISIVE)  # fails in an archive unpacked inside another repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git(*_CHANGES) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _code() -> str:
    return hashlib.sha256(b"".join((_PACKAGE / name).read_bytes() for name in _DECISIVE)).hexdigest()


# Read on import: during hours of training, files and commits may change.
_COMMIT, _CODE = _commit(), _code()


def warn_of_edits() -> None:
    """Say once that the source files are no longer those that were imported."""
    if (now := _code()) != _CODE:
        _warn_of(now)


@functools.cache
def _warn_of(code: str) -> None:
    what = "The package's files were edited after they were imported, so the old code runs"
    log.warning("%s: restart Python (in a notebook, the kernel), unless you have reloaded them.", what)
