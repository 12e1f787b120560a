"""The parameter grid, the store of finished runs, and what runs the one into the other.

    python -m mixer.runner                the coursework's eight runs, one on every core
    python -m mixer.runner --help         other values, seeds, sizes, devices

A finished run is one JSON file in ``results/``. A run that is there is never trained again; one that was cut off
goes on from its checkpoint. Several grids may work on one folder at the same time.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, as_completed
from itertools import product
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
from safetensors import SafetensorError, safe_open

from mixer import data as fashion_mnist
from mixer.config import RECIPES, Config
from mixer.data import DataError
from mixer.distillation import weights_of as teacher_weights
from mixer.download import absolute
from mixer.files import check_writable, write_whole
from mixer.records import Record, RecordError, best_epoch, read_record, write_record
from mixer.runs import Interrupted, train
from mixer.training import find_device, find_precision, part_of
from mixer.workers import Workers, cores, in_words

RESULTS = Path(__file__).parent.parent / "results"
LRS, DROPOUTS, BATCH_SIZES = (0.01, 0.001), (0.0, 0.1), (256, 512)
_LISTS = {"lr": "lrs", "dropout_p": "dropouts", "batch_size": "batch_sizes", "seed": "seeds"}
HISTORY = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")

log = logging.getLogger("mixer")


class GridError(RuntimeError):
    """Some runs of a grid failed, after all the others were finished. ``failures``: config -> reason."""

    def __init__(self, failures: dict[Config, str]):
        self.failures = failures
        reasons = "".join(f"\n  {config.name}: {reason}" for config, reason in failures.items())
        super().__init__(f"{len(failures)} of the grid's runs failed; run the grid again to try them again:{reasons}")


def grid(
    lrs: Iterable[float] | None = None,
    dropouts: Iterable[float] | None = None,
    batch_sizes: Iterable[int] | None = None,
    seeds: Iterable[int] = (0,),
    recipe: str | None = None,
    **others: Any,
) -> list[Config]:
    """The configs of a parameter grid; without arguments the coursework's eight.

    ``recipe``: one of ``RECIPES``, whose values stand where none are given here.
    ``others``: any other fields of ``Config``, each with one value or with a list of values:
    ``grid(seeds=range(3), num_epochs=10, num_blocks=[1, 2, 4])``. Raises ValueError, TypeError.
    """
    for name in _LISTS.keys() & others.keys():
        raise TypeError(f"a grid takes {_LISTS[name]}, a list of values, in place of {name}")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, but it has to be one of {', '.join(RECIPES)}")
    base = Config(**RECIPES[recipe]) if recipe else None
    lrs = lrs if lrs is not None else [base.lr] if base else LRS
    dropouts = dropouts if dropouts is not None else [base.dropout_p] if base else DROPOUTS
    batch_sizes = batch_sizes if batch_sizes is not None else [base.batch_size] if base else BATCH_SIZES
    others = {name: value for name, value in RECIPES.get(recipe, {}).items() if name not in _LISTS} | others
    lists = [values if isinstance(values, list) else [values] for values in others.values()]
    return [
        Config(lr=lr, dropout_p=dropout_p, batch_size=batch_size, seed=seed, **dict(zip(others, rest, strict=True)))
        for seed, lr, dropout_p, batch_size, *rest in product(seeds, lrs, dropouts, batch_sizes, *lists)
    ]


# The store


def record_path(config: Config, results: Path | str = RESULTS) -> Path:
    return Path(results) / f"{config.name}.json"


def weights_path(config: Config, results: Path | str = RESULTS) -> Path:
    """The weights of a run's best epoch: made by the run, too many to keep in the repository."""
    return Path(results) / "weights" / f"{config.name}.safetensors"


def read_records(results: Path | str = RESULTS) -> list[Record]:
    """All records of the folder, in the order of their names. Raises RecordError."""
    return [read_record(path) for path in sorted(Path(results).glob("lr*.json"))]


