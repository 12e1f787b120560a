"""Fashion-MNIST, or a data set of one's own in the same layout, as tensors on the device.

A batch is an index into them, normalised where it is used, so there are no loader workers and no copies.

    python -m mixer.data        puts Fashion-MNIST into the data folder (see ``fetch.py``)
"""

import gzip
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from mixer.download import SHA256, DataError, absolute, content_of, prepare, sha256_of

CLASSES = tuple(FashionMNIST.classes)
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale of 0 to 1


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
        return {name: sha256_of(idx_file(tensor)) for name, tensor in zip(SHA256, tensors, strict=True)}

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


def load(device: torch.device | str = "cpu") -> Data:
    """Fashion-MNIST on ``device``. Raises DataError."""
    return Data(*_read(prepare() / "FashionMNIST" / "raw"), "Fashion-MNIST", PIXEL_MEAN, PIXEL_STD).to(device)


def load_folder(folder: Path | str, device: torch.device | str = "cpu") -> Data:
    """A data set of one's own on ``device``: Fashion-MNIST's layout, any size of image and up to 256 classes.

    ``folder`` holds four IDX files of unsigned bytes, named as in ``SHA256``, each as it is or packed as ``.gz``. The
    data set is called as the folder, or as the folder above where it is torchvision's ``raw``. Raises DataError.
    """
    folder = absolute(folder)
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


def idx_file(tensor: Tensor) -> bytes:
    """LeCun's format for unsigned bytes: 0, 0, type 8, number of dimensions, each size as four bytes, the bytes."""
    header = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
    return header + tensor.to("cpu", torch.uint8).numpy().tobytes()


def _read(folder: Path) -> Iterator[Tensor]:
    """The four tensors in Data's order. Raises DataError."""
    for name, dimensions in zip(SHA256, (3, 1, 3, 1), strict=True):
        plain, packed = folder / name, folder / f"{name}.gz"
        path = packed if os.path.lexists(packed) and not os.path.lexists(plain) else plain
        content = content_of(path)
        try:
            content = gzip.decompress(content) if path == packed else content
            shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
            array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
            if content[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError
        except (EOFError, OSError, ValueError, zlib.error):  # NumPy refuses sizes that do not fit the bytes
            raise DataError(f"{path} is not a whole IDX file of {dimensions}-D unsigned bytes: copy it anew.") from None
        yield torch.tensor(array, dtype=torch.uint8 if dimensions == 3 else torch.int64)


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
