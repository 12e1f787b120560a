"""Compiles ``fused.cpp`` on first use and caches the library in ``$XDG_CACHE_HOME/mixer``, else ``~/.cache/mixer``.

Its name is a hash of everything it depends on, so it never goes stale. Without a cache, each process builds its own.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from mixer.system import files

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")  # the first that the compiler supports
PROCESSOR = ("flags", "Features", "vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # for "native"
log = logging.getLogger("mixer")
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """Return the compiled ``fused.cpp``; if it cannot be built, None, and one log line with the reason."""
    with _lock:  # concurrent threads build it once
        return _library_or_none()


@functools.cache
def _library_or_none() -> ctypes.CDLL | None:
    try:
        return _library(_compiler())
    except (OSError, ValueError) as error:
        log.warning("The mixer's blocks run in eager PyTorch, which is several times slower: %s.", error)
        return None


def _library(compiler: list[str]) -> ctypes.CDLL:
    name = _name(compiler)
    with contextlib.suppress(OSError):  # not built yet, or damaged
        return ctypes.CDLL(str(_cache() / name))
    with tempfile.TemporaryDirectory(prefix="mixer-", ignore_cleanup_errors=True) as folder:
        made = Path(folder, name)
        _compile(compiler, made)
        with contextlib.suppress(OSError):  # read-only, full or mounted noexec
            files.write_whole(_cache() / name, made.read_bytes())
            return ctypes.CDLL(str(_cache() / name))
        return ctypes.CDLL(str(made))


def _cache() -> Path:
    """Folder of the libraries. Raises OSError if it cannot be made, or if others could replace the code in it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (base if base.is_absolute() else files.expand("~/.cache")) / "mixer"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and (cache.stat().st_uid not in (0, os.geteuid()) or cache.stat().st_mode & 0o022):
        raise PermissionError(f"others can write to {cache}")
    return cache


def _compiler() -> list[str]:
    """The compiler's command: CXX if set, else the first compiler found."""
    words = shlex.split(os.environ.get("CXX", ""))
    programs = words[:1] or ["g++", "c++", "clang++"]
    for found in filter(None, map(shutil.which, programs)):
        return [found, *words[1:]]
    raise FileNotFoundError(f"there is no C++ compiler ({', '.join(programs)})")


def _name(compiler: list[str]) -> str:
    programs = [Path(found).resolve() for found in map(shutil.which, compiler) if found]  # ccache and g++, say
    versions = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs]
    content = [*compiler, *versions, *FLAGS, *NATIVE, platform.machine()]
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(errors="replace") as lines:
        content += [line for line in itertools.takewhile(str.strip, lines) if line.startswith(PROCESSOR)]
    digest = hashlib.sha256(SOURCE.read_bytes() + os.fsencode("\n".join(content)))
    return f"{SOURCE.stem}-{digest.hexdigest()[:16]}.so"


def _compile(compiler: list[str], target: Path) -> None:
    for native in NATIVE:
        command = [*compiler, *FLAGS, native, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode == 0 or native.partition("=")[0] not in done.stderr:  # retry only if the flag is unknown
            break
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise OSError(f"{shlex.join(compiler)} cannot compile {SOURCE.name} ({reason})")