def coursework(records: Iterable[Record], seed: int = 0) -> list[Record]:
    """The coursework's eight runs with this seed, in grid order, of the longest training that has all eight.

    Raises RecordError when no eight belong together.
    """
    found = {Config(**record["config"]): record for record in records}
    for num_epochs in sorted({config.num_epochs for config in found}, reverse=True):
        configs = grid(num_epochs=num_epochs, seeds=[seed])
        if all(config in found for config in configs):
            return [found[config] for config in configs]
    raise RecordError("The results folder does not hold the eight runs of the coursework: run `make grid`.")


def best(records: Iterable[Record]) -> Record:
    """The record with the highest test accuracy of any epoch, the first of equals. ValueError when there is none."""
    return max((r for r in records if r["history"]), key=lambda record: best_epoch(record)["test_accuracy"])


def publish_best(results: Path | str = RESULTS) -> None:
    """Keep the weights of the coursework's best run with seed 0 as ``best.safetensors``, where they were trained here.

    Does nothing as long as the coursework's eight runs are not all there, nor with weights of another training than the
    record's. Raises OSError.
    """
    with contextlib.suppress(RecordError, ValueError, KeyError, TypeError, FileNotFoundError, SafetensorError):
        record, published = best(coursework(read_records(results))), Path(results) / "best.safetensors"
        weights = weights_path(Config(**record["config"]), results)
        with safe_open(weights, "pt") as file:
            origin = json.loads(file.metadata()["mixer"])
        content, measured = weights.read_bytes(), origin["measured"]
        same = all(best_epoch(record)[name] == value for name, value in measured.items())
        if same and not (published.exists() and published.read_bytes() == content):
            write_whole(published, content)


def histories(records: Iterable[Record]) -> pd.DataFrame:
    """One row for every epoch of every record: the config's columns, then the history's. Accuracies are fractions."""
    rows = [dataclasses.asdict(Config(**record["config"])) | epoch for record in records for epoch in record["history"]]
    columns = [field.name for field in dataclasses.fields(Config)]
    return pd.DataFrame(rows, columns=[*columns, *HISTORY])


# Running


