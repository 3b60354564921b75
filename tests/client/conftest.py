"""DICOM files as hospitals have them, written for one test."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")


def _gdcm_compressed(data: bytes, syntax: str, folder: Any) -> bytes:
    """Lossless JPEG, which pydicom does not encode."""
    import gdcm

    source, target = folder / "native.dcm", folder / "lossless.dcm"
    source.write_bytes(data)
    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return bytes(target.read_bytes())


@pytest.fixture
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Return the bytes of a DICOM file with these stored values (rows, columns) or (frames, rows, columns), or (..., 3).

    `bits` are those stored; `elements` replace or add elements by keyword, None removes one; `change` may do anything else.
    """
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import generate_uid

    def written(
        pixels: np.ndarray | None = None,
        *,
        syntax: str = EXPLICIT_LITTLE,
        bits: int | None = None,
        frames: int = 1,
        meta: dict[str, Any] | None = None,
        change: Callable[[Dataset], None] | None = None,
        **elements: Any,
    ) -> bytes:
        if pixels is None:
            pixels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
        allocated = pixels.dtype.itemsize * 8
        colour = pixels.shape[-1] == 3 and pixels.ndim == 3 + (frames > 1)
        rows, columns = pixels.shape[1:3] if frames > 1 else pixels.shape[:2]
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        dataset.SOPInstanceUID = generate_uid()
        dataset.PatientID = "P1"
        dataset.Modality = "OT"
        dataset.SamplesPerPixel = 3 if colour else 1
        dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            dataset.PlanarConfiguration = 0
        dataset.Rows, dataset.Columns = rows, columns
        dataset.BitsAllocated, dataset.BitsStored = allocated, bits or allocated
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
        if frames > 1:
            dataset.NumberOfFrames = frames
        big = syntax == "1.2.840.10008.1.2.2"
        data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
        dataset.add_new("PixelData", "OW" if allocated > 8 else "OB", data + b"\0" * (len(data) % 2))
        photometric = elements.pop("PhotometricInterpretation", None)
        if syntax == JPEG_BASELINE:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
            dataset.PixelData = encapsulate([buffer.getvalue()])
            dataset["PixelData"].is_undefined_length = True
            dataset.PhotometricInterpretation = "YBR_FULL" if colour else "MONOCHROME2"
            dataset.file_meta.TransferSyntaxUID = syntax
        elif (
            syntax.startswith("1.2.840.10008.1.2.4") and syntax not in JPEG_LOSSLESS
        ) or syntax == "1.2.840.10008.1.2.5":
            dataset.compress(syntax, generate_instance_uid=False)
        elif syntax not in JPEG_LOSSLESS:
            dataset.file_meta.TransferSyntaxUID = syntax
        if photometric is not None:
            dataset.PhotometricInterpretation = photometric
        for keyword, value in elements.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        if change is not None:
            change(dataset)
        for keyword, value in (meta or {}).items():
            setattr(dataset.file_meta, keyword, value)
        buffer = io.BytesIO()
        written_as = dataset.file_meta.TransferSyntaxUID
        dataset.save_as(
            buffer,
            enforce_file_format=True,
            implicit_vr=written_as == "1.2.840.10008.1.2" if written_as.is_private else None,
            little_endian=True if written_as.is_private else None,
        )
        if syntax in JPEG_LOSSLESS:
            return _gdcm_compressed(buffer.getvalue(), syntax, tmp_path_factory.mktemp("lossless"))
        return buffer.getvalue()

    return written
