"""Training gives the same record every time, whatever surrounds it, also with a custom model and optimiser."""

import copy
import errno
import io
import json
import multiprocessing
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import threadpoolctl
import torch
from conftest import first_images
from torch import nn
from torch.nn.utils import prune

from mixer.config import Config
from mixer.data import Data
from mixer.kernels import fused
from mixer.prediction import predict
from mixer.records import read_record, write_record
from mixer.system.device import find_device, find_precision
from mixer.system.progress import Bar
from mixer.training import Run, part_of, train

CPU = torch.device("cpu")
SMALL = {"num_blocks": 2, "patches_mlp_dim": 256, "channels_mlp_dim": 128}
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, **SMALL)
TINY = replace(SHORT, num_epochs=2, num_blocks=1, patches_mlp_dim=64, channels_mlp_dim=32, limit=100)  # eager is slow
needs_operator = pytest.mark.skipif(not fused.available(), reason="no operator here")


def timeless(record: dict) -> dict:
    """A record without seconds, which differ between runs of the same config."""
    record = copy.deepcopy(record)
    for epoch in record["history"]:
        del epoch["seconds"]
    return record


def run(few, config=SHORT, **options) -> dict:
    return train(config, **{"data": few, "device": "cpu", "progress": False} | options)


@pytest.fixture(scope="module")
def uninterrupted(few) -> dict:
    return run(few)


# The record


def test_learns_real_images(data):
    config = replace(SHORT, lr=0.005, batch_size=25, num_epochs=2)
    first, second = run(first_images(data, 1500, 1000), config)["history"]
    assert second["test_accuracy"] > 0.6 and second["train_loss"] < first["train_loss"]


def test_record_says_what_was_run_and_where(few, uninterrupted):
    assert not uninterrupted.keys() & {"model", "optimiser"}
    assert Config(**uninterrupted["config"]) == SHORT and uninterrupted["diverged"] is None
    assert [epoch["epoch"] for epoch in uninterrupted["history"]] == [1, 2, 3]
    assert all(0 < epoch["test_accuracy"] < 1 and epoch["seconds"] > 0 for epoch in uninterrupted["history"])
    environment = uninterrupted["environment"]
    assert environment["torch"] == torch.__version__ and environment["precision"] == find_precision(CPU)
    assert environment["path"] == ("fused" if fused.available() else "eager")
    assert environment["data"] == few.name and environment["data_sha256"] == few.sha256
    json.dumps(uninterrupted, allow_nan=False)


def test_limit_validation_and_inputs_select_the_training_data(data):
    some, config = first_images(data, 300, 50), replace(SHORT, num_epochs=1)
    record = run(some, replace(config, limit=64, inputs="scaled"))
    scaled = replace(some.first(64), pixel_mean=0.0, pixel_std=1.0)
    assert timeless(record)["history"] == timeless(run(scaled, config))["history"]
    environment = record["environment"]
    assert (environment["pixel_mean"], environment["data_sha256"]) == (0.0, some.first(64).sha256)
    held_out = part_of(some, replace(config, validation=True, limit=64))
    assert len(held_out.train_images) == 64 and len(held_out.test_images) == pytest.approx(300 / 12, abs=5)


