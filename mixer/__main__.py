"""The command line: ``python -m mixer`` trains the coursework's grid, ``--help`` lists everything else."""

import argparse
import dataclasses
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from mixer import data as fashion_mnist
from mixer.config import BATCH_SIZES, DROPOUTS, LRS, RECIPES, Config, grid
from mixer.data import DataError
from mixer.records import RESULTS, Record, RecordError, best_epoch, record_path
from mixer.runner import GridError, run_grid
from mixer.system.affinity import cores
from mixer.system.device import find_device, find_precision


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
        prog="python -m mixer",
        description="Train a grid of parameter sets, one record a run. Finished runs in the results folder are "
        "skipped, interrupted runs resume. Without arguments: the coursework's eight runs. An option with several "
        "values trains every combination.",
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
            kind, shown = _reader(field)
            values(f"--{field.name.replace('_', '-')}", type=kind, **several, help=f"({shown})")
    return parser


def _reader(field: dataclasses.Field) -> tuple[Any, str]:
    """What reads a field's value from the command line, and how its default is shown."""
    default = field.default
    if isinstance(default, bool):
        return _yes_or_no, "yes" if default else "no"
    if isinstance(default, tuple):
        return _pair, "x".join(map(str, default))
    if default is None:
        return int, "all"
    words = get_args(field.type) if isinstance(default, str) else ()
    return type(default), ", ".join(words) + f"; {default}" if words else str(default)


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
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt Python's exit
        sys.exit("Stopped; the same command resumes from here.")
