"""A run that lasts: the same record every time, whatever befalls it."""

import copy
import io
import json
import multiprocessing
import os
import pickle
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
import threadpoolctl
import torch
from conftest import first_images

from mixer import data as fashion_mnist
from mixer import runs
from mixer.config import Config
from mixer.data import Data
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.prediction import load_model
from mixer.records import best_epoch
from mixer.runs import Interrupted, _Run, last_weights, train
from mixer.training import Training, find_precision, predict

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, num_blocks=2)


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


def test_it_is_the_loop_that_is_run(few, uninterrupted):
    """Nothing that is put around the loop changes a bit of what it gives."""
    with fused.threads_for_the_operator():
        loop = Training(SHORT, CPU, find_precision(CPU), few)
        assert [loop.train_epoch() for _ in range(3)] == timeless(uninterrupted)["history"]


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_the_caller_has_around_it_does_not_reach_a_run(few, around):
    config = replace(SHORT, num_blocks=1)
    alone = run(few, config, precision="float32")
    with around():
        assert timeless(run(few, config, precision="float32")) == timeless(alone)


@pytest.mark.parametrize(("num_channels", "path"), [(16, "fused"), (8, "plain")])
def test_path_and_threads_are_what_was_computed_on(few, num_channels, path):
    """The plain formula takes all of PyTorch's threads; beside the operator PyTorch has one."""
    if path == "fused" and fused._library() is None:
        pytest.skip("no operator here")
    openmp = threadpoolctl.ThreadpoolController().select(user_api="openmp")
    seen, threads = [], torch.get_num_threads()

    def look(epoch, model):
        seen.append({library["num_threads"] for library in openmp.info()})

    torch.set_num_threads(2)
    try:
        record = run(few, Config(num_channels=num_channels, num_blocks=1, num_epochs=1), on_epoch=look)
    finally:
        torch.set_num_threads(threads)
    assert (record["environment"]["path"], record["environment"]["threads"]) == (path, 2)
    assert seen == [{1 if path == "fused" else 2}]


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no bfloat16 here")
@pytest.mark.skipif(fused._library() is None, reason="no operator here")
@pytest.mark.parametrize(
    ("environment", "outcome"),
    [
        ({"CXX": "g++ -mno-avx512bf16"}, ["float32", "fused", "bfloat16", "plain"]),
        ({"MIXER_FUSED": "0"}, ["bfloat16", "plain", "bfloat16", "plain"]),
    ],
)
def test_precision_and_path_are_what_the_operator_can(tmp_path, environment, outcome):
    """A compiler that does not know this processor's bfloat16, and no operator; asked for nothing, then for it."""
    code = """if True:
        import torch
        from mixer import Config, train
        from mixer.data import Data
        images, labels = torch.zeros(8, 28, 28, dtype=torch.uint8), torch.arange(8)
        for precision in (None, "bfloat16"):
            config = Config(num_blocks=1, num_epochs=1)
            record = train(config, precision=precision, data=Data(images, labels, images, labels), progress=False)
            print(record["environment"]["precision"], record["environment"]["path"])
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stdout.split() == outcome, process.stderr


@pytest.mark.skipif(fused._library() is None, reason="PyTorch's own sums depend on the threads")
@pytest.mark.parametrize("precision", sorted({"float32", find_precision(CPU)}))
def test_same_record_on_one_thread_and_on_two(few, precision):
    threads = torch.get_num_threads()
    records = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            records.append(
                run(few, Config(dropout_p=0.1, batch_size=128, num_epochs=2, num_blocks=2), precision=precision)
            )
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert [record["environment"].pop("threads") for record in records] == [1, 2]
    assert timeless(records[0]) == timeless(records[1])


def settings() -> tuple:
    """What is the whole process's, and of the calling thread."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
    )


