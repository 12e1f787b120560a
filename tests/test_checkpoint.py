"""A run resumes bit for bit from its checkpoint, and saves the weights of its best and last epochs."""

import json
import multiprocessing
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import first_images
from safetensors.torch import load_file
from test_training import SHORT, TINY, nesterov, network, run, timeless
from torch import nn

from mixer import data as fashion_mnist
from mixer.baselines import networks
from mixer.checkpoint import key, last_weights
from mixer.config import Config
from mixer.kernels import fused
from mixer.kernels.dropout import Dropout
from mixer.model import MlpMixer
from mixer.prediction import load_with_origin
from mixer.records import best_epoch
from mixer.training import Interrupted, Run

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")


@pytest.fixture(scope="module")
def uninterrupted(few) -> dict:
    return run(few)


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The numbers of the epochs trained from now on."""
    epochs, train_epoch = [], Run.train_epoch

    def counted(self, *callbacks):
        epochs.extend([] if self.eager else [self.epoch + 1])  # not those of a fingerprint
        train_epoch(self, *callbacks)

    monkeypatch.setattr(Run, "train_epoch", counted)
    return epochs


@pytest.fixture
def checkpoint(few, tmp_path) -> Path:
    """The checkpoint after two of SHORT's three epochs."""
    with pytest.raises(Interrupted, match=r"^Interrupted after 2 of 3 epochs; .*has them\.$") as interrupted:
        run(few, checkpoint=str(tmp_path / "run.pt"), on_epoch=stop_after(2))
    handed_on = pickle.loads(pickle.dumps(interrupted.value))  # by a process
    assert str(handed_on) == str(interrupted.value) and [epoch["epoch"] for epoch in handed_on.history] == [1, 2]
    return tmp_path / "run.pt"


def stop_after(last: int):
    def stop(epoch, model):
        if epoch["epoch"] == last:
            raise KeyboardInterrupt

    return stop


# Resuming


def test_resumes_after_kills_at_random_moments_with_the_same_record(tmp_path, uninterrupted):
    """Kill real processes until one of them finishes."""
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["mixer.training"])
    outcome, kills, patience = tmp_path / "record.json", 0, 0.1
    while not outcome.exists():
        process = context.Process(target=train_in_a_process, args=(tmp_path,))
        process.start()
        process.join(patience * moments.uniform(0.5, 2))
        kills += process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        patience *= 1.1  # so that the test ends even on a slow machine
    assert kills >= 5 and timeless(json.loads(outcome.read_text()))["history"] == timeless(uninterrupted)["history"]


def train_in_a_process(folder: Path) -> None:
    record = run(first_images(fashion_mnist.load()), checkpoint=folder / "run.pt")
    (folder / "incoming").write_text(json.dumps(record))
    (folder / "incoming").rename(folder / "record.json")


