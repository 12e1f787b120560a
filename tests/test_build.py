import ctypes
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import filelock
import pytest

from mixer.kernels import build

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the scripts here are for a POSIX shell")
needs_library = pytest.mark.skipif(build.library() is None, reason="the operator cannot be built here")
as_root = pytest.mark.skipif(
    os.name != "posix"
    or os.geteuid() != 0
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode,
    reason="only root may mount",
)
SHOW = """
import logging
from mixer.kernels import build
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
library = build.library()
print(library and library._name)
"""
OTHER_LIBRARY = importlib.util.find_spec("_ctypes").origin  # one that loads, but is not ours


def start(cache, *before, code=SHOW, **environment):
    """A process that asks for the library; ``before`` its command may stand another that runs it."""
    environment = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [*before, sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def end(process):
    """The path of the library that a process had, and the lines that it logged."""
    output, errors = process.communicate(timeout=50)
    assert process.returncode == 0, (process.returncode, errors)
    return Path(os.fsdecode(output).strip()), errors.decode(errors="replace").splitlines()


def reason(process):
    """Why a process had no library, which it says in one line."""
    path, lines = end(process)
    assert path == Path("None")
    (line,) = lines
    assert line.startswith("WARNING mixer The mixer's blocks run as the plain formula")
    return line


def script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", 'for target; do :; done; echo "$*" >> "$0.calls"', *lines, ""]))
    path.chmod(0o755)
    return str(path)


def calls(compiler):
    """The arguments of each call of a compiler that is a script of ours."""
    path = Path(f"{compiler}.calls")
    return path.read_text().splitlines() if path.exists() else []


def kept(cache):
    return sorted(path for path in (cache / "mixer").iterdir() if path.suffix != ".lock")


def wait_for(path):
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes that start together with an empty cache have, and the calls of the compiler."""
    folder = tmp_path_factory.mktemp("together")
    compiler = script(folder / "compiler", f'exec {build._compiler()[0]} "$@"')
    return [end(p) for p in [start(folder, CXX=compiler) for _ in range(2)]], calls(compiler), kept(folder)


@pytest.fixture
def copying(together, tmp_path):
    """A compiler that is done at once."""
    return script(tmp_path / "compiler", f'cp {together[2][0]} "$target"')


@pytest.fixture
def fresh(monkeypatch, tmp_path, copying):
    """This process, as if it had not looked for the library yet, with an empty cache and temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", copying)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    build.library.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()
    assert list((tmp_path / "temporary").iterdir()) == []


# ---------------------------------------------------------------- what is kept


@needs_library
def test_two_processes_that_start_together_build_once(together):
    (one, other), compiled, files = together
    assert one == other == (files[0], [])
    assert len(compiled) == len(files) == 1


def ask_together(count=8):
    barrier, got = threading.Barrier(count), []

    def ask():
        barrier.wait()
        got.append(build.library())

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == count
    return {id(library): library for library in got}.values()


@needs_library
def test_threads_that_ask_together_build_once(fresh, copying):
    (library,) = ask_together()
    assert library is not None
    assert len(calls(copying)) == 1


@needs_library
def test_threads_that_ask_together_in_vain_say_so_once(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    assert list(ask_together()) == [None]
    assert len(caplog.records) == 1
    assert build.library() is None
    assert len(caplog.records) == 1


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


@needs_library
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: cut(path, 0), id="empty"),
        pytest.param(lambda path: cut(path, 5000), id="cut short"),
        pytest.param(lambda path: flip(path, 9000), id="a bit flipped"),
        pytest.param(lambda path: flip(path, 18), id="another architecture"),
        pytest.param(lambda path: path.write_bytes(Path(OTHER_LIBRARY).read_bytes()), id="another library"),
    ],
)
def test_a_damaged_library_is_rebuilt_once(tmp_path, copying, damage):
    path, _ = end(start(tmp_path, CXX=copying))
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    for _ in range(2):
        assert end(start(tmp_path, CXX=copying)) == (path, [])
        assert path.read_bytes() == whole
        assert len(calls(copying)) == 2
    assert kept(tmp_path) == [path]


@needs_library
def test_it_is_on_the_disk_before_it_has_its_name(fresh, monkeypatch):
    sync, synced = os.fsync, []

    def watch(descriptor):
        sync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, len(list(fresh.glob("mixer/*.so")))))

    monkeypatch.setattr(os, "fsync", watch)
    path = Path(build.library()._name)
    assert synced == [(path.stat().st_ino, 0), (path.parent.stat().st_ino, 1)]


