import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from mixer import figures
from mixer.data import CLASSES
from mixer.grid import RESULTS, RecordError, coursework, grid, histories, read_records
from mixer.model import MlpMixer


def curves(num_epochs: int, configs=None) -> pd.DataFrame:
    """Histories of the coursework's eight runs that approach 90 % at speeds of their own."""
    rows = []
    for run, config in enumerate(configs or grid(num_epochs=num_epochs)):
        for epoch in range(1, num_epochs + 1):
            accuracy = 0.9 - 0.3 * np.exp(-epoch * (0.2 + 0.05 * run))
            loss = 1 - accuracy
            measured = {"train_loss": loss, "train_accuracy": accuracy, "test_loss": loss, "test_accuracy": accuracy}
            rows.append(dataclasses.asdict(config) | {"epoch": epoch} | measured | {"seconds": 1.0})
    return pd.DataFrame(rows)


def lines(figure):
    """The curves in a figure's first panel."""
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]


@pytest.mark.parametrize("draw", [figures.loss, figures.test_accuracy, figures.train_accuracy])
def test_no_two_runs_look_the_same(draw):
    styles = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines(draw(curves(60)))]
    assert len(styles) == len(set(styles)) == 8


def test_a_mark_stands_for_one_setting():
    encoding = figures.encode(curves(2))
    for marks in encoding.values():
        assert len(marks) == len(set(marks.values())) == 2


def test_legend_names_every_setting():
    figure = figures.test_accuracy(curves(60))
    words = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert words == [["learning rate", "0.001", "0.01"], ["dropout", "0", "0.1"], ["batch size", "256", "512"]]


def test_colours_differ_in_grey_too():
    def grey(colour):
        return sum(w * int(colour[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))

    assert abs(grey(figures.BLUE) - grey(figures.ORANGE)) > 60


def test_more_values_than_marks_are_refused():
    configs = grid(lrs=(0.1, 0.2, 0.3, 0.4, 0.5), num_epochs=2)
    with pytest.raises(ValueError, match="5 values of learning rate"):
        figures.loss(curves(2, configs))


@pytest.mark.parametrize("num_epochs", [1, 2, 60])
def test_frame_holds_the_end_of_every_curve(num_epochs):
    history = curves(num_epochs)
    overfitted = (history["lr"] == 0.01) & (history["dropout_p"] == 0) & (history["batch_size"] == 512)
    history.loc[overfitted, "test_loss"] += 0.1 * history["epoch"]
    for draw in (figures.loss, figures.test_accuracy, figures.train_accuracy):
        for axis in draw(history).axes:
            low, high = axis.get_ylim()
            for line in axis.lines:
                if len(line.get_xdata()) == num_epochs:
                    assert low < line.get_ydata()[-1] < high
            assert axis.get_xlim()[0] < 1 <= num_epochs < axis.get_xlim()[1]


def test_short_training_is_shown_whole():
    history = curves(2)
    low, _ = figures.train_accuracy(history).axes[0].get_ylim()
    assert low < history["train_accuracy"].min()


def test_a_run_without_history_and_one_cut_short_do_no_harm():
    history = curves(60)
    settings = history["batch_size"].eq(512) & history["lr"].eq(0.01)
    gone = settings & history["dropout_p"].eq(0)
    short = settings & history["dropout_p"].eq(0.1) & history["epoch"].gt(3)
    assert len(lines(figures.loss(history[~gone & ~short]))) == 7


def test_same_numbers_same_bytes(tmp_path):
    for folder in ("one", "two"):
        figures.write_curves(curves(60), tmp_path / folder)
    written = sorted(path.name for path in (tmp_path / "one").iterdir())
    names = ("fig1_loss", "fig2_test_accuracy", "fig3_train_accuracy")
    assert written == [f"{name}.{kind}" for name, kind in itertools.product(names, ("pdf", "png"))]
    for name in written:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert b"Date" not in content
        assert b"Matplotlib" not in content
        assert len(content) < 200_000
    assert b"DejaVuSans" in (tmp_path / "one" / "fig1_loss.pdf").read_bytes()


def test_sheets_of_images():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40) % 10
    sheet = figures.samples(images, labels, rows=2)
    assert [axis.get_title() for axis in sheet.axes[:10]] == list(CLASSES)
    shown = sheet.axes[13].images[0].get_array()  # second row, fourth column
    assert np.array_equal(shown, images[13])

    probabilities = np.full((40, 10), 0.02)
    probabilities[np.arange(40), labels] = 0.82
    probabilities[7] = np.roll(probabilities[7], 1)  # a sneaker taken for a bag
    probabilities[23] = np.roll(probabilities[23], 1) * 0.9 + 0.01  # a dress taken for a coat, less surely
    sheet = figures.mistakes(images, labels, probabilities, rows=1)
    captions = [(axis.get_title(), axis.get_xlabel()) for axis in sheet.axes if axis.images]
    assert captions == [("Sneaker", "→ Bag\n82.00%"), ("Dress", "→ Coat\n74.80%")]


def test_confusion_counts_true_by_predicted():
    labels = np.repeat(np.arange(10), 10)
    predictions = labels.copy()
    predictions[60:63] = 0
    matrix, bars = figures.confusion(labels, predictions).axes
    counts = matrix.images[0].get_array()
    assert counts[6, 0] == 3
    assert counts[6, 6] == 7
    assert counts.sum() == 100
    assert bars.patches[6].get_width() == pytest.approx(0.7)


def test_architecture_shows_the_sizes_of_the_model():
    model = MlpMixer(num_blocks=3, patch_size=(7, 7), num_patches=16, num_channels=5, patches_mlp_dim=77)
    figure = figures.architecture(model, np.zeros((28, 28), dtype=np.uint8))
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    for size in ("28 × 28", "16 patches", "of 7 × 7", "49 → 5", "3 mixer", "16×5", "77", "512", "5 → 10"):
        assert size in words


@pytest.mark.parametrize("name", ["fig1_loss", "fig2_test_accuracy", "fig3_train_accuracy"])
def test_committed_figures_follow_from_the_committed_records(name, tmp_path):
    records = read_records(RESULTS)
    try:
        records = coursework(records)
    except RecordError:
        pytest.skip("results/ does not hold the coursework's grid yet")
    figures.write_curves(histories(records), tmp_path)
    committed = figures.FIGURES / name
    assert committed.with_suffix(".pdf").read_bytes() == (tmp_path / f"{name}.pdf").read_bytes(), "stale: run `make`"
    # The pixels, since the bytes of a PNG depend on the version of the compression library, too.
    assert np.array_equal(imread(committed.with_suffix(".png")), imread(tmp_path / f"{name}.png")), "stale: run `make`"
