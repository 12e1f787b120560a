"""Augmentation moves, mirrors and cuts out parts of images, each independently."""

import pytest
import torch
from torch.nn.functional import pad

from mixer.augment import cut_out, draw_views, view, warp


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(1, 256, (400, 28, 28), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_draws_every_flip_and_shift(images):
    generator = torch.Generator().manual_seed(0)
    augmented = view(images, draw_views(len(images), generator, flip=True, shift=2), shift=2)
    drawn = set()
    for image, result in zip(pad(images, (2, 2, 2, 2)), augmented, strict=True):
        crops = {(down, right): image[down : down + 28, right : right + 28] for down in range(5) for right in range(5)}
        views = {(*move, flip): crop.flip(1) if flip else crop for move, crop in crops.items() for flip in (0, 1)}
        matches = [key for key, candidate in views.items() if torch.equal(candidate, result)]
        assert len(matches) == 1, "not a view of its image"
        drawn.update(matches)
    assert len(drawn) == 50


def test_draws_nothing_from_the_generator_without_flip_and_shift(images):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(view(images, draw_views(len(images), generator, flip=False, shift=0), shift=0), images)
    assert torch.equal(generator.get_state(), before)


def test_moves_and_cuts_all_channels_of_an_image_alike(images):
    colours, generator = images.view(100, 4, 28, 28)[:, :3], torch.Generator()
    views = draw_views(100, generator, flip=True, shift=2)
    for change in (lambda i: view(i, views, 2), lambda i: cut_out(i, generator.manual_seed(0), 7)):
        assert torch.equal(change(colours), torch.stack([change(one) for one in colours.unbind(1)], dim=1))


@pytest.mark.parametrize("side", [1, 2, 4, 7])
def test_cuts_out_a_square_around_any_pixel(side):
    images = torch.full((12_000, 28, 28), 9, dtype=torch.uint8)
    cut = cut_out(images, torch.Generator().manual_seed(0), side) == 0
    tall, wide = cut.any(2).sum(1), cut.any(1).sum(1)
    assert torch.equal(cut.sum((1, 2)), tall * wide), "not a rectangle"
    assert tall.max() == wide.max() == side and tall.min() >= side // 2
    assert cut.any(0).all(), "some pixel is never cut"


def test_warps_by_maps_within_the_given_strength(images):
    """An image whose pixels are their own coordinates shows the map that was applied to it."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    for coordinate, others in ((rows, 0), (columns, 1)):
        generator = torch.Generator().manual_seed(0)
        ramp = (coordinate + 100).expand(500, 28, 28)
        warped = warp(ramp, generator, flip=False, shift=2, strength=0.1)
        centre = warped[:, 13:15, 13:15].mean((1, 2)) - 113.5
        assert -2 <= centre.min() < -1.8 and 1.8 < centre.max() <= 2
        slopes = warped[:, 14, 14] - warped[:, 13, 14], warped[:, 14, 14] - warped[:, 14, 13]
        own, other = slopes[others], slopes[1 - others]
        assert 0.9 - 1e-4 <= own.min() < 0.91 and 1.09 < own.max() <= 1.1 + 1e-4
        assert -0.1 - 1e-4 <= other.min() < -0.09 and 0.09 < other.max() <= 0.1 + 1e-4


def test_warping_by_nothing_changes_nothing_but_flips(images):
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(warp(images, generator, flip=False, shift=0, strength=0.0), images.float(), atol=1e-3)
    flipped = warp(images, generator, flip=True, shift=0, strength=0.0)
    same = [torch.allclose(one, image.float(), atol=1e-3) for one, image in zip(flipped, images, strict=True)]
    turned = [torch.allclose(one, image.flip(1).float(), atol=1e-3) for one, image in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True)) and 150 < sum(same) < 250