def test_runs_in_threads_are_those_in_turn_and_change_nothing_of_the_process(few):
    """Several seeds and both precisions at once, while somebody else draws from PyTorch's own generator."""
    configs = [replace(SHORT, seed=seed, num_epochs=2) for seed in range(3)]
    configs.append(replace(SHORT, num_epochs=2, num_channels=8, num_blocks=1))  # by the plain formula
    precisions = [find_precision(CPU), "float32", find_precision(CPU), "float32"]
    in_turn = [run(few, config, precision=p) for config, p in zip(configs, precisions, strict=True)]
    done, seen = threading.Event(), set()

    def somebody_else():
        while not done.is_set():
            torch.manual_seed(0)
            torch.rand(100)
            seen.add(settings())
            fresh = threading.Thread(target=lambda: seen.add(settings()))
            fresh.start()
            fresh.join()

    expected = {settings()}
    other = threading.Thread(target=somebody_else)
    other.start()
    try:
        with ThreadPoolExecutor(4) as executor:
            jobs = [executor.submit(run, few, c, precision=p) for c, p in zip(configs, precisions, strict=True)]
            together = [job.result() for job in jobs]
    finally:
        done.set()
        other.join()
    assert [timeless(record) for record in together] == [timeless(record) for record in in_turn]
    assert seen == expected == {settings()}


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
    model = MlpMixer(num_blocks=2)
    model.load_state_dict(safetensors.torch.load(content))
    logits = torch.cat(list(predict(model, few.test_images, record["environment"]["precision"])))
    best = best_epoch(record)
    assert float((logits.argmax(dim=1) == few.test_labels).double().mean()) == best["test_accuracy"]
    with safetensors.safe_open(tmp_path / "one.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["mixer"])
    assert Config(**origin["config"]) == SHORT and (origin["name"], origin["epoch"]) == (SHORT.name, best["epoch"])
    assert torch.equal(load_model(tmp_path / "one.safetensors").head.weight, model.head.weight)


def test_a_run_that_diverges_leaves_no_weights_of_its_last_step_and_none_of_another_training(few, tmp_path):
    weights, wild = tmp_path / "run.safetensors", replace(SHORT, lr=10.0, optimiser="sgd")
    run(few, weights=weights)
    record = run(few, wild, weights=weights)
    assert record["diverged"] and record["history"]
    best = safetensors.torch.load(weights.read_bytes())
    assert all(weight.isfinite().all() for weight in best.values()) and not last_weights(weights).exists()
    run(few, weights=weights)
    assert not run(few, replace(wild, lr=1e30), weights=weights)["history"]
    assert not weights.exists() and not last_weights(weights).exists()


def test_what_a_callback_does_to_the_model_between_epochs_draws_nothing_of_the_run(few, uninterrupted):
    def meddle(epoch, model):
        epoch.clear()
        model.train()
        model(torch.zeros(4, 1, 28, 28)).sum().backward()

    assert timeless(run(few, on_epoch=meddle)) == timeless(uninterrupted)


@pytest.mark.parametrize("argument", ["checkpoint", "weights"])
def test_a_place_that_cannot_be_written_is_said_before_training(few, tmp_path, argument, monkeypatch):
    monkeypatch.setattr(Training, "train_epoch", None)
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run.pt.before").mkdir()
    places = [tmp_path, str(tmp_path / "file" / "below"), tmp_path / "pipe", ""]
    for place in places + [tmp_path / "run.pt"] * (argument == "checkpoint"):
        with pytest.raises(OSError, match="cannot be written"):
            run(few, **{argument: place})


def test_weights_that_cannot_be_written_after_all_do_not_cost_the_record(few, tmp_path, uninterrupted, caplog):
    weights = tmp_path / "best.safetensors"
    record = run(few, weights=weights, on_epoch=lambda epoch, model: weights.mkdir(exist_ok=True))
    assert timeless(record) == timeless(uninterrupted)
    assert "safetensors cannot be written" in caplog.text and "The record is returned" in caplog.text


def test_another_default_dtype_is_refused(few):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"torch\.set_default_dtype\(torch\.float32\)"):
            run(few)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("patch_size", [(32, 32), (4, 29), (5, 4)])
def test_patches_that_do_not_tile_the_images_are_refused(few, patch_size):
    with pytest.raises(ValueError, match="{}×{} do not tile an image of 28×28".format(*patch_size)):
        run(few, replace(SHORT, patch_size=patch_size))


def test_inputs_may_be_scaled_only(few):
    record = run(few, replace(SHORT, inputs="scaled", num_epochs=1))
    assert (record["environment"]["pixel_mean"], record["environment"]["pixel_std"]) == (0.0, 1.0)
    by_hand = replace(few, pixel_mean=0.0, pixel_std=1.0)
    assert timeless(record)["history"] == timeless(run(by_hand, replace(SHORT, num_epochs=1)))["history"]