@needs_library
def test_a_library_that_is_whole_but_does_not_load_here_is_rebuilt_once(fresh, copying):
    name = f"mixer/{build._name(build._compiler())}"
    foreign, damaged = (
        fresh / f"{name}-{hashlib.sha256(content).hexdigest()}.so" for content in (b"foreign", b"whole")
    )
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"foreign")  # it may serve another machine that shares the cache
    damaged.write_bytes(b"damaged")
    for _ in range(2):
        path, _ = end(start(fresh, CXX=copying))
        assert kept(fresh) == sorted([foreign, path])
        assert len(calls(copying)) == 1


@needs_library
@pytest.mark.parametrize("what", ["FLAGS", "NATIVE", "SOURCE", "_cpu", "compiler", "arguments", "behind ccache"])
def test_the_name_says_what_decides_the_library(fresh, copying, tmp_path, monkeypatch, what):
    compiler = ["/usr/bin/env", copying, "-m64"]
    before = build._name(compiler)
    assert build._name(compiler) == before
    if what in ("FLAGS", "NATIVE"):
        monkeypatch.setattr(build, what, ("-O1",))
    elif what == "SOURCE":
        (tmp_path / "other.cpp").write_bytes(build.SOURCE.read_bytes() + b"\n")
        monkeypatch.setattr(build, what, tmp_path / "other.cpp")
    elif what == "_cpu":
        monkeypatch.setattr(build, what, lambda: "another processor")
    elif what == "compiler":
        compiler = ["/usr/bin/nice", *compiler[1:]]
    elif what == "arguments":
        compiler[2] = "-m32"
    else:
        script(Path(copying), "echo upgraded in place")
    assert build._name(compiler) != before


# ---------------------------------------------------------------- compilers


def test_without_a_compiler_one_log_line(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert build.library() is None
    assert build.library() is None
    assert [(r.name, r.levelname) for r in caplog.records] == [("mixer", "WARNING")]
    assert "no C++ compiler (g++, c++, clang++)" in caplog.text


@needs_library
@pytest.mark.parametrize(
    "lines, wanted",
    [
        (["exit 1"], "cannot compile fused.cpp (exit status 1)"),
        (["echo one >&2", "echo an error, two >&2", "exit 1"], "cannot compile fused.cpp (an error, two)"),
        (
            [r"printf 'r\351sum\351 \377\n\nerror \302 \033[31m' >&2", "exit 1"],
            "(error \N{REPLACEMENT CHARACTER} ?[31m)",
        ),
        (["exit 0"], "writes no library"),
        (['echo rubbish > "$target"'], "cannot be loaded"),
        (['head -c 5000 "$library" > "$target"'], "cannot be loaded"),
        ([f'cp {OTHER_LIBRARY} "$target"'], "cannot be loaded"),
    ],
    ids=["fails", "says why", "any encoding", "no file", "rubbish", "cut short", "another library"],
)
def test_a_compiler_that_does_wrong(tmp_path, together, lines, wanted):
    compiler = script(tmp_path / "compiler", f"library={together[2][0]}", *lines)
    line = reason(start(tmp_path, CXX=compiler))
    assert wanted in line and compiler in line
    assert kept(tmp_path) == []


BEATING = '(while :; do echo >> "$0.beat"; sleep 0.05; done) & touch "$TMPDIR/cc1.s" "$0.begun"; wait'


def assert_silent(compiler):
    """None of a BEATING compiler's processes lives."""
    beat = Path(f"{compiler}.beat")
    before = beat.stat().st_size
    time.sleep(0.3)
    assert beat.stat().st_size == before > 0


@needs_library
def test_a_compiler_that_hangs_is_given_up_with_all_that_it_started(fresh, tmp_path, monkeypatch, caplog):
    compiler = script(tmp_path / "hangs", BEATING)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "TIMEOUT", 0.3)
    assert build.library() is None
    assert len(caplog.records) == 1
    assert f"{compiler} was not done after 0.3 s" in caplog.text
    assert_silent(compiler)
    assert len(calls(compiler)) == 1
    assert kept(fresh) == []


