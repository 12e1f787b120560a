"""The grid skips what is there, goes on with what was cut off, outlives a run that fails, and stops when told to."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from mixer import data as fashion_mnist
from mixer import distillation as teacher
from mixer import grid as grid_function
from mixer import run_grid
from mixer.config import Config
from mixer.records import RecordError, best_epoch, read_record
from mixer.runner import (
    GridError,
    best,
    coursework,
    grid,
    histories,
    publish_best,
    read_records,
    record_path,
    weights_path,
)
from mixer.runs import last_weights, train
from mixer.workers import WorkerError, Workers

module = sys.modules["mixer.runner"]  # the package's `grid` is the function
ROOT = Path(__file__).parent.parent
TWO = [Config(lr, 0.1, 64, 1, limit=128) for lr in (0.01, 0.001)]


def course(record: dict) -> list[dict]:
    """A record's history without the seconds, which differ from run to run."""
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in record["history"]]


@pytest.fixture
def quick(few, monkeypatch):
    """In this process, runs of one second; the list of those that were trained."""
    trained = []

    def quick_train(config, **options):
        trained.append(config)
        return train(config, **options | {"data": few})

    monkeypatch.setattr(module, "train", quick_train)
    monkeypatch.setattr(fashion_mnist, "SHA256", few.sha256)
    monkeypatch.setattr(fashion_mnist, "load", lambda: few)
    module._sha256_of_part.cache_clear()
    yield trained
    module._sha256_of_part.cache_clear()


def run(configs, results, **options):
    return run_grid(configs, results, **{"device": "cpu", "progress": False} | options)


def test_the_coursework_grid():
    configs = grid()
    assert grid_function is grid and len(configs) == len(set(configs)) == 8
    assert {(c.lr, c.dropout_p, c.batch_size) for c in configs} == {
        (lr, dropout_p, batch_size) for lr in (0.01, 0.001) for dropout_p in (0.0, 0.1) for batch_size in (256, 512)
    }
    assert {dataclasses.replace(c, lr=1, dropout_p=0, batch_size=1) for c in configs} == {Config(lr=1, batch_size=1)}


def test_any_field_can_be_varied():
    configs = grid([0.01], [0.0], [256], np.arange(2), num_epochs=3, num_blocks=[1, 2], patch_size=[(7, 7), 14])
    assert len(configs) == 8 and {c.num_epochs for c in configs} == {3}
    assert {(c.seed, c.num_blocks, c.patch_size) for c in configs} == {
        (seed, blocks, size) for seed in (0, 1) for blocks in (1, 2) for size in ((7, 7), (14, 14))
    }
    with pytest.raises(TypeError, match="num_blokcs"):
        grid(num_blokcs=3)
    for one, several in {"lr": "lrs", "dropout_p": "dropouts", "batch_size": "batch_sizes", "seed": "seeds"}.items():
        with pytest.raises(TypeError, match=f"takes {several}, a list of values, in place of {one}"):
            grid(recipe="modern", **{one: 0.5})


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


# ---------------------------------------------------------------- a record that is not the one asked for


@pytest.mark.parametrize("part", [{"limit": 60}, {"validation": True}, {}], ids=str)
def test_a_record_of_another_data_set_is_not_taken_for_fashion_mnists(quick, few, tmp_path, monkeypatch, part):
    mirrored = dataclasses.replace(few, train_images=few.train_images.flip(2), test_images=few.test_images.flip(2))
    monkeypatch.setattr(fashion_mnist, "load_folder", lambda folder: mirrored)
    config = Config(num_epochs=1, batch_size=64, num_blocks=1, **part)
    monkeypatch.setattr(module, "train", train)
    (record,) = run([config], tmp_path, data="mirrored")
    assert run([config], tmp_path, data="mirrored") == [record]
    with pytest.raises(GridError, match="a record of another data than asked for"):
        run([config], tmp_path)


def test_a_students_record_is_not_that_of_another_teacher(quick, few, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "WEIGHTS", tmp_path)
    monkeypatch.setattr(teacher, "data_folder", lambda: tmp_path)
    little = {"batch_size": 100, "num_epochs": 1}
    student = Config(teacher="little", num_blocks=1, patches_mlp_dim=16, channels_mlp_dim=16, **little)
    for seed in (0, 1):
        taught = Config(network="conv", seed=seed, **little)
        run([taught], tmp_path / "teachers")
        last_weights(weights_path(taught, tmp_path / "teachers")).rename(tmp_path / "little.safetensors")
        if seed == 0:
            records = run([student], tmp_path / "students")
            assert run([student], tmp_path / "students") == records
    with pytest.raises(GridError, match="a record of another teacher than asked for"):
        run([student], tmp_path / "students")
    (tmp_path / "little.safetensors").unlink()  # as for those who have the records alone
    assert run([student], tmp_path / "students") == records


