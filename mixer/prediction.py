"""Predictions of a trained model: logits of a data set, classes of a picture of one's own.

from mixer import classify
classify("shoe.jpg")            class -> probability, the likeliest first
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mixer.data import CLASSES, PIXEL_MEAN, PIXEL_STD, normalise
from mixer.kernels.acceleration import choose
from mixer.model import MlpMixer, count_patches
from mixer.system.device import autocast, threads_after_fork
from mixer.system.files import SHIPPED, expand

EVAL_BATCH = 1000  # images at a time, which keeps the eager model's hidden layer near 100 MB
WEIGHTS = SHIPPED / "best.safetensors"
_FASHION_MNIST = {"data": "Fashion-MNIST", "image": (28, 28), "pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
_WITHOUT_TRACE = ("skip_connections", "gelu")  # in a model's tensors


def predict(
    model: nn.Module,
    images: Tensor,
    precision: str = "float32",
    mean: float | None = None,
    std: float | None = None,
) -> Iterator[Tensor]:
    """The model's logits (up to EVAL_BATCH, num_classes) at a time, for uint8 images (N, H, W).

    They are float32, or float64 of a model in float64, which answers the same on every processor. ``mean`` and ``std``
    of the pixels: Fashion-MNIST's when not given.
    """
    statistics = {} if mean is None else {"mean": mean, "std": std}
    dtype = next(model.parameters()).dtype
    model.eval()
    forward = model
    if images.device.type == "cpu":  # what is recorded on CUDA is for training
        with autocast(images.device, precision):
            forward = choose(model, normalise(images[:1], **statistics).to(dtype)).forward
    for batch in images.split(EVAL_BATCH):
        with torch.inference_mode(), autocast(images.device, precision):
            logits = forward(normalise(batch, **statistics).to(dtype))
        yield logits  # outside, since a generator's contexts would hold for its caller too


def classify(picture: Path | str | Image.Image | np.ndarray, weights: Path | str = WEIGHTS) -> pd.Series:
    """Class -> probability, the likeliest first.

    picture: a file, a PIL image or an array (H, W) or (H, W, colours); of any size, see :func:`prepare`.
    weights: a safetensors file of an ``MlpMixer`` of any sizes. Where it was trained on another data set than
    Fashion-MNIST, classes are numbers.

    Raises ValueError, which says in one sentence what is wrong with either.
    """
    threads_after_fork()
    with torch.inference_mode():
        model, origin = load_with_origin(weights)
        of_clothing = origin["data"].startswith("Fashion-MNIST")
        image = torch.from_numpy(prepare(picture, origin["image"], invert=of_clothing))
        inputs = normalise(image[None], origin["pixel_mean"], origin["pixel_std"])
        probabilities = model(inputs).softmax(dim=1)[0].numpy()
    names = CLASSES if of_clothing and model.num_classes == len(CLASSES) else range(model.num_classes)
    return pd.Series(probabilities, index=names, name="probability").sort_values(ascending=False, kind="stable")


def prepare(
    picture: Path | str | Image.Image | np.ndarray, size: tuple[int, int] = (28, 28), invert: bool = True
) -> np.ndarray:
    """A picture as the data set has them: grey, bright on dark, centred in a frame, (H, W) uint8 of ``size``.

    What is transparent becomes white. With ``invert`` a picture whose border is bright, by its median, is taken to be
    dark on light and inverted; not every data set is bright on dark. A picture that is as the data set's already comes
    out as it went in. Raises ValueError.
    """
    grey = _grey(_array(picture) if isinstance(picture, np.ndarray) else _open(picture))
    border = np.median(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]]))
    if invert and border > 127:
        grey, border = 255 - grey, 255 - border
    height, width = grey.shape
    scale = max(height / size[0], width / size[1])
    frame = Image.new("L", (max(width, round(scale * size[1])), max(height, round(scale * size[0]))), int(border))
    frame.paste(Image.fromarray(grey), ((frame.width - width) // 2, (frame.height - height) // 2))
    return np.array(frame.resize(size[::-1], Image.Resampling.LANCZOS))


def load_model(weights: Path | str = WEIGHTS) -> MlpMixer:
    """The trained model, ready to predict, with the sizes that the file's tensors have. Raises ValueError."""
    return load_with_origin(weights)[0]


def load_with_origin(weights: Path | str) -> tuple[MlpMixer, dict[str, Any]]:
    """The model, and what the file says of its training.

    Of that, what a prediction needs is always there: of the images their data set's name (data), height and width
    (image), and pixels' mean and standard deviation (pixel_mean, pixel_std). Raises ValueError.
    """
    try:
        with safe_open(expand(weights), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            origin = _FASHION_MNIST | json.loads((file.metadata() or {}).get("mixer", "{}"))
        channels, _, *patch_size = state["stem.weight"].shape
        hidden, patches = state["blocks.0.patches_in.weight"].shape
        model = MlpMixer(
            num_classes=len(state["head.bias"]),
            num_blocks=len([name for name in state if name.endswith("patches_in.weight")]),
            patch_size=tuple(patch_size),
            num_patches=patches,
            num_channels=channels,
            patches_mlp_dim=hidden,
            channels_mlp_dim=len(state["blocks.0.channels_in.weight"]),
            **{name: value for name, value in origin.get("config", {}).items() if name in _WITHOUT_TRACE},
        )
        model.load_state_dict(state)
        origin |= {"data": str(origin["data"]), "image": tuple(origin["image"])}
        origin |= {name: float(origin[name]) for name in ("pixel_mean", "pixel_std")}
        fits = count_patches(origin["image"], model.patch_size) == patches and origin["pixel_std"] > 0
        if not (fits and all(weight.isfinite().all() for weight in state.values())):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"There are no weights in {weights}: train a run, or give another file.") from None
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{weights} does not hold the weights of an MlpMixer: give another file.") from None
    return model.eval(), origin


def _open(picture: Path | str | Image.Image) -> Image.Image:
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(expand(picture))
        return ImageOps.exif_transpose(image)  # as it was held, which also reads all of it
    except FileNotFoundError:
        raise ValueError(f"There is no picture {picture}.") from None
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError, Image.DecompressionBombError):
        raise ValueError(f"{picture} is not a picture that can be read: give a PNG or JPEG file.") from None


def _array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_fits or array.size == 0 or array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise ValueError(
            f"An array of {array.dtype} and shape {array.shape} is not a picture: give finite numbers in the shape "
            "(height, width) or (height, width, 3)."
        )
    return Image.fromarray(_bytes(array))


def _grey(image: Image.Image) -> np.ndarray:
    if min(image.size) == 0:
        raise ValueError("The picture is empty.")
    if image.mode[0] in "IF":  # more than eight bits, which convert() would cut off
        return _bytes(np.array(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("L"))


def _bytes(values: np.ndarray) -> np.ndarray:
    """Any numbers as bytes: whole ones up to 255 as they are, others from 0 (or the least) to the largest."""
    if values.dtype.kind != "f" and values.min() >= 0 and values.max() <= 255 and values.dtype != bool:
        return values.astype(np.uint8)
    low, high = min(0.0, float(values.min())), float(values.max())
    return np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)
