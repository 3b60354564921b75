"""What the headers of DICOM files tell beside the picture: who is in them, which is counted and never passed on, and oddities.

Nothing here returns a value of a header: what comes out are keywords of the standard, counts, letters of closed lists, sizes in
pixels, digests under a key that is drawn anew in every process and never stored, and, as a patient's name within the hospital,
a digest of PatientID.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chainward_client.data.dicom_picture import Origin
from chainward_client.data.unusable import unreadable

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset
    from pydicom.dataelem import DataElement, RawDataElement

# The attributes of PS3.15 Table E.1-1 (Basic Application Level Confidentiality Profile) that name or number a person, a
# visit, an order, a place or a day. Those that only describe a person (age, sex, weight) and UIDs are left out: every file
# has them. Any other element that holds a person's name (VR PN) counts as well.
_PATIENT = """
PatientName PatientID IssuerOfPatientID OtherPatientIDs OtherPatientIDsSequence OtherPatientNames PatientBirthName
PatientMotherBirthName PatientBirthDate PatientBirthTime PatientDeathDateInAlternativeCalendar
PatientBirthDateInAlternativeCalendar PatientAddress PatientTelephoneNumbers PatientTelecomInformation
PatientInsurancePlanCodeSequence PatientReligiousPreference PatientComments PatientInstitutionResidence
AdditionalPatientHistory EthnicGroup Occupation MilitaryRank BranchOfService CountryOfResidence RegionOfResidence
MedicalRecordLocator ResponsiblePerson ResponsibleOrganization
"""
_STUDY = """
AccessionNumber StudyID AdmissionID AdmittingDate CurrentPatientLocation ServiceEpisodeID
FillerOrderNumberImagingServiceRequest PlacerOrderNumberImagingServiceRequest PerformedProcedureStepID
RequestedProcedureID ScheduledProcedureStepID StudyDate SeriesDate AcquisitionDate AcquisitionDateTime ContentDate
PerformedProcedureStepStartDate ScheduledProcedureStepStartDate DateOfSecondaryCapture
"""
_PLACE = """
ReferringPhysicianName ReferringPhysicianAddress ReferringPhysicianTelephoneNumbers PhysiciansOfRecord
PerformingPhysicianName OperatorsName NameOfPhysiciansReadingStudy RequestingPhysician RequestingService
InstitutionName InstitutionAddress InstitutionalDepartmentName InstitutionCodeSequence StationName DeviceSerialNumber
PerformedStationName ScheduledStationName
"""
_FREE_TEXT = """
ImageComments StudyComments VisitComments RequestedProcedureComments TextComments TextString
"""
IDENTIFYING = frozenset((_PATIENT + _STUDY + _PLACE + _FREE_TEXT).split())

_MODALITIES = "CR CT DX ES GM IO MG MR NM OP OPT OT PT PX RF SM US XA XC"
_MAX_DEPTH = 8
_KEY = secrets.token_bytes(32)


@dataclass(frozen=True)
class Facts:
    """What is counted of one file.

    Attributes
    ----------
    identifying : keywords of elements with a value that identify
    private : it has elements that are not of the standard
    declared_clean : PatientIdentityRemoved is YES
    burned_in : BurnedInAnnotation is YES
    overlays : it has overlays, which are not shown
    modality : one of the common ones, or ""
    instance, person : digests of SOPInstanceUID and PatientID, as of `digest`; None where missing
    origin : how its picture came about
    unreadable : elements of it can't be read, and may identify
    """

    identifying: frozenset[str]
    private: bool
    declared_clean: bool
    burned_in: bool
    overlays: bool
    modality: str
    instance: str | None
    person: str | None
    origin: Origin
    unreadable: bool = False


def facts(dataset: FileDataset, origin: Origin) -> Facts:
    """Return what is counted of a parsed file.

    Raises
    ------
    ImageProblem
        If its elements are damaged.
    """
    from pydicom.datadict import keyword_for_tag

    identifying: set[str] = set()
    private = overlays = unreadable = False
    for element in _elements(dataset, 0):
        if element is None:
            unreadable = True
            continue
        private |= element.tag.is_private
        overlays |= 0x6000 <= element.tag.group <= 0x60FF and element.tag.element == 0x3000
        keyword = "" if element.tag.is_private else keyword_for_tag(element.tag)
        names = keyword in IDENTIFYING or (bool(keyword) and _representation(element) == "PN")
        if names and _has_value(element):
            identifying.add(keyword)
    return Facts(
        identifying=frozenset(identifying),
        private=private,
        declared_clean=text_of(dataset, "PatientIdentityRemoved").upper() == "YES",
        burned_in=text_of(dataset, "BurnedInAnnotation").upper() == "YES",
        overlays=overlays,
        modality=found if (found := text_of(dataset, "Modality").upper()) in _MODALITIES.split() else "",
        instance=digest(text_of(dataset, "SOPInstanceUID")),
        person=digest(text_of(dataset, "PatientID").casefold()),
        origin=origin,
        unreadable=unreadable,
    )


def person_name(dataset: Dataset) -> str | None:
    """Return a name for a file's patient that is the same in every process, None where PatientID is missing or empty.

    Case and blanks around the id play no role. The issuer plays none either: two patients taken for one do no harm, one taken for
    two may be on both sides of a split. The name stays at the hospital, as patients of a column do; the id itself is not kept in
    memory.

    Raises
    ------
    ImageProblem
        If it is damaged.
    """
    text = text_of(dataset, "PatientID").casefold()
    return f"patient-{hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=8).hexdigest()}" if text else None


def digest_with(key: bytes) -> None:
    """Make digests comparable with those of other processes that were given the same `key`, 32 bytes."""
    global _KEY
    _KEY = key


def digest(text: str) -> str | None:
    """Return a digest that can be compared within this process only (or as `digest_with` says), None of an empty text."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), key=_KEY, digest_size=16).hexdigest() if text else None