def test_a_foreign_record_fails_its_run_only_and_is_kept(quick, tmp_path):
    path = record_path(TWO[0], tmp_path)
    path.write_text("{}")
    with pytest.raises(GridError, match=r"(?s)1 of .*is not a record"):
        run(TWO, tmp_path)
    assert path.read_text() == "{}" and record_path(TWO[1], tmp_path).exists()
    with pytest.raises(RecordError):
        read_records(tmp_path)


def test_a_record_made_otherwise_is_no_answer(tmp_path, own_data):
    small = Config(batch_size=16, num_epochs=1, patch_size=4, patches_mlp_dim=8, channels_mlp_dim=8, limit=32)
    run([small], tmp_path, precision="float32", data=own_data)
    run([small], tmp_path, precision="float32", data=own_data)  # as it was made
    for asked, what in (
        ({"precision": "bfloat16", "data": own_data}, "precision"),
        ({"device": "cuda", "data": own_data}, "device"),
    ):
        with pytest.raises(GridError, match=f"record of another {what} than asked for"):
            run([small], tmp_path, **asked)
    unlimited = dataclasses.replace(small, limit=None)
    run([unlimited], tmp_path, precision="float32", data=own_data)
    with pytest.raises(GridError, match="record of another data than asked for"):
        run([unlimited], tmp_path)


@pytest.fixture
def own_data(tmp_path, few):
    """A data set of one's own: three classes of 8 × 8 pixels, as IDX files."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for name, count in (("train", 60), ("t10k", 30)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4) for n in pixels.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4) + bytes(i % 3 for i in range(count))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def test_a_data_set_of_ones_own_is_named_in_the_record(tmp_path, own_data):
    [record] = run([Config(batch_size=16, num_epochs=1, patch_size=2)], tmp_path, data=own_data)
    assert record["environment"]["data"] == "letters"
    assert record["environment"]["data_sha256"] == fashion_mnist.load_folder(own_data).sha256


def test_a_results_folder_that_cannot_be_written_is_said_before_training(quick, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OSError, match="cannot be written"):
        run(TWO, tmp_path / "results")
    assert quick == []


# ---------------------------------------------------------------- side by side


def test_two_grids_at_once_train_each_run_once(tmp_path):
    """Two real processes on one folder, in opposite order; every training leaves a line."""
    context = multiprocessing.get_context("spawn")
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
    return train(config, **options)


def test_a_killed_worker_costs_its_run_and_no_other():
    with Workers(2) as workers:
        first, killed, *others = [workers.submit(os.getpid), workers.submit(kill_this_process)] + [
            workers.submit(abs, -n) for n in range(6)
        ]
        assert first.result() != os.getpid() and [other.result() for other in others] == list(range(6))
        with pytest.raises(WorkerError, match="killed or died"):
            killed.result()
        with pytest.raises(WorkerError, match=r"ZeroDivisionError: .* by zero"):
            workers.submit(divmod, 1, 0).result()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_a_pool_is_a_failure_that_the_next_grid_makes_good(quick, tmp_path):
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), kill_this_process)
    with executor, pytest.raises(GridError, match=r"2 of "):
        run(TWO, tmp_path, executor=executor)
    assert len(run(TWO, tmp_path)) == 2


def test_threads_train_the_records_of_runs_in_turn(quick, tmp_path):
    configs = [Config(0.01, 0.1, 64, 2, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as executor:
        together = run(configs, tmp_path / "together", executor=executor)
    in_turn = run(configs, tmp_path / "in turn")
    assert [course(record) for record in together] == [course(record) for record in in_turn]
    assert len({json.dumps(course(record)) for record in in_turn}) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_pool_that_forks_after_training_does_not_hang(quick, tmp_path):
    here = run(TWO, tmp_path / "here")
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        forked = run(TWO, tmp_path / "forked", executor=executor)
    assert [course(record) for record in forked] == [course(record) for record in here]


def test_a_dask_worker_of_several_threads_trains_the_same_records(tmp_path):
    """As README's lines for Slurm do it: one process a job, with a thread for each of its cores."""
    distributed = pytest.importorskip("distributed")
    configs = [Config(0.01, 0.1, 256, 1, seed, limit=256) for seed in range(3)]
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        records = run(configs, tmp_path / "dask", executor=client.get_executor())
    assert [course(record) for record in records] == [course(record) for record in run(configs, tmp_path / "here")]


