"""Pictures in the data set's format: grey, bright on black, the object filling the frame; or whole, in colour."""

from logging import getLogger

import numpy as np
from PIL import Image
from scipy import ndimage

CONTRAST = 12  # of 255: pixels that differ less from the background belong to it
FILLED = 0.09, 0.84  # share of the frame; one training image in a thousand fills less, one in a thousand more
UNLIKE = "The picture is unlike the data set, since %s: show=True draws what the model sees."
log = getLogger("mixer")


def prepare(
    image: Image.Image, size: tuple[int, int] = (28, 28), find: bool = True, in_colour: bool = False
) -> np.ndarray:
    """Convert a picture to the data set's format, uint8 (H, W) of ``size``. Raises ValueError in one sentence.

    With ``find``, the object is whatever stands out from the border's colours. Its bounding box is centred and fills
    the frame, as in Fashion-MNIST. A pixel's value is its distance from the background, scaled to at most 255. A
    picture already of ``size`` is kept, or inverted if its border is bright.
    Without ``find``, the whole picture is scaled and padded; ``in_colour`` returns (3, H, W).
    """
    if 0 in image.size or (find and image.size != size[::-1]):
        return _find(image.convert("RGB"), size)
    if in_colour:
        return np.stack([prepare(channel, size, find=False) for channel in image.convert("RGB").split()])
    grey = np.array(image.convert("L"))
    border = np.median(np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]]))
    if find and grey.min() == grey.max():
        log.warning("The picture has only one colour: no class fits it.")
    return 255 - grey if find and border > 127 else _fit(grey, size, int(border))


def _find(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    if min(image.size) < 8 or max(image.size) > 50 * min(image.size):
        raise ValueError(f"A picture of {image.width} × {image.height} pixels is too small or narrow: use another.")
    image.thumbnail((512, 512), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float32)
    difference, spread = _subtract_background(pixels)
    distance = np.linalg.norm(ndimage.gaussian_filter(difference, (1.5, 1.5, 0)), axis=2)
    if distance.max() <= CONTRAST:
        raise ValueError("The picture has only one colour: there is no object in it.")
    stands_out = distance > max(4 * spread, CONTRAST, 0.2 * np.percentile(distance, 99.9))  # excludes noise and shadows
    mask = _largest(stands_out)
    (box,) = ndimage.find_objects(mask.astype(int))
    difference[ndimage.distance_transform_edt(~mask) > 1 + 0.02 * max(mask[box].shape)] = 0  # except for a soft edge
    grey = np.linalg.norm([_fit(channel, size, 0) for channel in np.moveaxis(difference[box], 2, 0)], axis=0)
    grey = np.rint(grey * (255 / grey.max())).astype(np.uint8)
    at_rim = (mask[[0, -1]].sum() + mask[:, [0, -1]].sum()) / (2 * sum(mask.shape))
    if spread > 20 or at_rim > 0.28:  # the data set's own images, enlarged, reach up to 0.27
        log.warning(UNLIKE, "its background is not plain")
    elif stands_out.sum() - stands_out[box].sum() > 0.5 * mask.sum():
        log.warning(UNLIKE, "several objects stand out, of which the largest is used")
    elif not FILLED[0] <= (grey > 30).mean() <= FILLED[1]:
        log.warning(UNLIKE, "its object has an unusual size or shape")
    return grey


def _subtract_background(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Subtract a quadratic fitted to the border's colours; also return the border's median distance from it."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2)
    border, wide = np.ones((height, width), dtype=bool), max(1, min(height, width) // 50)
    border[wide:-wide, wide:-wide] = False
    seen, basis = pixels[border], terms[border]
    fitted = np.median(seen, axis=0)
    for _ in range(6):  # each time without objects on the border
        distance = np.linalg.norm(seen - fitted, axis=1)
        plain = distance <= max(3 * np.median(distance), CONTRAST)
        coefficients = np.linalg.lstsq(basis[plain], seen[plain], rcond=None)[0]
        fitted = basis @ coefficients
    return pixels - terms @ coefficients, float(np.median(np.linalg.norm(seen - fitted, axis=1)))


def _largest(mask: np.ndarray) -> np.ndarray:
    """Mask the largest region, bridging small gaps; regions at the rim, such as a table's edge, count a quarter."""
    labels, _ = ndimage.label(ndimage.distance_transform_edt(~mask) <= 0.015 * min(mask.shape), np.ones((3, 3)))
    labels[~mask] = 0
    areas = np.bincount(labels.ravel()).astype(float)
    rim = np.concatenate([labels[0], labels[:, -1], labels[-1, ::-1], labels[::-1, 0]])
    areas[np.unique(rim)] *= 0.25
    areas[0] = 0
    if areas.max() < 0.0005 * mask.size or np.diff(rim == areas.argmax()).sum() > 14:  # 14: touches the rim repeatedly
        raise ValueError("No object stands out from the background: photograph it on a plain background.")
    return labels == areas.argmax()


def _fit(channel: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """Scale a channel to fit into ``size`` and centre it; an odd pixel goes above or left, as in the data set."""
    scale = min(size[0] / channel.shape[0], size[1] / channel.shape[1])
    height, width = (max(1, round(scale * side)) for side in channel.shape)
    top, left = (size[0] - height + 1) // 2, (size[1] - width + 1) // 2
    scaled = Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS)
    return np.pad(scaled, ((top, size[0] - top - height), (left, size[1] - left - width)), constant_values=fill)