def text_of(dataset: Dataset, keyword: str) -> str:
    """Return the text of an element, without blanks around it; an empty one where it is missing."""
    try:
        value = dataset.get(keyword)
        return "" if value is None else str(value).strip(" \0")
    except MemoryError:
        raise
    except Exception:
        raise unreadable(f"{keyword} can't be read") from None


def _elements(dataset: Dataset, depth: int) -> Iterator[DataElement | RawDataElement | None]:
    """Yield all elements, also those within sequences, without converting values; None for one that can't be read."""
    for tag in dataset.keys():  # noqa: SIM118 (a Dataset iterates over converted elements)
        try:
            element = dataset.get_item(tag)
            if element is None:
                continue
            nested = []
            if depth < _MAX_DEPTH and not element.tag.is_private and _representation(element) == "SQ":
                nested = list(dataset[tag].value)
        except MemoryError:
            raise
        except Exception:
            yield None
            continue
        yield element
        for item in nested:
            yield from _elements(item, depth + 1)


def _representation(element: DataElement | RawDataElement) -> str:
    from pydicom.datadict import dictionary_VR

    if element.VR not in (None, "UN"):
        return str(element.VR)
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return ""


def _has_value(element: DataElement | RawDataElement) -> bool:
    value = element.value
    if isinstance(value, bytes):
        return bool(value.strip(b" \0^=\\"))
    try:
        return value is not None and (len(value) > 0 if hasattr(value, "__len__") else True)
    except Exception:
        return True


def notes(found: Sequence[Facts], *, view: int = 1, own_window: bool = False) -> tuple[str, ...]:
    """Return what a person should know about the files of a site, a line each: keywords and counts, no value of a header."""
    fields = Counter(keyword for file in found for keyword in file.identifying)
    lines = []
    if fields:
        listed = ", ".join(
            f"{keyword} {count}" for keyword, count in sorted(fields.items(), key=lambda kv: (-kv[1], kv[0]))
        )
        lines.append(
            f"{_files(sum(bool(file.identifying) for file in found))} of {len(found)} with identifying header fields, none of "
            f"which is kept, written or sent: {listed}"
        )
    for what, having in (
        ("private header fields, which are not read", [file.private for file in found]),
        (
            "burned-in annotation (BurnedInAnnotation YES): the pixels may show names",
            [file.burned_in for file in found],
        ),
        ("overlays, which are not shown", [file.overlays for file in found]),
        (
            "pixels that are not square: made square",
            [file.origin.geometry.stored != file.origin.geometry.square for file in found],
        ),
        ("pixels that are all alike", [file.origin.constant for file in found]),
        (
            f"several windows or VOI LUTs: number {view} taken (dicom.view)",
            [file.origin.views > 1 and not own_window for file in found],
        ),
        (
            "more than 8 bits and no window: shown by the scale of the data set (dicom.window or image.scale declares it)",
            [file.origin.contrast == "scale of the set" for file in found],
        ),
        ("elements that can't be read, and that no picture needs", [file.unreadable for file in found]),
        *(
            (f"something odd, which does no harm: {oddity}", [oddity in file.origin.oddities for file in found])
            for oddity in sorted(set().union(*(file.origin.oddities for file in found)))
        ),
    ):
        if any(having):
            lines.append(f"{_files(sum(having))} of {len(found)} with {what}")
    clean = sum(file.declared_clean for file in found)
    if clean and fields:
        lines.append(f"{_files(clean)} declared to be without identity (PatientIdentityRemoved YES)")
    return (*lines, *_mixtures(found))


def _mixtures(found: Sequence[Facts]) -> Iterator[str]:
    """Yield a line for everything in which files are unlike each other that should be alike, and for copies."""
    for what, kinds in (
        ("modalities", [file.modality or "another" for file in found]),
        ("photometric interpretations", [file.origin.photometric for file in found]),
        ("orientations (along rows, along columns)", [file.origin.directions or "unknown" for file in found]),
        ("lateralities", [file.origin.side or "unknown" for file in found]),
    ):
        if len(counts := Counter(kinds)) > 1:
            yield f"mixed {what}: {', '.join(f'{kind} {count}' for kind, count in counts.most_common())}"
    sizes = {file.origin.geometry.stored for file in found}
    if len(sizes) > 1:
        low, high = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        yield f"{len(sizes)} different sizes of DICOM images, {low[0]}x{low[1]} to {high[0]}x{high[1]}"
    copies = len(found) - len({file.instance or index for index, file in enumerate(found)})
    if copies:
        yield f"{_files(copies)} with the SOPInstanceUID of another: copies of one image"


def shared_persons(found: Sequence[Facts], patients: Sequence[str]) -> int:
    """Return how many patients of the manifest share a PatientID with another one; 0 where all files have the same."""
    patients_of: dict[str, set[str]] = {}
    for file, patient in zip(found, patients, strict=True):
        if file.person is not None:
            patients_of.setdefault(file.person, set()).add(patient)
    if len(patients_of) == 1:  # what a de-identification wrote into all
        return 0
    return len({patient for several in patients_of.values() if len(several) > 1 for patient in several})


def _files(count: int) -> str:
    return f"{count} DICOM file{'' if count == 1 else 's'}"
