"""How the pictures come out of DICOM files: what the data file may say of it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from chainward_client.data.columns import Block


class OwnWindow(Block):
    """The values that become black (`center` - `width` / 2, and less) and white (`center` + `width` / 2, and more).

    In the units of the modality: Hounsfield units in CT.
    """

    center: FiniteFloat
    width: FiniteFloat = Field(gt=0)


class DicomBlock(Block):
    """How the pictures come out of DICOM files.

    Attributes
    ----------
    window : values shown from black to white; default: each file's own window or VOI LUT, and where a file of more than
        8 bits has none, from percentile 0.5 to 99.5 of its pixels
    view : which of a file's several windows or VOI LUTs, from 1, default 1
    frame : which frame of files with several, from 1; default: such files are refused
    orientation : "stored" (default), or "standard": turned and mirrored so that right in the picture is the patient's left,
        or posterior in a sagittal picture, and down is foot, or posterior in an axial picture
    laterality : "stored" (default), or "left" or "right": images of the other side are mirrored
    """

    window: OwnWindow | None = None
    view: int = Field(default=1, ge=1)
    frame: int | None = Field(default=None, ge=1)
    orientation: Literal["stored", "standard"] = "stored"
    laterality: Literal["stored", "left", "right"] = "stored"

    @model_validator(mode="after")
    def _one_window(self) -> Self:
        if self.window is not None and self.view != 1:
            raise ValueError(
                "both 'window' and 'view', which chooses among the files' own, are given; keep one of them"
            )
        return self
