"""The figures of the notebooks and the report, in one style, as wide as the report's text.

Every function returns a Matplotlib figure for the notebook, and ``save`` writes it as PDF for LaTeX and as PNG for
people. The same numbers give the same bytes: no dates, no versions, Matplotlib's own DejaVu fonts.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from statsmodels.stats.proportion import proportion_confint

from mixer.data import CLASSES
from mixer.model import MlpMixer
from mixer.system.files import PROJECT, write_whole

FIGURES = PROJECT / "figures"
WIDTH = 6.3  # inches, the text width of report.tex, so that font sizes are those of the report

BLUE, ORANGE = "#1F4E8C", "#E08A00"  # different greys when printed in black and white
GREEN, PURPLE = "#3F9C7A", "#A0529A"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
INK, MUTED, FAINT = "#222222", "#777777", "#DDDDDD"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#EAEAEA",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 120,  # in the notebook
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # TrueType, since publishers reject Matplotlib's Type 3
    "pdf.compression": 0,  # so that the bytes depend on Matplotlib and fontTools, which are pinned, and not on zlib
}

_PERCENT = FuncFormatter(lambda fraction, _: f"{100 * fraction:.6g} %")


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """Yield an empty figure of the report's width, and apply the style meanwhile; ``height`` in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, name: str, folder: Path | str = FIGURES) -> None:
    """Write ``name.pdf`` and ``name.png`` into ``folder``. Raises OSError in one sentence."""
    nothing = {"pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")), "png": {"Software": None}}
    for kind, metadata in nothing.items():
        content = io.BytesIO()
        with mpl.rc_context(_STYLE):
            figure.savefig(content, format=kind, metadata=metadata)
        write_whole(Path(folder) / f"{name}.{kind}", content.getbuffer())


# Learning curves


