"""The parameter grid, the store of finished runs, and what runs the one into the other.

    python -m mixer.grid                the coursework's eight runs, one after the other
    python -m mixer.grid --help         other values, seeds, devices

A finished run is one JSON file in ``results/``. A run that is there is never trained again; one that was cut off
goes on from its checkpoint. Several grids may work on one folder at the same time.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import filelock
import pandas as pd
import torch

from mixer import data as fashion_mnist
from mixer.data import DataError
from mixer.records import Record, RecordError, best_epoch, read_record, write_record, write_whole
from mixer.runs import train
from mixer.train import Config, find_device

RESULTS = Path(__file__).parent.parent / "results"
LRS, DROPOUTS, BATCH_SIZES = (0.01, 0.001), (0.0, 0.1), (256, 512)

_HISTORY = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")

log = logging.getLogger("mixer")


class GridError(RuntimeError):
    """Some runs of a grid failed, after all the others were finished. ``failures``: config -> reason."""

    def __init__(self, failures: dict[Config, str]):
        self.failures = failures
        reasons = "".join(f"\n  {config.name}: {reason}" for config, reason in failures.items())
        super().__init__(f"{len(failures)} of the grid's runs failed; run the grid again to try them again:{reasons}")


def grid(
    lrs: Iterable[float] = LRS,
    dropouts: Iterable[float] = DROPOUTS,
    batch_sizes: Iterable[int] = BATCH_SIZES,
    seeds: Iterable[int] = (0,),
    num_epochs: int = Config.num_epochs,
    limit: int | None = None,
) -> list[Config]:
    """The configs of a parameter grid; without arguments the coursework's eight. Raises ValueError."""
    return [
        Config(lr, dropout_p, batch_size, num_epochs, seed, limit)
        for seed, lr, dropout_p, batch_size in product(seeds, lrs, dropouts, batch_sizes)
    ]


# The store


def record_path(config: Config, results: Path = RESULTS) -> Path:
    return Path(results) / f"{config.name}.json"


def weights_path(config: Config, results: Path = RESULTS) -> Path:
    """The weights of a run's best epoch: made by the run, too many to keep in the repository."""
    return Path(results) / "weights" / f"{config.name}.safetensors"


def read_records(results: Path = RESULTS) -> list[Record]:
    """All records of the folder, in the order of their names. Raises RecordError."""
    return [read_record(path) for path in sorted(Path(results).glob("lr*.json"))]


def coursework(records: Iterable[Record]) -> list[Record]:
    """The coursework's eight runs with seed 0, in grid order, of the longest training that has all eight.

    Raises RecordError when no eight belong together.
    """
    found = {Config(**record["config"]): record for record in records}
    for num_epochs in sorted({config.num_epochs for config in found}, reverse=True):
        configs = grid(num_epochs=num_epochs)
        if all(config in found for config in configs):
            return [found[config] for config in configs]
    raise RecordError("The results folder does not hold the eight runs of the coursework: run `make grid`.")


def best(records: Iterable[Record]) -> Record:
    """The record with the highest test accuracy of any epoch, the first of equals."""
    return max((r for r in records if r["history"]), key=lambda record: best_epoch(record)["test_accuracy"])


def publish_best(results: Path = RESULTS) -> None:
    """Keep the weights of the coursework grid's best run as ``best.safetensors``, where they were trained here."""
    config = Config(**best(coursework(read_records(results)))["config"])
    with contextlib.suppress(FileNotFoundError):
        write_whole(Path(results) / "best.safetensors", weights_path(config, results).read_bytes())


def histories(records: Iterable[Record]) -> pd.DataFrame:
    """One row for every epoch of every record: the config's columns, then the history's. Accuracies are fractions."""
    rows = [record["config"] | epoch for record in records for epoch in record["history"]]
    columns = [field.name for field in dataclasses.fields(Config)]
    return pd.DataFrame(rows, columns=[*columns, *_HISTORY])


# Running


