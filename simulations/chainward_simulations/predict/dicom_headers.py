"""The headers of the DICOM files that reports and secondary captures belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chainward_client.data.dicom_file import is_dicom, require_pydicom
from chainward_shared.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
MANUFACTURER = "Chainward"


def header_of(path: Path | None) -> Dataset | None:
    """Return a DICOM file's header, with what every object that refers to it takes over; None of a file of another kind.

    Raises
    ------
    DataError
        It lacks a UID without which nothing can refer to it.
    """
    if path is None:
        return None
    with path.open("rb") as file:
        if not is_dicom(file.read(132)):
            return None
    require_pydicom()
    from pydicom import dcmread

    header = dcmread(path, stop_before_pixels=True)
    missing = [keyword for keyword in NEEDED if not str(header.get(keyword, "")).strip()]
    if missing:
        raise DataError(f"no {missing[0]}, so that no report can refer to it")
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
        *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    ):
        if keyword not in header:
            setattr(header, keyword, "")
    return header


def require_highdicom() -> None:
    """Check that highdicom is there.

    Raises
    ------
    DataError
        It is not installed.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise DataError(
            "DICOM output needs highdicom, which is not installed; pip install 'chainward[report]'"
        ) from None
