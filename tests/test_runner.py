"""The grid skips finished runs, resumes interrupted ones, survives a killed worker and stops on Ctrl-C."""

import functools
import importlib
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import mixer
from mixer import data as fashion_mnist
from mixer import runner, training
from mixer.baselines import distillation
from mixer.checkpoint import last_weights
from mixer.config import Config
from mixer.fingerprint import differences
from mixer.model import MixerBlock
from mixer.records import RecordError, read_record, read_records, record_path, weights_path
from mixer.runner import GridError, check_code, fingerprints, run_grid, run_one
from mixer.system.files import unseal
from mixer.training import train

ROOT = Path(__file__).parent.parent


def tiny(seed: int = 0, num_epochs: int = 1, **others) -> Config:
    """A run on :func:`own_data` whose epochs take milliseconds."""
    size = {"num_blocks": 1, "patch_size": 4, "patches_mlp_dim": 16, "channels_mlp_dim": 16}
    return Config(**{"batch_size": 16, "seed": seed, "num_epochs": num_epochs, "dropout_p": 0.1} | size | others)


TINY = (
    "--lr 0.01 --dropout 0.1 --batch-size 16 --num-blocks 1 --patch-size 4 --patches-mlp-dim 16 --channels-mlp-dim 16"
)
TWO = [tiny(0), tiny(1)]


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """A custom data set: three classes of 8 × 8 pixels, as IDX files."""
    return write_data(tmp_path_factory.mktemp("data") / "letters", seed=0)


def write_data(folder: Path, seed: int) -> Path:
    folder.mkdir()
    for name, count in (("train", 60), ("t10k", 30)):
        images = torch.randint(256, (count, 8, 8), generator=torch.Generator().manual_seed(seed))
        for kind, tensor in (("images-idx3", images), ("labels-idx1", torch.arange(count) % 3)):
            (folder / f"{name}-{kind}-ubyte").write_bytes(fashion_mnist.idx_file(tensor))
    return folder


@pytest.fixture
def run(own_data) -> Callable[..., list[dict]]:
    return functools.partial(run_grid, device="cpu", progress=False, data=own_data)


@pytest.fixture
def trained(monkeypatch) -> list[Config]:
    """The configs trained in this process from now on."""
    return count(monkeypatch)


def count(monkeypatch) -> list[Config]:
    configs = []
    monkeypatch.setattr(runner, "train", lambda config, **how: configs.append(config) or train(config, **how))
    return configs


def timeless(records: list[dict]) -> list[list[dict]]:
    return [[epoch | {"seconds": 0} for epoch in record["history"]] for record in records]


def test_rejects_arguments_in_one_sentence(tmp_path, own_data):
    with pytest.raises(TypeError, match="takes the folder of a data set"):
        run_grid(TWO, tmp_path, data=fashion_mnist.load_folder(own_data))
    for jobs in (0, -1, "2"):
        with pytest.raises(ValueError, match=f"jobs is {jobs!r}, but it has to be a whole number above 0"):
            run_grid(TWO, tmp_path, jobs=jobs)


def test_trains_each_run_once_and_then_reads_its_record(run, trained, tmp_path, own_data, monkeypatch):
    records = run(TWO, tmp_path)
    assert trained == TWO and [Config(**record["config"]) for record in records] == TWO
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert run(TWO[::-1], f"~/{tmp_path.name}", jobs=2) == records[::-1] == read_records(tmp_path)[::-1]
    assert trained == TWO and all(weights_path(config, tmp_path).exists() for config in TWO)
    assert not list((tmp_path / "checkpoints").iterdir())
    made = records[0]["environment"]
    assert (made["data"], made["data_sha256"]) == ("letters", fashion_mnist.load_folder(own_data).sha256)


def test_names_a_failed_run_at_the_end_and_trains_the_others(run, tmp_path):
    absent = [tiny(seed, limit=61) for seed in (0, 1)]
    with pytest.raises(GridError, match=r"^2 of .*\n  .*limit61.*, .*limit61.*: ValueError: limit is 61") as error:
        run([absent[0], TWO[0], absent[1]], tmp_path)
    assert list(error.value.failures) == absent and str(error.value).count("\n") == 1
    assert [Config(**record["config"]) for record in read_records(tmp_path)] == TWO[:1]