def run_grid(
    configs: Sequence[Config],
    results: Path | str = RESULTS,
    *,
    executor: Executor | None = None,
    device: str | None = None,
    precision: str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train what is missing in ``results`` and return the records of all ``configs``, in their order.

    executor: anything of ``concurrent.futures``, which then trains the runs: a ProcessPoolExecutor, or dask's
    ``Client.get_executor()`` on a cluster whose nodes share the folder. Without one they are trained here, in turn.

    When a run fails, the others are trained all the same; then GridError names what failed.
    """
    results = Path(results).absolute()
    configs = list(dict.fromkeys(configs))
    records: dict[Config, Record] = {}
    failures: dict[Config, str] = {}
    run = functools.partial(run_one, results=results, device=device, precision=precision, progress=progress)

    def attempt(todo: list[Config], wait: bool) -> list[Config]:
        """Run these, and return those that another grid is training just now."""
        busy = []
        jobs: dict[Future | functools.partial, Config]
        if executor is None:
            jobs = {functools.partial(run, config, wait=wait): config for config in todo}
        else:
            jobs = {executor.submit(run, config, wait=wait): config for config in todo}
        for job in jobs if executor is None else as_completed(jobs):
            config = jobs[job]
            try:
                record = job() if executor is None else job.result()
            except Exception as error:
                failures[config] = f"{type(error).__name__}: {error}"
                log.error("%s failed: %s", config.name, failures[config])
                continue
            if record is None:
                busy.append(config)
            else:
                records[config] = record
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
    progress: bool = True,
    wait: bool = True,
) -> Record | None:
    """The record of one run: read where it is there, trained where not; None if it is busy and ``wait`` is false."""
    path = record_path(config, results)
    if path.exists():
        return read_record(path)
    checkpoint = Path(results) / "checkpoints" / f"{config.name}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # A lock of the operating system ends with its process, however that ends.
    lock = filelock.FileLock(checkpoint.with_suffix(".lock"), timeout=-1 if wait else 0)
    try:
        with lock:
            if not path.exists():  # nobody finished it while we waited
                record = train(
                    config,
                    device=device,
                    precision=precision,
                    checkpoint=checkpoint,
                    weights=weights_path(config, results),
                    progress=progress,
                    position=_worker_position,
                )
                write_record(record, path)
                for leftover in checkpoint.parent.glob(f"{checkpoint.name}*"):
                    leftover.unlink()
            return read_record(path)
    except filelock.Timeout:
        return None


_worker_position: int | None = None  # the line of this worker process's progress bar


def _start_worker(threads: int, positions) -> None:
    global _worker_position
    torch.set_num_threads(threads)
    _worker_position = positions.get()
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """``jobs`` processes that share the machine's cores evenly."""
    context = multiprocessing.get_context("spawn")
    positions = context.Queue()
    for position in range(jobs):
        positions.put(position)
    threads = max(1, _cores() // jobs)
    return ProcessPoolExecutor(jobs, context, _start_worker, (threads, positions))


# The command line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mixer.grid",
        description="Train a grid of parameter sets, one record a run. What the results folder holds already is not "
        "trained again, and a run that was cut off goes on. Without arguments: the coursework's eight runs.",
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the records (results/)")
    add("--lr", type=float, nargs="+", default=LRS, metavar="RATE", help=f"learning rates {_default(LRS)}")
    add("--dropout", type=float, nargs="+", default=DROPOUTS, metavar="P", help=f"probabilities {_default(DROPOUTS)}")
    add("--batch-size", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help=f"images {_default(BATCH_SIZES)}")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="each runs the whole grid (0)")
    add("--num-epochs", type=int, default=Config.num_epochs, metavar="N", help="of each run (%(default)s)")
    add("--limit", type=int, metavar="N", help="train on the first N images only, to try things out")
    add("--device", help="cuda, mps or cpu; found when not given")
    add("--precision", choices=["bfloat16", "float32"], help="bfloat16 where the hardware has it, when not given")
    # mixer.bench measures that one run a core is faster than one run on all.
    add("--jobs", type=int, metavar="N", help="runs at a time, which share a CPU's cores (one a core; on a GPU one)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        configs = grid(
            options.lr, options.dropout, options.batch_size, options.seeds, options.num_epochs, options.limit
        )
    except ValueError as error:
        parser.error(str(error))
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"jobs is {options.jobs}, but it has to be a whole number above 0")
    try:
        records = _run(configs, options)
    except (GridError, DataError, OSError, RuntimeError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
    print(_table(records))
    with contextlib.suppress(RecordError):  # the coursework's grid may not be complete yet
        publish_best(options.results)


def _default(values: Iterable[float]) -> str:
    return f"({' '.join(map(str, values))})"


def _run(configs: list[Config], options: argparse.Namespace) -> list[Record]:
    device = options.device or str(find_device())
    torch.empty(0, device=device)  # a device that is not there fails here, once, not in every run
    common = {"results": options.results, "device": device, "precision": options.precision}
    missing = sum(not record_path(config, options.results).exists() for config in configs)
    jobs = min(options.jobs or (_cores() if device == "cpu" else 1), missing)
    if missing:
        fashion_mnist.prepare()  # what is wrong with the data set is said once, not by every run
    if jobs <= 1:
        return run_grid(configs, **common)
    with process_pool(jobs) as executor:
        return run_grid(configs, executor=executor, **common)


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
    main()
