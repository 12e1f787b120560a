import itertools

import numpy as np
import pytest

from mixer.data import CLASSES
from mixer.model import MlpMixer
from mixer.reporting import figures


def curves(figure, *heights: float, epochs: int = 60):
    """A panel with lines that fall steeply from 1 to these heights."""
    axis = figure.subplots()
    for number, height in enumerate(heights):
        x = np.arange(1, epochs + 1)
        axis.plot(x, height + (1 - height) * np.exp(1.0 - x), label=f"curve {number}")
    return axis


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_frames_the_end_of_every_curve_but_not_its_steep_start(epochs):
    with figures.drawing(2) as figure:
        axis = curves(figure, 0.1, 0.2, epochs=epochs)
        figures.frame([axis], 0.3)
    low, high = axis.get_ylim()
    assert low < 0.1 < 0.3 < high and (epochs < 60 or high < 0.5)
    assert axis.get_xlim()[0] < 1 <= epochs <= axis.get_xlim()[1]
    assert all(tick == int(tick) for tick in axis.get_xticks())


@pytest.mark.parametrize("heights", [(0.1, 0.2, 0.3), (0.2, 0.2, 0.2, 0.2, 0.6)])
def test_labels_the_ends_in_their_order_without_overlap(heights):
    with figures.drawing(2.5) as figure:
        axis = curves(figure, *heights)
        figures.frame([axis])
        figure.canvas.draw()
        figures.label_ends(axis, "title")
        figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]  # from the lowest curve to the highest, and the title
    assert [text.get_text() for text in axis.texts] == [*(f"curve {n}" for n in range(len(heights))), "title"]
    assert all(upper.y0 >= lower.y1 - 1 for lower, upper in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_saves_the_same_numbers_as_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        with figures.drawing(1) as figure:
            curves(figure, 0.1)
        figures.save(figure, "loss", tmp_path / folder)
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
    whole = ["28 × 28 pixels", "16 patches\nof 7 × 7", "stem\n49 → 5", "16 × 5", "3 mixer\nblocks", "5", "head\n5 → 10"]
    block = ["16\n↓\n77", "77\n↓\n16", "5\n↓\n512", "512\n↓\n5"]
    assert set(whole + block) <= {text.get_text() for text in drawn}
