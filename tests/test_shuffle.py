import copy

import pytest
import torch
from conftest import first_images

from mixer.data import TENSORS, load_folder, normalise
from mixer.model import MlpMixer
from mixer.studies import shuffle as module
from mixer.studies.shuffle import SIDES, order, shuffle_squares


@pytest.mark.parametrize("side", [1, 2, 4, 14])
def test_moves_whole_squares_to_their_new_positions(side):
    images, columns = torch.arange(3 * 28 * 28).view(3, 28, 28), 28 // side
    moved = shuffle_squares(images, side)
    assert not torch.equal(moved, images)
    for place, source in enumerate(order(columns**2).tolist()):
        (top, left), (y, x) = ((side * (n // columns), side * (n % columns)) for n in (place, source))
        assert torch.equal(moved[:, top : top + side, left : left + side], images[:, y : y + side, x : x + side])


def test_rejects_squares_that_do_not_tile_an_image():
    with pytest.raises(ValueError, match="squares of 5×5 do not tile an image of 28×28"):
        shuffle_squares(torch.zeros(1, 28, 28), 5)


def test_a_mixer_with_permuted_weights_gives_the_same_logits(data):
    """So shuffled patches make no difference to training, apart from the initial weights."""
    model = MlpMixer(num_blocks=2, patches_mlp_dim=32, channels_mlp_dim=32).eval()
    torch.nn.init.normal_(model.head.weight)
    permuted, places = copy.deepcopy(model), order(49)
    for block in permuted.blocks:
        block.patches_in.weight.data = block.patches_in.weight.data[:, places]
        for parameter in (block.patches_out.weight, block.patches_out.bias):
            parameter.data = parameter.data[places]
    images = data.test_images[:20]
    expected, patches = model(normalise(images)), normalise(shuffle_squares(images, 4))
    torch.testing.assert_close(permuted(patches), expected, atol=1e-4, rtol=1e-4)
    for other in (model(patches), permuted(normalise(shuffle_squares(images, 1)))):
        assert (other - expected).abs().max() > 0.1


def test_writes_two_data_sets_that_load(data, tmp_path, monkeypatch):
    few = first_images(data)
    monkeypatch.setattr(module.fashion_mnist, "load", lambda: few)
    module.main([str(tmp_path)])
    for name, side in SIDES.items():
        loaded = load_folder(tmp_path / name)
        for field in TENSORS:
            expected = getattr(few, field)
            expected = shuffle_squares(expected, side) if field.endswith("images") else expected
            assert torch.equal(getattr(loaded, field), expected)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot be written"):
        module.main([str(tmp_path / "file")])
