"""Scaling and resizing of pixels, against plain loops."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from chainward_shared.preprocessing import RESIZED_AT_ONCE, resized, to_float


def random_images(n: int, channels: int = 1, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("images", [random_images(3), to_float(random_images(3))])
def test_images_of_the_size_asked_for_are_returned_untouched(images):
    assert resized(images, 32) is images


def test_half_the_size_is_the_triangle_weighted_mean_of_the_neighbourhood():
    image = random_images(1, size=8)
    found = resized(image, 4)[0, 0]
    values = image[0, 0].double()
    for row in range(4):
        for column in range(4):
            total = weight_sum = 0.0
            for y in range(8):
                for x in range(8):
                    # a triangle of two input pixels to each side of the output pixel's centre
                    down = max(0.0, 1 - abs(y + 0.5 - 2 * (row + 0.5)) / 2)
                    across = max(0.0, 1 - abs(x + 0.5 - 2 * (column + 0.5)) / 2)
                    total += down * across * float(values[y, x])
                    weight_sum += down * across
            assert abs(float(found[row, column]) - total / weight_sum) <= 0.5 + 1e-3


@pytest.mark.parametrize("size", [16, 24, 48, 100])
def test_bytes_are_resized_as_pillow_does_within_a_grey_level(size):
    image = random_images(1)
    expected = Image.fromarray(image[0, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
    found = resized(image, size)
    assert (found.dtype, found.shape) == (torch.uint8, (1, 1, size, size))
    difference = found[0, 0].short() - torch.tensor(list(expected.getdata())).reshape(size, size)
    assert difference.abs().max() <= 1


def test_many_images_are_resized_as_each_alone():
    images = random_images(RESIZED_AT_ONCE + 3, channels=3, size=8)
    found = resized(images, 12)
    assert torch.equal(found[-1:], resized(images[-1:], 12))
    assert torch.equal(found[:1], resized(images[:1], 12))


def test_floats_stay_floats_and_unrounded():
    views = to_float(random_images(2))
    found = resized(views, 16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, to_float(resized(random_images(2), 16)), rtol=0, atol=0.51 / 255 / 0.25)
    assert not torch.equal(found, to_float(resized(random_images(2), 16)))
