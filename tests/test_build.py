import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mixer.kernels import build

COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
OTHER_PROCESS = """
import importlib, pathlib, sys, types
sys.modules["mixer"] = package = types.ModuleType("mixer")  # without PyTorch, which takes seconds to import
package.__path__ = [sys.argv[1]]
build = importlib.import_module("mixer.kernels.build")
build.SOURCE = pathlib.Path(sys.argv[2])
library = build.library()
print(library and library.answer(), library and library._name)
"""
CAN_MOUNT = subprocess.run("unshare -m true", shell=True, stderr=subprocess.DEVNULL).returncode == 0
pytestmark = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="not Linux, or no C++ compiler")
as_root = pytest.mark.skipif(not CAN_MOUNT, reason="only root may mount")


def write_compiler(path, *lines):
    """Write a shell script that logs its arguments in ``path.calls`` and then runs the lines."""
    path.write_text("\n".join(["#!/bin/sh", 'for target; do :; done; echo "$*" >> "$0.calls"', *lines, ""]))
    path.chmod(0o755)
    Path(f"{path}.calls").touch()
    return path


def calls(compiler):
    return Path(f"{compiler}.calls").read_text().splitlines()


@pytest.fixture
def compiler(tmp_path):
    return write_compiler(tmp_path / "compiler", f'exec {COMPILER} "$@"')


@pytest.fixture
def cache(monkeypatch, tmp_path, compiler):
    """An empty cache, before the library is first requested, with a small source file."""
    for name in ("temporary", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "stub.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "SOURCE", tmp_path / "stub.cpp")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    build._library_or_none.cache_clear()
    yield tmp_path / "cache" / "mixer"
    build._library_or_none.cache_clear()


def ask_again():
    build._library_or_none.cache_clear()
    return build.library()


def start(*before):
    """Start a process that requests the library; ``before``: a command that runs it."""
    command = [*before, sys.executable, "-c", OTHER_PROCESS, str(Path(build.__file__).parents[1]), str(build.SOURCE)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_loads_the_operator():
    assert build.library().mixing_has_bfloat16() in (0, 1)


def test_compiles_on_first_use_only(cache, compiler):
    library = build.library()
    assert library.answer() == 42 and build.library() is library
    assert list(cache.iterdir()) == [Path(library._name)] == [Path(ask_again()._name)]
    assert len(calls(compiler)) == 1


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_rebuilds_a_damaged_library(cache, compiler, content):
    wanted = start().communicate()
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert [start().communicate() for _ in range(2)] == [wanted, wanted]
    assert len(calls(compiler)) == 2


def test_rebuilds_when_a_dependency_changes(cache, compiler, monkeypatch):
    changes = [
        lambda: monkeypatch.setenv("CXX", f"env {compiler}"),
        lambda: monkeypatch.setenv("CXX", f"env {compiler} -DA"),
        lambda: write_compiler(compiler, "# upgraded in place", f'exec {COMPILER} "$@"'),
        lambda: monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1")),
        lambda: monkeypatch.setattr(build, "PROCESSOR", ("processor",)),
        lambda: build.SOURCE.write_text('extern "C" int answer() { return 43; }\n'),
    ]
    assert build.library().answer() == 42
    for count, change in enumerate(changes, 2):
        change()
        assert ask_again().answer() == (43 if change is changes[-1] else 42)
        assert len(calls(compiler)) == count


@pytest.mark.parametrize("cxx, logged", [("compiler", 0), ("no-compiler", 1)])
def test_concurrent_threads_build_once(cache, compiler, monkeypatch, caplog, cxx, logged):
    monkeypatch.setenv("CXX", str(compiler.with_name(cxx)))
    with ThreadPoolExecutor(8, initializer=threading.Barrier(8).wait) as pool:
        libraries = set(pool.map(lambda _: build.library(), range(8)))
    assert len(libraries) == 1
    assert len(calls(compiler)) == 1 - logged and len(caplog.records) == logged


def test_processes_that_start_together_share_one_library(cache):
    answers = {process.communicate() for process in [start() for _ in range(3)]}
    (path,) = cache.iterdir()
    assert answers == {(f"42 {path}\n", "")}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_leaves_no_library(cache, compiler, how):
    write_compiler(compiler, 'echo half > "$target"; touch "$0.begun"; exec sleep 5')
    process = start()
    while process.poll() is None and not Path(f"{compiler}.begun").exists():
        time.sleep(0.02)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == -how and list(cache.iterdir()) == []


def test_without_a_compiler_logs_one_line(cache, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert build.library() is None and build.library() is None
    reason = "there is no C++ compiler (g++, c++, clang++)"
    message = f"The mixer's blocks run in eager PyTorch, which is several times slower: {reason}."
    assert caplog.record_tuples == [("mixer", logging.WARNING, message)]


@pytest.mark.parametrize(
    "line, reason", [("exit 1", "(exit status 1)"), ("echo no; echo error; exit 1", "(error)"), ("exit 0", "No such")]
)
def test_failing_compiler_logs_one_line(cache, compiler, caplog, line, reason):
    write_compiler(compiler, "exec >&2", line)
    assert build.library() is None
    (message,) = caplog.messages
    assert reason in message and "\n" not in message


def test_cxx_may_have_arguments(cache, compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"env A=1 '{compiler.rename(compiler.with_name('with a space'))}' -DB '-DA=b c'")
    assert build.library().answer() == 42
    assert calls(compiler.with_name("with a space"))[0].startswith("-DB -DA=b c -std=c++17")


@pytest.mark.parametrize("says, tries", [("bad value for -march=", 2), ("error: cc1plus was killed", 1)])
def test_tries_mcpu_only_where_march_is_unknown(cache, compiler, says, tries):
    write_compiler(compiler, f'case "$*" in *-march=*) echo "{says}" >&2; exit 1;; esac', f'exec {COMPILER} "$@"')
    assert (build.library() is not None) == (tries == 2)
    assert ["-mcpu=native" in call for call in calls(compiler)] == [False, True][:tries]


@pytest.mark.parametrize("mode, owner", [(0o777, -1), (0o770, -1), pytest.param(0o755, 12345, marks=as_root)])
def test_rejects_a_cache_that_others_can_write_to(cache, tmp_path, mode, owner):
    build.library()
    cache.chmod(mode)
    os.chown(cache, owner, -1)
    assert Path(ask_again()._name).is_relative_to(tmp_path / "temporary")


def test_without_a_home_builds_for_this_process_alone(cache, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)  # no entry for this user
    assert build.library().answer() == 42
    assert list((tmp_path / "temporary").iterdir()) == [] and caplog.records == []


def test_ignores_a_cache_that_is_not_absolute(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(build.library()._name).parent == tmp_path / ".cache" / "mixer"


@as_root
@pytest.mark.parametrize("options, mounted", [("ro", "cache"), ("noexec", "cache"), ("noexec", "cache temporary")])
def test_builds_for_this_process_alone_where_the_cache_cannot_be_used(cache, tmp_path, options, mounted):
    mounts = [f"mount -t tmpfs -o {options} tmpfs '{tmp_path / name}'" for name in mounted.split()]
    output, errors = start("unshare", "-m", "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh").communicate()
    if "temporary" in mounted:  # where nothing may run
        assert output == "None None\n" and "failed to map segment" in errors and errors.count("\n") == 1
    else:
        assert output.startswith(f"42 {tmp_path / 'temporary'}") and errors == ""
