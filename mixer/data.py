"""Fashion-MNIST as tensors on the device.

A batch is an index into them, normalised where it is used, so there are no loader workers and no copies.

The four files are looked for in this order:
  1. the data folder (``MIXER_DATA``, else ``data/``), in torchvision's layout ``FashionMNIST/raw/``;
  2. Debian's and Ubuntu's package ``dataset-fashion-mnist``, where it is installed;
  3. torchvision's download;
  4. that package again, fetched with ``apt-get download`` and unpacked without being installed.
Wherever they come from, they are checked by SHA-256 as uncompressed and end up in the data folder.

    python -m mixer.data        puts the data set into the data folder
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import FashionMNIST

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = tuple(FashionMNIST.classes)
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale of 0 to 1

NEEDED_BYTES = 200_000_000  # for the data set, packed and unpacked, while it is being fetched

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"


class DataError(RuntimeError):
    """The data set could not be had; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Data:
    """Images (N, 28, 28) as uint8 and labels (N,) as int64: 60,000 for training, 10,000 for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(device: torch.device | str = "cpu", limit: int | None = None) -> Data:
    """The data set on ``device``; ``limit`` keeps only the first training images. Raises DataError."""
    folder = prepare()
    train, test = (FashionMNIST(folder, train=train) for train in (True, False))
    if limit is not None and limit > len(train):
        raise ValueError(f"limit is {limit}, but there are only {len(train)} training images")
    return Data(
        train.data[:limit].to(device),
        train.targets[:limit].to(device),
        test.data.to(device),
        test.targets.to(device),
    )


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 28, 28) from 0 to 255 -> float32 (B, 1, 28, 28) of mean 0 and variance 1 over the training set."""
    scale, offset = 1 / (255 * PIXEL_STD), -PIXEL_MEAN / PIXEL_STD
    return images.unsqueeze(1).to(torch.float32).mul_(scale).add_(offset)


def data_folder() -> Path:
    """``MIXER_DATA``, else ``data/`` at the top of the project."""
    return Path(os.environ.get("MIXER_DATA") or Path(__file__).parent.parent / "data")


def prepare() -> Path:
    """Make sure that the data folder holds the data set, undamaged, and return the folder. Raises DataError."""
    raw = data_folder() / "FashionMNIST" / "raw"
    if any((raw / name).exists() for name in SHA256):
        damaged = _damaged(raw)
        if damaged and all((raw / name).exists() for name in SHA256):
            raise DataError(f"{raw / damaged[0]} is damaged: delete it and run `make data`.")
    else:
        damaged = list(SHA256)
    if damaged:
        _fetch(raw)
    return data_folder()


def _fetch(raw: Path) -> None:
    """Fill ``raw`` from the first source that has the data set, each file whole or not at all."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(raw.parent / ".lock"):
            if not _damaged(raw):  # another process was faster
                return
            for leftover in raw.glob(".incoming-*"):  # of a process that was killed
                shutil.rmtree(leftover)
            if shutil.disk_usage(raw).free < NEEDED_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryDirectory(dir=raw, prefix=".incoming-") as folder:
                _from_first_source(Path(folder))
                for name in SHA256:
                    (Path(folder) / name).replace(raw / name)
    except OSError as error:
        raise DataError(
            f"The data set cannot be written to {raw} ({error.strerror or error}): make room there, or set "
            "MIXER_DATA to a folder that can be written."
        ) from error


def _from_first_source(incoming: Path) -> None:
    reasons = []
    sources: dict[str, Callable[[Path], None]] = {
        "the installed package": lambda folder: _gunzip_all(DEBIAN_FOLDER, folder),
        "torchvision's download": _from_torchvision,
        "apt-get download": _from_apt,
    }
    for source, fetch in sources.items():
        try:
            fetch(incoming)
        except _NotThere as reason:
            reasons.append(f"{source}: {reason}")
            continue
        damaged = _damaged(incoming)
        if not damaged:
            return
        reasons.append(f"{source}: {damaged[0]} is damaged")
    raise DataError(
        f"Fashion-MNIST could not be found ({'; '.join(reasons)}): connect to the internet, or install the "
        f"package {DEBIAN_PACKAGE}, or put its four files into {incoming.parent}, then run `make data`."
    )


class _NotThere(Exception):
    """A source does not have the data set; why."""


def _gunzip_all(source: Path, folder: Path) -> None:
    for name in SHA256:
        packed = source / f"{name}.gz"
        if not packed.exists():
            raise _NotThere("not installed")
        try:
            with gzip.open(packed) as content, (folder / name).open("wb") as unpacked:
                shutil.copyfileobj(content, unpacked)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise _NotThere(f"{packed} is damaged, install the package again") from None


def _from_torchvision(folder: Path) -> None:
    try:
        with _socket_timeout(20), contextlib.redirect_stdout(sys.stderr):
            FashionMNIST(folder, download=True)
    except (OSError, RuntimeError) as error:  # a full disk is an OSError with a number; URLError has none
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, TimeoutError):
            raise
        raise _NotThere("no connection") from None
    for name in SHA256:
        (folder / "FashionMNIST" / "raw" / name).replace(folder / name)


def _from_apt(folder: Path) -> None:
    if not shutil.which("apt-get"):
        raise _NotThere("no apt on this system")
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", DEBIAN_PACKAGE]
    if _run(download, folder) != 0 and (_run(["apt-get", "update", "-qq"], folder), _run(download, folder))[1]:
        raise _NotThere("no connection, or the package is not in its lists")
    for package in folder.glob(f"{DEBIAN_PACKAGE}*.deb"):
        if _run(["dpkg-deb", "-x", str(package), str(folder)], folder) != 0:
            raise _NotThere("the package could not be unpacked")
    _gunzip_all(folder / DEBIAN_FOLDER.relative_to("/"), folder)


def _run(command: list[str], folder: Path) -> int:
    return subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _damaged(folder: Path) -> list[str]:
    """The names of the files in ``folder`` that are not, bit for bit, those of the data set."""
    return [name for name, sha256 in SHA256.items() if _sha256(folder / name) != sha256]


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def main() -> None:
    try:
        print(f"Fashion-MNIST is in {prepare()}")
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
