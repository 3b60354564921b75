"""The description of a site's data: the `data` block of a `site.yaml`, or a data file of its own."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from chainward_shared.errors import DataError, nearest
from chainward_shared.task import Task

Fit = Literal["pad", "crop", "stretch"]

SEPARATOR = "|"
"""Between the findings of one image in the label column."""


class Block(BaseModel):
    """Base of every mapping in a data file: frozen, and unknown keys are refused."""

    # A class called 1 is a name here, though YAML reads a number.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            raise ValueError("expected a mapping ('key: value' lines)")
        known = list(cls.model_fields)
        unknown = [str(key) for key in block if key not in known]
        if unknown:
            named = ", ".join(f"'{key}'{nearest(key, known)}" for key in unknown)
            raise ValueError(f"unknown key{'s' if len(unknown) > 1 else ''} {named}; known: {', '.join(known)}")
        return block


class ImageShape(Block):
    """What every image is brought to.

    Attributes
    ----------
    size : height and width in pixels, default 64
    channels : 1 (grey) or 3 (RGB), default 3
    fit : how another shape becomes square: "pad" (default) keeps the whole image between black bars, "crop"
        keeps the centre (the shorter side fills the square), "stretch" changes the proportions
    """

    size: int = Field(default=64, ge=8, le=2048)
    channels: Literal[1, 3] = 3
    fit: Fit = "pad"


class NumberColumn(Block):
    """A privileged column of numbers within the declared range `min` to `max`, both included."""

    kind: Literal["number"]
    min: FiniteFloat
    max: FiniteFloat

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self


class CategoryColumn(Block):
    """A privileged column that holds one of the declared `values`."""

    kind: Literal["category"]
    values: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        _refuse_repeats(self.values, "value")
        return self


TabularColumn = Annotated[NumberColumn | CategoryColumn, Field(discriminator="kind")]


LabelColumns = Annotated[
    Annotated[str, Tag("one")] | Annotated[tuple[str, ...], Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
]


class Columns(Block):
    """Which column of the manifest plays which role; only `image` and `label` are required.

    Attributes
    ----------
    image : file name of the image; extension and folders optional
    label : class name, or index into the classes; multi-label: the findings' names or indices with "|" between them,
        or a list of columns, one per class in the order of `classes`, that hold 1 or 0
    patient : what must stay together in one split and at one site; default: every image its own
    split : train, val or test; default: split by patient, seeded
    site : the hospital; the natural partition of a simulation
    text : free-text report; privileged
    mask : file name of the region of interest's mask; for scoring only
    box : the columns of x0, y0, x1, y1 in pixels of the original image; for scoring only
    tabular : privileged columns by name, with their declared ranges or values
    """

    image: str
    label: LabelColumns
    patient: str | None = None
    split: str | None = None
    site: str | None = None
    text: str | None = None
    mask: str | None = None
    box: tuple[str, str, str, str] | None = None
    tabular: dict[str, TabularColumn] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _roles_agree(self) -> Self:
        if self.mask is not None and self.box is not None:
            raise ValueError("both 'mask' and 'box' are given; keep one of them")
        if self.box is not None:
            _refuse_repeats(self.box, "box column")
        _refuse_repeats(self.label_columns, "label column")
        for label in self.label_columns:
            if label == self.text or label in self.tabular:
                raise ValueError(
                    f"column '{label}' is both label and privileged: the privileged teacher would only copy "
                    "the label; take it out of 'text' or 'tabular'"
                )
        return self

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the columns that hold the label."""
        return (self.label,) if isinstance(self.label, str) else self.label

    def by_key(self) -> dict[str, str]:
        """Return the column name of every key in use, e.g. ``{"label": "dx", "box[0]": "left", ...}``."""
        single = ("image", "label", "patient", "split", "site", "text", "mask")
        named = {key: name for key in single if isinstance(name := getattr(self, key), str)}
        if not isinstance(self.label, str):
            named |= {f"label[{position}]": name for position, name in enumerate(self.label)}
        named |= {f"box[{position}]": name for position, name in enumerate(self.box or ())}
        return named | {f"tabular.{name}": name for name in self.tabular}


def _refuse_repeats(names: tuple[str, ...], what: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} '{repeated[0]}' is given more than once")


def _beside_data_file(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    path = folder / path
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise ValueError(f"there is no {path}; give the path relative to the data file") from None
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    return path


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is a folder; expected a file")
    return path


def _folder_or_zip(path: Path) -> Path:
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a whole zip")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder")
    return path


def _class_names(names: tuple[str, ...]) -> tuple[str, ...]:
    _refuse_repeats(names, "class")
    return names