@needs_library
def test_ctrl_c_ends_the_compiler_and_leaves_nothing(tmp_path):
    compiler = script(tmp_path / "compiler", BEATING)
    (tmp_path / "temporary").mkdir()
    process = start(tmp_path, CXX=compiler, TMPDIR=str(tmp_path / "temporary"))
    wait_for(Path(f"{compiler}.begun"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == b"KeyboardInterrupt"
    assert_silent(compiler)
    assert kept(tmp_path) == list((tmp_path / "temporary").iterdir()) == []


@needs_library
def test_a_killed_build_harms_nobody(tmp_path, copying):
    hang = 'if mkdir "$0.begun"; then echo rubbish > "$target"; echo $$ > "$0.begun/pid"; exec sleep 100; fi 2>&-'
    compiler = script(tmp_path / "hangs at first", hang, f'exec {copying} "$@"')
    process = start(tmp_path, CXX=compiler)
    wait_for(Path(f"{compiler}.begun", "pid"))
    process.kill()
    process.communicate()
    os.kill(int(Path(f"{compiler}.begun", "pid").read_text()), signal.SIGKILL)
    assert len(kept(tmp_path)) == 1
    path, lines = end(start(tmp_path, CXX=compiler))
    assert lines == [] and kept(tmp_path) == [path]


@needs_library
@pytest.mark.parametrize(
    "cxx, arguments",
    [
        ("{compiler}", []),
        ("  {compiler} ", []),
        ("'{compiler}' -m64 '-DA=b c'", ["-m64", "-DA=b c"]),
        ("env A=1 '{compiler}' -m64", ["-m64"]),
    ],
)
def test_cxx_may_hold_arguments(tmp_path, copying, cxx, arguments):
    compiler = script(tmp_path / "with a space" / "compiler", f'exec {copying} "$@"')
    path, lines = end(start(tmp_path, CXX=cxx.format(compiler=compiler)))
    assert lines == [] and kept(tmp_path) == [path]
    (call,) = calls(compiler)
    assert call.startswith(" ".join([*arguments, build.FLAGS[0]]))


def test_cxx_may_be_empty(fresh, monkeypatch):
    monkeypatch.delenv("CXX")
    wanted = build._compiler()
    for empty in ("", "  "):
        monkeypatch.setenv("CXX", empty)
        assert build._compiler() == wanted


def test_cxx_that_is_no_command(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "'g++ -m64")
    assert build.library() is None
    assert "CXX='g++ -m64 is no command (No closing quotation)" in caplog.text
    assert len(caplog.records) == 1


@needs_library
def test_the_other_native_flag_only_where_the_first_is_not_known(tmp_path, copying):
    unknown = "case \"$*\" in *-march=*) echo \"error: bad value ('native') for '-march=' switch\" >&2; exit 1;; esac"
    compiler = script(tmp_path / "unknown", unknown, f'exec {copying} "$@"')
    path, _ = end(start(tmp_path, CXX=compiler))
    assert kept(tmp_path) == [path]
    assert ["-mcpu=native" in call for call in calls(compiler)] == [False, True]
    # The other flag builds for any processor where the first is known; that must not be kept for a passing trouble.
    compiler = script(tmp_path / "troubled", "echo fatal error: Killed signal terminated program cc1plus >&2", "exit 1")
    assert "Killed" in reason(start(tmp_path, CXX=compiler))
    assert not any("-mcpu=native" in call for call in calls(compiler))


# ---------------------------------------------------------------- caches


def spoil(cache, how):
    cache.mkdir()
    if how == "a file":
        (cache / "mixer").touch()
    elif how == "in a file":
        cache.rmdir()
        cache.touch()
    elif how == "cannot be made":
        cache.rmdir()
        cache.symlink_to("/proc/none")
    elif how == "anyone's":
        (cache / "mixer").mkdir()
        (cache / "mixer").chmod(0o777)
    elif how == "another user's":
        (cache / "mixer").mkdir()
        os.chown(cache / "mixer", 12345, 12345)


@needs_library
@pytest.mark.parametrize(
    "how", ["a file", "in a file", "cannot be made", "anyone's", pytest.param("another user's", marks=as_root)]
)
def test_without_a_cache_for_this_process_alone(fresh, tmp_path, how):
    spoil(fresh, how)
    library = build.library()
    assert library.mixing_has_bfloat16() in (0, 1)
    assert Path(library._name).is_relative_to(tmp_path / "temporary")
    if fresh.is_dir() and (fresh / "mixer").is_dir():
        assert kept(fresh) == []


@needs_library
def test_without_a_home(fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setitem(sys.modules, "pwd", None)  # no entry for this user
    with pytest.raises(RuntimeError):
        Path.home()
    assert build.library() is not None
    assert caplog.records == []


@needs_library
@pytest.mark.parametrize("given", ["", "relative", "~/elsewhere"])
def test_a_cache_that_is_not_absolute_is_ignored(tmp_path, copying, given):
    path, _ = end(start(given, CXX=copying, HOME=str(tmp_path / "home")))
    assert path.parent == tmp_path / "home" / ".cache" / "mixer"
    assert not Path("relative").exists() and not Path("~").exists()


@needs_library
def test_nothing_may_run_from_the_cache(fresh, tmp_path, monkeypatch):
    load = ctypes.CDLL

    def refuse(name, *arguments):
        if Path(name).is_relative_to(fresh):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name, *arguments)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for _ in range(2):
        assert Path(build.library()._name).is_relative_to(tmp_path / "temporary")
        build.library.cache_clear()


def mounted(tmp_path, options, *names):
    """A command that runs another where these folders are mounted so, which no other process sees."""
    mounts = [f"mount -t tmpfs -o {options} tmpfs '{tmp_path / name}'" for name in names]
    for name in names:
        (tmp_path / name).mkdir()
    return ["unshare", "-m", "sh", "-ec", "\n".join([*mounts, 'exec "$@"']), "sh"]


@needs_library
@as_root
@pytest.mark.parametrize("options", ["noexec", "size=64k", "ro"])
def test_a_cache_mounted_so_that_it_does_not_serve(tmp_path, copying, options):
    before = mounted(tmp_path, options, "cache")
    (tmp_path / "temporary").mkdir()
    path, lines = end(start(tmp_path / "cache", *before, CXX=copying, TMPDIR=str(tmp_path / "temporary")))
    assert path.is_relative_to(tmp_path / "temporary") and lines == []
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(calls(copying)) == (2 if options == "size=64k" else 1)


@needs_library
@as_root
@pytest.mark.parametrize("options, wanted", [("noexec", "cannot be loaded"), ("size=64k", "No space left")])
def test_no_folder_serves(tmp_path, copying, options, wanted):
    before = mounted(tmp_path, options, "cache", "temporary")
    process = start(tmp_path / "cache", *before, CXX=copying, TMPDIR=str(tmp_path / "temporary"))
    assert wanted in reason(process)


@needs_library
def test_a_cache_that_can_only_be_read_is_read(fresh, copying, monkeypatch):
    wanted = build.library()._name
    build.library.cache_clear()
    monkeypatch.setattr(filelock.FileLock, "acquire", None)
    assert build.library()._name == wanted
    assert len(calls(copying)) == 1


@needs_library
@pytest.mark.parametrize("error", [NotImplementedError, PermissionError])
def test_without_locks_for_this_process_alone(fresh, tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert Path(build.library()._name).is_relative_to(tmp_path / "temporary")


@needs_library
def test_a_lock_that_is_never_released_is_not_waited_for(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TIMEOUT", 1)
    (fresh / "mixer").mkdir(parents=True)
    holder = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True), input()"
    lock = fresh / "mixer" / f"{build._name(build._compiler())}.lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        before = time.monotonic()
        assert Path(build.library()._name).is_relative_to(tmp_path / "temporary")
        assert time.monotonic() - before < 10
        process.communicate(b"\n")


@needs_library
def test_names_that_the_locale_cannot_say(tmp_path, copying):
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "utf-8:surrogateescape",
    }
    folder = tmp_path / "Käse €"
    compiler = script(folder / "compiler", f'exec {copying} "$@"')
    path, lines = end(start(folder, CXX=f"'{compiler}'", **ascii_only))
    assert lines == [] and kept(folder) == [path]
    assert "there is no C++ compiler" in reason(start(folder, CXX=f"'{folder}/none'", **ascii_only))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_it_too(tmp_path, copying):
    code = """if True:
        import os
        from mixer.kernels import build
        wanted = build.library().mixing_has_bfloat16()
        child = os.fork()
        assert build.library().mixing_has_bfloat16() == wanted
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """
    end(start("/proc/none", CXX=copying, TMPDIR=str(tmp_path), code=code))
    assert len(calls(copying)) == 1
