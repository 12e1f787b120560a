"""The grid skips what is there, goes on with what was cut off, and outlives a run that fails."""

import functools
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from test_train import timeless

from mixer import grid as module
from mixer.grid import (
    GridError,
    RecordError,
    best,
    coursework,
    grid,
    histories,
    publish_best,
    read_record,
    read_records,
    record_path,
    run_grid,
    weights_path,
)
from mixer.train import Config, train

TWO = [Config(lr, 0.1, 64, 1, limit=128) for lr in (0.01, 0.001)]


@pytest.fixture
def quick(few, monkeypatch):
    """In this process, runs of one second; the list of those that were trained."""
    trained = []

    def quick_train(config, **options):
        trained.append(config)
        return train(config, **options, data=few)

    monkeypatch.setattr(module, "train", quick_train)
    return trained


def run(configs, results, **options):
    return run_grid(configs, results, device="cpu", progress=False, **options)


def test_the_coursework_grid():
    configs = grid()
    assert len(configs) == len(set(configs)) == 8
    assert {(c.lr, c.dropout_p, c.batch_size) for c in configs} == {
        (lr, dropout_p, batch_size) for lr in (0.01, 0.001) for dropout_p in (0.0, 0.1) for batch_size in (256, 512)
    }
    assert {(c.num_epochs, c.seed, c.limit) for c in configs} == {(60, 0, None)}


def test_runs_are_trained_once_and_read_ever_after(quick, tmp_path):
    records = run(TWO, tmp_path)
    assert quick == TWO and [Config(**record["config"]) for record in records] == TWO
    assert run(TWO, tmp_path) == records == [read_record(record_path(config, tmp_path)) for config in TWO]
    assert quick == TWO
    assert all(weights_path(config, tmp_path).stat().st_size > 3_700_000 for config in TWO)
    assert not list((tmp_path / "checkpoints").glob("*.pt*"))
    frame = histories(records)
    assert frame[["lr", "epoch"]].values.tolist() == [[0.01, 1], [0.001, 1]]


def test_a_run_that_fails_is_named_at_the_end_and_the_others_go_on(quick, tmp_path, monkeypatch):
    working = module.train

    def failing_train(config, **options):
        if config == TWO[0]:
            raise RuntimeError("the device is on fire")
        return working(config, **options)

    monkeypatch.setattr(module, "train", failing_train)
    with pytest.raises(GridError, match=r"(?s)1 of .*lr0\.01.*the device is on fire") as error:
        run(TWO, tmp_path)
    assert list(error.value.failures) == [TWO[0]]
    assert [Config(**record["config"]) for record in read_records(tmp_path)] == [TWO[1]]


def test_a_run_that_diverges_leaves_a_record(quick, tmp_path):
    wild = Config(lr=1e30, batch_size=64, num_epochs=1)
    records = run([wild, TWO[0]], tmp_path)
    assert records[0]["diverged"]["epoch"] == 1 and records[1]["diverged"] is None
    assert run([wild], tmp_path) == records[:1]
    assert best(records) == records[1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:300], "line"),
        (lambda text: "{}", "lacks 'config'"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format is 9"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "should be called"),
        (lambda text: text.replace('"history": [', '"history": [], "old": ['), "0 of 1 epochs"),
        (lambda text: text.replace('"lr": 0.01', '"learning_rate": 0.01'), "learning_rate"),
    ],
)
def test_a_foreign_or_truncated_record_is_one_sentence_and_is_kept(quick, tmp_path, damage, reason):
    run(TWO[:1], tmp_path)
    path = record_path(TWO[0], tmp_path)
    path.write_text(damage(path.read_text()))
    damaged = path.read_text()
    with pytest.raises(RecordError, match="is not a record of a finished run") as error:
        read_records(tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(GridError, match="is not a record"):
        run(TWO, tmp_path)
    assert path.read_text() == damaged and record_path(TWO[1], tmp_path).exists()


def test_two_grids_at_once_train_each_run_once(tmp_path, few):
    """Two real processes on one folder, in opposite order; every training leaves a line."""
    context = multiprocessing.get_context("forkserver")
    configs = [Config(0.01, 0.0, 64, 2, seed, limit=64) for seed in range(4)]
    grids = [context.Process(target=counted_grid, args=(order, tmp_path)) for order in (configs, configs[::-1])]
    for process in grids:
        process.start()
    for process in grids:
        process.join()
    assert [process.exitcode for process in grids] == [0, 0]
    assert sorted((tmp_path / "trained").read_text().split()) == sorted(config.name for config in configs)
    assert len(read_records(tmp_path)) == 4


def counted_grid(configs, results) -> None:
    module.train = functools.partial(counted_train, results=results)
    assert len(run(configs, results)) == len(configs)


def counted_train(config, *, results, **options):
    with (results / "trained").open("a") as file:
        file.write(f"{config.name}\n")
    return few_test_images_train(config, **options)


def few_test_images_train(config, **options):
    from conftest import first_images

    from mixer import data as fashion_mnist

    return train(config, data=first_images(fashion_mnist.load(), 64, 100), **options)


def test_a_killed_worker_is_a_failure_that_the_next_grid_makes_good(quick, tmp_path):
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), kill_this_process)
    with executor, pytest.raises(GridError, match=r"2 of "):
        run(TWO, tmp_path, executor=executor)
    assert len(run(TWO, tmp_path)) == 2


