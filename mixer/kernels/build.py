"""Compiles ``fused.cpp`` on first use and keeps the library in the user's cache.

The cache is ``mixer`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. A library's name says what decides it (source,
compiler, flags, processor), so that it never goes stale, and ends in the SHA-256 of its bytes. Bytes that differ from
it never reach the system's loader, which dies of a library cut short and takes the process with it: they are thrown
away and built anew. Where nothing can be kept or run from there, the library is built in a temporary folder, for this
process alone, and the folder is gone once it is loaded.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import filelock

SOURCE = Path(__file__).with_name("fused.cpp")
FUNCTIONS = ("mixing_forward", "mixing_backward", "mixing_gelu", "mixing_has_bfloat16")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")  # whichever the compiler knows
TIMEOUT = 120  # seconds for the compiler, which takes about five
TRIAL = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); [library[name] for name in sys.argv[2:]]"
log = logging.getLogger("mixer")

_answer: list[ctypes.CDLL | None] = []  # once there is one
_asking = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The compiled ``fused.cpp``, built if need be; None, and a log line with the reason, when it cannot be had.

    The answer stands for the life of the process; ``library.cache_clear()`` forgets it.
    """
    if not _answer:
        with _asking:
            if not _answer:
                _answer.append(_library_or_none())
    return _answer[0]


library.cache_clear = _answer.clear


def _library_or_none() -> ctypes.CDLL | None:
    try:
        return _library()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())).rstrip(".")
        log.warning("The mixer's blocks run as the plain formula, which is several times slower: %s.", reason)
        return None


def _library() -> ctypes.CDLL:
    compiler = _compiler()
    name = _name(compiler)
    try:
        cache = _cache()
        if kept := _kept(cache, name):
            return kept
        # Released by the system when its process dies, so a killed build holds nobody up.
        with filelock.FileLock(cache / f"{name}.lock", timeout=TIMEOUT):
            return _kept(cache, name) or _built(cache, name, compiler)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home, or the file system has no locks
        log.info("The operator is built for this process alone, since it cannot be kept: %s", error)
    with tempfile.TemporaryDirectory(prefix="mixer-", ignore_cleanup_errors=True) as folder:
        return _built(Path(folder), name, compiler)


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # to be ignored then, says its specification
        base = Path.home() / ".cache"
    cache = base / "mixer"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = cache.stat()
    if os.name == "posix" and (status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002):
        raise PermissionError(f"others can write to {cache}, and so choose what runs here")
    if os.name == "posix" and os.statvfs(cache).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(f"nothing may run from {cache}")
    return cache


def _kept(cache: Path, name: str) -> ctypes.CDLL | None:
    for path in cache.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{_sha256(path)}":
                return ctypes.CDLL(str(path))
            path.unlink()
    return None


def _built(folder: Path, name: str, compiler: list[str]) -> ctypes.CDLL:
    """Build the library into ``folder``: whole, tried and on the disk, or not at all."""
    for leftover in folder.glob(f"{name}.*.work"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.", suffix=".work", ignore_cleanup_errors=True) as work:
        made = Path(work, "made.so")
        _compile(compiler, made)
        # In a process of its own, since a library that is wrong can take its process with it.
        failure = _run([sys.executable or "python3", "-P", "-S", "-c", TRIAL, str(made), *FUNCTIONS], made.parent)
        if failure is not None:
            raise OSError(f"what {shlex.join(compiler)} made of {SOURCE.name} cannot be loaded ({failure[-1]})")
        target = folder / f"{name}-{_sha256(made)}.so"
        _sync(made)
        made.replace(target)
        with contextlib.suppress(OSError):  # not every file system can
            _sync(folder)
    return ctypes.CDLL(str(target))


def _compile(compiler: list[str], target: Path) -> None:
    for native in NATIVE:
        failure = _run([*compiler, *FLAGS, native, str(SOURCE), "-o", str(target)], target.parent)
        if failure is None:
            if target.is_file():
                return
            raise OSError(f"{shlex.join(compiler)} ends well but writes no library")
        if not any(native.partition("=")[0] in line for line in failure):  # it was not for the flag's sake
            break
    reason = next((line for line in failure if "error" in line), failure[0])
    raise OSError(f"{shlex.join(compiler)} cannot compile {SOURCE.name} ({reason})")


def _run(command: list[str], folder: Path) -> list[str] | None:
    """None, or the lines that a command that fails says. What it leaves behind on its way is in ``folder``.

    Raises OSError when it cannot be started, and SubprocessError when it takes longer than TIMEOUT.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except BaseException as error:  # Ctrl-C too
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            if isinstance(error, subprocess.TimeoutExpired):
                raise subprocess.SubprocessError(f"{shlex.join(command[:1])} was not done after {TIMEOUT} s") from None
            raise
    if process.returncode == 0:
        return None
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    return [line for line in lines if line] or [f"exit status {process.returncode}"]


def _compiler() -> list[str]:
    """The words of the command: what CXX asks for, else the first compiler that there is."""
    given = os.environ.get("CXX", "").strip()
    try:
        words = [given] if shutil.which(given) else shlex.split(given)  # a path may have spaces
    except ValueError as error:
        raise ValueError(f"CXX={given} is no command ({error})") from None
    programs, arguments = (words[:1], words[1:]) if words else (["g++", "c++", "clang++"], [])
    for program in programs:
        if found := shutil.which(program):
            return [found, *arguments]
    raise FileNotFoundError(f"there is no C++ compiler ({', '.join(programs)})")


def _name(compiler: list[str]) -> str:
    """Of the library, less its own hash: all that decides what it is."""
    programs = [Path(found).resolve() for word in compiler if (found := shutil.which(word))]  # ccache g++: both
    versions = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs]
    content = "\n".join([*compiler, *versions, *FLAGS, *NATIVE, _cpu()])
    digest = hashlib.sha256(SOURCE.read_bytes() + content.encode("utf-8", "surrogateescape"))
    return f"fused-{digest.hexdigest()[:16]}"


def _cpu() -> str:
    """What the compiler's "native" depends on."""
    names = ("flags", "Features", "vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(names)})])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