def run_grid(
    configs: Sequence[Config],
    results: Path | str = RESULTS,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    device: str | None = None,
    precision: str | None = None,
    data: Path | str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train what is missing in ``results`` and return the records of all ``configs``, in their order.

    jobs: so many runs at a time, in processes that share this machine's cores; with one, they are trained here.
    executor: anything of ``concurrent.futures`` instead, such as dask's ``Client.get_executor()`` on a cluster whose
    nodes share the folder. (When a worker of a ProcessPoolExecutor is killed, its other runs fail too; of ``jobs``,
    only the one.)
    device, precision: as of ``train``. data: the folder of a data set of one's own, as ``data.load_folder`` takes it.
    A record that is there already and was made in another way, of other data or by another teacher, is a failure.

    When a run fails, the others are trained all the same; then GridError names what failed. Ctrl-C stops them
    all and raises Interrupted.
    """
    results = Path(results).absolute()
    data = None if data is None else absolute(data)
    configs = list(dict.fromkeys(configs))
    if any(not os.path.lexists(record_path(config, results)) for config in configs):
        check_writable(results / "checkpoints" / "lock")
    how = {"device": device, "precision": precision, "data": data, "progress": progress}
    run = functools.partial(run_one, results=results, **how)
    try:
        with Workers(jobs) if executor is None and jobs > 1 else contextlib.nullcontext(executor) as workers:
            records = _run_all(configs, run, workers)
    except KeyboardInterrupt as stop:
        message = "Interrupted; the same grid goes on from here."
        raise Interrupted(message, getattr(stop, "history", [])) from None
    publish_best(results)
    return records


def _run_all(configs: list[Config], run: functools.partial, executor: Executor | None) -> list[Record]:
    records: dict[Config, Record] = {}
    failures: dict[Config, str] = {}

    def attempt(todo: list[Config], wait: bool) -> list[Config]:
        """Run these, and return those that another grid is training just now."""
        busy = []
        jobs: dict[Future | functools.partial, Config]
        if executor is None:
            jobs = {functools.partial(run, config, wait=wait): config for config in todo}
        else:
            jobs = {executor.submit(run, config, wait=wait): config for config in todo}
        try:
            for job in jobs if executor is None else as_completed(jobs):
                config = jobs[job]
                try:
                    record = job() if executor is None else job.result()
                except Exception as error:
                    failures[config] = in_words(error)
                    log.error("%s failed: %s", config.name, failures[config])
                    continue
                if record is None:
                    busy.append(config)
                else:
                    records[config] = record
        except KeyboardInterrupt:
            for job in jobs if executor is not None else ():
                job.cancel()
            raise
        return busy

    busy = attempt(configs, wait=False)
    if busy:
        log.info("Waiting for %d runs that another grid is training.", len(busy))
        attempt(busy, wait=True)
    if failures:
        raise GridError(failures)
    return [records[config] for config in configs]


def run_one(
    config: Config,
    results: Path = RESULTS,
    *,
    device: str | None = None,
    precision: str | None = None,
    data: Path | str | None = None,
    progress: bool = True,
    wait: bool = True,
) -> Record | None:
    """The record of one run: read where it is there, trained where not; None if it is busy and ``wait`` is false."""
    path = record_path(config, results)
    checkpoint = Path(results) / "checkpoints" / f"{config.name}.pt"
    if not os.path.lexists(path):  # what is there, if only a link to nothing, is not overwritten
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # A lock of the operating system ends with its process, however that ends.
        lock = filelock.FileLock(checkpoint.with_suffix(".lock"), timeout=-1 if wait else 0)
        try:
            with lock:
                if not os.path.lexists(path):  # nobody finished it while we waited
                    record = train(
                        config,
                        device=device,
                        precision=precision,
                        data=None if data is None else fashion_mnist.load_folder(data),
                        checkpoint=checkpoint,
                        weights=weights_path(config, results),
                        progress=progress,
                        position=Workers.position,
                    )
                    write_record(record, path)
                    for leftover in checkpoint.parent.glob(f"{checkpoint.name}*"):
                        leftover.unlink()
        except filelock.Timeout:
            return None
    record = read_record(path)
    _check_as_asked_for(record, path, config, device, precision, data)
    return record


def _check_as_asked_for(
    record: Record, path: Path, config: Config, device: str | None, precision: str | None, data: Path | str | None
) -> None:
    """RecordError when the record is another config's, or was made otherwise than is asked for now."""
    environment = record["environment"]
    kind = environment["device"].partition(":")[0]
    made = {
        "config": Config(**record["config"]).name,
        "device": kind if kind in ("cpu", "mps") else "cuda",
        "precision": environment["precision"],
        "data": environment["data_sha256"],
    }
    wanted = made | {"config": config.name}
    if config.teacher and (teacher := teacher_weights(config.teacher)).exists():
        made["teacher"] = environment.get("teacher_weights_sha256")
        wanted["teacher"] = hashlib.sha256(teacher.read_bytes()).hexdigest()
    if device is not None:
        wanted["device"] = str(device).partition(":")[0]
    if precision is not None:
        wanted["precision"] = precision
    if data is not None:
        wanted["data"] = part_of(fashion_mnist.load_folder(data), config).sha256
    elif config.limit is None and not config.validation:
        wanted["data"] = fashion_mnist.SHA256
    else:
        wanted["data"] = _sha256_of_part(config.limit, config.validation)
    others = [name for name in made if made[name] != wanted[name]]
    if others:
        raise RecordError(
            f"{path} is a record of another {' and '.join(others)} than asked for: give another folder for the "
            "results, or take the record away."
        )


@functools.cache
def _sha256_of_part(limit: int | None, validation: bool) -> dict[str, str]:
    """Of that part of Fashion-MNIST."""
    return part_of(fashion_mnist.load(), Config(limit=limit, validation=validation)).sha256


# The command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results, jobs = options.pop("results"), options.pop("jobs")
    how = {name: options.pop(name) for name in ("device", "precision", "data")}
    try:
        configs = grid(**{name: value for name, value in options.items() if value is not None})
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs is {jobs}, but it has to be a whole number above 0")
    except ValueError as error:
        parser.error(str(error))
    try:
        missing = sum(not os.path.lexists(record_path(config, results)) for config in configs)
        if missing:  # what is wrong with device, precision or data set is said once, not by every run
            find_precision(find_device(how["device"]), how["precision"])
            _ = fashion_mnist.prepare() if how["data"] is None else fashion_mnist.load_folder(how["data"])
        at_a_time = jobs or (cores() if find_device(how["device"]).type == "cpu" else 1)
        records = run_grid(configs, results, jobs=min(at_a_time, missing), **how)
    except (GridError, RecordError, DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(_table(records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer.runner",
        description="Train a grid of parameter sets, one record a run. What the results folder holds already is not "
        "trained again, and a run that was cut off goes on. Without arguments: the coursework's eight runs. An option "
        "with several values trains every combination.",
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records (results/)")
    add("--device", help="cuda, mps or cpu; found when not given")
    add("--precision", choices=["bfloat16", "float32"], help="bfloat16 where the hardware has it, when not given")
    add("--data", type=Path, metavar="DIR", help="a data set of your own in Fashion-MNIST's layout, in place of it")
    # mixer.studies.bench measures that one run a core is faster than one run on all.
    add("--jobs", type=int, metavar="N", help="runs at a time, which share a CPU's cores (one a core; on a GPU one)")
    values = parser.add_argument_group("what is varied, and the values when not given").add_argument
    several = {"nargs": "+", "metavar": "X"}
    values("--lr", dest="lrs", type=float, **several, help=f"learning rates ({_words(LRS)})")
    values("--dropout", dest="dropouts", type=float, **several, help=f"probabilities ({_words(DROPOUTS)})")
    values("--batch-size", dest="batch_sizes", type=int, **several, help=f"images ({_words(BATCH_SIZES)})")
    values("--seeds", type=int, **several, help="each runs the whole grid (0)")
    values("--recipe", choices=list(RECIPES), help="a named config, whose values stand where none are given here")
    for field in dataclasses.fields(Config):
        if field.name not in ("lr", "dropout_p", "batch_size", "seed"):
            option, default = f"--{field.name.replace('_', '-')}", field.default
            kind, shown = _KINDS[type(default)]
            values(option, type=kind, **several, help=f"({shown(default)})")
    return parser


def _pair(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"one size or two, like 4 or 4x4, not {text!r}")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"yes or no, not {text!r}")
    return text == "yes"


def _words(values: Iterable[float]) -> str:
    return " ".join(map(str, values))


# For a field's default: what reads a value from the command line, and how a value is shown.
_KINDS = {
    int: (int, str),
    float: (float, str),
    str: (str, str),
    bool: (_yes_or_no, lambda value: "yes" if value else "no"),
    tuple: (_pair, lambda value: "x".join(map(str, value))),
    type(None): (int, lambda _: "all"),
}


def _table(records: list[Record]) -> str:
    rows = []
    for record in records:
        name, history, diverged = Config(**record["config"]).name, record["history"], record["diverged"]
        row = {"run": name, "best test accuracy": "", "last test accuracy": "", "diverged": ""}
        if history:
            row["best test accuracy"] = f"{best_epoch(record)['test_accuracy']:.2%}"
            row["last test accuracy"] = f"{history[-1]['test_accuracy']:.2%}"
        if diverged:
            row["diverged"] = f"epoch {diverged['epoch']}, step {diverged['step']}"
        rows.append(row)
    return pd.DataFrame(rows).to_string(index=False)


if __name__ == "__main__":
    try:
        from mixer.runner import main  # one module, not two of the same code

        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
