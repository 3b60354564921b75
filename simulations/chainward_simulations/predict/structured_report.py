"""DICOM Structured Reports of a model's answers: a measurement report (TID 1500) for each series, written by highdicom.

A report is neither complete nor verified: nobody has read it. It says which model answered, by the digest of its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from chainward_shared import __version__
from chainward_shared.errors import DataError
from chainward_shared.outside import visible
from chainward_simulations.predict.answers import USE, Answer
from chainward_simulations.predict.dicom_headers import MANUFACTURER, header_of, require_highdicom
from chainward_simulations.predict.inputs import Batch, Problem
from chainward_simulations.predict.models import Predictor

if TYPE_CHECKING:
    from pydicom import Dataset

SCHEME = "99CHAINWARD"
"""Our own coding scheme, as 99... are: a model's classes have no codes that others know."""
_LONGEST = 64  # characters of a code's meaning (LO)


class StructuredReports:
    """Collects answers about DICOM files, and writes a report for each of their series.

    Parameters
    ----------
    predictor : whose answers they are
    folder : to write to

    Attributes
    ----------
    problems : files about which no report could be written, and why

    Raises
    ------
    DataError
        highdicom is not installed.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        require_highdicom()
        self._predictor, self._folder = predictor, folder
        self._series: dict[tuple[str, str], list[tuple[Dataset, Answer]]] = {}
        self.problems: list[Problem] = []

    def add(self, batch: Batch, found: list[Answer]) -> None:
        """Take the answers to a batch."""
        for path, answer in zip(batch.files, found, strict=True):
            try:
                header = header_of(path)
            except DataError as error:
                self.problems.append(Problem(answer.image, f"no Structured Report: {error}"))
                continue
            if header is None:
                self.problems.append(Problem(answer.image, "no Structured Report: not a DICOM file"))
                continue
            key = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
            self._series.setdefault(key, []).append((header, answer))

    def write(self) -> None:
        """Write a report for each series."""
        for number, (_, answered) in enumerate(sorted(self._series.items()), start=1):
            path = self._folder / f"series-{number:04d}.dcm"
            try:
                report_of(answered, self._predictor).save_as(path, enforce_file_format=True)
            except Exception as error:  # headers that can't be taken over raise nearly anything, which may quote them
                reason = f"no Structured Report: the file's header can't be taken over ({type(error).__name__})"
                self.problems += [Problem(answer.image, reason) for _, answer in answered]
                path.unlink(missing_ok=True)


def report_of(answered: list[tuple[Dataset, Answer]], predictor: Predictor) -> Any:
    """Return the report of a series.

    Parameters
    ----------
    answered : header and answer of each image, all of one series
    """
    from highdicom import UID, sr
    from pydicom.sr.codedict import codes

    record = predictor.record
    model = f"Chainward {record.run} {record.model}"
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=UID.from_uuid(str(UUID(predictor.sha256[:32]))),
        name=model,
        manufacturer_name=MANUFACTURER,
        serial_number=predictor.sha256,
    )
    context = sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )
    algorithm = sr.AlgorithmIdentification(
        name=model, version=predictor.sha256, parameters=[f"chainward {__version__}", USE], manufacturer=MANUFACTURER
    )
    content = sr.MeasurementReport(
        observation_context=context,
        procedure_reported=sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=[_group(header, answer, predictor, algorithm) for header, answer in answered],
    )
    report = sr.ComprehensiveSR(
        evidence=[header for header, _ in answered],
        content=content,
        series_instance_uid=UID(),
        series_number=99,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=False,
        is_final=False,
        is_verified=False,
        series_description=f"Chainward model {predictor.sha256[:8]}, {USE}",
    )
    report.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: a class may be called anything
    return report


def _group(header: Dataset, answer: Answer, predictor: Predictor, algorithm: Any) -> Any:
    from highdicom import sr

    record = predictor.record
    predicted = [
        sr.QualitativeEvaluation(_code("PREDICTED", "Predicted"), _code(f"C{record.classes.index(name) + 1}", name))
        for name in answer.classes
    ] or [sr.QualitativeEvaluation(_code("PREDICTED", "Predicted"), _code("NONE", "No finding"))]
    predicted += [
        sr.QualitativeEvaluation(_code("ABSTAINS", "The model abstains"), _code(f"REASON{number}", reason))
        for number, reason in enumerate(answer.reasons, start=1)
    ]
    predicted += [
        sr.QualitativeEvaluation(
            _code(f"O{k + 1}", f"Found at operating point: {name}"), _code(*(("YES", "Yes") if there else ("NO", "No")))
        )
        for k, (name, there) in enumerate(zip(record.classes, answer.found, strict=True))
        if there is not None
    ]
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(identifier=f"image {header.SOPInstanceUID}"),
        algorithm_id=algorithm,
        measurements=_measurements(answer, record.classes),
        qualitative_evaluations=predicted,
        source_images=[sr.SourceImageForMeasurementGroup.from_source_image(header)],
    )


def _measurements(answer: Answer, classes: list[str]) -> list[Any]:
    from highdicom import sr

    unit = sr.CodedConcept("1", "UCUM", "no units")
    kinds = [("P", "Probability", answer.probabilities)]
    if answer.calibrated is not None:
        kinds.append(("K", "Calibrated probability", answer.calibrated))
    return [
        sr.Measurement(name=_code(f"{letter}{k + 1}", f"{what}: {name}"), value=round(values[k], 4), unit=unit)
        for letter, what, values in kinds
        for k, name in enumerate(classes)
    ]


def _code(value: str, meaning: str) -> Any:
    from highdicom import sr

    shown = visible(meaning, _LONGEST).replace("\\", "/") or "-"
    return sr.CodedConcept(value, SCHEME, shown)