FilePath = Annotated[Path, AfterValidator(_beside_data_file), AfterValidator(_file)]
Folder = Annotated[Path, AfterValidator(_beside_data_file), AfterValidator(_folder)]
FolderOrZip = Annotated[Path, AfterValidator(_beside_data_file), AfterValidator(_folder_or_zip)]
ClassNames = Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_class_names)]
# `image:` with nothing behind it means the defaults, like leaving it out.
OptionalImageShape = Annotated[ImageShape, BeforeValidator(lambda block: {} if block is None else block)]


class PrivilegedBlock(Block):
    """How the hospital's privileged teachers read its reports and table.

    Attributes
    ----------
    label_words : words that give the label away in a report, beside the class names; taken out where the run blanks them
    exclude : columns of `columns.tabular` that the teachers must not read: one that encodes the label, say
    encoder : folder of a local Hugging Face encoder for the reports; default: hashed n-grams
    """

    label_words: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    encoder: Folder | None = None


# `privileged:` with nothing behind it, likewise.
OptionalPrivilegedBlock = Annotated[PrivilegedBlock, BeforeValidator(lambda block: {} if block is None else block)]


class CsvDescription(Block):
    """Images in a folder or zip, and a CSV manifest with one row per image.

    Attributes
    ----------
    manifest : the CSV file
    images : folder or zip of the images; default: the manifest's folder
    masks : folder or zip of the masks of `columns.mask`; default: where the images are
    task : "single" (default): one class per image; "multilabel": any number of findings per image
    classes : class names, in the order of the label indices
    no_finding : multi-label with one label column: the word for an image without any finding; default: an empty cell
    columns : the roles of the manifest's columns
    image : what every image is brought to
    privileged : how privileged teachers read reports and table
    """

    format: Literal["csv"]
    manifest: FilePath
    images: FolderOrZip | None = None
    masks: FolderOrZip | None = None
    task: Task = "single"
    classes: ClassNames
    no_finding: str | None = None
    columns: Columns
    image: OptionalImageShape = ImageShape()
    privileged: OptionalPrivilegedBlock = PrivilegedBlock()

    @model_validator(mode="after")
    def _masks_have_a_column(self) -> Self:
        if self.masks is not None and self.columns.mask is None:
            raise ValueError("'masks' is given without 'columns.mask', the column with the masks' file names")
        return self

    @model_validator(mode="after")
    def _label_suits_the_task(self) -> Self:
        label = self.columns.label
        if not isinstance(label, str):
            if self.task == "single":
                raise ValueError(
                    f"'columns.label' lists {len(label)} columns, which 'task: multilabel' alone permits; set the task, or "
                    "name the one column with the class"
                )
            if len(label) != len(self.classes):
                raise ValueError(
                    f"'columns.label' lists {len(label)} columns; expected one for each of the {len(self.classes)} classes"
                )
        if self.no_finding is not None:
            if self.task == "single":
                raise ValueError("'no_finding' is given, which 'task: multilabel' alone permits; set the task")
            if not isinstance(label, str):
                raise ValueError("'no_finding' is given, but columns of 1 and 0 need no word for it; remove it")
            if self.no_finding in self.classes:
                raise ValueError(
                    f"'no_finding' '{self.no_finding}' is one of the classes; take it out of them: it is the absence of all"
                )
        if self.task == "multilabel" and isinstance(label, str):
            barred = [name for name in (*self.classes, self.no_finding or "") if SEPARATOR in name]
            if barred:
                raise ValueError(f"class '{barred[0]}' contains '{SEPARATOR}', which separates findings; rename it")
        return self

    @model_validator(mode="after")
    def _privileged_names_what_is_there(self) -> Self:
        declared = list(self.columns.tabular)
        unknown = [name for name in self.privileged.exclude if name not in declared]
        if unknown:
            raise ValueError(
                f"'privileged.exclude' names '{unknown[0]}'{nearest(unknown[0], declared)}; expected columns of "
                f"'columns.tabular' ({', '.join(declared) or 'none is declared'})"
            )
        for key in ("label_words", "encoder"):
            if getattr(self.privileged, key) and self.columns.text is None:
                raise ValueError(f"'privileged.{key}' is given without 'columns.text', the column with the reports")
        return self

    @property
    def image_location(self) -> Path:
        """Return the folder or zip of the images."""
        return self.images or self.manifest.parent

    @property
    def mask_location(self) -> Path:
        """Return the folder or zip of the masks."""
        return self.masks or self.image_location


class NpzDescription(Block):
    """One file in the layout of MedMNIST: `train_images`, `train_labels`, the same for `val` and `test`.

    Attributes
    ----------
    images : the .npz file
    task : "single" (default): labels (n,) or (n, 1); "multilabel": labels (n, classes) of 1 and 0
    classes : class names; default "0", "1", ... up to the largest label, or as many as the labels have columns
    image : what every image is brought to
    """

    format: Literal["npz"]
    images: FilePath
    task: Task = "single"
    classes: ClassNames | None = None
    image: OptionalImageShape = ImageShape()


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