def test_weights_that_cannot_be_written_after_all_cost_no_training(few, tmp_path, uninterrupted, trained_epochs):
    weights = tmp_path / "best.safetensors"
    files = {"weights": weights, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(OSError, match="safetensors cannot be written"):
        run(few, **files, on_epoch=lambda epoch, model: weights.mkdir(exist_ok=True))
    weights.rmdir()
    assert timeless(run(few, **files)) == timeless(uninterrupted) and weights.is_file()
    assert trained_epochs == [1, 2, 3]


# ---------------------------------------------------------------- cut off


def test_killed_at_random_moments_it_ends_with_the_same_record(tmp_path, uninterrupted):
    """Real processes, real SIGKILLs, until one of them gets to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixer.runner"])
    moments = random.Random(0)
    outcome = tmp_path / "record.json"
    kills = 0
    patience = 0.1
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


def test_an_interruption_is_handed_on_whole_by_a_process():
    other = pickle.loads(pickle.dumps(Interrupted("Interrupted.", [{"epoch": 1}])))
    assert (str(other), other.history) == ("Interrupted.", [{"epoch": 1}])


def test_a_callback_that_fails_leaves_the_checkpoint(few, tmp_path, uninterrupted, trained_epochs):
    def fail(epoch, model):
        raise RuntimeError("The caller's own.")

    with pytest.raises(RuntimeError, match=r"^The caller's own\.$"):
        run(few, checkpoint=tmp_path / "run.pt", on_epoch=fail)
    assert timeless(run(few, checkpoint=tmp_path / "run.pt")) == timeless(uninterrupted)
    assert trained_epochs == [1, 2, 3]


def test_a_checkpoint_is_used(few, cut_off, uninterrupted, caplog, trained_epochs):
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    assert trained_epochs == [3] and not caplog.records


def test_a_record_says_where_its_first_epochs_were_trained(few, cut_off, uninterrupted, monkeypatch):
    here = runs._environment
    monkeypatch.setattr(runs, "_environment", lambda training: here(training) | {"system": "another machine"})
    record = run(few, checkpoint=cut_off)
    earlier = record["environment"].pop("earlier")
    assert earlier == [{"epochs": 2} | uninterrupted["environment"]]
    assert record["environment"] == uninterrupted["environment"] | {"system": "another machine"}
    assert timeless(record)["history"] == timeless(uninterrupted)["history"]


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not a checkpoint": lambda content: b"Hello",
    "made by somebody else": lambda content: foreign(),
    **{f"a bit at {share:.0%}": lambda content, share=share: flipped(content, share) for share in (0.0, 0.3, 0.7, 1.0)},
}


def flipped(content: bytes, share: float) -> bytes:
    place = int(share * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def foreign() -> bytes:
    content = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, content)
    return content.getvalue()


def test_no_flipped_bit_is_overlooked(few, cut_off):
    content, places = cut_off.read_bytes(), random.Random(0)
    this = _Run(Training(SHORT, CPU, find_precision(CPU), few))
    for _ in range(50):
        with pytest.raises(ValueError, match="damaged"):
            this._restore(flipped(content, places.random()))
    this._restore(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    few, cut_off, uninterrupted, caplog, damage, trained_epochs
):
    cut_off.write_bytes(damage(cut_off.read_bytes()))
    assert timeless(run(few, checkpoint=cut_off)) == timeless(uninterrupted)
    [message] = [record.getMessage() for record in caplog.records]
    assert str(cut_off) in message and "goes on after epoch 1" in message and "\n" not in message
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
    [message] = [record.getMessage() for record in caplog.records]
    assert trained_epochs == [1, 2, 3] and "other code, data, config" in message and "starts afresh" in message
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
    record = run(few, Config(lr=1e30, batch_size=64, num_epochs=2, num_blocks=1))
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
    assert "Interrupted after " in errors.splitlines()[-1]
    assert (tmp_path / "run.pt").exists() or (tmp_path / "run.pt.before").exists()  # this one while it writes a new one


def test_a_run_goes_on_only_with_the_code_that_began_it(tmp_path):
    """That is the code that was loaded, not what lies there when a checkpoint is written."""
    shutil.copytree(ROOT / "mixer", tmp_path / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import sys
        import torch
        from mixer import Config, train
        from mixer.data import Data
        from mixer.runs import Interrupted

        def look(epoch, model):
            print(int(epoch["epoch"]))
            if "stop" in sys.argv:
                with open("mixer/train.py", "a") as file:
                    file.write("# changed")
                if epoch["epoch"] == 2:
                    raise KeyboardInterrupt

        images, labels = torch.zeros(8, 28, 28, dtype=torch.uint8), torch.arange(8)
        data = Data(images, labels, images, labels)
        try:
            train(Config(num_blocks=1, num_epochs=3), data=data, checkpoint="run.pt", on_epoch=look, progress=False)
        except Interrupted:
            pass
    """)

    def trained(*arguments: str) -> tuple[list[str], list[str]]:
        command = [sys.executable, "-B", str(script), *arguments]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout.split(), process.stderr.splitlines()

    loop = tmp_path / "mixer" / "train.py"
    began = loop.read_bytes()
    assert trained("stop")[0] == ["1", "2"]
    changed, checkpoint = loop.read_bytes(), (tmp_path / "run.pt").read_bytes()
    loop.write_bytes(began)
    assert trained() == (["3"], [])
    loop.write_bytes(changed)
    (tmp_path / "run.pt").write_bytes(checkpoint)
    epochs, [warning] = trained()
    assert epochs == ["1", "2", "3"] and "other code" in warning


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
    assert record["environment"]["path"] == "replayed"
    assert timeless(record) == timeless(run(few, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sizes", [{"num_blocks": 2}, {"network": "mlp"}, {"network": "conv"}], ids=str)
def test_cuda_goes_on_where_it_was_cut_off(few, tmp_path, sizes):
    config = Config(lr=0.01, dropout_p=0.1, batch_size=64, num_epochs=3, **sizes)

    def stop(epoch, model):
        if epoch["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(few, config, device="cuda", checkpoint=tmp_path / "run.pt", on_epoch=stop)
    epochs = []
    resumed = run(few, config, device="cuda", checkpoint=tmp_path / "run.pt", on_epoch=lambda e, _: epochs.append(e))
    assert [epoch["epoch"] for epoch in epochs] == [3]
    assert timeless(resumed) == timeless(run(few, config, device="cuda"))
