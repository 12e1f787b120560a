"""A record that is read is a true one, or one sentence says why not."""

import dataclasses
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixer import records, run_grid
from mixer.config import Config
from mixer.records import RecordError, read_record, write_record
from mixer.runner import GridError
from mixer.system.files import PROJECT, check_writable, write_whole

CONFIG = Config(num_epochs=2)


def record() -> dict:
    epochs = [
        {
            "epoch": number,
            "train_loss": 0.5,
            "train_accuracy": 0.75,
            "test_loss": 1,
            "test_accuracy": 0.5,
            "seconds": 1.5,
        }
        for number in (1, 2)
    ]
    environment = {"torch": "2", "device": "cpu: X", "threads": 2, "precision": "float32", "path": "eager"}
    environment |= {"commit": "0", "data_sha256": {}}
    return {
        "format": 1,
        "config": dataclasses.asdict(CONFIG),
        "history": epochs,
        "diverged": None,
        "environment": environment,
    }


def put(content: dict | str | bytes, folder: Path) -> Path:
    path = folder / f"{CONFIG.name}.json"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_is_read_as_it_was_written(tmp_path):
    path = tmp_path / f"{CONFIG.name}.json"
    write_record(record(), path)
    assert json.dumps(read_record(path)) == json.dumps(record())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_committed_records_are_read():
    found = [read_record(path) for path in (PROJECT / "results").rglob("lr*.json")]
    assert len(found) > 210 and all("fingerprint" in record for record in found)
    assert {record["environment"]["path"] for record in found} == {"fused", "graphs", "eager"}
    assert {record["config"]["mixup_prob"] for record in found} == {0.0, 0.5, 1.0}  # once called mixup


def test_a_record_of_ones_own_model_has_any_name(tmp_path):
    write_record(record() | {"model": "mine"}, tmp_path / "mine.json")
    assert read_record(tmp_path / "mine.json")["model"] == "mine"


def changed(**places) -> dict:
    """A record with other values, at places like environment__threads or history__0__epoch."""
    whole = record()
    for place, value in places.items():
        *parts, last = (int(part) if part.isdigit() else part for part in place.split("__"))
        at = whole
        for part in parts:
            at = at[part]
        at[last] = value
    return whole


WRONG = {
    "cut short": (json.dumps(record())[:300], ""),
    "empty": ("", ""),
    "not UTF-8": (b'{"format": "\xff"}', "codec"),
    "a list": ("[]", ""),
    "a word": ('"record"', ""),
    "nothing": ("null", ""),
    "nested without end": ("[" * 100_000, ""),
    "huge whole number": (json.dumps(record()).replace("0.75", "9" * 5000), ""),
    "lacks its config": ("{}", "lacks 'config'"),
    "another format": (changed(format=9), "format is 9"),
    "another config": (changed(config__seed=1), "its name should be"),
    "an unknown field": (changed(config__learning_rate=1), "learning_rate"),
    "an impossible config": (changed(config__lr=-1), "lr is -1"),
    "too few epochs": (changed(history=record()["history"][:1]), "epochs from 1 to 2"),
    "too many epochs": (changed(history=record()["history"] * 2), "epochs from 1 to 2"),
    "epochs in disorder": (changed(history=record()["history"][::-1]), "epochs from 1 to 2"),
    "epochs that are no list": (changed(history={"0": 1, "1": 2}), ""),
    "an epoch that is no dict": (changed(history=[1, 2]), ""),
    "a word for a number": (changed(history__1__train_loss="much"), "much"),
    "an epoch that lacks one": (changed(history__1={"epoch": 2}), "lacks"),
    "no environment": (changed(environment=[]), ""),
    "diverged in a word": (changed(diverged="yes"), ""),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG)
def test_rejects_what_is_no_record_and_keeps_it(tmp_path, content, reason):
    path = put(content, tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="is not a record of a finished run") as error:
        read_record(path)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself", "pipe"])
def test_rejects_what_is_no_regular_file(tmp_path, kind):
    path = tmp_path / f"{CONFIG.name}.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # which would be waited for
    else:
        path.symlink_to(path if kind == "link to itself" else tmp_path / "nowhere")
    with pytest.raises(RecordError, match="is not a record of a finished run"):
        read_record(path)
    with pytest.raises(GridError, match="is not a record of a finished run"):
        run_grid([CONFIG], tmp_path, device="cpu", progress=False)
    assert os.path.lexists(path)


def test_missing_record_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "lr1.json")


# ---------------------------------------------------------------- the commit


@pytest.fixture
def commit_of(monkeypatch) -> Callable[[Path], str]:
    """What a record made by a copy of the package would say."""

    def commit(package: Path) -> str:
        monkeypatch.setattr(records, "_PACKAGE", package)
        return records._commit()

    return commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository with a copy of the package in it."""
    folder = tmp_path / "prüfung"
    shutil.copytree(PROJECT / "mixer", folder / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text("Read me.")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "config", "status.showUntrackedFiles", "no")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_commit_has_a_plus_where_the_package_differs(repository, commit_of, monkeypatch):
    head = git(repository, "rev-parse", "--short=12", "HEAD")
    assert commit_of(repository / "mixer") == head
    (repository / "README.md").write_text("Changed.")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit_of(repository / "mixer") == head
    monkeypatch.delenv("GIT_DIR")
    (repository / "mixer" / "own.py").write_text("")
    assert commit_of(repository / "mixer") == f"{head}+"
    git(repository, "add", ".")
    assert commit_of(repository / "mixer") == f"{head}+"
    git(repository, "commit", "-q", "-m", "second")
    assert commit_of(repository / "mixer") == git(repository, "rev-parse", "--short=12", "HEAD") != head
    with (repository / "mixer" / "training.py").open("a") as file:
        file.write("# changed")
    assert commit_of(repository / "mixer").endswith("+")


def test_unpacked_archive_has_no_commit(repository, commit_of):
    unpacked = repository / "downloads" / "mixer"
    shutil.copytree(repository / "mixer", unpacked)
    assert commit_of(unpacked) == "unknown"


def test_commit_is_unknown_without_git(repository, commit_of, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert commit_of(repository / "mixer") == "unknown"


# ---------------------------------------------------------------- files


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below"):
        for write in (check_writable, lambda path: write_whole(path, b"content")):
            with pytest.raises(OSError, match="cannot be written") as error:
                write(path)
            assert "\n" not in str(error.value)
    check_writable(tmp_path / "new" / "record.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"] and not list((tmp_path / "new").iterdir())


def test_writes_over_regular_files_only(tmp_path):
    """A pipe would be waited for, and a device be replaced."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(OSError, match="because it is not a regular file"):
            check_writable(path)
        assert os.path.lexists(path)


def test_two_writers_do_not_spoil_a_file(tmp_path):
    path, contents, start = tmp_path / "record.json", [b"a" * 100_000, b"b" * 100_000], threading.Barrier(2)

    def write(content):
        start.wait()
        for _ in range(50):
            check_writable(path)
            write_whole(path, content)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(write, contents))
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_whole(path, b"before")

    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