def kill_this_process() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_dask_trains_the_same_records(tmp_path, few):
    distributed = pytest.importorskip("distributed")
    configs = [Config(0.01, 0.1, 256, 1, limit=256), Config(0.001, 0.0, 256, 1, limit=256)]
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        records = run(configs, tmp_path / "dask", executor=client.get_executor())
    assert [Config(**record["config"]) for record in records] == configs
    here = run(configs[:1], tmp_path / "here")
    assert timeless(here[0])["history"] == timeless(records[0])["history"]


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mixer.grid", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )


def test_the_command_line_with_two_jobs(tmp_path):
    options = ["--lr", 0.01, "--dropout", 0.1, "--batch-size", 256, "--seeds", 0, 1]
    options += ["--num-epochs", 1, "--limit", 256, "--device", "cpu"]
    outcome = command("--results", tmp_path, *options, "--jobs", 2)
    assert outcome.returncode == 0, outcome.stderr
    records = read_records(tmp_path)
    assert [record["config"]["seed"] for record in records] == [0, 1]
    assert "lr0.01_dropout0.1_batch256_seed1_epochs1_limit256" in outcome.stdout
    again = command("--results", tmp_path, *options)
    assert again.returncode == 0 and again.stdout == outcome.stdout and "step" not in again.stderr


def test_help_reads_well_and_wrong_values_are_one_sentence(tmp_path):
    assert "the coursework's eight runs" in " ".join(command("--help").stdout.split())
    outcome = command("--dropout", 1.5, "--results", tmp_path)
    assert outcome.returncode == 2 and "dropout_p is 1.5, but it has to be" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    outcome = command("--device", "abacus", "--results", tmp_path)
    assert outcome.returncode == 1 and "abacus" in outcome.stderr and "Traceback" not in outcome.stderr


def test_the_longest_complete_grid_is_the_courseworks(tmp_path):
    def record(config, accuracy=0.5):
        epoch = {"epoch": 1, "test_accuracy": accuracy}
        return {"config": vars(config), "history": [epoch] * config.num_epochs}

    two, sixty = grid(num_epochs=2), grid()
    records = [record(config) for config in two + sixty[:7]]
    assert [Config(**r["config"]) for r in coursework(records)] == two
    records.append(record(sixty[7], accuracy=0.6))
    assert [Config(**r["config"]) for r in coursework(records)] == sixty
    assert Config(**best(coursework(records))["config"]) == sixty[7]
    with pytest.raises(RecordError, match="make grid"):
        coursework(records[:7])


def test_the_best_runs_weights_are_published(quick, tmp_path):
    records = run(grid(num_epochs=1), tmp_path)
    publish_best(tmp_path)
    published = (tmp_path / "best.safetensors").read_bytes()
    assert published == weights_path(Config(**best(records)["config"]), tmp_path).read_bytes()
    assert json.dumps(Config(**best(records)["config"]).name).encode() in published[:20_000]
