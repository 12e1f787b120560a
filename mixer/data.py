"""Fashion-MNIST, or a data set of your own in the same layout, as tensors on the device.

Images are indexed and normalised one batch at a time. ``python -m mixer.data`` downloads Fashion-MNIST.
"""

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from logging import getLogger
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixer.download import SHA256, DataError, absolute, content_of, prepare, sha256_of

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale from 0 to 1
_NAMES = {"FashionMNIST": "Fashion-MNIST"}  # torchvision's class and folder, by which classify() knows clothing
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
OTHER_TYPES = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}  # of IDX files
warnings.filterwarnings("ignore", "'mixer.data' found in sys.modules", RuntimeWarning)  # by ``python -m mixer.data``


@dataclass(frozen=True, eq=False)
class Data:
    """Training and test images (uint8) with their labels (N,) (int64 from 0 to 255).

    Images are (N, H, W), or (N, 3, H, W) in colour. ``pixel_mean`` and ``pixel_std``, for :func:`normalise`, are
    fractions of 255. By default they are computed from the training images, over all channels, to four decimals.
    ``num_classes`` is by default the largest label plus 1; a part of the data keeps that of the whole. Raises
    ValueError naming the field that does not fit.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    name: str = "data given by the caller"
    pixel_mean: float | None = None
    pixel_std: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for field, dtype, ndim in zip(TENSORS, 2 * [torch.uint8, torch.int64], 2 * [3, 1], strict=True):
            tensor = getattr(self, field)
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            in_colour = isinstance(tensor, Tensor) and tensor.shape[1:-2] == (3,)
            if not found.startswith(str(dtype)) or tensor.ndim - in_colour != ndim or tensor.numel() == 0:
                shape = "(N, H, W), or (N, 3, H, W) in colour," if ndim == 3 else "(N,)"
                raise ValueError(f"{field} must be {dtype} {shape} and not empty, not {found}")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if len(images) != len(labels):
                raise ValueError(f"{part}_labels has {len(labels)} labels for {len(images)} {part}_images")
            if labels.min() < 0 or labels.max() > 255:
                raise ValueError(f"{part}_labels must be from 0 to 255, not from {labels.min()} to {labels.max()}")
        train, test = tuple(self.train_images.shape[1:]), tuple(self.test_images.shape[1:])
        if train != test:
            raise ValueError(f"test_images must have the size of train_images, {train}, not {test}")
        least = 1 + max(int(self.train_labels.max()), int(self.test_labels.max()))
        count = least if self.num_classes is None else self.num_classes
        if not isinstance(count, Integral) or count < least:
            raise ValueError(f"num_classes is {count!r:.100}, but it has to be a whole number of at least {least}")
        object.__setattr__(self, "num_classes", int(count))
        object.__setattr__(self, "name", str(self.name))
        given = self.pixel_mean, self.pixel_std
        measured = _pixel_statistics(self.train_images) if any(value is None for value in given) else given
        for field, value, own in zip(("pixel_mean", "pixel_std"), given, measured, strict=True):
            try:
                number = float(own if value is None else value)
            except (TypeError, ValueError, RuntimeError):
                number = math.nan
            if not math.isfinite(number) or (field == "pixel_std" and number <= 0):
                kind = "a number above 0" if field == "pixel_std" else "a number"
                raise ValueError(f"{field} is {value!r:.100}, but it has to be {kind}")
            object.__setattr__(self, field, number)

    @classmethod
    def from_torchvision(cls, train: torch.utils.data.Dataset, test: torch.utils.data.Dataset) -> "Data":
        """Convert two torchvision datasets held in memory: MNIST, KMNIST, EMNIST, USPS, CIFAR-10, CIFAR-100 or SVHN.

        Colour images stay in colour; torchvision's ``rgb_to_grayscale(images)[:, 0]`` turns them grey. Labels index
        ``train.classes``, so EMNIST's letters are 1 to 26. Transforms are not applied. Raises ValueError for datasets
        read file by file (ImageFolder) and for subsets (Subset).
        """
        tensors, name = [], type(train).__name__
        if getattr(train, "transforms", None):
            warning = "The transforms of %s are not applied: augment with flip, shift, affine and erase of Config."
            getLogger("mixer").warning(warning, name)
        for part in (train, test):
            try:
                images = torch.as_tensor(part.data)
                labels = torch.as_tensor(part.targets if hasattr(part, "targets") else part.labels)
            except (AttributeError, TypeError, ValueError, RuntimeError):
                raise ValueError(f"{type(part).__name__} has no .data and .targets: pass its tensors to Data") from None
            if images.shape[3:] == (3,):  # as in CIFAR; in SVHN the channels come first
                images = images.movedim(3, 1).contiguous()
            tensors += [images, labels.long()]
        return cls(*tensors, name=_NAMES.get(name, name))

    @property
    def in_channels(self) -> int:
        """1, or 3 in colour."""
        return 1 if self.train_images.ndim == 3 else 3

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The SHA-256 of each tensor's IDX file; for all of Fashion-MNIST they equal ``SHA256``."""
        return {file: sha256_of(idx_file(getattr(self, name))) for file, name in zip(SHA256, TENSORS, strict=True)}

    def to(self, device: torch.device | str) -> "Data":
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def first(self, limit: int) -> "Data":
        """Keep the first ``limit`` training images, normalised as before. Raises ValueError if there are fewer."""
        count = len(self.train_images)
        if not 1 <= limit <= count:
            raise ValueError(f"limit is {limit}, but must be from 1 to {count}, the number of training images")
        if limit == count:
            return self
        images, labels = self.train_images[:limit], self.train_labels[:limit]
        return replace(self, train_images=images, train_labels=labels, name=f"{self.name}, first {limit}")


