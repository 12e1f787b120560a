import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from mixer.data import CLASSES
from mixer.model import MlpMixer
from mixer.reporting import figures
from mixer.runner import grid, histories, run_grid


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


def thick(figure):
    """The curves in a figure's first panel, without the thin lines under running means."""
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2 and line.get_linewidth() >= 1]


@pytest.mark.parametrize("draw", [figures.loss, figures.test_accuracy, figures.train_accuracy])
def test_no_two_runs_look_the_same(draw):
    styles = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in thick(draw(curves(60)))]
    assert len(styles) == len(set(styles)) == 8


def test_the_courseworks_values_keep_their_marks_in_any_grid():
    usual = figures.encode(curves(2))
    wide = figures.encode(curves(2, grid(lrs=(0.0003, 0.001, 0.003, 0.01), dropouts=(0.05, 0.1, 0.5), num_epochs=2)))
    for column, (kind, marks) in usual.items():
        assert len(set(map(str, marks.values()))) == len(marks) == 2
        assert wide[column][0] == kind
        assert {value: wide[column][1][value] for value in marks if value in wide[column][1]}.items() <= marks.items()
    assert len(set(wide["lr"][1].values())) == 4 and list(wide["lr"][1]) == [0.0003, 0.001, 0.003, 0.01]


def test_another_setting_that_varies_takes_the_mark_of_one_that_does_not():
    configs = grid(lrs=[0.01], dropouts=[0.1], batch_sizes=[256], num_epochs=3, num_blocks=[2, 4])
    encoding = figures.encode(curves(3, configs))
    assert list(encoding) == ["num_blocks", "dropout_p", "batch_size"]
    figure = figures.test_accuracy(curves(3, configs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["num blocks", "2", "4"]
    assert len({line.get_color() for line in thick(figure)}) == 2


def test_a_setting_too_many_is_refused_and_all_images_are_called_so():
    with pytest.raises(ValueError, match="lr, dropout_p, batch_size, num_blocks vary: draw a part of the runs"):
        figures.loss(curves(2, grid(num_epochs=2, num_blocks=[1, 2])))
    configs = grid(lrs=[0.01], dropouts=[0.1], batch_sizes=[256], num_epochs=3, limit=[None, 2000])
    figure = figures.loss(curves(3, configs))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["limit", "2000", "all"]


def test_seeds_are_a_mean_in_a_band_from_the_lowest_to_the_highest():
    seeds = curves(4, grid(lrs=[0.01], dropouts=[0.1], batch_sizes=[256], seeds=(0, 1, 2), num_epochs=4))
    axis = figures.train_accuracy(seeds).axes[0]
    (mean,) = axis.lines
    by_epoch = seeds.groupby("epoch")["train_accuracy"]
    assert mean.get_ydata() == pytest.approx(by_epoch.mean())
    (band,) = axis.collections
    reach = pd.DataFrame(band.get_paths()[0].vertices, columns=["epoch", "y"]).groupby("epoch")["y"].agg(["min", "max"])
    assert reach["min"].to_numpy() == pytest.approx(by_epoch.min())
    assert reach["max"].to_numpy() == pytest.approx(by_epoch.max())


def test_accuracy_is_a_running_mean_and_of_one_seed_also_a_thin_line():
    history = curves(20, grid(num_epochs=20)[:1])
    thin, mean = figures.test_accuracy(history).axes[0].lines
    assert thin.get_linewidth() < mean.get_linewidth()
    assert thin.get_ydata() == pytest.approx(history["test_accuracy"])
    assert mean.get_ydata()[4] == pytest.approx(history["test_accuracy"][2:7].mean())
    seeds = curves(20, grid(lrs=[0.01], dropouts=[0.1], batch_sizes=[256], seeds=(0, 1), num_epochs=20))
    seeds.loc[seeds["seed"] == 1, "test_accuracy"] -= 0.01
    axis = figures.test_accuracy(seeds).axes[0]
    by_epoch = seeds.pivot(index="epoch", columns="seed", values="test_accuracy")
    (mean,), (band,) = axis.lines, axis.collections
    assert mean.get_ydata()[4] == pytest.approx(by_epoch.loc[3:7].mean(axis=None))
    fifth = [y for x, y in band.get_paths()[0].vertices if x == 5]
    assert [min(fifth), max(fifth)] == pytest.approx(sorted(by_epoch.loc[3:7].mean()))
    assert axis.get_ylabel() == "test accuracy, mean of 5 epochs"
    axis = figures.test_accuracy(history[:5]).axes[0]
    (only,) = axis.lines
    assert only.get_ydata() == pytest.approx(history["test_accuracy"][:5]) and axis.get_ylabel() == "test accuracy"


@pytest.mark.parametrize("values", [(2, 2, 2), (3, 1, 2), (1, 4, 2), (4, 4, 4)])
def test_legends_fit(values):
    """No text of the legends lies on another one or outside the figure."""
    lrs, dropouts, batch_sizes = values
    settings = (
        [0.001 * 2**n for n in range(lrs)],
        [n / 10 for n in range(dropouts)],
        [32 * 2**n for n in range(batch_sizes)],
    )
    figure = figures.test_accuracy(curves(2, grid(*settings, num_epochs=2)))
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts() if text.get_text().strip()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 3 + sum(values)
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_more_values_than_marks_use_them_again():
    configs = grid(lrs=[0.001 * 2**n for n in range(9)], num_epochs=2)
    assert len(figures.encode(curves(2, configs))["lr"][1]) == 9
    assert len(figures.loss(curves(2, configs)).axes[0].lines) == len(configs)


def test_colours_differ_in_grey_too():
    def grey(colour):
        return sum(w * int(colour[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))

    assert abs(grey(figures.BLUE) - grey(figures.ORANGE)) > 60


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
    assert len(thick(figures.loss(history[~gone & ~short]))) == 7


def test_same_numbers_same_bytes(tmp_path):
    for folder in ("one", "two"):
        figures.save(figures.loss(curves(60)), "loss", tmp_path / folder)
    for name in ("loss.pdf", "loss.png"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert not any(word in content for word in (b"Date", b"Matplotlib", b"Type3"))
        assert len(content) < 200_000
    assert b"DejaVuSans" in (tmp_path / "one" / "loss.pdf").read_bytes()


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
    assert captions == [("Sneaker", "→ Bag\n82.00 %"), ("Dress", "→ Coat\n74.80 %")]


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


def test_committed_figures_follow_from_the_committed_records(tmp_path):
    history = histories(run_grid(grid(seeds=[0, 1, 2])))
    figures.save(figures.loss(history), "fig1_loss", tmp_path)
    figures.save(figures.test_accuracy(history, 0.8917), "fig2_test_accuracy", tmp_path)
    figures.save(figures.train_accuracy(history), "fig3_train_accuracy", tmp_path)
    for made in tmp_path.glob("*.pdf"):
        committed = figures.FIGURES / made.name
        assert committed.read_bytes() == made.read_bytes(), f"{made.name} is stale: run `make`"
        # The pixels, since the bytes of a PNG depend on the version of the compression library, too.
        pixels = [imread(path.with_suffix(".png")) for path in (committed, made)]
        assert np.array_equal(*pixels), f"{made.stem}.png is stale: run `make`"


def test_a_figures_folder_may_be_a_string_and_a_bad_one_is_one_sentence(tmp_path):
    figure = figures.samples(np.zeros((10, 28, 28), np.uint8), np.arange(10), rows=1)
    figures.save(figure, "samples", str(tmp_path / "new"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["samples.pdf", "samples.png"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"samples\.pdf cannot be written"):
        figures.save(figure, "samples", tmp_path / "file")
