"""Regions of interest: masks and boxes that come to lie as their images do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chainward_client.data.description import ImageShape
from chainward_client.data.images import decode_all, deep, fit_image, open_image, placement, to_channels
from chainward_client.data.scale import Scale
from chainward_client.data.unusable import ImageProblem, counted
from chainward_shared.errors import DataError


def load_masks(
    location: Path,
    names: Sequence[str | None],
    rows: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    shape: ImageShape,
    *,
    extensions: Collection[str] = (),
    opened: Callable[[bytes], Image.Image] = open_image,
    turned: Callable[[Image.Image, int], Image.Image] = lambda mask, _: mask,
    quoted: bool = True,
) -> torch.Tensor:
    """Decode the masks called `names` and place them as their images are.

    A pixel is inside where the mask is brighter than half of its own maximum: both 0/1 and 0/255 are common.
    A case without a mask (None) gets all zeros.

    Parameters
    ----------
    location, names, rows : as in `load_images`
    sizes : width and height of each original image in pixels
    shape : the images' shape; its channels play no role
    extensions : as in `ImageStore`
    opened : decodes a mask
    turned : turns a mask of the original's size, and its position among `names`, as its image was turned
    quoted : whether messages may name files

    Returns
    -------
    uint8 (n, size, size), 1 inside

    Raises
    ------
    DataError
        As `load_images`, and if a mask is not of its image's proportions.
    """

    def decode(data: bytes, position: int) -> np.ndarray:
        mask = opened(data)
        width, height = sizes[position]
        # Rounding may cost a mask of lower resolution one pixel per side.
        if abs(mask.width * height - mask.height * width) > max(width, height):
            raise ImageProblem(
                "{} of other proportions than the image",
                f"{mask.width}x{mask.height}, the image is {width}x{height}",
            )
        values = np.asarray(mask if deep(mask) else to_channels(mask, 1, _no_scale))
        inside = Image.fromarray(((values > values.max() / 2) * 255).astype(np.uint8))
        if inside.size != (width, height):
            inside = inside.resize((width, height), Image.Resampling.NEAREST)
        inside = turned(inside, position)
        fitted = fit_image(inside, shape.size, shape.fit, resample=Image.Resampling.NEAREST)
        return np.asarray(fitted) // np.uint8(255)

    masks = np.zeros((len(names), shape.size, shape.size), dtype=np.uint8)
    decoded = decode_all("mask", location, names, rows, decode, extensions, quoted=quoted)
    for mask, array in zip(masks, decoded, strict=True):
        if array is not None:
            mask[:] = array
    return torch.from_numpy(masks)


def _no_scale() -> Scale:
    raise AssertionError("a mask is inside where it is brighter than half of its own maximum, whatever its bits")


def box_masks(
    boxes: np.ndarray, rows: Sequence[int], sizes: Sequence[tuple[int, int]], shape: ImageShape
) -> torch.Tensor:
    """Draw boxes as masks that lie as their images do.

    Parameters
    ----------
    boxes : float (n, 4), x0, y0, x1, y1: the left, upper, right and lower edge in pixels of the original,
        upright image (a box over the whole image is 0, 0, width, height); NaN for a case without a box
    rows : the manifest's row of each, for messages
    sizes : width and height of each original image in pixels
    shape : the images' shape; its channels play no role

    Returns
    -------
    uint8 (n, size, size), 1 where the pixel's centre is inside, and at least in one pixel; all zeros without
    a box, and for a box that `crop` cuts off

    Raises
    ------
    DataError
        Counting the boxes that reach beyond their image (by more than one pixel) or have no area.
    """
    masks = np.zeros((len(boxes), shape.size, shape.size), dtype=np.uint8)
    empty: list[str] = []
    outside: list[str] = []
    for mask, box, row, (width, height) in zip(masks, boxes, rows, sizes, strict=True):
        if np.isnan(box).all():
            continue
        x0, y0, x1, y1 = (float(edge) for edge in box)
        shown = f"row {row}: {x0:g}, {y0:g}, {x1:g}, {y1:g}"
        if not (x0 < x1 and y0 < y1):
            empty.append(f"{shown}; expected x0 < x1 and y0 < y1")
            continue
        if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
            outside.append(f"{shown}, the image is {width}x{height}; expected pixels of the original image")
            continue
        source, target = placement(width, height, shape.size, shape.fit)
        columns = _covered(x0, x1, source[0::2], target[0::2])
        lines = _covered(y0, y1, source[1::2], target[1::2])
        mask[lines, columns] = 1
    problems = []
    if empty:
        problems.append(counted("box without area", "boxes without area", empty))
    if outside:
        problems.append(counted("box beyond its image", "boxes beyond their images", outside))
    if problems:
        raise DataError("; ".join(problems))
    return torch.from_numpy(masks)


def _covered(low: float, high: float, source: tuple[float, ...], target: tuple[int, ...]) -> slice:
    """Return which pixels of one axis have their centres between `low` and `high` of the original."""
    scale = (target[1] - target[0]) / (source[1] - source[0])
    start, stop = (target[0] + (edge - source[0]) * scale for edge in (low, high))
    first, last = int(np.ceil(start - 0.5)), int(np.ceil(stop - 0.5))
    if first >= last:  # thinner than a pixel: the pixel that holds the middle
        first = int(np.floor((start + stop) / 2))
        last = first + 1
    return slice(min(max(first, target[0]), target[1]), min(max(last, target[0]), target[1]))
