import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from mixer.config import grid
from mixer.data import CLASSES
from mixer.model import MlpMixer
from mixer.records import histories
from mixer.reporting import figures
from mixer.runner import run_grid

ONE_SET = {"lrs": [0.01], "dropouts": [0.1], "batch_sizes": [256]}


def curves(num_epochs: int, **parameters) -> pd.DataFrame:
    """Histories of a grid's runs, each of which approaches 90 % at a speed of its own."""
    rows = []
    for run, config in enumerate(grid(num_epochs=num_epochs, **parameters)):
        for epoch in range(1, num_epochs + 1):
            accuracy = 0.9 - 0.3 * np.exp(-epoch * (0.2 + 0.05 * run))
            loss = 1 - accuracy
            measured = {"train_loss": loss, "train_accuracy": accuracy, "test_loss": loss, "test_accuracy": accuracy}
            rows.append(dataclasses.asdict(config) | {"epoch": epoch} | measured | {"seconds": 1.0})
    return pd.DataFrame(rows)


def thick(figure):
    """The curves in a figure's first panel, without the thin lines under running means."""
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2 and line.get_linewidth() >= 1]


@pytest.mark.parametrize("draw", [figures.loss, figures.test_accuracy, figures.train_accuracy])
def test_draws_no_two_runs_alike(draw):
    styles = {(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in thick(draw(curves(60)))}
    assert len(styles) == 8


def test_keeps_the_marks_of_the_courseworks_values_in_any_grid():
    usual = figures.encode(curves(2))
    wide = figures.encode(curves(2, lrs=(0.0003, 0.001, 0.003, 0.01), dropouts=(0.05, 0.1, 0.5)))
    for column, (kind, marks) in usual.items():
        assert len(set(map(str, marks.values()))) == len(marks) == 2
        assert wide[column][0] == kind
        assert all(wide[column][1][value] == marks[value] for value in marks if value in wide[column][1])
    assert len(set(wide["lr"][1].values())) == 4 and list(wide["lr"][1]) == ["0.0003", "0.001", "0.003", "0.01"]
    assert len(figures.encode(curves(2, lrs=[0.001 * 2**n for n in range(9)]))["lr"][1]) == 9  # more than there are


@pytest.mark.parametrize(
    ("setting", "values", "labels"),
    [("num_blocks", [16, 2], ["num blocks", "2", "16"]), ("limit", [None, 2000], ["limit", "2000", "none"])],
)
def test_gives_another_setting_that_varies_the_mark_of_one_that_does_not(setting, values, labels):
    history = curves(3, **ONE_SET, **{setting: values})
    assert list(figures.encode(history)) == [setting, "dropout_p", "batch_size"]
    figure = figures.test_accuracy(history)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert len({line.get_color() for line in thick(figure)}) == 2


def test_rejects_four_settings_that_vary():
    with pytest.raises(ValueError, match="lr, dropout_p, batch_size, num_blocks vary, but"):
        figures.loss(curves(2, num_blocks=[1, 2]))


def test_draws_seeds_as_their_mean_in_a_band_from_lowest_to_highest():
    history = curves(20, **ONE_SET, seeds=(0, 1, 2))
    axis = figures.test_accuracy(history).axes[0]
    by_epoch = history.pivot(index="epoch", columns="seed", values="test_accuracy")
    (mean,), (band,) = axis.lines, axis.collections
    assert mean.get_ydata()[4] == pytest.approx(by_epoch.loc[3:7].mean(axis=None))
    fifth = [y for x, y in band.get_paths()[0].vertices if x == 5]
    assert [min(fifth), max(fifth)] == pytest.approx([by_epoch.loc[3:7].mean().min(), by_epoch.loc[3:7].mean().max()])
    assert axis.get_ylabel() == "test accuracy, mean of 5 epochs"


def test_draws_one_seed_as_it_is_under_its_running_mean_and_a_short_run_only_as_it_is():
    history = curves(20, **ONE_SET)
    thin, mean = figures.test_accuracy(history).axes[0].lines
    assert thin.get_linewidth() < mean.get_linewidth()
    assert thin.get_ydata() == pytest.approx(history["test_accuracy"])
    assert mean.get_ydata()[4] == pytest.approx(history["test_accuracy"][2:7].mean())
    axis = figures.test_accuracy(history[:5]).axes[0]
    (only,) = axis.lines
    assert only.get_ydata() == pytest.approx(history["test_accuracy"][:5]) and axis.get_ylabel() == "test accuracy"


@pytest.mark.parametrize("values", [(2, 2, 2), (3, 1, 2), (1, 4, 2), (4, 4, 4)])
def test_fits_legends_into_the_figure_without_overlap(values):
    lrs, dropouts, sizes = ([start * 2**n for n in range(4)] for start in (0.001, 0.1, 32))
    a, b, c = values
    figure = figures.test_accuracy(curves(2, lrs=lrs[:a], dropouts=dropouts[:b], batch_sizes=sizes[:c]))
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts() if text.get_text().strip()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 3 + sum(values)
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.parametrize("num_epochs", [1, 2, 60])
def test_frames_the_end_of_every_curve(num_epochs):
    history = curves(num_epochs)
    overfitted = (history["lr"] == 0.01) & (history["dropout_p"] == 0) & (history["batch_size"] == 512)
    history.loc[overfitted, "test_loss"] += 0.1 * history["epoch"]
    for draw in (figures.loss, figures.test_accuracy, figures.train_accuracy):
        for axis in draw(history).axes:
            low, high = axis.get_ylim()
            ends = [line.get_ydata()[-1] for line in axis.lines if len(line.get_xdata()) == num_epochs]
            assert ends and all(low < end < high for end in ends)
            assert axis.get_xlim()[0] < 1 <= num_epochs < axis.get_xlim()[1]


def test_draws_runs_that_diverged_as_far_as_they_came():
    history = curves(60)
    cut = history["batch_size"].eq(512) & history["lr"].eq(0.01)
    at_once, later = cut & history["dropout_p"].eq(0), cut & history["dropout_p"].eq(0.1) & history["epoch"].gt(3)
    assert len(thick(figures.loss(history[~at_once & ~later]))) == 7
    assert not thick(figures.loss(history[:0]))


def test_saves_the_same_numbers_as_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        figures.save(figures.loss(curves(60)), "loss", tmp_path / folder)
    for name in ("loss.pdf", "loss.png"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert not any(word in content for word in (b"Date", b"Matplotlib", b"Type3"))
    assert b"DejaVuSans" in (tmp_path / "one" / "loss.pdf").read_bytes()


def test_draws_samples_by_class_and_the_most_confident_errors_first():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40) % 10
    sheet = figures.samples(images, labels, rows=2)
    assert [axis.get_title() for axis in sheet.axes[:10]] == list(CLASSES)
    assert np.array_equal(sheet.axes[13].images[0].get_array(), images[13])  # second row, fourth column

    probabilities = np.full((40, 10), 0.02)
    probabilities[np.arange(40), labels] = 0.82
    probabilities[7] = np.roll(probabilities[7], 1) * 0.9 + 0.01  # a sneaker taken for a bag, less confidently
    probabilities[23] = np.roll(probabilities[23], 1)  # a dress taken for a coat
    sheet = figures.mistakes(images, labels, probabilities, rows=1)
    captions = [(axis.get_title(), axis.get_xlabel()) for axis in sheet.axes if axis.images]
    assert captions == [("Dress", "→ Coat\n82.00 %"), ("Sneaker", "→ Bag\n74.80 %")]


def test_counts_confusions_true_by_predicted():
    labels = np.repeat(np.arange(10), 10)
    predictions = np.where(np.arange(100) // 3 == 20, 0, labels)  # 60 to 62
    matrix, bars = figures.confusion(labels, predictions).axes
    counts = matrix.images[0].get_array()
    assert (counts[6, 0], counts[6, 6], counts.sum()) == (3, 7, 100)
    assert bars.patches[6].get_width() == pytest.approx(0.7)


def test_draws_the_architecture_with_the_sizes_of_the_model():
    model = MlpMixer(num_blocks=3, patch_size=(7, 7), num_patches=16, num_channels=5, patches_mlp_dim=77)
    drawn = figures.architecture(model, np.zeros((28, 28), dtype=np.uint8)).axes[0].texts
    whole = ["28 × 28 pixels", "16 patches\nof 7 × 7", "stem\n49 → 5", "16×5", "3 mixer\nblocks", "5", "head\n5 → 10"]
    block = ["16\n↓\n77", "77\n↓\n16", "5\n↓\n512", "512\n↓\n5"]
    assert set(whole + block) <= {text.get_text() for text in drawn}


def test_committed_figures_follow_from_the_committed_records(tmp_path, data):
    history = histories(run_grid(grid(seeds=[0, 1, 2])))
    figures.save(figures.loss(history), "fig1_loss", tmp_path)
    figures.save(figures.test_accuracy(history, 0.8917), "fig2_test_accuracy", tmp_path)
    figures.save(figures.train_accuracy(history), "fig3_train_accuracy", tmp_path)
    figures.save(figures.architecture(MlpMixer(), data.train_images[0].numpy()), "architecture", tmp_path)
    for made in tmp_path.glob("*.pdf"):
        committed = figures.FIGURES / made.name
        assert committed.read_bytes() == made.read_bytes(), f"{made.name} is stale: run `make`"
        # The pixels, since the bytes of a PNG depend on the version of the compression library, too.
        pixels = [imread(path.with_suffix(".png")) for path in (committed, made)]
        assert np.array_equal(*pixels), f"{made.stem}.png is stale: run `make`"
