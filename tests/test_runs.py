"""A run that lasts: the same record every time, whatever befalls it."""

import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import first_images

from mixer import data as fashion_mnist
from mixer import fused
from mixer.config import Config
from mixer.data import Data
from mixer.model import MlpMixer
from mixer.predict import load_model
from mixer.records import best_epoch
from mixer.runs import Interrupted, train
from mixer.train import Training, find_precision, predict

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3)


def timeless(record: dict) -> dict:
    """A record without the seconds, which differ between two runs of the same config."""
    record = copy.deepcopy(record)
    for epoch in record["history"]:
        del epoch["seconds"]
    return record


def run(few, config=SHORT, **options) -> dict:
    return train(config, **{"data": few, "device": "cpu", "progress": False} | options)


@pytest.fixture(scope="module")
def uninterrupted(few) -> dict:
    return run(few)


# ---------------------------------------------------------------- the record


def test_the_record_says_what_was_run_and_where(few, uninterrupted):
    assert set(uninterrupted) == {"format", "config", "history", "diverged", "environment"}
    assert Config(**uninterrupted["config"]) == SHORT
    assert [epoch["epoch"] for epoch in uninterrupted["history"]] == [1, 2, 3]
    assert all(0 < epoch["test_accuracy"] < 1 and epoch["seconds"] > 0 for epoch in uninterrupted["history"])
    environment = uninterrupted["environment"]
    assert environment["torch"] == torch.__version__ and environment["precision"] == find_precision(CPU)
    assert environment["path"] == ("plain" if fused._library() is None else "fused")
    assert environment["threads"] == torch.get_num_threads()
    assert environment["data"] == few.name and environment["data_sha256"] == few.sha256 != fashion_mnist.SHA256
    json.dumps(uninterrupted, allow_nan=False)


def test_a_limit_cuts_what_is_given_and_the_hash_is_of_what_was_used(few):
    config = Config(batch_size=64, num_epochs=1, num_blocks=1, limit=64)
    record = run(few, config)
    assert record["environment"]["data_sha256"] == few.first(64).sha256
    assert timeless(record)["history"] == timeless(run(few.first(64), config))["history"]
    with pytest.raises(ValueError, match=r"limit is 301.*300"):
        run(few, replace(config, limit=301))


def test_same_seed_same_record(few, uninterrupted):
    assert timeless(run(few)) == timeless(uninterrupted)
    other = run(few, replace(SHORT, seed=1))
    assert timeless(other)["history"] != timeless(uninterrupted)["history"]


@pytest.mark.skipif(fused._library() is None, reason="PyTorch's own sums depend on the threads")
@pytest.mark.parametrize("precision", sorted({"float32", find_precision(CPU)}))
def test_same_record_on_one_thread_and_on_two(few, precision):
    threads = torch.get_num_threads()
    records = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            records.append(run(few, Config(dropout_p=0.1, batch_size=128, num_epochs=2), precision=precision))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert [record["environment"].pop("threads") for record in records] == [1, 2]
    assert timeless(records[0]) == timeless(records[1])


def test_runs_in_threads_are_those_in_turn_and_change_nothing_of_the_process(few):
    """Several seeds and both precisions at once, while somebody else draws from PyTorch's own generator."""
    configs = [replace(SHORT, seed=seed, num_epochs=2) for seed in range(3)]
    precisions = [find_precision(CPU), "float32", find_precision(CPU)]
    in_turn = [run(few, config, precision=p) for config, p in zip(configs, precisions, strict=True)]
    done, seen = threading.Event(), set()

    def somebody_else():
        while not done.is_set():
            torch.manual_seed(0)
            torch.rand(100)
            seen.add((torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.is_autocast_enabled("cpu")))
            fresh = threading.Thread(target=lambda: seen.add((torch.get_num_threads(), False, False)))
            fresh.start()
            fresh.join()

    expected = {(torch.get_num_threads(), False, False)}
    other = threading.Thread(target=somebody_else)
    other.start()
    try:
        with ThreadPoolExecutor(3) as executor:
            jobs = [executor.submit(run, few, c, precision=p) for c, p in zip(configs, precisions, strict=True)]
            together = [job.result() for job in jobs]
    finally:
        done.set()
        other.join()
    assert [timeless(record) for record in together] == [timeless(record) for record in in_turn]
    assert seen == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_of_a_process_that_has_trained_trains_too(few, uninterrupted):
    """GNU OpenMP's threads do not survive it: PyTorch would wait for them for ever."""
    torch.rand(500, 500) @ torch.rand(500, 500)
    torch.nn.functional.layer_norm(torch.rand(20_000, 16), (16,))  # so that they have been used
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=lambda: outcome.put(timeless(run(few))["history"]), daemon=True)
    child.start()
    child.join(120)
    hangs = child.exitcode is None
    child.kill()
    assert not hangs and outcome.get() == timeless(uninterrupted)["history"]


