"""Fashion-MNIST, or a data set of one's own in the same layout, as tensors on the device.

A batch is an index into them, normalised where it is used, so there are no loader workers and no copies.

Fashion-MNIST's four files are looked for in this order:
  1. the data folder (``MIXER_DATA``, else ``data/``), in torchvision's layout ``FashionMNIST/raw/``;
  2. Debian's and Ubuntu's package ``dataset-fashion-mnist``, where it is installed;
  3. the internet, where torchvision downloads it from;
  4. that package again, fetched with ``apt-get download`` and unpacked without being installed.
Wherever they come from, they are checked by SHA-256 as uncompressed and end up in the data folder. What is there
already is never overwritten or deleted, whatever it is.

    python -m mixer.data        puts Fashion-MNIST into the data folder
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

SHA256 = {  # of the IDX files as uncompressed, in the order of Data's tensors
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = tuple(FashionMNIST.classes)
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale of 0 to 1

NEEDED_BYTES = 200_000_000  # for the data set, packed and unpacked, while it is being fetched
REPLY_TIMEOUT = 20.0  # seconds without a byte
APT_TIMEOUT = 180.0  # seconds for one command

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"


class DataError(RuntimeError):
    """The data set could not be had; the message is one sentence that says what to do."""


@dataclass(frozen=True, eq=False)
class Data:
    """Images (N, H, W) as uint8 and their labels (N,) as int64 from 0 to 255, for training and for testing.

    ``pixel_mean`` and ``pixel_std`` are for :func:`normalise`, as fractions of 255; where they are not given they are
    those of the training images to four decimals, which for Fashion-MNIST are the constants that everybody uses.
    Raises ValueError, which names the field that does not fit.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str = "data given by the caller"
    pixel_mean: float | None = None
    pixel_std: float | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            _check(f"{part}_images", images, torch.uint8, "(N, H, W)")
            _check(f"{part}_labels", labels, torch.int64, "(N,)")
            if len(images) != len(labels):
                raise ValueError(f"{part}_labels has {len(labels)} labels for {len(images)} {part}_images")
            if labels.min() < 0 or labels.max() > 255:
                raise ValueError(f"{part}_labels must be from 0 to 255, not from {labels.min()} to {labels.max()}")
        train, test = tuple(self.train_images.shape[1:]), tuple(self.test_images.shape[1:])
        if train != test:
            raise ValueError(f"test_images must be of the size of train_images, {train}, not {test}")
        if self.pixel_mean is None or self.pixel_std is None:
            mean, std = _pixel_statistics(self.train_images)
            object.__setattr__(self, "pixel_mean", mean)
            object.__setattr__(self, "pixel_std", std)

    @property
    def num_classes(self) -> int:
        """The largest label of both parts, plus 1."""
        return 1 + max(int(self.train_labels.max()), int(self.test_labels.max()))

    @cached_property
    def sha256(self) -> dict[str, str]:
        """For each tensor the SHA-256 of its IDX file: for the whole of Fashion-MNIST these are the files' own."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return {name: _sha256(_idx_file(tensor)) for name, tensor in zip(SHA256, tensors, strict=True)}

    def to(self, device: torch.device | str) -> "Data":
        """The same data on ``device``."""
        tensors = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def first(self, limit: int) -> "Data":
        """Only the first ``limit`` training images, normalised like all of them; ValueError where there are fewer."""
        count = len(self.train_images)
        if not 1 <= limit <= count:
            raise ValueError(f"limit is {limit}, but must be from 1 to {count}, the number of training images")
        if limit == count:
            return self
        images, labels = self.train_images[:limit], self.train_labels[:limit]
        return replace(self, train_images=images, train_labels=labels, name=f"{self.name}, first {limit}")


def load(device: torch.device | str = "cpu", limit: int | None = None) -> Data:
    """Fashion-MNIST on ``device``; ``limit`` keeps only the first training images. Raises DataError, ValueError."""
    data = Data(*_read(prepare() / "FashionMNIST" / "raw"), "Fashion-MNIST", PIXEL_MEAN, PIXEL_STD)
    return (data if limit is None else data.first(limit)).to(device)


def load_folder(folder: Path | str, device: torch.device | str = "cpu") -> Data:
    """A data set of one's own on ``device``: Fashion-MNIST's layout, any size of image and up to 256 classes.

    ``folder`` holds four IDX files of unsigned bytes, named as in ``SHA256``, each as it is or packed as ``.gz``. The
    data set is called as the folder, or as the folder above where it is torchvision's ``raw``. Raises DataError.
    """
    folder = _absolute(folder)
    try:
        return Data(*_read(folder), (folder.parent if folder.name == "raw" else folder).name).to(device)
    except ValueError as error:
        raise DataError(f"The data set in {folder} cannot be used: {error}.") from None


def validation_split(data: Data, seed: int = 0) -> Data:
    """One twelfth of the training images of each class is held out, drawn by ``seed``, and stands for the test images.

    Of Fashion-MNIST these are 500 a class: 55,000 images remain for training, in their order, and 5,000 validate. The
    test images are not in it, so nothing can be chosen by them.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_labels.cpu()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.where(labels == label)
        drawn = torch.randperm(len(members), generator=generator)[: round(len(members) / 12)]
        held_out[members[drawn]] = True
    held_out = held_out.to(data.train_labels.device)
    return replace(
        data,
        train_images=data.train_images[~held_out],
        train_labels=data.train_labels[~held_out],
        test_images=data.train_images[held_out],
        test_labels=data.train_labels[held_out],
        name=f"{data.name}, validation split (seed {seed})",
    )


