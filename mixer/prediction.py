"""Predictions of a trained model: logits for a data set, and the class of a picture, ``classify("shoe.jpg")``."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import is_zipfile

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.func import functional_call

from mixer.data import CLASSES, PIXEL_MEAN, PIXEL_STD, normalise
from mixer.kernels.acceleration import choose
from mixer.model import MlpMixer, count_patches
from mixer.system.buffers import keep_large_buffers
from mixer.system.device import autocast, threads_after_fork
from mixer.system.files import SHIPPED, expand

EVAL_BATCH = 1000  # images per batch, which keeps the eager model's hidden layer near 100 MB
WEIGHTS = SHIPPED / "best.safetensors"
_FASHION_MNIST = {"data": "Fashion-MNIST", "image": (28, 28), "pixel_mean": PIXEL_MEAN, "pixel_std": PIXEL_STD}
WITHOUT_TRACE = ("skip_connections", "gelu")  # in a model's tensors
Picture = Path | str | bytes | BinaryIO | Image.Image | np.ndarray | Tensor


def predict(
    model: nn.Module, images: Tensor, precision: str = "float32", mean: float | None = None, std: float | None = None
) -> Iterator[Tensor]:
    """Yield the model's logits (at most EVAL_BATCH, num_classes) for uint8 images (N, H, W) or (N, 3, H, W).

    Logits are float32, or float64 from a float64 model, which gives the same answers on every processor. ``mean`` and
    ``std`` of the pixels default to Fashion-MNIST's.
    """
    statistics = {} if mean is None else {"mean": mean, "std": std}
    dtype = next(model.parameters()).dtype
    model.eval()
    forward = model
    if images.device.type == "cpu":  # CUDA graphs are for training only
        with autocast(images.device, precision):
            choice = choose(model, normalise(images[:1], **statistics).to(dtype))
        forward = choice.forward
        if choice.path == "eager":
            keep_large_buffers()
    for batch in images.split(EVAL_BATCH):
        with torch.inference_mode(), autocast(images.device, precision):
            logits = forward(normalise(batch, **statistics).to(dtype))
        yield logits  # outside, since a generator's contexts would apply to its caller too


def classify(picture: Picture, weights: Path | str = WEIGHTS, show: bool = False) -> pd.Series:
    """Return the probability of each class, most likely first. Raises ValueError in one sentence.

    picture: a file's name or bytes, an open file, a PIL image, or an array or tensor (H, W), (H, W, 3) or (3, H, W), of
    any size.
    weights: a safetensors file of an ``MlpMixer`` of any size. For Fashion-MNIST, the model sees the object that
    ``picture.prepare`` finds. For any other data set, classes are numbers and the model sees the whole picture, in
    colour if it was trained in colour.
    show: draw what the model sees. A log line warns if the picture is unlike the data set.
    """
    from mixer.picture import prepare  # here, since SciPy is slow to import

    threads_after_fork()
    with torch.inference_mode(), torch.device("cpu"):  # whatever the caller's default device
        model, origin = load_with_origin(weights)
        of_clothing, in_colour = origin["data"].startswith("Fashion-MNIST"), model.in_channels == 3
        image = prepare(open_picture(picture), origin["image"], of_clothing and not in_colour, in_colour)
        inputs = normalise(torch.from_numpy(image)[None], origin["pixel_mean"], origin["pixel_std"])
        probabilities = model(inputs.float()).softmax(dim=1)[0].numpy()
    names = CLASSES if of_clothing and model.num_classes == len(CLASSES) else range(model.num_classes)
    answer = pd.Series(probabilities, index=names, name="probability").sort_values(ascending=False, kind="stable")
    if show:
        import matplotlib.pyplot as plt  # here, since it is slow to import

        axes = plt.figure(figsize=(2, 2)).add_subplot(title=answer.index[0], xticks=[], yticks=[])
        axes.imshow(image.transpose(1, 2, 0) if in_colour else image, cmap="gray", vmin=0, vmax=255)
        plt.show()
    return answer


def load_model(weights: Path | str = WEIGHTS) -> MlpMixer:
    """Load a trained model, ready to predict; its sizes follow from the file's tensors. Raises ValueError."""
    return load_with_origin(weights)[0]