def test_a_data_set_of_ones_own_is_trained_on_and_named():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (90, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.arange(90) % 3
    own = Data(images[:60], labels[:60], images[60:], labels[60:], name="letters")
    record, model = run(own, Config(batch_size=16, num_epochs=1, patch_size=2), return_model=True)
    assert record["environment"]["data"] == "letters" and model.num_classes == 3 and model.num_patches == 16


# ---------------------------------------------------------------- what it hands out


def test_callbacks_and_the_model(few, uninterrupted):
    seen = []
    record, model = run(few, on_epoch=lambda epoch, model: seen.append((epoch, model.training)), return_model=True)
    assert [epoch | {"seconds": 0} for epoch, _ in seen] == [epoch | {"seconds": 0} for epoch in record["history"]]
    assert not any(training for _, training in seen) and not model.training
    logits = torch.cat(list(predict(model, few.test_images, record["environment"]["precision"])))
    assert float((logits.argmax(1) == few.test_labels).double().mean()) == record["history"][-1]["test_accuracy"]
    assert timeless(record) == timeless(uninterrupted)


def test_the_weights_are_those_of_the_best_epoch_and_the_same_bytes_every_time(few, tmp_path):
    record = run(few, weights=str(tmp_path / "one.safetensors"))
    run(few, weights=tmp_path / "other.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    assert content == (tmp_path / "other.safetensors").read_bytes()
    model = MlpMixer()
    model.load_state_dict(safetensors.torch.load(content))
    logits = torch.cat(list(predict(model, few.test_images, record["environment"]["precision"])))
    best = best_epoch(record)
    assert float((logits.argmax(dim=1) == few.test_labels).double().mean()) == best["test_accuracy"]
    with safetensors.safe_open(tmp_path / "one.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["mixer"])
    assert Config(**origin["config"]) == SHORT and (origin["name"], origin["epoch"]) == (SHORT.name, best["epoch"])
    assert torch.equal(load_model(tmp_path / "one.safetensors").head.weight, model.head.weight)


@pytest.mark.parametrize("argument", ["checkpoint", "weights"])
def test_a_place_that_cannot_be_written_is_said_before_training(few, tmp_path, argument, monkeypatch):
    monkeypatch.setattr(Training, "train_epoch", None)
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, str(tmp_path / "file" / "below")):
        with pytest.raises(OSError, match="cannot be written"):
            run(few, **{argument: place})


# ---------------------------------------------------------------- cut off


def test_killed_at_random_moments_it_ends_with_the_same_record(tmp_path, uninterrupted):
    """Real processes, real SIGKILLs, until one of them gets to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixer.grid"])
    moments = random.Random(0)
    outcome = tmp_path / "record.json"
    kills = 0
    patience = 0.2
    while not outcome.exists():
        process = context.Process(target=train_in_a_process, args=(tmp_path,))
        process.start()
        process.join(patience * moments.uniform(0.5, 2))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -9)
        patience *= 1.1  # so that the test ends on a slow machine too
    assert kills >= 5
    assert timeless(json.loads(outcome.read_text()))["history"] == timeless(uninterrupted)["history"]


def train_in_a_process(folder) -> None:
    few = first_images(fashion_mnist.load())
    record = run(few, checkpoint=folder / "run.pt")
    (folder / "incoming").write_text(json.dumps(record))
    (folder / "incoming").rename(folder / "record.json")


@pytest.fixture
def cut_off(few, tmp_path):
    """A checkpoint of two of three epochs, with the one of the first epoch before it."""
    checkpoint = tmp_path / "run.pt"

    def stop(epoch, model):
        if epoch["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"^Interrupted after 2 of 3 epochs; .*has them\.$") as interrupted:
        run(few, checkpoint=str(checkpoint), on_epoch=stop)
    assert [epoch["epoch"] for epoch in interrupted.value.history] == [1, 2]
    return checkpoint


@pytest.fixture
def trained_epochs(monkeypatch):
    """The numbers of the epochs that are trained from now on."""
    epochs, train_epoch = [], Training.train_epoch

    def counted(self, *arguments):
        epochs.append(self.epoch + 1)
        return train_epoch(self, *arguments)

    monkeypatch.setattr(Training, "train_epoch", counted)
    return epochs


def test_a_checkpoint_is_used(few, cut_off, uninterrupted, caplog, trained_epochs):
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    assert trained_epochs == [3] and not caplog.records


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not a checkpoint": lambda content: b"Hello",
    **{f"a bit at {share:.0%}": lambda content, share=share: flipped(content, share) for share in (0.0, 0.3, 0.7, 1.0)},
}


def flipped(content: bytes, share: float) -> bytes:
    place = int(share * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    few, cut_off, uninterrupted, caplog, damage, trained_epochs
):
    cut_off.write_bytes(damage(cut_off.read_bytes()))
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    [message] = [record.getMessage() for record in caplog.records]
    assert str(cut_off) in message and "passed over" in message and "\n" not in message
    assert trained_epochs == [2, 3]


@pytest.mark.parametrize("other", ["config", "data", "precision", "code"])
def test_a_checkpoint_of_another_run_starts_this_one_afresh(few, cut_off, caplog, other, trained_epochs, monkeypatch):
    config, data, options = SHORT, few, {}
    if other == "config":
        config = replace(SHORT, lr=0.02)
    elif other == "data":
        data = replace(few, train_images=few.train_images.flip(2))
    elif other == "precision":
        options = {"precision": "float32" if find_precision(CPU) == "bfloat16" else pytest.skip("float32 only")}
    else:
        monkeypatch.setattr("mixer.records._CODE", "other code")
    record = run(data, config, checkpoint=cut_off, **options)
    assert trained_epochs == [1, 2, 3] and len(caplog.records) == 1 and "starts afresh" in caplog.text
    assert timeless(record)["history"] == timeless(run(data, config, **options))["history"]


def test_the_plain_formula_on_another_number_of_threads_starts_afresh(few, tmp_path, caplog, trained_epochs):
    """It gives other bits there."""
    config = Config(num_channels=8, num_blocks=1, batch_size=64, num_epochs=2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run(few, replace(config, num_epochs=2), checkpoint=tmp_path / "run.pt")
    finally:
        torch.set_num_threads(threads)
    assert trained_epochs == [1, 2, 1, 2] and "passed over" in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_the_one_before_stays(few, cut_off, uninterrupted):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"run\.pt cannot be written .*make room and run again"):
            run(few, checkpoint=cut_off)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name for path in cut_off.parent.iterdir()} == {"run.pt.before"}
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)


def test_a_loss_that_is_not_finite_ends_the_run(few):
    record = run(few, Config(lr=1e30, batch_size=64, num_epochs=2))
    assert record["diverged"]["epoch"] == 1 and record["history"] == []
    json.dumps(record, allow_nan=False)


def test_ctrl_c_in_a_notebook_is_one_line_and_the_finished_epochs_are_there(tmp_path):
    """A real kernel, really interrupted."""
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT), env=os.environ | {"PYTHONPATH": str(ROOT)})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        ready = tmp_path / "ready"
        code = f"""from pathlib import Path
from mixer import Config, train
train(Config(num_epochs=500, num_blocks=1, limit=256), progress=False,
      on_epoch=lambda epoch, model: Path({str(ready)!r}).touch())"""
        outputs = []

        def interrupt():
            while not ready.exists():
                threading.Event().wait(0.1)
            manager.interrupt_kernel()

        threading.Thread(target=interrupt, daemon=True).start()
        client.execute_interactive(code, output_hook=outputs.append, timeout=120)
        [error] = [message["content"] for message in outputs if message["msg_type"] == "error"]
        assert len(error["traceback"]) == 1 and error["traceback"][0].startswith("Interrupted after ")
        outputs.clear()
        client.execute_interactive("import sys; print(len(sys.last_value.history))", output_hook=outputs.append)
        [text] = [message["content"]["text"] for message in outputs if message["msg_type"] == "stream"]
        assert int(text) >= 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_ctrl_c_in_a_script_leaves_a_checkpoint(tmp_path):
    code = f"""from mixer import Config, train
train(Config(num_epochs=500, num_blocks=1, limit=256), progress=False, checkpoint={str(tmp_path / "run.pt")!r})"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run.pt").exists():
        threading.Event().wait(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "Interrupted after " in errors.splitlines()[-1] and (tmp_path / "run.pt").exists()


def test_code_that_changed_on_disk_meanwhile_is_not_what_the_record_names(tmp_path):
    """Commit and hash are those of the code that was loaded."""
    shutil.copytree(ROOT / "mixer", tmp_path / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    code = """if True:
        import hashlib, pathlib, sys
        sys.path.insert(0, ".")
        from mixer import records
        before = records.environment(records.torch.device("cpu"), "float32")["code_sha256"]
        with open("mixer/train.py", "a") as file:
            file.write("# changed")
        assert records.environment(records.torch.device("cpu"), "float32")["code_sha256"] == before
        print(before)
    """
    hashes = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert len(set(hashes)) == 2 and all(len(line) == 65 for line in hashes)


def test_the_progress_bar_puts_numbers_first_and_can_be_switched_off(few, capsys):
    run(few, replace(SHORT, num_epochs=1), progress=True)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert last.startswith("100%") and "epoch 1/1 loss " in last and last.index("test ") < last.index(SHORT.name[:6])
    run(few, replace(SHORT, num_epochs=1))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_learns_as_the_cpu_does(few, uninterrupted):
    record = run(few, device="cuda")
    for ours, theirs in zip(record["history"], uninterrupted["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
    assert timeless(record) == timeless(run(few, device="cuda"))
