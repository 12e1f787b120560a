"""Fashion-MNIST's four IDX files in torchvision's layout, unpacked or as ``.gz``, checked against their SHA-256.

Missing files come from Debian's package ``dataset-fashion-mnist`` if it is installed, else from torchvision's mirror,
else from that package through ``apt-get download``. No data file is ever overwritten or deleted.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from mixer.system.files import IN_CHECKOUT, PROJECT, expand, locked

SHA256 = {  # of the unpacked files, in the order of Data's tensors
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
APT_GET = "apt-get download -qq -o APT::Sandbox::User=root dataset-fashion-mnist"
APT = f"{APT_GET} || {{ apt-get update -qq; {APT_GET}; }} && dpkg-deb -x dataset-fashion-mnist*.deb ."
REPLY_TIMEOUT = 20.0  # seconds without a byte


class DataError(RuntimeError):
    """The data set cannot be used; the message says in one sentence what to do."""


def data_folder() -> Path:
    """Return ``MIXER_DATA``, relative to PROJECT; else ``data`` in a checkout, or the user's. Raises DataError."""
    place = os.environ.get("MIXER_DATA") or ("data" if IN_CHECKOUT else _users_folder())
    return absolute(place if place.startswith("~") else PROJECT / place)


def _users_folder() -> str:
    """Return the system's usual folder for this user's data."""
    usual = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Application Support")}
    variable, default = usual.get(sys.platform, ("XDG_DATA_HOME", "~/.local/share"))
    base = os.environ.get(variable, "")
    return f"{base if Path(base).is_absolute() else default}/mixer"


def prepare() -> Path:
    """Add the missing files to the data folder and return the folder. Raises DataError."""
    folder = data_folder()
    raw = folder / "FashionMNIST" / "raw"
    try:
        if _missing(raw):
            raw.mkdir(parents=True, exist_ok=True)
            with locked(raw.parent / ".lock"):
                _complete(raw)
    except OSError as error:
        problem = f"Fashion-MNIST cannot be written to {raw} ({error.strerror or error})"
        raise DataError(f"{problem}: set MIXER_DATA to a writable folder with 200 MB of free space.") from None
    return folder


def _missing(raw: Path) -> list[str]:
    """Return the names of the files missing from ``raw``. Raises DataError if a file is not Fashion-MNIST's."""
    missing = [name for name in SHA256 if not any(os.path.lexists(raw / (name + end)) for end in ("", ".gz"))]
    for name, digest in SHA256.items():
        if name not in missing and sha256_of(content_of(raw / name)) != digest:
            advice = "move it away, or set MIXER_DATA to another folder, then run again"
            raise DataError(f"{raw / name} is not Fashion-MNIST's file of that name: {advice}.")
    return missing


def _complete(raw: Path) -> None:
    for leftover in raw.glob(".incoming-*"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    if missing := _missing(raw):
        with tempfile.TemporaryDirectory(dir=raw, prefix=".incoming-", ignore_cleanup_errors=True) as incoming:
            source = _download(Path(incoming), raw) if _missing(DEBIAN_FOLDER) else DEBIAN_FOLDER
            _missing(source)
            for name in missing:
                Path(incoming, name).write_bytes(content_of(source / name))
                if not os.path.lexists(raw / name):  # nothing has been put there meanwhile
                    Path(incoming, name).replace(raw / name)
        _missing(raw)


def _download(incoming: Path, raw: Path) -> Path:
    """Download with torchvision, else with apt, updating its lists if needed; return the folder. Raises DataError."""
    from torchvision.datasets import FashionMNIST  # here, since it is slow to import

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(REPLY_TIMEOUT)  # torchvision would wait for ever
    try:
        with Path(os.devnull).open("w") as silence, contextlib.redirect_stderr(silence):
            FashionMNIST(incoming, download=True)
        return incoming / "FashionMNIST" / "raw"
    except Exception as error:  # network, HTTP, gzip and torchvision each raise their own
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
    finally:
        socket.setdefaulttimeout(before)
    apt = subprocess.run(APT, shell=True, cwd=incoming, stdin=subprocess.DEVNULL, capture_output=True)
    if apt.returncode == 0:
        return incoming / DEBIAN_FOLDER.relative_to("/")
    reason += "; " + apt.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    advice = f"connect to the internet, or put its four files, unpacked or as .gz, into {raw}"
    raise DataError(f"Fashion-MNIST could not be downloaded ({reason}): {advice}, then run again.")


def content_of(path: Path) -> bytes:
    """Read a file, or unpack its ``.gz`` if only that is there. Raises DataError."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        if os.path.lexists(packed) and not os.path.lexists(path):
            return gzip.decompress(packed.read_bytes())
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): put a sound copy there, or use another folder.") from None


def absolute(path: Path | str) -> Path:
    """Expand the path of a data set. Raises DataError."""
    try:
        return expand(path)
    except OSError as error:
        raise DataError(str(error)) from None


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
