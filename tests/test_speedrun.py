import json
import time
from dataclasses import replace

import pytest
import torch
from test_comparison import record

from mixer.config import RECIPES, Config
from mixer.studies import speedrun
from mixer.training import Interrupted, train

SMALL = {"num_epochs": 2, "batch_size": 64, "num_blocks": 1, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


@pytest.fixture
def folder(few, tmp_path, monkeypatch):
    """The folder that main() writes to, with a small recipe and few images."""
    pytest.importorskip("timm")
    monkeypatch.setitem(RECIPES, "speedrun", RECIPES["speedrun"] | SMALL)
    monkeypatch.setattr(speedrun, "FOLDER", tmp_path)
    monkeypatch.setattr(speedrun, "STEPS", 2)
    monkeypatch.setattr(speedrun, "load", few.to)
    monkeypatch.setattr(speedrun, "read_records", lambda: [record(speedrun.COURSEWORK, 0.8, 0.9)])
    torch.set_num_threads(1)  # eager steps on all threads wait long for each other on a busy machine
    return tmp_path


def test_measures_whole_runs(folder, monkeypatch, capsys):
    calls = []

    def timed(config, **options):
        start = time.perf_counter()
        time.sleep(0.1)  # a slow start counts
        finished = train(config, **options)
        calls.append((config, finished, time.perf_counter() - start))
        return finished

    monkeypatch.setattr(speedrun, "train", timed)
    speedrun.main(["--runs", "2", "--device", "cpu"])
    (warm_up, _, _), *runs = calls
    config = Config(**RECIPES["speedrun"])
    assert warm_up == replace(config, num_epochs=1, limit=64)
    assert [run for run, _, _ in runs] == [config, replace(config, seed=1)]

    [path] = folder.iterdir()
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    for seed, (row, (_, run, seconds)) in enumerate(zip(result["runs"], runs, strict=True)):
        accuracy = run["history"][-1]["test_accuracy"]
        assert row == {"seed": seed, "epochs": 2, "test_accuracy": accuracy, "seconds": row["seconds"]}
        assert row["seconds"] == pytest.approx(seconds, abs=0.05)
        assert f"seed {seed}: 2 epochs, test accuracy {accuracy:.2%}" in printed
    assert result["environment"] == runs[0][1]["environment"] | {"timm": result["environment"]["timm"]}
    assert Config(**result["config"]) == config and result["timm"]["epoch_seconds"]["n"] == 4
    assert "0 of 2 runs reach 89.17%" in printed and "extrapolated to the 2 epochs" in printed
    assert f"{path} is written." in printed


def test_extrapolates_to_the_first_epoch_that_reaches_the_target():
    best = speedrun.COURSEWORK
    others = [record(replace(best, **other), 0.9) for other in ({"dropout_p": 0.0}, {"num_epochs": 3})]
    ours = [record(best, 0.88, 0.8916, 0.8917, 0.85, 0.9), record(replace(best, seed=7), 0.88, 0.8916)]
    assert speedrun.extrapolate(ours + others, 10.0) == [
        {"seed": 0, "epochs": 3, "seconds": 30},
        {"seed": 7, "epochs": None, "seconds": None},
    ]


def test_reports_how_many_reach_the_target():
    rows = [{"test_accuracy": a, "seconds": s} for a, s in [(0.8917, 40.0), (0.8916, 50.0), (0.9, 60.0)]]
    extrapolated = [{"seed": 3, "epochs": 20, "seconds": 4000}, {"seed": 4, "epochs": None, "seconds": None}]
    timm = {"epoch_seconds": speedrun.spread([100.0, 300.0]), "extrapolated": extrapolated}
    lines = speedrun.report({"target": 0.8917, "runs": rows, "timm": timm}).splitlines()
    assert lines[0].startswith("2 of 3 runs reach 89.17%")
    assert lines[2] == "seconds: mean 50.0, standard deviation 10.0, from 40.0 to 60.0, n=3"
    assert lines[3].endswith("mean 200.0, standard deviation 141.4, from 100.0 to 300.0, n=2")
    assert "20 epochs" in lines[4] and "seed 3" in lines[4] and lines[4].endswith("4,000 s, 80 times as long")
    assert lines[5].endswith("with seed 4 never reaches it")


def test_writes_nothing_when_interrupted(folder, monkeypatch):
    def stopped(config, **options):
        if config.seed == 1:
            raise Interrupted("Interrupted after 0 epochs.")
        return train(config, **options)

    monkeypatch.setattr(speedrun, "train", stopped)
    with pytest.raises(SystemExit, match="Stopped; nothing was written"):
        speedrun.main(["--device", "cpu"])
    assert list(folder.iterdir()) == []


def test_names_a_run_that_diverges(folder, few):
    config = Config(**SMALL | {"lr": 1e30, "batch_size": 32})
    with pytest.raises(ValueError, match="seed 0 diverged: give the recipe a smaller learning rate"):
        speedrun.measure(config, 2, few, torch.device("cpu"), [])


def test_rejects_one_run_and_a_missing_peer(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        speedrun.main(["--runs", "1"])
    assert "--runs is 1, but it has to be at least 2" in capsys.readouterr().err
    monkeypatch.setattr(speedrun.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"timm.* is missing: pip install -r requirements-dev\.txt"):
        speedrun.main([])