def test_trains_on_a_custom_data_set_and_names_it():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (90, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.arange(90) % 3
    own = Data(images[:60], labels[:60], images[60:], labels[60:], name="letters")
    record, model = run(own, Config(batch_size=16, num_epochs=1, patch_size=2), return_model=True)
    assert record["environment"]["data"] == "letters" and model.num_classes == 3 and model.num_patches == 16


def test_diverged_run_names_epoch_and_step(few, caplog):
    record = run(few, replace(SHORT, lr=1e30))
    assert caplog.messages[-1].endswith(f" diverged in epoch 1, step {record['diverged']['step']}.")
    assert record["diverged"]["epoch"] == 1 and record["history"] == []
    json.dumps(record, allow_nan=False)
    spoilt = Run(SHORT, CPU, "float32", few)
    loss, calls = spoilt.loss, []
    spoilt.loss = lambda *given: loss(*given) * (torch.nan if calls.append(0) or len(calls) == 7 else 1)
    spoilt.train_epoch()  # five steps
    assert not spoilt.finished
    spoilt.train_epoch()
    assert spoilt.finished and spoilt.record()["diverged"] == {"epoch": 2, "step": 2} and spoilt.epoch == 1


def test_on_epoch_gets_the_history_and_return_model_the_tested_model(few, uninterrupted):
    seen = []
    record, model = run(few, on_epoch=lambda epoch, model: seen.append((epoch, model.training)), return_model=True)
    assert seen == [(epoch, False) for epoch in record["history"]] and not model.training
    logits = torch.cat(list(predict(model, few.test_images, record["environment"]["precision"])))
    last = record["history"][-1]
    assert float((logits.argmax(1) == few.test_labels).double().mean()) == last["test_accuracy"]
    assert float(nn.functional.cross_entropy(logits, few.test_labels)) == pytest.approx(last["test_loss"], rel=1e-5)
    assert timeless(record) == timeless(uninterrupted)


CHANGES = {
    "hook": lambda block, seen: block.register_forward_hook(lambda *_: seen.append(0)),
    "forward": lambda block, seen: setattr(block, "forward", lambda x: seen.append(0) or x),
}


@needs_operator
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_in_on_epoch_takes_effect_in_the_next_epoch(few, caplog, change):
    seen = []
    record = run(few, TINY, on_epoch=lambda epoch, model: seen or change(model.blocks[0], seen))
    assert len(seen) >= 2 + 1 and "in eager PyTorch, several times slower, since" in caplog.text
    [earlier] = record["environment"]["earlier"]
    assert (earlier["epochs"], earlier["path"], record["environment"]["path"]) == (1, "fused", "eager")


# The same every time


def test_same_seed_gives_the_same_record_whatever_else_is_drawn(few, uninterrupted):
    def meddle(epoch, model):
        epoch.clear()
        model.train()
        model(torch.zeros(4, 1, 28, 28)).sum().backward()

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert timeless(run(few, on_epoch=meddle)) == timeless(uninterrupted)
    assert torch.equal(torch.random.get_rng_state(), before), "PyTorch's own generator was drawn from"
    assert timeless(run(few, replace(SHORT, seed=1)))["history"] != timeless(uninterrupted)["history"]


def test_ignores_the_callers_contexts(few):
    alone = timeless(run(few, precision="float32"))
    for around in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        with around:
            assert timeless(run(few, precision="float32")) == alone, around


@needs_operator
@pytest.mark.parametrize("precision", sorted({"float32", find_precision(CPU)}))
def test_one_thread_and_two_give_the_same_record(few, precision):
    config, records = replace(SHORT, batch_size=128, num_epochs=2), []
    for count in (1, 2):
        torch.set_num_threads(count)
        records.append(run(few, config, precision=precision))
        assert torch.get_num_threads() == count
    assert [record["environment"].pop("threads") for record in records] == [1, 2]
    assert timeless(records[0]) == timeless(records[1])


@pytest.mark.parametrize(("channels", "path"), [pytest.param(16, "fused", marks=needs_operator), (65, "eager")])
def test_record_has_the_number_of_threads_used(few, channels, path, caplog):
    """The eager model uses all of PyTorch's threads; with the operator, PyTorch uses one."""
    openmp, seen = threadpoolctl.ThreadpoolController().select(user_api="openmp"), set()
    torch.set_num_threads(2)
    watched = Run(replace(TINY, num_channels=channels), CPU, "float32", few)
    # scikit-learn, which Dask imports, brings an OpenMP of its own.
    threads = lambda: (x["num_threads"] for x in openmp.info() if "scikit_learn" not in x["filepath"])  # noqa: E731
    watched.train_epoch(lambda *_: seen.update(threads()))
    environment = watched.record()["environment"]
    assert (environment["path"], environment["threads"]) == (path, 2) and seen == {1 if path == "fused" else 2}
    assert ("several times slower, since it has 65 channels" in caplog.text) == (path == "eager")


def settings() -> tuple:
    """Settings of the process and of the calling thread."""
    process = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
    return *process, *cudnn, *autocast, torch.is_grad_enabled()


def test_concurrent_runs_equal_sequential_ones_and_leave_the_process_unchanged(few):
    """Several seeds and both precisions at once, while other code draws from PyTorch's own generator."""
    configs = [replace(SHORT, seed=seed, num_epochs=2) for seed in range(3)]
    configs.append(replace(TINY, num_channels=65))  # eager
    precisions = [find_precision(CPU), "float32", find_precision(CPU), "float32"]
    in_turn = [run(few, config, precision=p) for config, p in zip(configs, precisions, strict=True)]
    done, seen = threading.Event(), set()

    def somebody_else():
        while not done.is_set():
            torch.manual_seed(0)
            seen.add(settings())
            fresh = threading.Thread(target=lambda: seen.add(settings()))
            fresh.start()
            fresh.join()

    expected = {settings()}
    with ThreadPoolExecutor(5) as executor:
        executor.submit(somebody_else)
        jobs = [executor.submit(run, few, c, precision=p) for c, p in zip(configs, precisions, strict=True)]
        wait(jobs)
        done.set()
    together = [job.result() for job in jobs]
    assert [timeless(record) for record in together] == [timeless(record) for record in in_turn]
    assert seen == expected == {settings()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_trains_in_a_fork_of_a_process_that_has_trained(few, uninterrupted):
    """GNU OpenMP's threads do not survive a fork; PyTorch would wait for them for ever."""
    torch.rand(500, 500) @ torch.rand(500, 500)
    nn.functional.layer_norm(torch.rand(20_000, 16), (16,))  # so that the threads have been used
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    child = context.Process(target=lambda: outcome.put(timeless(run(few))["history"]), daemon=True)
    child.start()
    child.join(120)
    hangs = child.exitcode is None
    child.kill()
    assert not hangs and outcome.get() == timeless(uninterrupted)["history"]


# A custom model and optimiser


def network(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), *between, nn.Linear(32, 10))


def nesterov(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def test_trains_a_model_in_place_and_names_it_and_its_optimiser(few, tmp_path):
    model = network(nn.Dropout(0.5))
    before, drawn = copy.deepcopy(model), torch.random.get_rng_state()
    record, ended = run(few, model=model, optimiser=nesterov, return_model=True)
    assert ended is model and not torch.equal(model[1].weight, before[1].weight)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert record["history"][-1]["train_loss"] < record["history"][0]["train_loss"]
    assert record["model"] == "torch.nn.modules.container.Sequential, 25,450 parameters"
    assert all(part in record["optimiser"] for part in ("SGD", "'lr': 0.05", "'momentum': 0.9", "'nesterov': True"))
    assert timeless(run(few, model=before, optimiser=nesterov)) == timeless(record)
    write_record(record, tmp_path / "mine.json")
    assert read_record(tmp_path / "mine.json") == record


def test_custom_models_in_threads_do_not_share_random_numbers(few):
    def record(seed):
        model = network(nn.Dropout(0.5))
        model.load_state_dict(initial)
        return timeless(run(few, replace(SHORT, seed=seed), model=model))["history"]

    initial = network(nn.Dropout(0.5)).state_dict()
    in_turn = [record(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(record, range(4))) == in_turn


def test_trains_a_model_that_makes_float32_tensors(few):
    class Turned(nn.Sequential):
        def forward(self, images):
            return super().forward(images) @ torch.eye(10)

    assert run(few, TINY, model=Turned(nn.Flatten(), nn.Linear(784, 10)))["model"].endswith("Turned, 7,850 parameters")


def test_custom_optimiser_equals_the_configs(few):
    config, model = Config(optimiser="momentum", lr=0.05, schedule="linear", batch_size=64, num_epochs=2), network()
    alike = run(few, config, model=copy.deepcopy(model))
    assert "optimiser" not in alike
    record = run(few, config, model=model, optimiser=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True))
    assert timeless(record)["history"] == timeless(alike)["history"]


def test_scheduler_of_a_custom_optimiser_takes_effect(few):
    made = []

    def stopping(parameters):
        made.append(torch.optim.lr_scheduler.StepLR(nesterov(parameters), 1, gamma=0.0))
        return made[-1].optimizer

    model, seen = network(), []
    run(few, model=model, optimiser=stopping, on_epoch=lambda *_: (made[-1].step(), seen.append(model[1].weight.sum())))
    assert len(made) == 2 and seen[0] == seen[1] == seen[2]


def test_loss_and_ties_of_bfloat16_logits_are_computed_in_float32(few):
    class Coarse(nn.Sequential):
        def forward(self, images):
            return super().forward(images).bfloat16()

    record, model = run(few, TINY, model=Coarse(nn.Flatten(), nn.Linear(784, 10)), return_model=True)
    logits = torch.cat(list(predict(model, few.test_images, record["environment"]["precision"]))).float()
    loss = float(nn.functional.cross_entropy(logits, few.test_labels))
    assert record["history"][-1]["test_loss"] == pytest.approx(loss, rel=1e-5)


# Rejected before training


def test_rejects_arguments_in_one_sentence(few, tmp_path):
    with pytest.raises(ValueError, match=r"limit is 301.*300"):
        run(few, replace(SHORT, limit=301))
    for size in ((32, 32), (4, 29), (5, 4)):
        with pytest.raises(ValueError, match="{}×{} do not tile an image of 28×28".format(*size)):
            run(few, replace(SHORT, patch_size=size))
    with pytest.raises(ValueError, match=r"muon trains the matrices in model\.blocks, and Sequential has no blocks"):
        run(few, replace(SHORT, optimiser="muon"), model=network())
    with pytest.raises(ValueError, match="optimiser has to be a function, like lambda"):
        run(few, model=(model := network()), optimiser=nesterov(model.parameters()))
    with pytest.raises(ValueError, match=r"optimiser has to return a torch\.optim\.Optimizer, not None"):
        run(few, optimiser=lambda parameters: None)
    with pytest.raises(ValueError, match="has to train the parameters that it is called with, not another model's"):
        run(few, model=network(), optimiser=lambda parameters: nesterov(network().parameters()))
    with pytest.raises(TypeError, match="on_epoch is a str, but it has to be a function"):
        run(few, on_epoch="x")
    doubled, forward = (model := network()), model.forward
    doubled.forward = lambda images: 2 * forward(images)
    with pytest.raises(ValueError, match="no parameter of a copy of the model gets a gradient: define forward in"):
        run(few, model=doubled)
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        run(few, model=network(), optimiser=torch.optim.LBFGS)
    prune.l1_unstructured((pruned := network())[1], "weight", 0.5)
    with pytest.raises(ValueError, match=r"the model cannot be copied .*: keep no computed tensors in it"):
        run(few, TINY, model=pruned)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        run(few, model=network().requires_grad_(False))
    with pytest.raises(ValueError, match=r"checkpoint and weights are both .*same: give two files"):
        run(few, checkpoint=tmp_path / "same", weights=str(tmp_path / "same"))
    pair = nn.Sequential(nn.Flatten(), nn.LSTM(784, 10))
    for model, found in ((nn.Linear(28, 10), r"\(2, 1, 28, 10\)"), (pair, "tuple")):
        with pytest.raises(ValueError, match=rf"has to return logits of shape \(2, 10\), not {found}"):
            run(few, model=model)
    for wrong, what in (({"model": nn.Flatten}, "the class Flatten"), ({"data": [few]}, "a list")):
        with pytest.raises(TypeError, match=f"is {what}, but it has to be "):
            run(few, **wrong)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"torch\.set_default_dtype\(torch\.float32\)"):
            run(few)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("argument", ["checkpoint", "weights"])
def test_rejects_an_unwritable_path(few, tmp_path, argument, monkeypatch):
    monkeypatch.setattr(Run, "train_epoch", None)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, str(tmp_path / "file" / "below"), tmp_path / "pipe", "", tmp_path / ("x" * 250)):
        with pytest.raises(OSError, match="cannot be written"):
            run(few, **{argument: place})
    longest = 232 - len(str(threading.get_native_id()))  # part of the temporary file's name
    with pytest.raises(OSError, match=r"x\.last\.safetensors cannot be written"):
        run(few, weights=tmp_path / f"{'x' * longest}.safetensors")


