"""The command line: ``python -m mixer`` trains the coursework's grid, ``--help`` lists everything else."""

import argparse
import dataclasses
import functools
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mixer import data as fashion_mnist
from mixer.config import BATCH_SIZES, DROPOUTS, LRS, MEANINGS, RECIPES, Config, check_names, grid
from mixer.data import DataError
from mixer.records import RESULTS, Record, RecordError, best_epoch, record_path
from mixer.runner import GridError, run_grid
from mixer.system.affinity import cores
from mixer.system.device import find_device, find_precision

# What every grid varies: the option, the argument of ``grid``, and the default values.
VARIED = {
    "lr": ("--lr", "lrs", LRS),
    "dropout_p": ("--dropout", "dropouts", DROPOUTS),
    "batch_size": ("--batch-size", "batch_sizes", BATCH_SIZES),
    "seed": ("--seeds", "seeds", (0,)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    options = vars(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results, jobs = options.pop("results"), options.pop("jobs")
    how = {name: options.pop(name) for name in ("device", "precision", "data")}
    try:
        given = [argument.partition("=")[0] for argument in unknown]
        check_names("this command", given, re.findall(r"--[\w-]+", parser.format_help()))
        chosen = {name: value for name, value in options.items() if value is not None}
        configs = grid(**chosen)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        missing = sum(not os.path.lexists(record_path(config, results)) for config in configs)
        if missing:  # an error of device, precision or data set is reported once, not by every run
            find_precision(find_device(how["device"]), how["precision"])
            _ = fashion_mnist.prepare() if how["data"] is None else fashion_mnist.load_folder(how["data"])
        if jobs is None:
            jobs = cores() if find_device(how["device"]).type == "cpu" else 1
        records = run_grid(configs, results, jobs=jobs, **how)
    except (GridError, RecordError, DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    fields = [field.name for field in dataclasses.fields(Config) if field.name != "seed"]
    varied = [name for name in fields if len({getattr(config, name) for config in configs}) > 1] or ["lr"]
    same = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    own = f", data={str(how['data'])!r}" if how["data"] else ""
    afterwards = _AFTERWARDS.format(results=str(results), same=same, own=own, varied=varied)
    _print(f"{_table(records)}\n\n{afterwards}", results)


def _print(text: str, results: Path) -> None:
    """Print to stdout, whose failures must not look like those of the grid."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (else Python would try again on exit)
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"The table cannot be printed ({error.strerror}); all records are in {results}.")


_AFTERWARDS = """The records are in {results}. To draw them, in Python:
from mixer import grid, histories, run_grid
frame = histories(run_grid(grid({same}), {results!r}{own}))  # reads the finished runs
curves = frame.pivot_table("test_accuracy", "epoch", {varied})  # means of the seeds
curves.plot().figure.savefig("accuracy.png")"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixer",
        usage="%(prog)s [option value ...]",
        description="Train a grid of parameter sets, with one record per run. Finished runs in the results folder are "
        "skipped, interrupted runs resume. Without arguments: the coursework's eight runs. Options with several "
        "values train every combination. Defaults are in brackets.",
        allow_abbrev=False,  # --channels would mean --channels-mlp-dim
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34),
    )
    add = {g: parser.add_argument_group(f"the {g}").add_argument for g in ("grid", "model", "training", "data")}
    for field in dataclasses.fields(Config):
        kind, shown = _reader(field)
        option, destination, values = VARIED.get(field.name, (f"--{field.name.replace('_', '-')}", field.name, [shown]))
        meaning = f"{MEANINGS[field.name]} ({' '.join(map(str, values))})"
        reading = {"type": kind, "nargs": "+", "action": "extend", "metavar": "X", "help": meaning}
        add[field.metadata["group"]](option, dest=destination, **reading)
    add["grid"]("--recipe", choices=list(RECIPES), help="a named config for all options not given here")
    add["data"]("--data", type=Path, metavar="DIR", help="a folder with four IDX files of grey images (Fashion-MNIST)")
    how = parser.add_argument_group("where and how").add_argument
    how("--results", type=_folder, default=RESULTS, metavar="DIR", help="folder of the records (results/)")
    how("--device", help="cuda, mps or cpu (the first available)")
    how("--precision", choices=["bfloat16", "float32"], help="training precision (bfloat16 where the hardware has it)")
    # mixer.studies.bench shows that one run per core is faster than one run on all cores.
    how("--jobs", type=_number(int), metavar="N", help="runs at a time, sharing the cores (one per core; one on a GPU)")
    return parser


def _reader(field: dataclasses.Field) -> tuple[Callable[[str], Any], str]:
    """Return the parser of a field's value and its default as ``--help`` shows it."""
    default = field.default
    if isinstance(default, bool):
        return _yes_or_no, "yes" if default else "no"
    if isinstance(default, tuple):
        return _pair, "x".join(map(str, default))
    if isinstance(default, str):
        return str, default or "none"
    return _number(int if default is None else type(default)), "all" if default is None else str(default)


def _number(kind: type) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {number}; put spaces between several") from None

    return read


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


def _pair(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"give one size or two, like 4 or 4x4, not {text!r}")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"give yes or no, not {text!r}")
    return text == "yes"


def _table(records: list[Record]) -> str:
    held_out, rows = any(record["config"]["validation"] for record in records), []
    best, last = (f"{which} {'held-out' if held_out else 'test'} accuracy" for which in ("best", "last"))
    for record in records:
        name, history, diverged = Config(**record["config"]).name, record["history"], record["diverged"]
        row = {"run": name, best: "", last: "", "diverged": ""}
        if history:
            row[best] = f"{best_epoch(record)['test_accuracy']:.2%}"
            row[last] = f"{history[-1]['test_accuracy']:.2%}"
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
