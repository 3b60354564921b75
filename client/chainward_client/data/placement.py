"""How an image comes to lie in its square; also what a mask or box of the image must follow."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from chainward_shared.preparation import Fit


@dataclass(frozen=True)
class Placement:
    """Where an image comes to lie in its square; also what a mask or box of the image must follow.

    Attributes
    ----------
    source : left, top, right, bottom of the part that is kept, in pixels of the original
    target : left, top, right, bottom of where it lies, in pixels of the square
    """

    source: tuple[float, float, float, float]
    target: tuple[int, int, int, int]


def placement(width: int, height: int, size: int, fit: Fit) -> Placement:
    """Return how an image of `width` x `height` pixels lies in a square of `size` pixels."""
    whole = (0.0, 0.0, float(width), float(height))
    full = (0, 0, size, size)
    if fit == "stretch":
        return Placement(whole, full)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return Placement((left, top, left + side, top + side), full)
    scale = size / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return Placement(whole, (left, top, left + new_width, top + new_height))


def fit_image(image: Image.Image, size: int, fit: Fit, *, resample: Image.Resampling) -> Image.Image:
    """Return `image` (mode L or RGB) as a square of `size` pixels; bars are black."""
    where = placement(*image.size, size, fit)
    left, top, right, bottom = where.target
    resized = image.resize((right - left, bottom - top), resample, box=where.source)
    if resized.size == (size, size):
        return resized
    square = Image.new(image.mode, (size, size))
    square.paste(resized, (left, top))
    return square