def normalise(images: Tensor, mean: float = PIXEL_MEAN, std: float = PIXEL_STD) -> Tensor:
    """uint8 (B, H, W) from 0 to 255 -> float32 (B, 1, H, W) of mean 0 and variance 1 over the training set."""
    scale, offset = 1 / (255 * std), -mean / std
    return images.unsqueeze(1).to(torch.float32).mul_(scale).add_(offset)


def _check(field: str, tensor: Tensor, dtype: torch.dtype, shape: str) -> None:
    found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
    if not found.startswith(str(dtype)) or tensor.ndim != shape.count(" ") + 1 or tensor.numel() == 0:
        raise ValueError(f"{field} must be {dtype} {shape} and not empty, not {found}")


def _pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation as fractions of 255, from whole numbers, so the same on every device."""
    count = images.flatten().bincount(minlength=256).cpu().double()
    value = torch.arange(256).double() / 255
    mean = (count @ value) / count.sum()
    variance = (count @ (value - mean) ** 2) / count.sum()
    return round(float(mean), 4), round(float(variance.sqrt()), 4) or 1.0  # images of one grey are divided by 1


def _idx_file(tensor: Tensor) -> bytes:
    """LeCun's format for unsigned bytes: 0, 0, type 8, number of dimensions, each size as four bytes, the bytes."""
    header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
    return header + tensor.to("cpu", torch.uint8).numpy().tobytes()


def _read(folder: Path) -> Iterator[Tensor]:
    """The four tensors in Data's order. Raises DataError."""
    for name, dimensions in zip(SHA256, (3, 1, 3, 1), strict=True):
        plain, packed = folder / name, folder / f"{name}.gz"
        path = packed if os.path.lexists(packed) and not os.path.lexists(plain) else plain
        content = _content(path)
        try:
            content = gzip.decompress(content) if path == packed else content
            shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
            array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
            if content[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError
        except (EOFError, OSError, ValueError, zlib.error):  # NumPy refuses sizes that do not fit the bytes
            raise DataError(f"{path} is not a whole IDX file of {dimensions}-D unsigned bytes: copy it anew.") from None
        yield torch.tensor(array, dtype=torch.uint8 if dimensions == 3 else torch.int64)


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path} is not a file: move it away, or use another folder.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): put it right, or use another folder.") from None


def _absolute(path: Path | str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError):
        raise DataError(f"{path} begins in a home or a folder that does not exist: use another folder.") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def data_folder() -> Path:
    """``MIXER_DATA``, else ``data/`` at the top of the project. Raises DataError."""
    return _absolute(os.environ.get("MIXER_DATA") or Path(__file__).parent.parent / "data")


def prepare() -> Path:
    """Make sure that the data folder holds Fashion-MNIST, bit for bit, and return the folder. Raises DataError."""
    folder = data_folder()
    raw = folder / "FashionMNIST" / "raw"
    if _missing(raw):
        try:
            _fetch(raw)
        except OSError as error:
            raise DataError(
                f"Fashion-MNIST cannot be written to {raw} ({error.strerror or error}): set MIXER_DATA to a folder "
                f"that can be written and has {NEEDED_BYTES / 1e6:.0f} MB of room."
            ) from error
    return folder


def _missing(raw: Path) -> list[str]:
    """The names that are free in ``raw``. Raises DataError where one is taken by anything but Fashion-MNIST's file."""
    there = [name for name in SHA256 if os.path.lexists(raw / name)]
    for name in there:
        if _sha256(_content(raw / name)) != SHA256[name]:
            raise DataError(
                f"{raw / name} is another file than Fashion-MNIST's of that name: move it away, or set MIXER_DATA to "
                "another folder, then run `make data` (a data set of your own is read by mixer.data.load_folder)."
            )
    return [name for name in SHA256 if name not in there]