def load_with_origin(weights: Path | str) -> tuple[MlpMixer, dict[str, Any]]:
    """Load a model and the file's metadata about its training.

    The metadata always has what a prediction needs: the data set's name (data), the images' height and width (image),
    and the pixels' mean and standard deviation (pixel_mean, pixel_std). Raises ValueError.
    """
    if not isinstance(weights, str | Path):
        kind = type(weights).__name__
        raise ValueError(f"weights is of type {kind}, but it has to be a file, as train(weights=...) writes it.")
    try:
        with safe_open(expand(weights), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            origin = _FASHION_MNIST | json.loads((file.metadata() or {}).get("mixer", "{}"))
        channels, in_channels, *patch_size = state["stem.weight"].shape
        if not all(patch_size):
            raise ValueError
        hidden, patches = state["blocks.0.patches_in.weight"].shape
        model = MlpMixer(
            num_classes=len(state["head.bias"]),
            num_blocks=len([name for name in state if name.endswith("patches_in.weight")]),
            patch_size=tuple(patch_size),
            num_patches=patches,
            num_channels=channels,
            patches_mlp_dim=hidden,
            channels_mlp_dim=len(state["blocks.0.channels_in.weight"]),
            in_channels=in_channels,
            **{k: v for k, v in origin.get("settings", origin.get("config", {})).items() if k in WITHOUT_TRACE},
        )
        model.load_state_dict(state)
        model = model.float()  # PyTorch's default dtype may have been changed
        origin |= {"data": str(origin["data"]), "image": tuple(origin["image"])[-2:]}
        origin |= {name: float(origin[name]) for name in ("pixel_mean", "pixel_std")}
        fits = count_patches(origin["image"], model.patch_size) == patches and origin["pixel_std"] > 0
        if not (fits and all(weight.isfinite().all() for weight in state.values())):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"There is no weights file {weights}: train a run, or give another file.") from None
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        problem = "does not hold the weights of an MlpMixer: give another file"
        if isinstance(error, SafetensorError) and is_zipfile(expand(weights)):
            problem = "was saved with torch.save: give a safetensors file, as train(weights=...) writes"
        raise ValueError(f"{weights!s:.200} {problem}.") from None
    shape = origin["image"] if in_channels == 1 else (in_channels, *origin["image"])
    statistics = origin["pixel_mean"], origin["pixel_std"]
    if "answers" in origin and not _close(answers(model, model.state_dict(), shape, *statistics), origin["answers"]):
        raise ValueError(
            f"{weights!s:.200} holds the weights of a model that computes something else than MlpMixer in "
            "mixer/model.py: load them into that model with safetensors.torch.load_model."
        )
    return model.eval(), origin


@torch.no_grad()
def answers(model: nn.Module, weights: dict[str, Tensor], shape: Sequence[int], mean: float, std: float) -> Tensor:
    """Logits (2, num_classes) for two noise images (H, W) or (3, H, W), by which a weights file knows its model."""
    device = next(model.parameters()).device
    tensors = {name: weight.to(device) for name, weight in weights.items()}
    noise = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    inputs = normalise(noise, mean, std).float()
    logits = functional_call(model.eval(), tensors, (inputs.to(device),), tie_weights=False)
    return logits.float().cpu()


def _close(one: Tensor, kept: list[list[float]]) -> bool:
    """Equal but for rounding, of which TensorFloat-32 has most."""
    other = torch.tensor(kept, dtype=torch.float32)
    return one.shape == other.shape and float((one - other).abs().max()) <= 0.01 * float(other.abs().max())


def open_picture(picture: Picture) -> Image.Image:
    """Open a picture in RGB, upright; if transparent, on white, or on black if it is light. Raises ValueError."""
    name = f"{picture!s:.200}" if isinstance(picture, str | Path) else f"An object of type {type(picture).__name__}"
    try:
        if isinstance(picture, Tensor):
            picture = (picture.float() if picture.is_floating_point() else picture).detach().cpu().numpy()
        if isinstance(picture, np.ndarray):
            name = f"An array of {picture.dtype} and shape {picture.shape}"
            picture = _from_array(picture)
        if not isinstance(picture, Image.Image):
            if isinstance(picture, bytes | bytearray):
                picture = io.BytesIO(picture)
            picture = Image.open(picture if hasattr(picture, "read") else expand(picture))
        image = ImageOps.exif_transpose(picture)
        if image.mode[0] in "IF":  # more than eight bits, which convert() would clip
            image = _from_array(np.array(image))
        if image.has_transparency_data:
            grey, alpha = np.asarray(image.convert("LA"), dtype=float).T
            backing = "black" if (grey * alpha).sum() > 127 * alpha.sum() else "white"
            image = Image.alpha_composite(Image.new("RGBA", image.size, backing), image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"There is no picture {name}.") from None
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError, Image.DecompressionBombError):
        advice = "give a PNG or JPEG file, or finite numbers (height, width) or (height, width, 3)"
        raise ValueError(f"{name} cannot be read as a picture: {advice}.") from None


def _from_array(values: np.ndarray) -> Image.Image:
    """Convert finite numbers to eight bits: integers up to 255 stay, others are scaled from 0 (or the minimum)."""
    while values.ndim > 2 and 1 in (len(values), values.shape[-1]):
        values = values[0] if len(values) == 1 else values[..., 0]
    if values.ndim == 3 and values.shape[2] not in (3, 4):
        values = np.moveaxis(values, 0, 2)
    colours = values.shape[2:] in ((), (3,), (4,))  # two would be read as grey and its transparency
    if values.ndim < 2 or not colours or values.dtype.kind not in "buif" or not np.isfinite(values).all():
        raise ValueError
    low, high = min(0.0, float(values.min())), float(values.max())
    if values.dtype.kind in "bf" or low < 0 or high > 255:
        values = np.rint((values - low) * (255 / ((high - low) or 1)))
    return Image.fromarray(values.astype(np.uint8))