def test_rejects_results_that_cannot_be_written_before_training(run, trained, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(OSError, match="cannot be written"):
        run(TWO, tmp_path / "results")
    assert trained == []


@pytest.mark.parametrize("put", [Path.touch, os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_foreign_record_fails_its_run_only_and_is_kept(run, tmp_path, put):
    """Reading a pipe would block, and writing would follow a broken link."""
    path = record_path(TWO[0], tmp_path)
    put(path)
    before = path.lstat().st_ino, path.lstat().st_mtime_ns
    with pytest.raises(GridError, match=r"^1 of .*\n.*is not a record of a finished run"):
        run(TWO, tmp_path)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == before and record_path(TWO[1], tmp_path).exists()
    with pytest.raises(RecordError):
        read_records(tmp_path)


@pytest.mark.parametrize("part", [{}, {"limit": 30}, {"validation": True}], ids=str)
def test_rejects_a_record_made_with_other_settings(run, tmp_path, part):
    config = tiny(**part)
    records = run([config], tmp_path, precision="float32")
    assert run([config], tmp_path, precision="float32") == records
    other = write_data(tmp_path / "other", seed=1)
    for what, value in (("precision", "bfloat16"), ("device", "cuda"), ("data", other), ("data", None)):
        with pytest.raises(GridError, match=rf"differs from what was requested \({what}\): give another"):
            run([config], tmp_path, **{what: value})


def test_rejects_a_record_of_another_teacher(run, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "WEIGHTS", tmp_path)
    monkeypatch.setattr(distillation, "data_folder", lambda: tmp_path)
    student, taught = tiny(teacher="little"), Config(network="conv", batch_size=30, num_epochs=1)
    run([taught], tmp_path / "teachers")
    weights = last_weights(weights_path(taught, tmp_path / "teachers")).rename(tmp_path / "little.safetensors")
    records = run([student], tmp_path / "students")
    assert run([student], tmp_path / "students") == records
    weights.write_bytes(b"others")
    with pytest.raises(GridError, match=r"differs from what was requested \(teacher\)"):
        run([student], tmp_path / "students")
    weights.unlink()  # as for someone who has only the records
    assert run([student], tmp_path / "students") == records


def test_rejects_a_record_of_different_code(run, tmp_path):
    [record] = run(TWO[:1], tmp_path)
    other = record | {"fingerprint": record["fingerprint"] | {"gradient": 1.0}}
    record_path(TWO[0], tmp_path).write_text(json.dumps(other))
    with pytest.raises(GridError, match=r"was trained with different code \(.*gradient.*\): give another"):
        run(TWO[:1], tmp_path)
    assert read_records(tmp_path) == [other]


def test_notices_that_a_data_set_was_corrected(run, tmp_path):
    folder = write_data(tmp_path / "own", seed=0)
    run(TWO[:1], tmp_path / "results", data=folder)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(fashion_mnist.idx_file(torch.arange(60) % 2))
    with pytest.raises(GridError, match=r"differs from what was requested \(data\)"):
        run(TWO[:1], tmp_path / "results", data=folder)
    run(TWO[1:], tmp_path / "results", data=folder)


EDITS = {
    "schedule": (training, "schedule", lambda name, done, first: (1 - done) ** 2),
    "accuracy": (training.Run, "evaluate", lambda run, on_test=None: (1.0, 0.9)),
    "output": (MixerBlock, "forward", lambda block, x: x),
}


@pytest.mark.parametrize("number", EDITS)
def test_fingerprint_shows_an_edit(number, monkeypatch):
    config = tiny(num_epochs=3, patch_size=7)
    before = fingerprints([config])[config]
    assert not differences(before, fingerprints([config])[config], config)
    monkeypatch.setattr(*EDITS[number])
    assert number in differences(before, fingerprints([config])[config], config)


def test_trains_a_part_of_a_data_set_that_lacks_a_class(tmp_path, run):
    [record] = run([tiny(limit=2)], tmp_path)  # labels 0 and 1 of three
    assert run([tiny(limit=2)], tmp_path) == [record]


def test_worker_refuses_to_train_a_changed_model(tmp_path, own_data, trained, monkeypatch):
    codes = fingerprints(TWO[:1], own_data)
    monkeypatch.setattr(MixerBlock, "forward", lambda block, x: x)
    with pytest.raises(ValueError, match="worker processes read the source files, and this process has other code"):
        run_one(TWO[0], tmp_path, data=own_data, codes=codes, caller=("another machine", 1))
    assert trained == []


def test_records_keep_their_fingerprints_on_another_processor():
    """PyTorch without AVX rounds differently, as another processor does."""
    code = """
from mixer.records import RESULTS, read_records
from mixer.runner import check_code
check_code(record for folder in ("", "questions", "recipe") for record in read_records(RESULTS / folder))"""
    old = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=old, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_warns_of_records_trained_with_different_code(caplog, monkeypatch):
    committed = [*(ROOT / "results").rglob("lr*.json")]
    records = [read_record(path) for path in committed]
    check_code(records)
    assert len(records) > 210 and not caplog.messages
    monkeypatch.setattr(MixerBlock, "forward", lambda block, x: x)
    check_code(records[:3])
    [line] = caplog.messages
    first = committed[0].stem
    assert line.startswith(f"3 of 3 records were trained with different code, the first being {first} (the ")


def test_dask_trains_the_same_records(run, tmp_path):
    """As in README's lines for Slurm, one thread per core, but in this process, which has imported PyTorch."""
    distributed = pytest.importorskip("distributed")
    configs = [tiny(seed) for seed in range(3)]
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=3, dashboard_address=None) as client:
        records = run(configs, tmp_path / "dask", executor=client.get_executor())
    assert timeless(records) == timeless(run(configs, tmp_path / "here"))


def test_two_grids_at_once_train_each_run_once(run, trained, tmp_path):
    configs = [tiny(seed, num_epochs=5) for seed in range(6)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
        others = elsewhere.submit(trained_by, run, configs[::-1], tmp_path)
        until((tmp_path / "checkpoints").exists)
        run(configs, tmp_path)
        assert sorted(config.seed for config in trained + others.result()) == list(range(6))


def trained_by(run, configs, results) -> list[Config]:
    with pytest.MonkeyPatch.context() as patch:
        trained = count(patch)
        run(configs, results)
        return trained


def test_killed_worker_costs_no_epoch(run, tmp_path):
    configs, kept = [tiny(seed, num_epochs=25) for seed in (0, 1)], {}

    def kill() -> None:
        until(lambda: kept.update(kept_histories(configs, tmp_path)) or kept)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    records = run(configs, tmp_path, jobs=np.int64(2))
    killer.join()
    assert kept and resume(records, kept)


def test_repeatedly_killed_worker_says_how_to_resume(run, tmp_path):
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.1):
            for process in multiprocessing.active_children():
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(GridError, match="a worker process was killed; run the grid again to resume") as error:
            run(TWO, tmp_path, jobs=2)
    finally:
        done.set()
        killer.join()
    assert list(error.value.failures) == TWO and str(error.value).count("\n") == 1
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), os._exit, (1,))
    with executor, pytest.raises(GridError, match="a worker process was killed"):
        run(TWO, tmp_path, executor=executor)
    assert len(run(TWO, tmp_path)) == 2


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_stopped_grid_leaves_no_process_and_resumes(run, tmp_path, own_data, stop):
    """SIGINT goes to all processes, as from a terminal; SIGKILL to the first one."""
    configs = [tiny(seed, num_epochs=25) for seed in (0, 1)]
    options = f"{TINY} --seeds 0 1 --num-epochs 25 --jobs 2 --data {own_data} --results {tmp_path}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", "mixer", *options.split()]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    until(lambda: kept_histories(configs, tmp_path))
    (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
    output, _ = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert output.endswith("Stopped; the same command resumes from here.\n") and "Traceback" not in output
    until(lambda: is_gone(process.pid))
    kept = kept_histories(configs, tmp_path)
    assert kept and not list(tmp_path.glob("*.json"))
    assert resume(run(list(kept), tmp_path), kept)


def kept_histories(configs, results) -> dict[Config, list[dict]]:
    """The states of the runs that have a checkpoint."""
    files = {config: results / "checkpoints" / f"{config.name}.pt" for config in configs}
    contents = {config: io.BytesIO(unseal(file.read_bytes())) for config, file in files.items() if file.exists()}
    return {config: torch.load(content, weights_only=True)["history"] for config, content in contents.items()}


def resume(records, kept) -> bool:
    """Whether these records continue the checkpoints, seconds included."""
    histories = {Config(**record["config"]): record["history"] for record in records}
    return all(histories[config][: len(history)] == history for config, history in kept.items())


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return False
    except ProcessLookupError:
        return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_exceptions_survive_pickling():
    modules = [importlib.import_module(module.name) for module in pkgutil.walk_packages(mixer.__path__, "mixer.")]
    found = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    own = {kind for kind in found if issubclass(kind, BaseException) and kind.__module__.startswith("mixer.")}
    assert len(own) >= 4
    for kind in own:
        error = kind({tiny(): "it fails"} if kind is GridError else "it fails")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)


def test_grid_in_a_pools_worker_reports_its_error(run, tmp_path):
    """A worker of multiprocessing.Pool cannot start processes; an error that cannot be pickled would hang it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(OSError, match=r"^Worker processes cannot be started \(daemonic .*\): train with jobs=1\.$"):
            pool.apply_async(run, (TWO, tmp_path), {"jobs": 2}).get(60)
        with pytest.raises(GridError, match="limit is 61"):
            pool.apply_async(run, ([tiny(limit=61)], tmp_path)).get(60)


def test_reports_a_script_without_a_guard_once(tmp_path, own_data):
    call = f"run_grid(grid(num_epochs=1), {str(tmp_path)!r}, jobs=2, data={str(own_data)!r})"
    (tmp_path / "script.py").write_text(f"from mixer import grid, run_grid\n{call}")
    command, environment = [sys.executable, tmp_path / "script.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 1 and outcome.stderr.count("Error") == outcome.stderr.count("Traceback") + 1 == 2
    assert 'in a script, call run_grid under `if __name__ == "__main__":`' in outcome.stderr.splitlines()[-1]
