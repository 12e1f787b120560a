"""The time to the coursework's accuracy: what is measured, what is extrapolated, and what is left behind."""

import json
import time
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch

from mixer.config import RECIPES, Config
from mixer.runs import Interrupted, train
from mixer.studies import speedrun

SMALL = {"num_epochs": 2, "batch_size": 64, "num_blocks": 1, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


@pytest.fixture
def folder(few, tmp_path, monkeypatch):
    """Where main() writes, with a small recipe on few images."""
    monkeypatch.setitem(RECIPES, "speedrun", RECIPES["speedrun"] | SMALL)
    monkeypatch.setattr(speedrun, "FOLDER", tmp_path)
    monkeypatch.setattr(speedrun, "load", few.to)
    monkeypatch.setattr(speedrun, "read_records", lambda: [record(speedrun.COURSEWORK, 0.8, 0.9)])
    return tmp_path


def record(config: Config, *accuracies: float) -> dict:
    history = [{"epoch": i, "test_accuracy": accuracy} for i, accuracy in enumerate(accuracies, start=1)]
    return {"config": asdict(config), "history": history}


@pytest.fixture(autouse=True)
def _few_steps_of_one_thread(monkeypatch):
    """Eager steps on all threads wait for one another long where other processes want the cores too."""
    monkeypatch.setattr(speedrun, "STEPS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_rows_are_those_of_whole_runs_and_are_written_and_shown(folder, monkeypatch, capsys):
    pytest.importorskip("timm")
    calls = []

    def timed(config, **options):
        start = time.perf_counter()
        time.sleep(0.1)  # as if it took long until the first epoch
        finished = train(config, **options)
        calls.append((config, finished, time.perf_counter() - start))
        return finished

    monkeypatch.setattr(speedrun, "train", timed)
    start = time.perf_counter()
    speedrun.main(["--runs", "2", "--device", "cpu"])
    seconds = time.perf_counter() - start
    (warm_up, _, _), *runs = calls
    config = Config(**RECIPES["speedrun"])
    assert warm_up == replace(config, num_epochs=1, limit=64)
    assert [run for run, _, _ in runs] == [config, replace(config, seed=1)]

    [path] = folder.iterdir()
    result = json.loads(path.read_text())
    first, accuracies = ([run["history"][i]["test_accuracy"] for _, run, _ in runs] for i in (0, 1))
    assert first[0] != accuracies[0] != accuracies[1]
    assert [list(row.values())[:3] for row in result["runs"]] == [[0, 2, accuracies[0]], [1, 2, accuracies[1]]]
    assert all(row["seconds"] > taken - 0.01 for row, (_, _, taken) in zip(result["runs"], runs, strict=True))
    assert sum(row["seconds"] for row in result["runs"]) < seconds
    assert Config(**result["config"]) == config
    assert result["environment"] == runs[0][1]["environment"] | {"timm": version("timm")}
    timm = result["timm"]["epoch_seconds"]
    assert timm["n"] == 4 and 0 < timm["min"] < timm["mean"] < timm["max"] < seconds * 60_000 / 256

    printed = capsys.readouterr().out
    assert f"seed 1: 2 epochs, test accuracy {accuracies[1]:.2%}" in printed
    assert "0 of 2 runs reach 89.17%" in printed and "extrapolated to the 2 epochs" in printed
    assert f"{path} is written." in printed


def test_the_epochs_are_those_until_our_own_records_of_the_courseworks_best_set_first_get_there():
    best = speedrun.COURSEWORK
    records = [
        record(best, 0.88, 0.8916, 0.8917, 0.85, 0.9),
        record(replace(best, seed=7), 0.88, 0.8916),
        record(replace(best, dropout_p=0.0), 0.9),
        record(replace(best, num_epochs=3), 0.9),
    ]
    assert speedrun.extrapolate(records, 10.0) == [
        {"seed": 0, "epochs": 3, "seconds": 30},
        {"seed": 7, "epochs": None, "seconds": None},
    ]


def test_the_report_counts_who_gets_there_and_says_who_never_does():
    accuracies = (0.8917, 0.8916, 0.9)
    result = {
        "target": 0.8917,
        "runs": [{"test_accuracy": accuracy, "seconds": 40.0 + 10 * i} for i, accuracy in enumerate(accuracies)],
        "timm": {
            "epoch_seconds": speedrun.spread([100.0, 300.0]),
            "extrapolated": [
                {"seed": 3, "epochs": 20, "seconds": 4000},
                {"seed": 4, "epochs": None, "seconds": None},
            ],
        },
    }
    lines = speedrun.report(result).splitlines()
    assert lines[0].startswith("2 of 3 runs reach 89.17%")
    assert lines[2] == "seconds: mean 50.0, standard deviation 10.0, from 40.0 to 60.0"
    assert lines[3].endswith("mean 200.0, standard deviation 141.4, from 100.0 to 300.0 (n=2)")
    assert "extrapolated to the 20 epochs" in lines[4] and "seed 3" in lines[4]
    assert lines[4].endswith("4,000 s, 80 times as long")
    assert lines[5].endswith("with seed 4 never gets there")


def test_ctrl_c_leaves_nothing(folder, monkeypatch):
    pytest.importorskip("timm")

    def stopped(config, **options):
        if config.seed == 1:
            raise Interrupted("Interrupted after 0 epochs.")
        return train(config, **options)

    monkeypatch.setattr(speedrun, "train", stopped)
    with pytest.raises(SystemExit, match="Stopped; nothing is written"):
        speedrun.main(["--device", "cpu"])
    assert list(folder.iterdir()) == []


def test_a_run_that_diverges_is_named(few):
    pytest.importorskip("timm")
    config = Config(**SMALL | {"lr": 1e30, "batch_size": 32})
    with pytest.raises(ValueError, match="seed 0 diverged: give the recipe a smaller learning rate"):
        speedrun.measure(config, 2, few, torch.device("cpu"), [])


def test_what_is_missing_is_said_before_anything_is_trained(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        speedrun.main(["--runs", "1"])
    assert "runs is 1, but it takes 2 or more" in capsys.readouterr().err
    monkeypatch.setattr(speedrun.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"timm.* is missing: pip install -r requirements-dev\.txt"):
        speedrun.main([])
