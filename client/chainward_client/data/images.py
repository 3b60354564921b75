"""Decoding of images from a folder or a zip: every file is read whole, once, and brought to one shape."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from chainward_client.data.description import Fit, ImageShape
from chainward_shared.errors import DataError, nearest

_Decoded = TypeVar("_Decoded")
_NOT_FOUND = "{} not found"


def counted(kind: str, kinds: str, problems: Sequence[str]) -> str:
    """Return ``"3 unreadable images; first: ..."`` for problems of one kind; `kinds` is its plural."""
    return f"{len(problems)} {kind if len(problems) == 1 else kinds}; first: {problems[0]}"


class ImageProblem(Exception):
    """Why one file can't be used.

    Parameters
    ----------
    kind : what such files are counted as; "{}" stands for "image" or "images", "mask" or "masks"
    reason : what is wrong with this one
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _unreadable(reason: str) -> ImageProblem:
    return ImageProblem("unreadable {}", reason)


def _wrong_mode(mode: str) -> ImageProblem:
    return ImageProblem(
        "{} of a wrong mode",
        f"mode {mode}; expected grey (8 or 16 bits), RGB or palette: convert it",
    )


class ImageStore:
    """The files of a folder (with its sub-folders) or of a zip, found by name.

    Parameters
    ----------
    location : folder or zip
    extensions : endings beside those of images that a name may leave out, ".dcm" say

    Raises
    ------
    DataError
        If `location` is neither a folder nor a zip.
    """

    def __init__(self, location: Path, extensions: Collection[str] = ()) -> None:
        self.location = location
        self._zip: zipfile.ZipFile | None = None
        if location.is_dir():
            members = [
                (Path(folder) / name).relative_to(location).as_posix()
                for folder, _, names in os.walk(location)
                for name in names
            ]
        else:
            try:
                self._zip = zipfile.ZipFile(location)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{location} is neither a folder nor a whole zip ({error})") from None
            members = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        self._members = set(members)
        self._by_name: dict[str, list[str]] = {}
        endings = {*Image.registered_extensions(), *extensions}
        for member in sorted(self._members):
            path = PurePosixPath(member)
            for start in range(len(path.parts)):
                ending = PurePosixPath(*path.parts[start:])
                self._by_name.setdefault(str(ending), []).append(member)
                if path.suffix.lower() in endings:
                    self._by_name.setdefault(str(ending.with_suffix("")), []).append(member)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zip is not None:
            self._zip.close()

    @property
    def members(self) -> tuple[str, ...]:
        """Return the paths of all files inside the store, sorted."""
        return tuple(sorted(self._members))

    def find(self, name: str) -> str:
        """Return the path inside the store of the file called `name`; extension and folders may be left out.

        Raises
        ------
        ImageProblem
            If there is no such file, or more than one.
        """
        wanted = str(PurePosixPath(name.replace("\\", "/")))
        if wanted in self._members:
            return wanted
        found = self._by_name.get(wanted, [])
        if not found:
            raise ImageProblem(_NOT_FOUND, "no such file")
        if len(found) > 1:
            raise ImageProblem("{} with an ambiguous name", f"could be {' or '.join(found[:3])}; name it in full")
        return found[0]

    def suggestion(self, name: str) -> str:
        """Return ``" (did you mean 'X'?)"`` for the nearest file name, or an empty string."""
        return nearest(name, self._by_name)

    def read(self, member: str) -> bytes:
        """Return the bytes of a file that `find` named."""
        if self._zip is not None:
            return self._zip.read(member)
        return (self.location / member).read_bytes()


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