# ---------------------------------------------------------------- the command line


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mixer.runner", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_line_with_two_jobs(tmp_path):
    options = ["--lr", 0.01, "--dropout", 0.1, "--batch-size", 256, "--seeds", 0, 1, "--num-blocks", 2]
    options += ["--num-epochs", 1, "--limit", 256, "--device", "cpu"]
    outcome = command("--results", tmp_path, *options, "--jobs", 2)
    assert outcome.returncode == 0, outcome.stderr
    assert "Warning" not in outcome.stderr
    records = read_records(tmp_path)
    assert [record["config"]["seed"] for record in records] == [0, 1]
    assert "lr0.01_dropout0.1_batch256_seed1_epochs1_limit256_blocks2" in outcome.stdout
    again = command("--results", tmp_path, *options)
    assert again.returncode == 0 and again.stdout == outcome.stdout and again.stderr == ""


def test_help_reads_well_and_wrong_values_are_one_sentence(tmp_path, capsys):
    outcome = command("--help")
    assert "the coursework's eight runs" in " ".join(outcome.stdout.split()) and outcome.stderr == ""
    for arguments, sentence in (
        (["--dropout", "1.5"], "dropout_p is 1.5, but it has to be"),
        (["--jobs", "0"], "jobs is 0"),
        (["--patch-size", "4x"], "--patch-size: one size or two, like 4 or 4x4, not '4x'"),
        (["--patch-size", "4,4"], "not '4,4'"),
        (["--flip", "true"], "--flip: yes or no, not 'true'"),
        (["--device", "abacus"], "there is no device 'abacus' here"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--results", str(tmp_path), *arguments])
        assert stopped.value.code and sentence in f"{stopped.value}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("stop", "whom"),
    [(signal.SIGINT, "all"), (signal.SIGTERM, "parent"), (signal.SIGKILL, "parent")],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_a_stopped_grid_leaves_no_process_and_goes_on_later(tmp_path, stop, whom):
    """Two jobs, stopped while both are being trained."""
    options = "--lr 0.01 --dropout 0.1 --batch-size 64 --seeds 0 1 2 --num-epochs 400 --limit 512 --num-blocks 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "mixer.runner", *options.split(), "--jobs", "2", "--results", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(checkpoints(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    (os.killpg if whom == "all" else os.kill)(process.pid, stop)
    output, _ = process.communicate(timeout=20)
    if stop == signal.SIGINT:
        assert output.endswith("Stopped; the same command goes on from here.\n") and "Traceback" not in output
    while is_there(process.pid) and time.monotonic() < deadline + 20:
        time.sleep(0.1)
    assert not is_there(process.pid)
    assert len(checkpoints(tmp_path)) == 2 and not list(tmp_path.glob("*.json"))


def checkpoints(results) -> set[str]:
    """The runs that have one: while a new one is written, only the one before it is there."""
    files = (results / "checkpoints").iterdir() if (results / "checkpoints").exists() else []
    return {file.name.removesuffix(".before") for file in files if file.name.endswith((".pt", ".pt.before"))}


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nothing tells how far the imports are")
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_while_it_is_still_importing(library):
    process = subprocess.Popen(
        [sys.executable, "-m", "mixer.runner"], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (1, "Stopped before anything was done.\n")


# ---------------------------------------------------------------- the best run


def test_the_longest_complete_grid_is_the_courseworks():
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
    with pytest.raises(RecordError, match="make grid"):
        coursework(records, seed=1)


def test_the_best_runs_weights_are_published_also_by_two_at_once(quick, tmp_path):
    records = run(grid(num_epochs=1), tmp_path)
    best_weights = weights_path(Config(**best(records)["config"]), tmp_path).read_bytes()
    published = tmp_path / "best.safetensors"
    assert published.read_bytes() == best_weights
    assert best_epoch(best(records))["test_accuracy"] == max(best_epoch(r)["test_accuracy"] for r in records)
    published.write_bytes(b"not to be written again" + best_weights)
    for other in ({"test_accuracy": 0.123}, None):  # another training's, and those of a version that did not say
        spoil(weights_path(Config(**best(records)["config"]), tmp_path), other)
        run(grid(num_epochs=1), tmp_path)
        assert published.read_bytes().startswith(b"not")
    weights_path(Config(**best(records)["config"]), tmp_path).write_bytes(best_weights)
    published.unlink()
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=publish_often, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and published.read_bytes() == best_weights


def spoil(weights: Path, measured: dict | None) -> None:
    """Let the file say that its epoch came to something else."""
    with safetensors.safe_open(weights, "pt") as file:
        origin = json.loads(file.metadata()["mixer"])
    origin = {name: value for name, value in origin.items() if name != "measured"}
    origin |= {} if measured is None else {"measured": measured}
    tensors = safetensors.torch.load(weights.read_bytes())
    weights.write_bytes(safetensors.torch.save(tensors, {"mixer": json.dumps(origin)}))


def publish_often(results) -> None:
    for _ in range(20):
        publish_best(results)