def test_ctrl_c_in_ipython_leaves_a_checkpoint_and_no_traceback(tmp_path):
    code = f"""from mixer import Config, train
train(Config(num_epochs=500, num_blocks=1, limit=256), progress=False, checkpoint={str(tmp_path / "run.pt")!r})"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "IPython", "-c", code], cwd=ROOT, **pipes)
    while process.poll() is None and not (tmp_path / "run.pt").exists():
        threading.Event().wait(0.1)
    process.send_signal(signal.SIGINT)
    [line] = process.communicate(timeout=60)[0].strip().splitlines()
    assert "Interrupted after " in line and (tmp_path / "run.pt").exists()


def test_resumes_an_interrupted_run_and_says_so(few, checkpoint, uninterrupted, caplog, trained, monkeypatch):
    here = Run._environment
    monkeypatch.setattr(Run, "_environment", lambda run: here(run) | {"system": "another machine"})
    record = run(few, checkpoint=checkpoint)
    assert trained == [3] and not caplog.records
    assert timeless(record)["history"] == timeless(uninterrupted)["history"]
    assert record["environment"].pop("earlier") == [{"epochs": 2} | uninterrupted["environment"]]
    assert record["environment"] == uninterrupted["environment"] | {"system": "another machine"}


def with_own_generator() -> Dropout:
    return Dropout(0.5, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dropout", [nn.Identity, lambda: nn.Dropout(0.5), with_own_generator])
def test_resumes_a_custom_model_but_no_other_one(few, tmp_path, trained, caplog, dropout):
    options = {"optimiser": nesterov, "checkpoint": tmp_path / "run.pt"}
    torch.manual_seed(0)
    whole = run(few, model=network(dropout()), optimiser=nesterov)
    torch.manual_seed(0)
    with pytest.raises(Interrupted):
        run(few, model=network(dropout()), on_epoch=stop_after(2), **options)
    trained.clear()
    resumed = run(few, model=network(dropout()), **options)  # with other initial weights
    assert timeless(resumed) == timeless(whole) and trained == [3]
    assert caplog.records.pop().getMessage().endswith("of a run with other initial weights: that run resumes.")
    torch.manual_seed(0)
    run(few, model=network(dropout()), **options)
    assert trained == [3] and caplog.records.pop().getMessage().endswith("of a finished run: nothing is trained.")
    renamed = network(dropout())
    renamed.register_buffer("seen", torch.zeros(1))  # computes the same
    for other in ({"model": renamed}, {"model": network(nn.Tanh())}, {"optimiser": torch.optim.Adam}):
        run(few, **{"model": network(dropout())} | options | other)
        assert trained[-3:] == [1, 2, 3] and caplog.records.pop().getMessage().endswith("starts from the beginning.")


def test_says_that_a_scheduler_is_not_resumed(few, tmp_path, caplog):
    def decaying(parameters):
        torch.optim.lr_scheduler.ExponentialLR(optimiser := nesterov(parameters), 0.5)
        return optimiser

    options = {"config": TINY, "optimiser": decaying, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(Interrupted):
        run(few, **options, on_epoch=stop_after(1))
    run(few, **options)
    assert [record.getMessage() for record in caplog.records] == [
        "A checkpoint does not hold learning-rate schedulers: yours starts anew."
    ]


# Unusable and unwritable files


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGE = {
    "half": lambda content: content[: len(content) // 2],
    "bit in the middle": lambda content: flipped(content, len(content) // 2),
    "bit of the checksum": lambda content: flipped(content, len(content) - 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_restarts_the_run(few, checkpoint, uninterrupted, caplog, damage, trained):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert timeless(run(few, checkpoint=checkpoint)) == timeless(uninterrupted) and trained == [1, 2, 3]
    [message] = [record.getMessage() for record in caplog.records]
    assert str(checkpoint) in message and "its checksum is wrong: it is kept as .old, and the run starts" in message


def test_checkpoint_of_another_run_restarts_this_one(few, checkpoint, caplog, trained):
    other = replace(SHORT, lr=0.02)
    record = run(few, other, checkpoint=checkpoint)
    [message] = [record.getMessage() for record in caplog.records]
    assert trained == [1, 2, 3] and "\n" not in message
    assert "made with different code, data, settings" in message
    assert timeless(record)["history"] == timeless(run(few, other))["history"]


def test_an_edit_restarts_a_run_and_its_undoing_resumes_it(few, checkpoint, uninterrupted, trained, caplog):
    with pytest.MonkeyPatch.context() as edit:
        edit.setattr(networks, "MlpMixer", lambda **settings: MlpMixer(**settings | {"initialisation": "pytorch"}))
        with pytest.raises(Interrupted):
            run(few, checkpoint=checkpoint, on_epoch=stop_after(1))
    assert timeless(run(few, checkpoint=checkpoint)) == timeless(uninterrupted) and trained == [1, 3]
    assert caplog.records.pop().getMessage().endswith("settings, device or precision: an earlier one resumes.")


def test_checkpoint_depends_on_data_and_precision(few):
    mirrored = replace(few, train_images=few.train_images.flip(2))
    made = [(SHORT, CPU, "float32", few), (SHORT, CPU, "float32", mirrored), (SHORT, CPU, "bfloat16", few)]
    assert len({key(Run(*each)) for each in made}) == 3


def test_another_path_and_number_of_threads_resumes(few, checkpoint, trained, caplog, monkeypatch):
    compiled = fused.library() is not None
    monkeypatch.setattr(fused, "WANTED", not fused.WANTED)
    torch.set_num_threads(torch.get_num_threads() + 1)
    record = run(few, checkpoint=checkpoint)
    assert trained == [3] and not any("beginning" in each.getMessage() for each in caplog.records)
    [before], now = record["environment"]["earlier"], record["environment"]
    assert before["epochs"] == 2 and before["threads"] != now["threads"]
    assert (before["path"] != now["path"]) == compiled


def test_full_disk_gives_one_sentence_and_costs_no_finished_epoch(few, checkpoint, uninterrupted, trained):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"run\.pt cannot be written .*free some space and run again"):
            run(few, checkpoint=checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert timeless(run(few, checkpoint=checkpoint)) == timeless(uninterrupted) and trained == [3, 3]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]


# Weights


@pytest.mark.parametrize("tested", [100, 1])  # with one image, epochs tie: the first of the best is kept
def test_weights_of_the_best_epoch_are_the_same_bytes_every_time(few, tmp_path, tested):
    one, other, heads = tmp_path / "one.safetensors", tmp_path / "other.safetensors", []
    some = replace(few, test_images=few.test_images[:tested], test_labels=few.test_labels[:tested])
    record = run(some, weights=str(one), on_epoch=lambda epoch, model: heads.append(model.head.weight.detach().clone()))
    run(some, weights=other)
    assert one.read_bytes() == other.read_bytes() and last_weights(one).read_bytes() == last_weights(other).read_bytes()
    for path, epoch in ((one, best_epoch(record)), (last_weights(one), record["history"][-1])):
        model, origin = load_with_origin(path)
        assert torch.equal(model.head.weight, heads[epoch["epoch"] - 1])
        assert (origin["name"], origin["epoch"]) == (SHORT.name, epoch["epoch"])


def test_diverged_run_leaves_no_last_weights_and_none_of_an_earlier_run(few, tmp_path):
    weights, wild = tmp_path / "run.safetensors", replace(SHORT, lr=10.0, optimiser="sgd")
    run(few, weights=weights)
    record = run(few, wild, weights=weights)
    assert record["diverged"] and record["history"] and not last_weights(weights).exists()
    assert all(weight.isfinite().all() for weight in load_file(weights).values())
    run(few, weights=weights)
    assert not run(few, replace(wild, lr=1e30), weights=weights)["history"]
    assert not weights.exists() and not last_weights(weights).exists()


def test_unwritable_weights_cost_neither_record_nor_training(few, tmp_path, caplog, trained):
    weights, checkpoint = tmp_path / "best.safetensors", tmp_path / "run.pt"
    record = run(few, weights=weights, on_epoch=lambda *_: weights.mkdir(exist_ok=True))
    assert "safetensors cannot be written" in caplog.text and "The record is returned nevertheless" in caplog.text
    weights.rmdir()
    with pytest.raises(OSError, match="safetensors cannot be written"):
        run(few, weights=weights, checkpoint=checkpoint, on_epoch=lambda *_: weights.mkdir(exist_ok=True))
    weights.rmdir()
    assert timeless(run(few, weights=weights, checkpoint=checkpoint)) == timeless(record)
    assert trained == 2 * [1, 2, 3] and weights.is_file()


def test_weights_of_tied_layers_are_written(few, tmp_path):
    layer = nn.Linear(784, 784)
    run(few, TINY, model=nn.Sequential(nn.Flatten(), layer, layer), weights=tmp_path / "tied.safetensors")
    assert torch.equal(load_file(tmp_path / "tied.last.safetensors")["2.weight"], layer.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("network", ["mixer", "mlp", "conv"])
def test_resumes_on_cuda(few, tmp_path, trained, network):
    config = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, network=network)
    options = {"device": "cuda", "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(Interrupted):
        run(few, config, on_epoch=stop_after(2), **options)
    resumed = run(few, config, **options)
    assert trained == [1, 2, 3] and timeless(resumed) == timeless(run(few, config, device="cuda"))
