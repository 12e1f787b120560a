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
from mixer.system.files import check_writable, write_whole
from mixer.records import RecordError, read_record, write_record
from mixer.runner import GridError

ROOT = Path(__file__).parent.parent
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
    environment = {"torch": "2", "device": "cpu: X", "threads": 2, "precision": "float32", "path": "plain"}
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


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / f"{CONFIG.name}.json"
    write_record(record(), path)
    assert read_record(path) == json.loads(json.dumps(record()))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for path in sorted((ROOT / "results").glob("lr*.json")):  # and so are those that there are
        read_record(path)


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
    "not a number": (json.dumps(changed(history__1__test_loss=float("nan"))), "NaN"),
    "infinite": (json.dumps(changed(history__1__seconds=float("inf"))), "Infinity"),
    "huge": (json.dumps(record()).replace("0.75", "1e999"), "train_accuracy"),
    "huge whole number": (json.dumps(record()).replace("0.75", "9" * 5000), ""),
    "lacks its config": ("{}", "lacks 'config'"),
    "another format": (changed(format=9), "format is 9"),
    "another config": (changed(config__seed=1), "should be called"),
    "an unknown field": (changed(config__learning_rate=1), "learning_rate"),
    "an impossible config": (changed(config__lr=-1), "lr is -1"),
    "too few epochs": (changed(history=record()["history"][:1]), "1 of 2 epochs"),
    "too many epochs": (changed(history=record()["history"] * 2), "4 of 2 epochs"),
    "epochs in disorder": (changed(history=record()["history"][::-1]), "its epoch 1 says that it is 2"),
    "epochs that are no list": (changed(history={"0": 1, "1": 2}), ""),
    "an epoch that is no dict": (changed(history=[1, 2]), ""),
    "accuracy in percent": (changed(history__0__test_accuracy=88.2), "test_accuracy of epoch 1 is 88.2"),
    "a negative loss": (changed(history__1__train_loss=-0.1), "train_loss of epoch 2"),
    "a word for a number": (changed(history__1__train_loss="0.1"), "train_loss of epoch 2"),
    "a truth for a number": (changed(history__1__train_accuracy=True), "train_accuracy of epoch 2"),
    "an epoch that lacks one": (changed(history__1={"epoch": 2}), "lacks"),
    "an epoch that is a truth": (changed(history__0__epoch=True), "its epoch 1 says that it is True"),
    "threads that are a truth": (changed(environment__threads=True), "threads is True"),
    "another precision": (changed(environment__precision="float8"), "precision is 'float8'"),
    "another path": (changed(environment__path=3), "path is 3"),
    "threads in words": (changed(environment__threads="two"), "threads is 'two'"),
    "no environment": (changed(environment=[]), ""),
    "diverged late": (changed(diverged={"epoch": 4, "step": 1}), "diverged where it cannot"),
    "diverged at no step": (changed(diverged={"epoch": 3, "step": 0}), "diverged where it cannot"),
    "diverged in a word": (changed(diverged="yes"), ""),
}


@pytest.mark.parametrize(("content", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_no_record_is_one_sentence_and_is_kept(tmp_path, content, reason):
    path = put(content, tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="is not a record of a finished run") as error:
        read_record(path)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself", "pipe"])
def test_what_is_no_file_is_one_sentence(tmp_path, kind):
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


def test_what_is_not_there_is_not_there(tmp_path):
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
    shutil.copytree(ROOT / "mixer", folder / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text("Read me.")
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "config", "status.showUntrackedFiles", "no")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_is_the_packages_with_a_plus_where_it_differs(repository, commit_of, monkeypatch):
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
    with (repository / "mixer" / "train.py").open("a") as file:
        file.write("# changed")
    assert commit_of(repository / "mixer").endswith("+")


def test_an_unpacked_archive_has_no_commit_not_even_of_a_repository_around_it(repository, commit_of):
    unpacked = repository / "downloads" / "mixer"
    shutil.copytree(repository / "mixer", unpacked)
    assert commit_of(unpacked) == "unknown"


def test_without_git_there_is_no_commit(repository, commit_of, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    assert commit_of(repository / "mixer") == "unknown"


# ---------------------------------------------------------------- files


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below"):
        for write in (check_writable, lambda path: write_whole(path, b"content")):
            with pytest.raises(OSError, match="cannot be written") as error:
                write(path)
            assert "\n" not in str(error.value)
    check_writable(tmp_path / "new" / "record.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"] and not list((tmp_path / "new").iterdir())


def test_only_a_file_is_written_over(tmp_path):
    """A pipe would be waited for, and a device be replaced."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(OSError, match="because it is no file: give the name of a file"):
            check_writable(path)
        assert os.path.lexists(path)


def test_two_that_write_the_same_file_do_not_spoil_it(tmp_path):
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


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_whole(path, b"before")

    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
