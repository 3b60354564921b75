"""How images were brought to the shape that a model saw: what whoever uses the model must do alike."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from chainward_shared.outside import Figure, Record

Fit = Literal["pad", "crop", "stretch"]
"""How another shape becomes square: the whole image between black bars, its centre, or with other proportions."""


class Preparation(Record):
    """The settings of a data file that decide the pixels of an image, beside its size and channels.

    Attributes
    ----------
    fit : how another shape becomes square, default "pad"
    scale : the values shown black and white in grey of more than 8 bits, in DICOM files in the units of the modality. None, the
        default: each DICOM file's own window; other images, and DICOM files without one, by a scale measured over their data set
    view : which of a DICOM file's several windows, from 1, default 1
    frame : which frame of DICOM files with several, from 1; None, the default: none of them
    orientation : whether DICOM pictures lie as stored, the default, or are turned to the standard position
    laterality : "left" or "right": DICOM images of the other side are mirrored; default "stored"
    """

    fit: Fit = "pad"
    scale: tuple[Figure, Figure] | None = None
    view: Annotated[int, Field(ge=1, le=10_000)] = 1
    frame: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    orientation: Literal["stored", "standard"] = "stored"
    laterality: Literal["stored", "left", "right"] = "stored"

    @model_validator(mode="after")
    def _scale_is_not_empty(self) -> Preparation:
        if self.scale is not None and not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale {self.scale[0]:g}, {self.scale[1]:g} is not from a lower to a higher value")
        return self