def load(device: torch.device | str = "cpu") -> Data:
    """Load Fashion-MNIST onto ``device``. Raises DataError."""
    return Data(*_read(prepare() / "FashionMNIST" / "raw"), "Fashion-MNIST", PIXEL_MEAN, PIXEL_STD).to(device)


def load_folder(folder: Path | str, device: torch.device | str = "cpu") -> Data:
    """Load a data set of your own: grey images of any size, up to 256 classes. Raises DataError.

    ``folder`` holds four IDX files of unsigned bytes, named as in ``SHA256``, unpacked or as ``.gz``. The data set
    takes the folder's name, or that of its parent if the folder is called ``raw``.
    """
    folder = absolute(folder)
    name = (folder.parent if folder.name == "raw" else folder).name
    try:
        return Data(*_read(folder), _NAMES.get(name, name)).to(device)
    except ValueError as error:
        raise DataError(f"The data set in {folder} cannot be used: {error}.") from None


def validation_split(data: Data, seed: int = 0) -> Data:
    """Replace the test images by one twelfth of each class's training images, drawn with ``seed`` and held out.

    In Fashion-MNIST, 55,000 images remain, in order, and 500 per class are held out. Raises ValueError if no image is.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = data.train_labels.cpu()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.where(labels == label)
        drawn = torch.randperm(len(members), generator=generator)[: round(len(members) / 12)]
        held_out[members[drawn]] = True
    if not held_out.any():
        most = labels.bincount().max()
        raise ValueError(f"the validation split is empty: each class needs at least 7 training images, not {most}")
    sides = [side.to(data.train_labels.device) for side in (~held_out, held_out)]
    parts = (tensor[side] for side in sides for tensor in (data.train_images, data.train_labels))
    whole = data.pixel_mean, data.pixel_std, data.num_classes
    return Data(*parts, f"{data.name}, validation split (seed {seed})", *whole)


def normalise(images: Tensor, mean: float = PIXEL_MEAN, std: float = PIXEL_STD) -> Tensor:
    """Map uint8 from 0 to 255 to float32 with mean 0 and variance 1 over the training set.

    Grey images (B, H, W) become (B, 1, H, W); colour images keep their shape (B, 3, H, W).
    """
    images = images.unsqueeze(1) if images.ndim == 3 else images
    return images.to(torch.float32).mul_(1 / (255 * std)).add_(-mean / std)


def idx_file(tensor: Tensor) -> bytes:
    """Encode in LeCun's IDX format: 0, 0, type 8 (unsigned bytes), number of dimensions, four bytes per size, data."""
    header = np.array([0x800 + tensor.ndim, *tensor.shape], ">u4").tobytes()
    return header + tensor.to("cpu", torch.uint8).numpy().tobytes()


def _read(folder: Path) -> Iterator[Tensor]:
    """Read the four tensors in Data's order. Raises DataError."""
    for name, dimensions in zip(SHA256, (3, 1, 3, 1), strict=True):
        content = content_of(folder / name)
        try:
            magic, *shape = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
            if magic != 0x800 + dimensions:
                raise ValueError
            array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        except ValueError:  # NumPy refuses sizes that do not fit the bytes
            problem = f"is not a complete IDX file of {dimensions}-D unsigned bytes: copy it again"
            if kind := OTHER_TYPES.get(int.from_bytes(content[:3])):
                problem = f"holds {kind}, but unsigned bytes (type 8) are needed: convert it"
            raise DataError(f"{folder / name} {problem}.") from None
        yield torch.tensor(array, dtype=torch.uint8 if dimensions == 3 else torch.int64)


def _pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation as fractions of 255, from integer counts, so that every device gives the same."""
    count = images.flatten().bincount(minlength=256).cpu().double()
    value = torch.arange(256).double() / 255
    mean = (count @ value) / count.sum()
    variance = (count @ (value - mean) ** 2) / count.sum()
    return round(float(mean), 4), round(float(variance.sqrt()), 4) or 1.0  # constant images are divided by 1


if __name__ == "__main__":
    try:
        print(f"Fashion-MNIST is in {prepare()}")
    except (DataError, KeyboardInterrupt) as error:
        sys.exit(str(error) or "Stopped; the same command starts again.")
