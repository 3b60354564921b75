"""Pictures as DICOM files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def as_dicom(pixels: np.ndarray, path: Path, *, study: str = "1.2.3.4", series: str = "1.2.3.4.5") -> None:
    """Write 8-bit pixels, (H, W) grey or (H, W, 3) RGB, as a DICOM file of a made-up patient, pixel for pixel."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    file.StudyInstanceUID, file.SeriesInstanceUID = study, series
    file.PatientID, file.PatientName, file.Modality = "made-up", "Made^Up", "OT"
    colour = pixels.ndim == 3
    file.PhotometricInterpretation, file.SamplesPerPixel = ("RGB", 3) if colour else ("MONOCHROME2", 1)
    if colour:
        file.PlanarConfiguration = 0
    file.Rows, file.Columns = pixels.shape[:2]
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.PixelRepresentation = 7, 0
    data = np.ascontiguousarray(pixels).tobytes()
    file.PixelData = data + b"\0" * (len(data) % 2)
    file.save_as(path, enforce_file_format=True)
