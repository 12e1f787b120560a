"""Records are read only if valid, otherwise one sentence says why; they name the code that made them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixer import records
from mixer.config import Config, grid
from mixer.records import RecordError, best, coursework, histories, read_record, write_record
from mixer.system.files import PROJECT, check_writable, write_whole

CONFIG = Config(num_epochs=2)
EPOCH = {"train_loss": 0.5, "train_accuracy": 0.75, "test_loss": 1, "test_accuracy": 0.5, "seconds": 1.5}


def record(config: Config = CONFIG, **changes) -> dict:
    environment = {"torch": "2", "device": "cpu: X", "threads": 2, "precision": "float32", "path": "eager"}
    history = [{"epoch": number + 1} | EPOCH for number in range(config.num_epochs)]
    whole = {"format": 1, "config": dataclasses.asdict(config), "history": history, "diverged": None}
    return whole | {"environment": environment} | changes


def test_reads_a_record_as_written(tmp_path):
    own = record(model="mine")  # which may have any name
    for path, written in ((tmp_path / f"{CONFIG.name}.json", record()), (tmp_path / "mine.json", own)):
        write_record(written, path)
        assert json.dumps(read_record(path)) == json.dumps(written)
    assert len(list(tmp_path.iterdir())) == 2


def test_committed_records_are_read_and_named_by_their_configs():
    found = {path: read_record(path) for path in (PROJECT / "results").rglob("lr*.json")}
    assert len(found) > 210 and all(path.stem == Config(**found[path]["config"]).name for path in found)
    assert {record["environment"]["path"] for record in found.values()} == {"fused", "graphs", "eager"}
    assert {record["config"]["mixup_prob"] for record in found.values()} == {0.0, 0.5, 1.0}  # once called mixup


@pytest.mark.parametrize(("old", "new"), [("plain", "eager"), ("replayed", "graphs")])
def test_old_names_are_understood(tmp_path, old, new):
    config = Config(num_epochs=2, mixup_prob=0.5, ema_decay=0.9)
    before = record(config, environment=record()["environment"] | {"path": old})
    before["config"] |= {"mixup": before["config"].pop("mixup_prob"), "average": before["config"].pop("ema_decay")}
    write_record(before, tmp_path / f"{config.name}.json")
    [after] = records.read_records(tmp_path)
    assert Config(**after["config"]) == config and after["environment"]["path"] == new


WRONG = {
    "cut short": (json.dumps(record()).encode()[:300], ""),
    "not UTF-8": (b'{"format": "\xff"}', "codec"),
    "nested without end": (b"[" * 100_000, ""),
    "a list": ([], ""),
    "no config": ({}, "'config' is missing"),
    "another format": (record(format=9), "its format is 9, not 1"),
    "another config": (record(Config(num_epochs=2, seed=1)), "rename it to lr0.01"),
    "an unknown field": (record() | {"config": {"warmth": 1}}, "warmth"),
    "an impossible config": (record() | {"config": {"lr": -1}}, "lr is -1"),
    "too few epochs": (record(history=record()["history"][:1]), "its epochs are not those from 1 to 2"),
    "epochs out of order": (record(history=record()["history"][::-1]), "its epochs are not those from 1 to 2"),
    "an incomplete epoch": (record(history=[{"epoch": 1}]), "'train_loss' is missing"),
    "a word for a number": (record(history=[{"epoch": 1} | EPOCH | {"test_loss": "much"}]), "much"),
    "an accuracy in per cent": (
        record(history=[{"epoch": n} | EPOCH | {"test_accuracy": 89.0} for n in (1, 2)]),
        "0 and 1",
    ),
    "no step": (record(diverged={"epoch": 3}), "'step' is missing"),
    "words in its fingerprint": (record() | {"fingerprint": {"loss": "low"}}, "does not consist of numbers"),
    "no environment": (record(environment=[]), ""),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG)
def test_rejects_a_file_that_is_no_record_and_keeps_it(tmp_path, content, reason):
    before = content if isinstance(content, bytes) else json.dumps(content).encode()
    path = tmp_path / f"{CONFIG.name}.json"
    path.write_bytes(before)
    with pytest.raises(RecordError, match=r"is (not a record of a finished run|the record of lr)") as error:
        read_record(path)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert path.read_bytes() == before


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_rejects_a_path_that_is_no_regular_file(tmp_path, put):
    path = tmp_path / f"{CONFIG.name}.json"
    with pytest.raises(FileNotFoundError):
        read_record(path)
    put(path)
    with pytest.raises(RecordError, match="is not a record of a finished run"):
        read_record(path)


def test_coursework_is_the_longest_complete_grid():
    runs = [record(config) for config in (*grid(num_epochs=2), *grid(num_epochs=3)[:7])]
    assert coursework(runs) == runs[:8] and len(histories(runs)) == 8 * 2 + 7 * 3
    assert histories(runs[0]).equals(histories(runs[:1]))
    own = histories([runs[0], runs[0] | {"model": "Mine", "optimiser": "SGD {}"}])
    assert [*own["model"].unique()] == ["", "Mine"] and [*own["optimiser"].unique()] == ["adam", "SGD {}"]
    last = record(grid(num_epochs=3)[7], history=[EPOCH | {"epoch": n, "test_accuracy": n / 4} for n in (1, 2, 3)])
    assert coursework([*runs, last]) == [*runs[8:], last] and best([*runs, last]) == last
    with pytest.raises(RecordError, match="does not hold the eight runs of the coursework"):
        coursework(runs, seed=1)


def test_commit_gets_a_plus_if_the_package_differs(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(package: str = "mixer") -> str:
        monkeypatch.setattr(records, "_PACKAGE", tmp_path / package)
        return records._commit()

    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # which may require signatures, or have hooks
    shutil.copytree(PROJECT / "mixer", tmp_path / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(*arguments)
    head = git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "README.md").write_text("Read me.")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit() == head
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "mixer" / "own.py").write_text("")
    assert commit() == f"{head}+"
    git("add", ".")
    git("commit", "-q", "-m", "second")
    assert commit() == git("rev-parse", "--short=12", "HEAD") != head
    shutil.copytree(tmp_path / "mixer", tmp_path / "unpacked" / "mixer")  # an archive inside another repository
    assert commit("unpacked/mixer") == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_reports_an_unwritable_path_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")  # writing to it would block; a device would be replaced
    for path in (tmp_path, tmp_path / "file" / "below", tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match=r"^[^\n]* cannot be written[^\n]*: give another [^\n]*\.$"):
            check_writable(path)
    check_writable(tmp_path / "new" / "record.json")
    assert not list((tmp_path / "new").iterdir())


def test_a_file_is_always_complete(tmp_path, monkeypatch):
    path, contents = tmp_path / "record.json", [b"a" * 100_000, b"b" * 100_000]
    with ThreadPoolExecutor(2) as executor:
        for _ in executor.map(lambda number: write_whole(path, contents[number % 2]), range(50)):
            assert path.read_bytes() in contents
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", sys.exit)  # in the middle of the write
    with pytest.raises(SystemExit):
        write_whole(path, b"after")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
