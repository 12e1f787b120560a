"""Shuffled images: what is moved, that a mixer cannot tell, and that what is written can be trained on."""

import copy

import pytest
import torch
from conftest import first_images

from mixer.data import load_folder, normalise
from mixer.model import MlpMixer
from mixer.studies import shuffle as module
from mixer.studies.shuffle import SIDES, order, shuffle


@pytest.mark.parametrize("side", [1, 2, 4, 14])
def test_squares_move_as_they_are_to_the_places_that_the_order_says(side):
    images = torch.arange(3 * 28 * 28).view(3, 28, 28)
    moved, columns = shuffle(images, side), 28 // side

    def square(image, place):
        top, left = side * (place // columns), side * (place % columns)
        return image[top : top + side, left : left + side]

    for place, source in enumerate(order(columns**2).tolist()):
        for before, after in zip(images, moved, strict=True):
            assert torch.equal(square(after, place), square(before, source))
    assert not torch.equal(moved, images)


def test_squares_that_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="squares of 5×5 do not tile an image of 28×28"):
        shuffle(torch.zeros(1, 28, 28), 5)


def test_to_a_mixer_shuffled_patches_are_other_places_of_its_weights(data):
    """So one trained on them is, but for the initial weights, one trained on the images as they are."""
    model = MlpMixer(num_blocks=2, patches_mlp_dim=32, channels_mlp_dim=32).eval()
    torch.nn.init.normal_(model.head.weight)
    rewired, places = copy.deepcopy(model), order(49)
    for block in rewired.blocks:
        block.patches_in.weight.data = block.patches_in.weight.data[:, places]
        for parameter in (block.patches_out.weight, block.patches_out.bias):
            parameter.data = parameter.data[places]
    images = data.test_images[:20]
    expected = model(normalise(images))
    torch.testing.assert_close(rewired(normalise(shuffle(images, 4))), expected, atol=1e-4, rtol=1e-4)
    for other in (model(normalise(shuffle(images, 4))), rewired(normalise(shuffle(images, 1)))):
        assert (other - expected).abs().max() > 0.1


def test_the_two_data_sets_can_be_loaded(data, tmp_path, monkeypatch):
    few = first_images(data)
    monkeypatch.setattr(module.fashion_mnist, "load", lambda: few)
    module.main([str(tmp_path)])
    for name, side in SIDES.items():
        loaded = load_folder(tmp_path / name)
        assert torch.equal(loaded.train_images, shuffle(few.train_images, side))
        assert torch.equal(loaded.test_images, shuffle(few.test_images, side))
        assert torch.equal(loaded.train_labels, few.train_labels) and torch.equal(loaded.test_labels, few.test_labels)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot be written"):
        module.main([str(tmp_path / "file")])