def open_image(data: bytes) -> Image.Image:
    """Return the fully decoded image, turned upright as its EXIF orientation says.

    Raises
    ------
    ImageProblem
        If the bytes are not one whole image.
    """
    if not data:
        raise _unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        # Cameras store a preview as a second frame (MPO); several frames elsewhere are several images.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        image.load()
        upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise _unreadable("not an image file of a known kind") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything inside a decoder
        raise _unreadable(str(error) or type(error).__name__) from None
    if frames > 1:
        raise _unreadable(f"{frames} images in one file; expected one")
    return upright


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return `image` in mode L (`channels` 1) or RGB (3).

    Transparent parts become black. 16-bit grey is scaled to 8 bits from 0..255, 0..4095 or 0..65535, the
    smallest range that holds the image's values: 12-bit detectors write 16-bit files.

    Raises
    ------
    ImageProblem
        If the mode is none of 1, L, LA, P, PA, RGB, RGBA or 16-bit grey.
    """
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        image = _eight_bits(image)
    elif mode in ("LA", "PA", "RGBA") or (mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    elif mode == "P":
        image = image.convert("RGB")
    elif mode not in ("1", "L", "RGB"):
        raise _wrong_mode(mode)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise _wrong_mode(f"{image.mode} with values {lowest} to {highest}")
    top = 255 if highest <= 255 else 4095 if highest <= 4095 else 65535
    return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8))


def load_images(
    location: Path, names: Sequence[str], rows: Sequence[int], shape: ImageShape
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Decode the images called `names`.

    Parameters
    ----------
    location : folder or zip
    names : one file name per image
    rows : the manifest's row of each, for messages
    shape : what every image is brought to

    Returns
    -------
    images : uint8 (n, channels, size, size)
    sizes : width and height of each original in pixels, once it is upright

    Raises
    ------
    DataError
        Counting the images that are missing, ambiguous, unreadable or of a wrong mode.
    """

    def decode(data: bytes, _: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = open_image(data)
        converted = to_channels(image, shape.channels)
        return _array(fit_image(converted, shape.size, shape.fit, resample=Image.Resampling.BICUBIC)), image.size

    decoded = _decode_all("image", location, names, rows, decode)
    images = np.empty((len(decoded), shape.channels, shape.size, shape.size), dtype=np.uint8)
    for position, (array, _) in enumerate(decoded):
        images[position] = array
    return torch.from_numpy(images), [size for _, size in decoded]


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
    present = [position for position, name in enumerate(names) if name is not None]

    def decode(data: bytes, index: int) -> np.ndarray:
        mask = to_channels(opened(data), 1)
        width, height = sizes[present[index]]
        # Rounding may cost a mask of lower resolution one pixel per side.
        if abs(mask.width * height - mask.height * width) > max(width, height):
            raise ImageProblem(
                "{} of other proportions than the image",
                f"{mask.width}x{mask.height}, the image is {width}x{height}",
            )
        values = np.asarray(mask)
        inside = Image.fromarray(((values > values.max() / 2) * 255).astype(np.uint8))
        if inside.size != (width, height):
            inside = inside.resize((width, height), Image.Resampling.NEAREST)
        inside = turned(inside, present[index])
        fitted = fit_image(inside, shape.size, shape.fit, resample=Image.Resampling.NEAREST)
        return np.asarray(fitted) // np.uint8(255)

    named = [str(names[position]) for position in present]
    decoded = _decode_all(
        "mask", location, named, [rows[position] for position in present], decode, extensions, quoted=quoted
    )
    masks = np.zeros((len(names), shape.size, shape.size), dtype=np.uint8)
    for position, array in zip(present, decoded, strict=True):
        masks[position] = array
    return torch.from_numpy(masks)


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
        where = placement(width, height, shape.size, shape.fit)
        columns = _covered(x0, x1, where.source[0::2], where.target[0::2])
        lines = _covered(y0, y1, where.source[1::2], where.target[1::2])
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


def _array(image: Image.Image) -> np.ndarray:
    """Return uint8 (channels, H, W)."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_all(
    what: str,
    location: Path,
    names: Sequence[str],
    rows: Sequence[int],
    decode: Callable[[bytes, int], _Decoded],
    extensions: Collection[str] = (),
    *,
    quoted: bool = True,
) -> list[_Decoded]:
    """Return `decode(bytes, position)` of every named file, or raise a DataError that counts all failures."""
    with ImageStore(location, extensions) as store:

        def attempt(position: int) -> _Decoded:
            try:
                member = store.find(names[position])
            except ImageProblem as problem:
                raise problem if quoted else ImageProblem(problem.kind, "no file, or several, of this name") from None
            try:
                data = store.read(member)
            except Exception as error:  # a bad checksum, an encrypted member, no permission
                reason = getattr(error, "strerror", None) or (str(error) if quoted else type(error).__name__)
                raise _unreadable(reason) from None
            return decode(data, position)

        def shown(position: int, problem: ImageProblem, first: bool) -> str:
            if not quoted:
                return f"row {rows[position]}: {problem}"
            name = names[position]
            hint = store.suggestion(name) if first and problem.kind == _NOT_FOUND else ""
            return f"row {rows[position]}, '{name}': {problem}{hint}"

        return attempt_all(what, location, len(names), attempt, shown)


def attempt_all(
    what: str,
    location: Path,
    count: int,
    attempt: Callable[[int], _Decoded],
    shown: Callable[[int, ImageProblem, bool], str],
) -> list[_Decoded]:
    """Return `attempt(position)` for all positions, several at a time.

    Parameters
    ----------
    what : "image" or "mask"
    location : folder or zip, for messages
    count : number of positions
    attempt : returns what a file becomes, or raises an ImageProblem
    shown : what to say of a position, its problem, and whether it is the first of this kind

    Raises
    ------
    DataError
        One line that counts every kind of problem and names the first of each.
    """

    def tried(position: int) -> _Decoded | ImageProblem:
        try:
            return attempt(position)
        except ImageProblem as problem:
            return problem

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(tried, range(count)))
    good: list[_Decoded] = []
    problems: dict[str, list[str]] = {}
    for position, result in enumerate(results):
        if not isinstance(result, ImageProblem):
            good.append(result)
            continue
        of_its_kind = problems.setdefault(result.kind, [])
        of_its_kind.append(shown(position, result, not of_its_kind))
    if problems:
        clauses = "; ".join(
            counted(kind.format(what), kind.format(what + "s"), found) for kind, found in problems.items()
        )
        raise DataError(" ".join(f"{location.name}: {clauses}".split()))  # names may hold line breaks
    return good
