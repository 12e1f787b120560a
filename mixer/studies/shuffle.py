"""Fashion-MNIST with the patches, or the pixels, of all images shuffled in the same way.

    python -m mixer.studies.shuffle FOLDER      writes FOLDER/shuffled-patches and FOLDER/shuffled-pixels

Both have Fashion-MNIST's layout: ``python -m mixer --data FOLDER/shuffled-patches`` trains on one.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mixer import data as fashion_mnist
from mixer.data import TENSORS, Data, DataError, idx_file
from mixer.download import SHA256
from mixer.system.files import write_whole

SIDES = {"shuffled-patches": 4, "shuffled-pixels": 1}  # of the squares that are moved as a whole


def order(count: int) -> Tensor:
    """For each of ``count`` positions, the index of the square that moves there, int64; a fixed permutation."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def shuffle_squares(images: Tensor, side: int) -> Tensor:
    """Cut images (N, H, W) into squares of ``side`` pixels and rearrange these in ``order``. Raises ValueError."""
    count, height, width = images.shape
    if height % side or width % side:
        raise ValueError(f"squares of {side}×{side} do not tile an image of {height}×{width}")
    rows, columns = height // side, width // side
    squares = images.view(count, rows, side, columns, side).transpose(2, 3).flatten(1, 2)
    squares = squares[:, order(rows * columns).to(images.device)]
    return squares.view(count, rows, columns, side, side).transpose(2, 3).reshape(images.shape)


def write(data: Data, folder: Path) -> None:
    """Write ``data`` in the format of ``data.load_folder``. Raises OSError."""
    for name, field in zip(SHA256, TENSORS, strict=True):
        write_whole(folder / name, idx_file(getattr(data, field)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.studies.shuffle", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder for the two data sets, 50 MB each")
    try:
        folder, data = parser.parse_args(arguments).folder, fashion_mnist.load()
        for name, side in SIDES.items():
            train, test = (shuffle_squares(images, side) for images in (data.train_images, data.test_images))
            write(replace(data, train_images=train, test_images=test), folder / name)
            print(f"{folder / name} is written.")
    except (DataError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