def frame(axes: Sequence[Axes], *also: float) -> None:
    """Set the limits of panels with one scale, from the first to the last epoch; the first tenth may lie outside.

    also: values that must be inside.
    """
    lines = [line for axis in axes for line in axis.lines if len(line.get_xdata()) > 2]
    last = max((max(line.get_xdata()) for axis in axes for line in axis.lines), default=1)
    curves = [np.asarray(line.get_ydata()) for line in lines]
    settled = np.concatenate([curve[len(curve) // 10 :] for curve in curves] or [[0, 1]])
    low, high = np.nanquantile(settled, [0.005, 0.995])
    low, high = min(low, *also, np.inf), max(high, *also, -np.inf)
    margin = 0.06 * (high - low) or 0.01
    for axis in axes:
        axis.set(xlim=(1 - 0.02 * last, last), ylim=(low - margin, high + margin))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def label_ends(axis: Axes, title: str = "") -> None:
    """Write each line's label at its end, in its colour and without overlap, with ``title`` above them."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    low, high = axis.get_ylim()
    apart = 1.2 * 7 / 72 / (axis.get_position().height * axis.figure.get_figheight()) * (high - low)
    ends = np.clip([line.get_ydata()[-1] for line in lines], low, high)
    places = np.arange(len(ends)) * apart + np.maximum.accumulate(ends - np.arange(len(ends)) * apart)
    places += np.mean(ends - places)
    places -= max(0, places[-1] - high + apart / 2)
    where = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False, "fontsize": 7}
    for line, place in zip(lines, places, strict=True):
        axis.annotate(line.get_label(), (1.02, place), **where, color=line.get_color())
    axis.annotate(title, (1.02, places[-1] + 1.3 * apart), **where, color=MUTED)


# The data set and the model


def samples(images: np.ndarray, labels: np.ndarray, rows: int = 3) -> Figure:
    """The first ``rows`` images of each class, one column per class. images: (N, 28, 28) uint8, labels: (N,)."""
    with drawing(0.64 * rows + 0.25) as figure:
        grid = figure.subplots(rows, len(CLASSES), squeeze=False)
        for label, column in enumerate(grid.T):
            column[0].set_title(CLASSES[label], fontsize=7, pad=3)
            for axis, image in zip(column, images[labels == label], strict=False):
                _show(axis, image)
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.0, hspace=0.0)
    return figure


def _show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="none")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=FAINT)


def architecture(model: MlpMixer, image: np.ndarray) -> Figure:
    """The model from image to logits and, below, one block, with the sizes of ``model``. image: (H, W) uint8."""
    (height, width), (down, right) = image.shape, model.patch_size
    tokens, channels = model.num_patches, model.num_channels
    with drawing(3.15) as figure:
        figure.set_layout_engine("none")
        axis = figure.add_axes((0, 0, 1, 1), frameon=False, xticks=[], yticks=[])
        axis.imshow(image, cmap="gray_r", extent=(0.12, 0.92, 2.28, 3.08), interpolation="none")
        axis.vlines(np.linspace(0.12, 0.92, width // right + 1), 2.28, 3.08, color=ORANGE, linewidth=0.5)
        axis.hlines(np.linspace(2.28, 3.08, height // down + 1), 0.12, 0.92, color=ORANGE, linewidth=0.5)
        axis.text(0.52, 2.15, f"{height} × {width} pixels", ha="center", fontsize=7)
        axis.axis((0, WIDTH, 0, 3.15))  # coordinates are inches
        axis.fill((2.7, 0.08, 0.08, 6.22, 6.22, 3.38), (2.43, 1.84, 0.08, 0.08, 1.84, 2.43), "#F4F4F4", zorder=0)
        for shift in (0.1, 0.05):  # further blocks behind the first
            axis.add_patch(FancyBboxPatch((2.7 + shift, 2.43 + shift), 0.68, 0.5, **_BOX))
        steps = [
            (0.74, f"{tokens} patches\nof {down} × {right}", 0.54, f"stem\n{down * right} → {channels}"),
            (0.50, f"{tokens} × {channels}", 0.68, f"{model.num_blocks} mixer\nblocks"),
            (0.62, f"  {tokens} × {channels}", 0.66, "LayerNorm"),
            (0.13, "", 0.60, "mean over\npatches"),
            (0.26, f"{channels}", 0.54, f"head\n{channels} → {model.num_classes}"),
        ]
        _draw_row(axis, 0.92, 2.68, 0.5, steps)
        end, transpose = 0.1, (0.12, "", 0.24, "transpose")
        for name, title, size, hidden, colour, turn in (
            ("$X$", "token mixing, for every channel", tokens, model.patches_mlp_dim, "#FBE6C8", [transpose]),
            ("$U$", "channel mixing, for every patch", channels, model.channels_mlp_dim, "#D3E0F1", []),
        ):
            start, labels = end + 0.31, (f"{size}\n↓\n{hidden}", "GELU", f"{hidden}\n↓\n{size}")
            mlp = [*turn, *((0.12, "", 0.42, label, colour) for label in labels), *turn]
            end = _draw_row(axis, end, 0.72, 0.9, [(0.43, name, 0.24, "LayerNorm"), *mlp, (0.12, "", 0.14, "+")])
            axis.plot([start, start, end - 0.07], [0.72, 1.34, 1.34], color=INK, linewidth=0.7)
            axis.annotate("", (end - 0.07, 0.79), (end - 0.07, 1.34), arrowprops=_ARROW)
            axis.text((start + end) / 2, 1.38, "skip connection", color=MUTED, ha="center", fontsize=7)
            axis.text((start + end) / 2, 1.6, title, ha="center")
        axis.annotate("", (6.19, 0.72), (end, 0.72), arrowprops=_ARROW)
        axis.text((end + 6.19) / 2, 0.78, "$Y$", ha="center", fontsize=7)
    return figure


_ARROW = {"arrowstyle": "-|>,head_width=0.13,head_length=0.26", "lw": 0.7, "color": INK, "shrinkA": 0, "shrinkB": 0}
_BOX = {"boxstyle": "round,pad=0,rounding_size=0.04", "facecolor": "white", "edgecolor": INK, "linewidth": 0.7}


def _draw_row(axis: Axes, x: float, y: float, height: float, steps: list[tuple]) -> float:
    """Draw boxes starting at ``x``; return their end. steps: arrow length, its text, box width, label, [colour]."""
    for length, passing, width, label, *colour in steps:
        axis.annotate("", (x + length, y), (x, y), arrowprops=_ARROW, zorder=0.9)
        axis.text(x + length / 2, y + 0.06, passing, ha="center", fontsize=7)
        size, shape = (width, "circle,pad=0") if label == "+" else (height, _BOX["boxstyle"])
        style = _BOX | {"boxstyle": shape, "facecolor": (*colour, "white")[0]}
        axis.add_patch(FancyBboxPatch((x + length, y - size / 2), width, size, **style))
        x += length + width
        axis.text(x - width / 2, y, label, ha="center", va="center", rotation=90 * (width < 0.3), fontsize=7)
    return x


# What the best run gets wrong


def confusion(labels: np.ndarray, predictions: np.ndarray) -> Figure:
    """Confusion matrix in counts and each class's accuracy with its 95 % interval. Both (N,), class numbers."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    np.add.at(counts, (labels, predictions), 1)
    correct, images = counts.diagonal(), counts.sum(axis=1)
    accuracy = correct / images
    reach = np.abs(np.array(proportion_confint(correct, images, method="wilson")) - accuracy)
    with drawing(3.15) as figure:
        matrix, bars = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
        norm = PowerNorm(0.4, vmin=0, vmax=counts.sum(axis=1).max())  # a linear scale would hide the errors
        matrix.imshow(counts, cmap="Blues", norm=norm, aspect="auto", interpolation="none")
        for row, column in np.argwhere(counts):
            count = counts[row, column]
            colour = "white" if norm(count) > 0.6 else INK
            matrix.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
        matrix.set_xticks(range(len(CLASSES)), CLASSES, rotation=40, ha="right", rotation_mode="anchor")
        matrix.set_yticks(range(len(CLASSES)), CLASSES)
        matrix.set(xlabel="predicted", ylabel="true")
        matrix.grid(False)
        matrix.tick_params(length=0)
        bars.barh(range(len(CLASSES)), accuracy, height=0.62, color="#9DB6D6")
        bars.errorbar(accuracy, range(len(CLASSES)), xerr=reach, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
        for row, value in enumerate(accuracy):
            bars.text(0.02, row, f"{100 * value:.1f} %", va="center", fontsize=7)
        bars.set(xlim=(0, 1), xlabel="accuracy")
        bars.xaxis.set_major_formatter(_PERCENT)
        bars.grid(axis="y", visible=False)
        bars.tick_params(axis="y", length=0)
    return figure


def mistakes(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, rows: int = 2) -> Figure:
    """The most confident errors in ``rows`` of eight, the most confident first.

    images: (N, 28, 28) uint8; labels: (N,); probabilities: (N, 10), after the softmax.
    """
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")]
    with drawing(1.22 * rows) as figure:
        places = figure.subplots(rows, 8, squeeze=False).ravel()
        for place in places[len(order) :]:
            place.axis("off")
        for place, index in zip(places, order, strict=False):
            _show(place, images[index])
            place.set_title(CLASSES[labels[index]], fontsize=7, pad=3)
            answer = f"→ {CLASSES[predictions[index]]}\n{100 * confidence[index]:.2f} %"
            place.set_xlabel(answer, fontsize=7, labelpad=3)
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure
