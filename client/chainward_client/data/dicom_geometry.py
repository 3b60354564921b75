"""How the picture of a DICOM file lies: square pixels, and the directions that the data file asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from chainward_client.data.dicom_file import Header
from chainward_client.data.dicom_format import MAX_PIXELS
from chainward_client.data.dicom_settings import DicomBlock
from chainward_client.data.unusable import ImageProblem, unreadable

MAX_ASPECT = 16.0
"""Pixels that are more oblong than this are a wrong PixelSpacing or PixelAspectRatio."""


@dataclass(frozen=True)
class Geometry:
    """How a picture came out of the stored pixels; masks and boxes of the stored pixels must follow. In the order done:

    Attributes
    ----------
    stored : width and height in stored pixels
    square : width and height with pixels made square
    transpose : rows and columns are exchanged
    mirror : left and right are exchanged
    flip : top and bottom are exchanged
    """

    stored: tuple[int, int]
    square: tuple[int, int]
    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of the picture."""
        return (self.square[1], self.square[0]) if self.transpose else self.square

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Return the picture of an image in stored pixels."""
        if image.size != self.square:
            image = image.resize(self.square, resample)
        if self.transpose:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image

    def box(self, box: np.ndarray) -> np.ndarray:
        """Return float (4,), x0, y0, x1, y1 in the picture, of a box in stored pixels; NaN stays NaN."""
        scale_x, scale_y = (new / old for new, old in zip(self.square, self.stored, strict=True))
        x0, y0, x1, y1 = (float(edge) for edge in box * np.array([scale_x, scale_y, scale_x, scale_y]))
        if self.transpose:
            x0, y0, x1, y1 = y0, x0, y1, x1
        width, height = self.size
        if self.mirror:
            x0, x1 = width - x1, width - x0
        if self.flip:
            y0, y1 = height - y1, height - y0
        # What reaches a pixel beyond the image, which is tolerated, may be several once pixels are square.
        return np.clip([x0, y0, x1, y1], 0, [width, height, width, height])


_AXES = {"L": "LR", "R": "LR", "A": "AP", "P": "AP", "H": "HF", "F": "HF"}
_STANDARD = {
    frozenset(("LR", "AP")): ("L", "P"),
    frozenset(("LR", "HF")): ("L", "F"),
    frozenset(("AP", "HF")): ("P", "F"),
}
"""Where rows and columns lead to in a picture of the standard orientation: as axial, coronal and sagittal slices are stored."""


def known_directions(header: Header) -> tuple[str, str] | None:
    """Return the direction of the body along a row and along a column of the stored pixels (PS3.3 C.7.6.1.1.1, C.7.6.2.1.1).

    One letter each: L(eft), R(ight), A(nterior), P(osterior), H(ead), F(oot) of the patient. Oblique slices get the nearest.
    None where the file does not say, says what can't be, or is of an animal.
    """
    cosines = header.group("PlaneOrientationSequence", "ImageOrientationPatient").numbers("ImageOrientationPatient")
    if len(cosines) == 6:
        letters = [_letter(cosines[:3]), _letter(cosines[3:])]
    else:
        value = header.get("PatientOrientation")
        if (
            header.word("AnatomicalOrientationType", ("QUADRUPED",))
            or not isinstance(value, Sequence)
            or len(value) != 2
        ):
            return None
        words = [str(word).strip().upper() for word in value]
        letters = [word[0] if word and set(word) <= set(_AXES) else "" for word in words]
    if "" in letters or _AXES[letters[0]] == _AXES[letters[1]]:
        return None
    return letters[0], letters[1]


def _letter(vector: list[float]) -> str:
    axis = int(np.argmax(np.abs(vector)))
    if vector[axis] == 0:
        return ""
    return ("LPH" if vector[axis] > 0 else "RAF")[axis]


def known_side(header: Header) -> str:
    """Return which of two paired organs the image shows, "" where the file does not say."""
    for source, keyword in (
        (header, "ImageLaterality"),
        (header.group("FrameAnatomySequence", "FrameLaterality"), "FrameLaterality"),
        (header, "Laterality"),
    ):
        if side := source.word(keyword, ("L", "R")):
            return side
    return ""


def geometry_of(
    header: Header, stored: tuple[int, int], directions: tuple[str, str] | None, side: str, block: DicomBlock
) -> Geometry:
    width, height = stored
    ratio = _aspect(header)
    if abs(ratio - 1) < 0.01:
        square = stored
    elif ratio > 1:
        square = (width, max(1, round(height * ratio)))
    else:
        square = (max(1, round(width / ratio)), height)
    if square[0] * square[1] > MAX_PIXELS:
        raise unreadable(f"{square[0]}x{square[1]} once its pixels are square; expected {MAX_PIXELS} pixels at most")
    transpose = mirror = flip = False
    if block.orientation == "standard":
        if directions is None:
            raise ImageProblem(
                "{} without orientation",
                "neither ImageOrientationPatient nor PatientOrientation says how it lies, and dicom.orientation is standard",
            )
        right, down = _STANDARD[frozenset(_AXES[letter] for letter in directions)]
        transpose = _AXES[directions[0]] != _AXES[right]
        along_rows, along_columns = directions[::-1] if transpose else directions
        mirror, flip = along_rows != right, along_columns != down
    if block.laterality != "stored":
        if not side:
            raise ImageProblem(
                "{} without laterality",
                f"neither ImageLaterality nor Laterality is L or R, and dicom.laterality is {block.laterality}",
            )
        mirror ^= side != {"left": "L", "right": "R"}[block.laterality]
    return Geometry(stored, square, transpose, mirror, flip)


def _aspect(header: Header) -> float:
    """Return height over width of a pixel: PixelSpacing (rows, then columns), else ImagerPixelSpacing, PixelAspectRatio.

    What can't be (0, below 0, more oblong than any detector's) is as if it were not there, and noted.
    """
    measures = header.group("PixelMeasuresSequence", "PixelSpacing")
    for source, keyword in (
        (measures, "PixelSpacing"),
        (header, "ImagerPixelSpacing"),
        (header, "PixelAspectRatio"),
    ):
        numbers = source.usable(keyword, "as if it were missing")
        if len(numbers) != 2:
            if numbers:
                header.note(f"{keyword} without two numbers: as if it were missing")
            continue
        if min(numbers) > 0 and 1 / MAX_ASPECT <= numbers[0] / numbers[1] <= MAX_ASPECT:
            return numbers[0] / numbers[1]
        header.note(
            f"{keyword} that can't be (0, below 0, or more oblong than {MAX_ASPECT:g} to 1): as if it were missing"
        )
    return 1.0