def _fetch(raw: Path) -> None:
    """Put the files that are missing into ``raw``, all from one source, each whole or not at all.

    Raises OSError where ``raw`` cannot be written, and only there.
    """
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.parent / ".lock"):
        for leftover in raw.glob(".incoming-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        missing = _missing(raw)  # none where another process was faster
        if missing and shutil.disk_usage(raw).free < NEEDED_BYTES:
            raise OSError("the disk is full")
        with tempfile.TemporaryDirectory(dir=raw, prefix=".incoming-") as incoming:
            if missing:
                _from_first_source(Path(incoming), missing)
            for name in missing:
                if not os.path.lexists(raw / name):  # what somebody put there meanwhile stays
                    (Path(incoming) / name).replace(raw / name)
    _missing(raw)


def _from_first_source(incoming: Path, names: list[str]) -> None:
    sources = {
        str(DEBIAN_FOLDER): DEBIAN_FOLDER.absolute().as_uri(),
        **{f"torchvision's mirror {urlsplit(url).netloc}": url.rstrip("/") for url in FashionMNIST.mirrors},
        "apt-get download": None,
    }
    reasons = []
    for source, url in sources.items():
        try:
            url = url or _from_apt(incoming).as_uri()
            for name in names:
                content = _download(f"{url}/{name}.gz", name)
                with (incoming / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            return
        except _NotThere as reason:
            reasons.append(f"{source}: {reason}")
    raise DataError(
        f"Fashion-MNIST could not be found ({'; '.join(reasons)}): connect to the internet, or install the "
        f"package {DEBIAN_PACKAGE}, or put its four files into {incoming.parent}, then run `make data`."
    )


class _NotThere(Exception):
    """A source does not have the data set; why."""


def _download(url: str, name: str) -> bytes:
    """The file at ``url``, unpacked and checked; _NotThere for whatever may befall it.

    Not through ``FashionMNIST(download=True)``: that writes while it reads, so that a fault of the network cannot be
    told from one of the disk, gives up at the first mirror that resets, and waits for ever.
    """
    try:
        with urllib.request.urlopen(url, timeout=REPLY_TIMEOUT) as reply:
            size = int(reply.headers["Content-Length"] or 0) or None
            with tqdm.wrapattr(reply, "read", total=size, desc=name, leave=False, disable=None) as body:
                packed = b"".join(iter(lambda: body.read(1 << 16), b""))
        if size is not None and len(packed) < size:
            raise EOFError
        content = gzip.decompress(packed)
        if _sha256(content) != SHA256[name]:
            raise gzip.BadGzipFile
    except (EOFError, http.client.IncompleteRead):
        raise _NotThere(f"{name}.gz was cut short") from None
    except (gzip.BadGzipFile, zlib.error):
        raise _NotThere(f"{name}.gz is damaged") from None
    except urllib.error.HTTPError as error:
        raise _NotThere(f"the server answered {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(getattr(error, "reason", None), OSError) else error
        words = str(cause) if isinstance(cause, OSError) else f"a broken address or reply ({type(cause).__name__})"
        raise _NotThere(getattr(cause, "strerror", None) or words) from None
    return content


def _from_apt(folder: Path) -> Path:
    """Fetch Debian's package and unpack it into ``folder``; where its files are."""
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", DEBIAN_PACKAGE]
    try:
        _run(download, folder)
    except _NotThere:  # perhaps its lists are old
        with contextlib.suppress(_NotThere):
            _run(["apt-get", "update", "-qq"], folder)
        _run(download, folder)
    for package in folder.glob(f"{DEBIAN_PACKAGE}*.deb"):
        _run(["dpkg-deb", "-x", package.name, "."], folder)
    return folder / DEBIAN_FOLDER.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    """Run it in ``folder``; _NotThere with its own last words where it fails."""
    with tempfile.TemporaryFile(dir=folder) as said:  # a pipe would be held open by the children of one that hangs
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
        try:
            status = subprocess.run(command, cwd=folder, timeout=APT_TIMEOUT, **quiet).returncode
        except subprocess.TimeoutExpired:
            raise _NotThere(f"{command[0]} did not end within {APT_TIMEOUT:g} seconds") from None
        except OSError as error:
            raise _NotThere(f"{command[0]} cannot be run ({error.strerror})") from None
        said.seek(0)
        words = said.read().decode("utf-8", "replace").strip() or f"exit status {status}"
    if status != 0:
        raise _NotThere(f"{command[0]} failed, {words.splitlines()[-1].rstrip('.')}")


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be in any encoding
    try:
        print(f"Fashion-MNIST is in {prepare()}")
    except DataError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; `make data` starts again.")


if __name__ == "__main__":
    main()
