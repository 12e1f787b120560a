"""Writing files completely or not at all, even if the disk fills up or the process is killed."""

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
SHIPPED = _PACKAGE / "weights"  # of the coursework's best run and of the recipe "modern"
IN_CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file() and (_PACKAGE.parent / "results").is_dir()
PROJECT = _PACKAGE.parent if IN_CHECKOUT else Path()  # an installed package works in the working directory


def expand(path: Path | str) -> Path:
    """Make a user's path absolute and expand ``~``. Raises OSError."""
    try:
        return Path(path).expanduser().absolute()
    except FileNotFoundError:
        raise OSError(f"{path} is relative to a working directory that was deleted: change to another one.") from None
    except RuntimeError:
        raise OSError(f"{path} begins with a home folder that does not exist: give another path.") from None


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file completely or not at all. Raises OSError in one sentence."""
    with _beside(path) as incoming:
        with incoming.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        incoming.replace(path)


def check_writable(path: Path) -> None:
    """Raise ``write_whole``'s OSError before hours of training; a full disk is not detected."""
    if os.path.lexists(path) and not path.is_file():  # a pipe would block, and a device would be replaced
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise OSError(f"{path} cannot be written, because it is {kind}: give another name.")
    with _beside(path) as incoming:
        incoming.touch()


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and remove it at the end. Raises OSError in one sentence.

    Each thread has its own, so that two writers of one file do not corrupt it.
    """
    incoming = path.with_name(f".{path.name}.{threading.get_native_id()}.incoming")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield incoming
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space and run again" if full else "give another path"
        raise OSError(f"{path} cannot be written ({error.strerror or error}): {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            incoming.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that excludes all other processes and threads; yields False if it is taken and ``wait`` is false.

    The operating system releases the lock when the process ends, however it ends; leaving the context removes the file.
    If the file system has no locks, as on some clusters, a log line says so and the code runs without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        try:
            held = filelock.FileLock(path).acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            yield False
            return
        with held:
            yield True
        return
    while True:  # as long as the lock's last holder has just removed the file
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue
            except FileNotFoundError:
                continue
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                log.warning("%s has no file locks: do not run two trainings in it at once.", path.parent)
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def seal(content: bytes | memoryview) -> bytes:
    """Append the content's SHA-256."""
    return b"".join((content, hashlib.sha256(content).digest()))


def unseal(content: bytes) -> bytes:
    """Return the content of a sealed file. Raises ValueError if a bit has changed."""
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its checksum is wrong")
    return content
