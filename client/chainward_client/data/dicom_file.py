"""One DICOM file as its elements: parsing, and typed access that never quotes a value.

No value of a header but numbers of the image format and words of closed lists may be in what these modules return or raise:
messages of pydicom and of the decoders quote values, and are never passed on.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from chainward_client.data.unusable import ImageProblem, unreadable
from chainward_shared.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

PHOTOMETRIC = (
    "MONOCHROME1",
    "MONOCHROME2",
    "PALETTE COLOR",
    "RGB",
    "YBR_FULL",
    "YBR_FULL_422",
    "YBR_PARTIAL_422",
    "YBR_PARTIAL_420",
    "YBR_ICT",
    "YBR_RCT",
    "XYB",
    "ARGB",
    "CMYK",
    "HSV",
)


@lru_cache(maxsize=1)
def require_pydicom() -> None:
    """Import pydicom and silence it: its warnings and log lines quote values of headers.

    Raises
    ------
    DataError
        If it is not installed.
    """
    try:
        import pydicom.config
    except ImportError:
        raise DataError("format dicom needs pydicom, which is not installed; pip install 'chainward[dicom]'") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    # Headers break rules of length and alphabet all the time; what is used of them is checked here.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


def parse(data: bytes) -> FileDataset:
    """Return the parsed file; elements are converted when they are asked for.

    Raises
    ------
    ImageProblem
        If the bytes are no DICOM file, or one whose elements can't be told apart.
    """
    from pydicom import dcmread

    if not data:
        raise unreadable("the file is empty")
    with no_values_told():
        dataset = dcmread(io.BytesIO(data))
        for tag in [tag for tag in dataset.keys() if tag.group == 0xFFFE]:  # noqa: SIM118 (iterating converts elements)
            del dataset[tag]  # a delimiter that delimits nothing
            dataset.stray_delimiter = True
        return dataset


@contextmanager
def no_values_told() -> Iterator[None]:
    """Turn whatever reading a file raises into an ImageProblem, whose words quote no value."""
    from pydicom.errors import InvalidDicomError

    try:
        yield
    except MemoryError:
        raise
    except InvalidDicomError:
        raise unreadable("not a DICOM file (no DICM at byte 128)") from None
    except Exception as error:  # a damaged file raises nearly anything; its text may quote a value
        if reason := getattr(error, "strerror", None):
            raise unreadable(reason) from None
        raise unreadable(f"damaged ({type(error).__name__} while its elements were read)") from None


def is_dicom(data: bytes) -> bool:
    """Return whether the bytes begin as a DICOM file does."""
    return data[128:132] == b"DICM"


class Header:
    """Elements of a file by keyword, for one frame: those of its functional groups count as if they stood in the file.

    Parameters
    ----------
    dataset : the file, or an item of a sequence
    frame : index of the frame
    oddities : where what is odd but does no harm is noted, in words without any value; shared by all that come from one file
    """

    def __init__(self, dataset: Dataset, frame: int, oddities: set[str] | None = None) -> None:
        self.dataset = dataset
        self._frame = frame
        self.oddities = set() if oddities is None else oddities
        if getattr(dataset, "stray_delimiter", False):
            self.note("a delimiter that delimits nothing: left out")

    def note(self, oddity: str) -> None:
        """Note what is odd but does no harm."""
        self.oddities.add(oddity)

    def get(self, keyword: str) -> Any:
        """Return the converted value, None where it is missing or empty."""
        return converted(self.dataset, keyword)

    def group(self, sequence: str, keyword: str) -> Header:
        """Return the functional group of the frame where it has `keyword`, else the file itself (PS3.3 C.7.6.16)."""
        for groups, index in (("PerFrameFunctionalGroupsSequence", self._frame), ("SharedFunctionalGroupsSequence", 0)):
            items = self.get(groups)
            if _is_sequence(items) and len(items) > index:
                found = converted(items[index], sequence)
                if _is_sequence(found) and found and converted(found[0], keyword) is not None:
                    return Header(found[0], 0, self.oddities)
        return self

    def items(self, keyword: str) -> list[Header]:
        """Return the items of a sequence."""
        value = self.get(keyword)
        return [Header(item, 0, self.oddities) for item in value] if _is_sequence(value) else []

    def numbers(self, keyword: str) -> list[float]:
        """Return the numbers of an element, none where it is missing.

        Raises
        ------
        ImageProblem
            If they aren't finite numbers.
        """
        value = self.get(keyword)
        if value is None:
            return []
        values = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        try:
            numbers = [float(number) for number in values]
        except (TypeError, ValueError, OverflowError):
            raise unreadable(f"{keyword} is not a number") from None
        if not all(map(math.isfinite, numbers)):
            raise unreadable(f"{keyword} is not a number")
        return numbers

    def whole(self, keyword: str, default: int | None = None) -> int:
        """Return a whole number.

        Raises
        ------
        ImageProblem
            If it is missing and there is no default, or is something else.
        """
        numbers = self.numbers(keyword)
        if not numbers and default is not None:
            return default
        if not numbers:
            raise unreadable(f"{keyword} is missing")
        if not numbers[0].is_integer():
            raise unreadable(f"{keyword} is not a whole number")
        if len(numbers) > 1:
            self.note(f"several values in {keyword}: the first taken")
        return int(numbers[0])

    def usable(self, keyword: str, meaning: str) -> list[float]:
        """Return the numbers of an element that a picture can do without; where they aren't numbers none, and a note."""
        try:
            return self.numbers(keyword)
        except ImageProblem:
            self.note(f"{keyword} that is no number: {meaning}")
            return []

    def word(self, keyword: str, known: Sequence[str]) -> str | None:
        """Return a word if it is one of those known, whatever its case and the blanks in and around it."""
        value = self.get(keyword)
        if isinstance(value, Sequence) and not isinstance(value, str):
            self.note(f"several values in {keyword}: the first taken")
            value = value[0]
        if not isinstance(value, str):
            return None
        found = {_plain(word): word for word in known}.get(_plain(value))
        if found is not None and found != value.strip(" \0"):
            self.note(f"{keyword} in an unusual spelling")
        return found


def _plain(word: str) -> str:
    return "".join(letter for letter in word.upper() if letter.isalnum())


def converted(dataset: Dataset, keyword: str) -> Any:
    try:
        value = dataset.get(keyword)
        empty = value is None or (hasattr(value, "__len__") and len(value) == 0)
    except MemoryError:
        raise
    except Exception:  # conversion of a damaged element raises nearly anything; its text quotes the value
        raise unreadable(f"{keyword} can't be read") from None
    return None if empty else value


def _is_sequence(value: Any) -> bool:
    from pydicom.sequence import Sequence as DicomSequence

    return isinstance(value, DicomSequence)


def transfer_syntax(dataset: Dataset) -> str:
    """Return the UID of the transfer syntax.

    Raises
    ------
    ImageProblem
        If it is missing.
    """
    meta = getattr(dataset, "file_meta", None)
    syntax = None if meta is None else converted(meta, "TransferSyntaxUID")
    if syntax is None:
        raise unreadable("TransferSyntaxUID is missing")
    return str(syntax)