class DicomDescription(CsvDescription):
    """DICOM files in a folder or zip, and a CSV manifest with one row per image.

    As `CsvDescription`, with these differences.

    Attributes
    ----------
    columns : `image` holds file names or SOPInstanceUIDs; without `patient`, the files' PatientID says whose they are
    dicom : how the pictures come out of the files
    """

    format: Literal["dicom"]  # type: ignore[assignment]
    dicom: Annotated[DicomBlock, BeforeValidator(lambda block: {} if block is None else block)] = DicomBlock()


DataDescription = CsvDescription | DicomDescription | NpzDescription
_FORMATS: dict[str, type[CsvDescription] | type[DicomDescription] | type[NpzDescription]] = {
    "csv": CsvDescription,
    "dicom": DicomDescription,
    "npz": NpzDescription,
}


def load_description(path: Path | str) -> DataDescription:
    """Read a data file.

    Raises
    ------
    DataError
        If the file is missing, is not YAML, or does not describe data as the format asks.
    """
    path = Path(path)
    try:
        block = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no data file {path}") from None
    except OSError as error:
        raise DataError(f"Data file {path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"Data file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, say
        raise DataError(f"Data file {path} is not valid YAML: {_yaml_problem(error)}") from None
    if block is None:
        raise DataError(f"Data file {path} is empty; expected 'format: csv' and the other keys of a data file")
    return parse_description(block, path)


def parse_description(block: Any, origin: Path) -> DataDescription:
    """Check a parsed data block. Its paths are relative to the folder of `origin`, the file it stands in.

    Raises
    ------
    DataError
        Naming `origin` and every key that is unknown, missing or wrong.
    """
    if not isinstance(block, Mapping):
        found = "a list" if isinstance(block, list) else f"{block!r:.40}"
        raise DataError(f"Data file {origin}: expected a mapping ('format: csv', ...), found {found}")
    # A path must not depend on the working directory of the process that happens to read it.
    folder = origin.absolute().parent
    try:
        return _model_of(block).model_validate(block, context={"folder": folder})
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
    except ValueError as error:
        problems = str(error)
    raise DataError(" ".join(f"Data file {origin}: {problems}".split()))  # names may hold line breaks


def _model_of(block: Mapping[str, Any]) -> type[CsvDescription] | type[DicomDescription] | type[NpzDescription]:
    if "format" not in block:
        raise ValueError(f"key 'format' is missing{_misspelt_format(block)}; expected csv, dicom or npz")
    found = block["format"]
    if isinstance(found, str) and found in _FORMATS:
        return _FORMATS[found]
    if found == "phantom":
        raise ValueError('phantoms need no data file; set data.source to "phantom" in the run\'s configuration')
    raise ValueError(f"key 'format': found {found!r}{nearest(str(found), _FORMATS)}; expected csv, dicom or npz")


def _misspelt_format(block: Mapping[str, Any]) -> str:
    near = [str(key) for key in block if nearest(str(key), ["format"])]
    return f" (there is '{near[0]}')" if near else ""


def _problem(error: Any) -> str:
    """Return one pydantic error as a clause that starts with the key."""
    location = [str(part) for part in error["loc"]]
    if location[:2] == ["columns", "tabular"]:
        del location[3:4]  # pydantic puts the column's kind into the path
    if location[:2] == ["columns", "label"]:
        del location[2:3]  # and whether there are several
    key = ".".join(location)
    prefix = f"key '{key}'" if key else "the file"
    found = error.get("input")
    match error["type"]:
        case "missing":
            return f"{prefix} is missing"
        case "value_error":
            reason = str(error["ctx"]["error"])
            return f"{prefix}: {reason}" if key else reason
        case "union_tag_not_found":
            return f"{prefix}: 'kind' is missing; expected number or category"
        case "union_tag_invalid":
            return f"{prefix}: found kind {error['ctx']['tag']!r}; expected number or category"
        case "model_attributes_type":
            return f"{prefix}: found {_shown(found)}; expected a mapping, {{kind: number, min: 0, max: 100}} say"
    message = error["msg"][0].lower() + error["msg"][1:]
    hint = ""
    if isinstance(found, bool):
        hint = " (YAML reads a bare yes, no, on or off as true or false: put it in quotes)"
    return f"{prefix}: found {_shown(found)}; {message}{hint}"


def _shown(found: Any) -> str:
    if found is None:
        return "nothing"
    if isinstance(found, float) and math.isnan(found):
        return "nan"
    shown = repr(list(found) if isinstance(found, tuple) else found)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _yaml_problem(error: Exception) -> str:
    """Return a YAML error on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(str(problem).split()) + where
