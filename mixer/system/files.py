"""Files that are whole or not there, also when the disk fills up or the process is killed."""

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = getLogger("mixer")
_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE / "weights"  # of the coursework's best run, and of the recipe "modern"
IN_CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file() and (_PACKAGE.parent / "results").is_dir()
PROJECT = _PACKAGE.parent if IN_CHECKOUT else Path()  # an installed package works in the working directory


def expand(path: Path | str) -> Path:
    """An absolute path, with ``~`` for the home folder: for every path that a user gives. Raises OSError."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise OSError(f"{path} begins with a home folder that does not exist: give another path.") from None


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all. Raises OSError in one sentence."""
    incoming = _incoming(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with incoming.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        incoming.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room and run again" if full else "give another place"
        raise OSError(f"{path} cannot be written ({error.strerror or error}): {advice}.") from error
    finally:
        _discard(incoming)


def check_writable(path: Path) -> None:
    """Raise the OSError that ``write_whole`` would raise, before hours of training; a full disk is not noticed."""
    if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for, a device be replaced
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise OSError(f"{path} cannot be written, because it is {kind}: give another name.")
    incoming = _incoming(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        incoming.open("ab").close()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}): give another place.") from error
    finally:
        _discard(incoming)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Within it, no other process or thread holds this lock; gives False where one does and ``wait`` is false.

    The operating system's lock ends with its process, however that ends, and its file goes with it. Where the file
    system has no locks, as on some clusters, a log line says so and it goes on without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            yield False
            return
        with lock:
            yield True
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break  # else it was the lock of a process that has just finished
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            log.warning("%s has no file locks: do not work on it from two places at once.", path.parent)
            break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def seal(content: bytes | memoryview) -> bytes:
    """The content with its SHA-256 behind it."""
    return b"".join((content, hashlib.sha256(content).digest()))


def unseal(content: bytes) -> bytes:
    """The content of a sealed file. Raises ValueError where a bit of it has changed."""
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its checksum is wrong")
    return content


def _incoming(path: Path) -> Path:
    """One name a thread, so that two writers of the same file do not spoil it."""
    return path.with_name(f".{path.name}.{threading.get_native_id()}.incoming")


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