def test_rejects_a_missing_device_or_precision(monkeypatch):
    for name in ("abacus", "meta", "cuda:77", "", "cpu:x", 5.5):
        with pytest.raises(ValueError, match=r"^there is no device '.*' here: give cpu, cuda or mps"):
            find_device(name)
    assert find_device("cpu") == find_device(CPU) == CPU and find_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="precision must be bfloat16 or float32, not 'float16'"):
        find_precision(CPU, "float16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="train in float32"):
        find_precision(CPU, "bfloat16")


@pytest.mark.skipif(find_precision(CPU) != "bfloat16", reason="no bfloat16 here")
def test_chooses_bfloat16_only_if_the_operator_has_it(few, monkeypatch):
    """A compiler may lack it even if the processor has it."""
    monkeypatch.setattr(fused, "available", lambda bfloat16=False: not bfloat16)
    found = [run(few, TINY, precision=precision)["environment"] for precision in (None, "bfloat16")]
    assert [(each["precision"], each["path"]) for each in found] == [("float32", "fused"), ("bfloat16", "eager")]


def test_a_failing_terminal_does_not_end_a_training(few, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    assert len(run(few, TINY, progress=True)["history"]) == TINY.num_epochs


def test_progress_bar_puts_numbers_first_and_can_be_switched_off(few, capsys, monkeypatch):
    config = replace(SHORT, num_epochs=1)
    run(few, config, progress=True)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert last.startswith("100%") and "epoch 1/1 loss " in last and last.index("test ") < last.index(SHORT.name[:6])
    run(few, replace(config, validation=True), progress=True)
    assert "held-out " in capsys.readouterr().err
    record = run(few, config)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    assert timeless(run(few, config, progress=True)) == timeless(record)


def test_progress_bar_moves_while_testing_and_ends_at_its_total(data, capsys, monkeypatch):
    """A training image counts as three test images."""
    moves, update = [0], Bar.update
    monkeypatch.setattr(Bar, "update", lambda bar, work: (update(bar, work), moves.append(bar.n)))
    run(first_images(data, 100, 2100), replace(TINY, num_epochs=1, limit=None), progress=True, turn=(2, 7, 2))
    assert moves == [0, 3 * 64, 3 * 100, 1300, 2300, 2400]
    line = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert re.match(r"100% 00:00 left, run 2/7, all ~\d\d:\d\d \|█{10}\| epoch 1/1", line)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_learns_like_the_cpu(few, uninterrupted):
    record = run(few, device="cuda")
    for ours, theirs in zip(record["history"], uninterrupted["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
    assert record["environment"]["path"] == "graphs"
    assert timeless(record) == timeless(run(few, device="cuda"))
