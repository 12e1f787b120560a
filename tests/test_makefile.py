"""What make trains for a notebook are the runs that it waits for, so a recipe that changes cannot leave one behind."""

import dataclasses
import itertools
import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mixer import grid as make_grid
from mixer.config import Config
from mixer.reporting.pages import PROJECT
from mixer.runner import RESULTS, _parser

Run = tuple[Path, Config]  # where its record lies


def trained(target: str) -> set[Run]:
    """The runs of the commands that ``make target`` would give."""
    make = subprocess.run(["make", "--dry-run", target], cwd=PROJECT, capture_output=True, text=True, check=True)
    runs = set()
    for line in make.stdout.splitlines():
        _, module, options = line.partition("-m mixer.runner ")
        if module:
            values = vars(_parser().parse_args(shlex.split(options)))
            folder = PROJECT / values.pop("results")
            for name in ("jobs", "device", "precision", "data"):
                values.pop(name)
            configs = make_grid(**{name: value for name, value in values.items() if value is not None})
            runs |= {(folder, config) for config in configs}
    return runs


def cells(notebook: str, *names: str) -> dict[str, object]:
    """What these cells of a notebook define, and those of its parameters before them."""
    tools = {"grid": make_grid, "Config": Config, "product": itertools.product, "pd": pd}
    tools |= {"fields": dataclasses.fields, "replace": dataclasses.replace}
    book = nbformat.read(PROJECT / "notebooks" / f"{notebook}.ipynb", 4)
    sources = {cell.id: cell.source for cell in book.cells}
    exec(sources["parameters"], tools)
    tools["results"] = RESULTS / notebook
    for name in names:
        exec(sources[name], tools)
    return tools


def longer(num_epochs: int) -> set[Config]:
    """The first epochs of runs of the coursework's grid, which go on."""
    return set(make_grid(seeds=[0, 1, 2], num_epochs=num_epochs))


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@needs_make
def test_make_grid():
    shown = cells("experiments")
    values = [shown[name] for name in ("lrs", "dropouts", "batch_sizes", "seeds")]
    runs = make_grid(*values, num_epochs=shown["num_epochs"], limit=shown["limit"])
    judged = [dataclasses.replace(config, validation=True) for config in runs if config.seed == shown["seeds"][0]]
    assert trained("grid") == {(RESULTS, config) for config in [*runs, *judged]}


@needs_make
def test_make_questions():
    sets = cells("questions", "sets")
    wanted = {
        (RESULTS / "questions", config)
        for question in ("depths", "sizes", "left_out", "likeliest")
        for configs in sets[question].values()
        for config in configs
    }
    begun = {(RESULTS / "questions", config) for config in longer(8) | longer(10) | longer(60)}
    assert len(wanted) > 80 and wanted - begun <= trained("questions") <= wanted


@needs_make
def test_make_recipe():
    sets = cells("recipe", "recipes", "sets")
    own = [*sets["recipes"].values(), sets["teacher"], *sets["ablation"].values(), *sets["peers"].values()]
    wanted = {(RESULTS / "recipe", config) for configs in own for config in configs}
    for networks, orders in sets["shuffles"]:
        shuffled = [config for configs in networks.values() for config in configs]
        wanted |= {(sets["folders"][which], config) for which, config in itertools.product(orders, shuffled)}
    wanted -= {(RESULTS / "recipe", config) for config in longer(10)}
    assert len(wanted) > 30 and trained("recipe") == wanted
