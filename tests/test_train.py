"""One run: the same record every time, whatever befalls it."""

import copy
import json
import math
import multiprocessing
import random
import time

import pytest
import safetensors.torch
import torch
from conftest import first_images

from mixer import data as fashion_mnist
from mixer import fused
from mixer.train import Config, best_epoch, find_precision, predict, train

CPU = torch.device("cpu")
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3)


def timeless(record: dict) -> dict:
    """A record without what may differ between two runs of the same config: the seconds, and the commit."""
    record = copy.deepcopy(record)
    record["environment"].pop("commit", None)
    for epoch in record["history"]:
        del epoch["seconds"]
    return record


def run(few, config=SHORT, **options) -> dict:
    return train(config, data=few, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def uninterrupted(few) -> dict:
    return run(few)


def test_the_record_says_what_was_run_and_where(uninterrupted):
    assert set(uninterrupted) == {"format", "config", "history", "diverged", "environment"}
    assert Config(**uninterrupted["config"]) == SHORT
    assert [epoch["epoch"] for epoch in uninterrupted["history"]] == [1, 2, 3]
    assert all(0 < epoch["test_accuracy"] < 1 and epoch["seconds"] > 0 for epoch in uninterrupted["history"])
    assert uninterrupted["history"][-1]["train_loss"] < uninterrupted["history"][0]["train_loss"]
    environment = uninterrupted["environment"]
    assert environment["torch"] == torch.__version__ and environment["precision"] == find_precision(CPU)
    assert environment["path"] in ("fused", "plain") and environment["data_sha256"] == fashion_mnist.SHA256
    json.dumps(uninterrupted, allow_nan=False)


def test_it_learns_real_images(data):
    """Three thousand images and two epochs, with the coursework's settings but a smaller batch."""
    config = Config(lr=0.001, batch_size=32, num_epochs=2)
    record = train(config, data=first_images(data, 3000, 1000), progress=False, device="cpu")
    assert record["history"][-1]["test_accuracy"] > 0.6


def test_same_seed_same_record_and_other_seed_another(few, uninterrupted):
    state = torch.random.get_rng_state()
    assert timeless(run(few)) == timeless(uninterrupted)
    assert torch.equal(torch.random.get_rng_state(), state), "training must leave the caller's random state alone"
    other = run(few, Config(**uninterrupted["config"] | {"seed": 1}))
    assert timeless(other)["history"] != timeless(uninterrupted)["history"]


@pytest.mark.skipif(fused.path("cpu", "float32") == "plain", reason="PyTorch's own sums depend on the threads")
@pytest.mark.parametrize("precision", sorted({"float32", find_precision(CPU)}))
def test_same_record_on_one_thread_and_on_two(few, precision):
    threads = torch.get_num_threads()
    records = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            records.append(run(few, Config(dropout_p=0.1, batch_size=128, num_epochs=2), precision=precision))
    finally:
        torch.set_num_threads(threads)
    assert [record["environment"].pop("threads") for record in records] == [1, 2]
    assert timeless(records[0]) == timeless(records[1])


def test_losses_and_accuracies_are_those_of_the_shipped_weights(few, tmp_path):
    record = run(few, weights=tmp_path / "best.safetensors")
    from mixer.model import MlpMixer

    model = MlpMixer()
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "best.safetensors"))
    precision = record["environment"]["precision"]
    logits = torch.cat(list(predict(model, few.test_images, precision)))
    best = best_epoch(record)
    assert float((logits.argmax(dim=1) == few.test_labels).float().mean()) == pytest.approx(best["test_accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, few.test_labels)
    assert float(loss) == pytest.approx(best["test_loss"], rel=1e-5)


def test_killed_at_random_moments_it_ends_with_the_same_record(tmp_path, uninterrupted):
    """Real processes, real SIGKILLs, until one of them gets to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixer.grid"])
    moments = random.Random(0)
    outcome = tmp_path / "record.json"
    kills = starts = 0
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
        starts += 1
        patience *= 1.1  # so that the test ends on a slow machine too
    assert kills >= 5
    assert timeless(json.loads(outcome.read_text())) == timeless(uninterrupted)


def train_in_a_process(folder) -> None:
    few = first_images(fashion_mnist.load())
    record = run(few, checkpoint=folder / "run.pt")
    (folder / "incoming").write_text(json.dumps(record))
    (folder / "incoming").rename(folder / "record.json")


@pytest.fixture
def cut_off(few, tmp_path, monkeypatch):
    """A checkpoint of two of three epochs, with the one of the first epoch before it."""
    from mixer import train as module

    checkpoint = tmp_path / "run.pt"
    save, saved = module._Run.save, []

    def save_twice(self, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(self, path))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Run, "save", save_twice)
        run(few, checkpoint=checkpoint)
    return checkpoint


def test_a_checkpoint_is_used(few, cut_off, uninterrupted, caplog, monkeypatch):
    from mixer import train as module

    epochs, train_epoch = [], module._Run.train_epoch
    monkeypatch.setattr(
        module._Run, "train_epoch", lambda self, bar: (epochs.append(self.epoch), train_epoch(self, bar))
    )
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    assert epochs == [2] and not caplog.records


@pytest.mark.parametrize("damage", ["cut short", "empty", "not a checkpoint", "other format", "other config"])
def test_a_bad_checkpoint_is_refused_and_the_one_before_is_used(few, cut_off, uninterrupted, caplog, damage):
    spoil(cut_off, damage)
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    [message] = [record.getMessage() for record in caplog.records]
    assert str(cut_off) in message and "passed over" in message and "\n" not in message


def test_two_bad_checkpoints_start_the_run_afresh(few, cut_off, uninterrupted, caplog):
    spoil(cut_off, "cut short")
    spoil(cut_off.with_name("run.pt.before"), "other config")
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    assert len(caplog.records) == 2


def spoil(checkpoint, damage) -> None:
    content = checkpoint.read_bytes()
    if damage == "cut short":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        checkpoint.write_bytes(b"")
    elif damage == "not a checkpoint":
        checkpoint.write_text("Hello")
    else:
        state = torch.load(checkpoint, weights_only=True)
        if damage == "other format":
            state["key"]["format"] = 0
        else:
            state["key"]["config"]["lr"] = 0.5
        torch.save(state, checkpoint)


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_the_one_before_stays(few, cut_off, uninterrupted):
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"run\.pt cannot be written .*make room and run again"):
            run(few, checkpoint=cut_off)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name for path in cut_off.parent.iterdir()} == {"run.pt.before"}
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(few, monkeypatch):
    from mixer import train as module

    logits, calls = module._Run._logits, []

    def spoilt_logits(self, images):
        calls.append(images)
        return logits(self, images) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(module._Run, "_logits", spoilt_logits)
    record = run(few)  # five steps an epoch
    assert record["diverged"] == {"epoch": 2, "step": 2}
    assert [epoch["epoch"] for epoch in record["history"]] == [1]
    json.dumps(record, allow_nan=False)


def test_an_absurd_learning_rate_really_diverges(few):
    record = run(few, Config(lr=1e30, batch_size=64, num_epochs=2))
    assert record["diverged"]["epoch"] == 1 and record["history"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -0.1},
        {"lr": "fast"},
        {"dropout_p": 1.0},
        {"batch_size": 0},
        {"num_epochs": 2.5},
        {"seed": -1},
        {"limit": 0},
    ],
)
def test_an_impossible_config_names_the_field_and_the_value(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        Config(**wrong)
    assert repr(value) in str(error.value)


def test_names_are_readable_and_one_per_config():
    assert Config(0.01, 0.1, 256).name == "lr0.01_dropout0.1_batch256_seed0"
    assert Config(0.001, 0.0, 512, 2, 1, 100).name == "lr0.001_dropout0_batch512_seed1_epochs2_limit100"


def test_a_wrong_precision_is_refused(few):
    with pytest.raises(ValueError, match="float16"):
        run(few, precision="float16")


def test_bfloat16_is_refused_where_the_processor_has_none(few, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="train in float32"):
        run(few, precision="bfloat16")
    assert run(few, Config(num_epochs=1))["environment"]["precision"] == "float32"


def test_the_progress_bar_shows_epoch_loss_and_accuracies(few, capsys):
    train(Config(num_epochs=1), data=few, device="cpu")
    assert "epoch 1/1, loss " in (shown := capsys.readouterr().err) and "test " in shown
    started = time.monotonic()
    train(Config(num_epochs=1), data=few, device="cpu", progress=False)
    assert capsys.readouterr().err == "" and time.monotonic() > started


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_learns_as_the_cpu_does(few, uninterrupted):
    on_gpu = first_images(fashion_mnist.load("cuda"))
    record = train(SHORT, data=on_gpu, device="cuda", progress=False)
    for ours, theirs in zip(record["history"], uninterrupted["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
    assert timeless(record) == timeless(train(SHORT, data=on_gpu, device="cuda", progress=False))
