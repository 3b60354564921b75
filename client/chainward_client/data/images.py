"""Decoding of images from a folder or a zip: every file is read whole, once, and brought to one square shape."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from chainward_client.data.description import ImageShape
from chainward_client.data.image_store import ImageStore, opened
from chainward_client.data.scale import Scale
from chainward_client.data.unusable import ImageProblem, attempt_all, unreadable
from chainward_shared.preparation import Fit

_Decoded = TypeVar("_Decoded")
_Number = TypeVar("_Number", int, float)
_Edges = tuple[_Number, _Number, _Number, _Number]


def open_image(data: bytes) -> Image.Image:
    """Return the fully decoded image, turned upright as its EXIF orientation says.

    Raises
    ------
    ImageProblem
        If the bytes are not one whole image.
    """
    if not data:
        raise unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        # Cameras store a preview as a second frame (MPO); several frames elsewhere are several images.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise unreadable("not an image file of a known kind") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything inside a decoder
        raise unreadable(str(error) or type(error).__name__) from None
    if frames > 1:
        raise unreadable(f"{frames} images in one file; expected one")
    return upright


def deep(image: Image.Image) -> bool:
    """Return whether grey has more than 8 bits, so that a scale must say which value is black and which white."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def to_channels(image: Image.Image, channels: int, scale: Callable[[], Scale]) -> Image.Image:
    """Return `image` in mode L (`channels` 1) or RGB (3).

    Transparent parts become black. Grey of more than 8 bits is brought to 8 by `scale`, that of its data set.

    Raises
    ------
    ImageProblem
        If the mode is none of 1, L, LA, P, PA, RGB, RGBA or grey of more than 8 bits, or values aren't finite.
    """
    mode = image.mode
    if deep(image):
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise unreadable("pixels that are not finite numbers")
        image = Image.fromarray(scale().eight_bits(values))
    elif mode in ("LA", "PA", "RGBA") or (mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    elif mode == "P":
        image = image.convert("RGB")
    elif mode not in ("1", "L", "RGB"):
        raise ImageProblem("{} of a wrong mode", f"mode {mode}; expected grey, RGB or palette: convert it")
    return image.convert("L" if channels == 1 else "RGB")


def measured_values(store: ImageStore, name: str) -> np.ndarray | None:
    """Return the pixels of an image of more than 8 bits; None of another, or of one that can't be read."""
    try:
        with Image.open(io.BytesIO(store.read(store.find(name)))) as image:
            if not deep(image):
                return None
            values: np.ndarray = np.asarray(image)
            return values if np.isfinite(values).all() else None
    except MemoryError:
        raise
    except Exception:  # decoding the image for training says what is wrong with it
        return None


def load_images(
    location: Path, names: Sequence[str], rows: Sequence[int], shape: ImageShape, scale: Callable[[], Scale]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Decode the images called `names`.

    Parameters
    ----------
    location : folder or zip
    names : one file name per image
    rows : the manifest's row of each, for messages
    shape : what every image is brought to
    scale : returns the data set's scale of grey of more than 8 bits

    Returns
    -------
    images : uint8 (n, channels, size, size)
    sizes : width and height of each original in pixels, once it is upright

    Raises
    ------
    UnusableFiles
        Counting the images that are missing, ambiguous, unreadable or of a wrong mode.
    """

    def decode(data: bytes, _: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = open_image(data)
        return fitted(to_channels(image, shape.channels, scale), shape), image.size

    decoded = [found for found in decode_all("image", location, names, rows, decode) if found is not None]
    return stacked([array for array, _ in decoded], shape), [size for _, size in decoded]


def fitted(image: Image.Image, shape: ImageShape) -> np.ndarray:
    """Return an image of mode L or RGB as it is trained on, uint8 (channels, size, size)."""
    image = image.convert("L" if shape.channels == 1 else "RGB")
    array = np.asarray(fit_image(image, shape.size, shape.fit, resample=Image.Resampling.BICUBIC))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def placement(width: int, height: int, size: int, fit: Fit) -> tuple[_Edges[float], _Edges[int]]:
    """Return how an image of `width` x `height` pixels lies in a square of `size` pixels; masks and boxes must follow.

    Returns
    -------
    source : left, top, right, bottom of the part that is kept, in pixels of the original
    target : left, top, right, bottom of where it lies, in pixels of the square
    """
    whole = (0.0, 0.0, float(width), float(height))
    full = (0, 0, size, size)
    if fit == "stretch":
        return whole, full
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side), full
    scale = size / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    x, y = (size - new_width) // 2, (size - new_height) // 2
    return whole, (x, y, x + new_width, y + new_height)


def fit_image(image: Image.Image, size: int, fit: Fit, *, resample: Image.Resampling) -> Image.Image:
    """Return `image` (mode L or RGB) as a square of `size` pixels; bars are black."""
    source, (left, top, right, bottom) = placement(*image.size, size, fit)
    resized = image.resize((right - left, bottom - top), resample, box=source)
    if resized.size == (size, size):
        return resized
    square = Image.new(image.mode, (size, size))
    square.paste(resized, (left, top))
    return square


def stacked(arrays: Sequence[np.ndarray], shape: ImageShape) -> torch.Tensor:
    """Return what `fitted` made of images as one tensor, (n, channels, size, size)."""
    images = np.array(arrays, dtype=np.uint8).reshape(-1, shape.channels, shape.size, shape.size)
    return torch.from_numpy(images)


def decode_all(
    what: str,
    location: Path,
    names: Sequence[str | None],
    rows: Sequence[int],
    decode: Callable[[bytes, int], _Decoded],
    extensions: Collection[str] = (),
    *,
    quoted: bool = True,
) -> list[_Decoded | None]:
    """Return `decode(bytes, position)` of every file, None where there is no name, or raise the UnusableFiles."""
    with opened(location, extensions) as store:

        def attempt(position: int) -> _Decoded | None:
            name = names[position]
            if name is None:
                return None
            try:
                member = store.find(name)
            except ImageProblem as problem:
                raise problem if quoted else ImageProblem(problem.kind, "no file, or several, of this name") from None
            return decode(store.read(member, quoted=quoted), position)

        return attempt_all(what, location, rows, attempt, names if quoted else (), store.suggestion)
