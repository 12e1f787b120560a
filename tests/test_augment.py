"""Augmentation moves, mirrors and cuts out parts of images, each independently."""

import pytest
import torch
from torch.nn.functional import pad

from mixer.augment import cut_out, draw_views, view


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
