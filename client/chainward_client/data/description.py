"""The description of a site's data: the `data` block of a `site.yaml`, or a data file of its own."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, FiniteFloat, ValidationError, ValidationInfo, model_validator

from chainward_client.data.columns import NOTHING_MEANS_DEFAULTS, SEPARATOR, Block, Columns, refuse_repeats
from chainward_client.data.formats import data_formats
from chainward_shared.errors import DataError, nearest
from chainward_shared.preparation import Fit, Preparation
from chainward_shared.task import Task
from chainward_shared.words import listed


def beside_data_file(path: Path, info: ValidationInfo) -> Path:
    """Return a path in a data file, which is relative to that file, if there is something."""
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
    if not path.is_file():  # a pipe is none either: reading one may wait for ever
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise ValueError(f"{path} is {what}; expected a file")
    return path


def folder_or_zip(path: Path) -> Path:
    if not path.is_dir() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise ValueError(f"{path} is neither a folder nor a whole zip")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a folder")
    return path


FilePath = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(_file)]
Folder = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(_folder)]
FolderOrZip = Annotated[Path, AfterValidator(beside_data_file), AfterValidator(folder_or_zip)]


class ImageShape(Block):
    """What every image is brought to.

    Attributes
    ----------
    size : height and width in pixels, default 64
    channels : 1 (grey) or 3 (RGB), default 3
    fit : how another shape becomes square: "pad" (default) keeps the whole image between black bars, "crop"
        keeps the centre (the shorter side fills the square), "stretch" changes the proportions
    scale : the values shown black and white in grey images of more than 8 bits, in DICOM files in the units of the modality;
        default: measured once over the data set (DICOM: each file's own window, and so measured where it has none)
    """

    size: int = Field(default=64, ge=8, le=2048)
    channels: Literal[1, 3] = 3
    fit: Fit = "pad"
    scale: tuple[FiniteFloat, FiniteFloat] | None = None

    @model_validator(mode="after")
    def _scale_is_not_empty(self) -> Self:
        if self.scale is not None and not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale {self.scale[0]:g}, {self.scale[1]:g} is not from a lower to a higher value")
        return self


ClassNames = Annotated[
    tuple[str, ...], Field(min_length=2), AfterValidator(lambda names: refuse_repeats(names, "class"))
]


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


Unusable = Literal["refuse", "leave-out"]


class DataDescription(Block):
    """What a data file says, whatever its format; each format adds its keys.

    Attributes
    ----------
    format : its name, as `data_format` registers it
    task : "single" (default): one class per image; "multilabel": any number of findings per image
    classes : class names, in the order of the label indices; None: the format finds them
    image : what every image is brought to
    """

    format: str
    task: Task = "single"
    classes: ClassNames | None = None
    image: Annotated[ImageShape, NOTHING_MEANS_DEFAULTS] = ImageShape()

    @property
    def preparation(self) -> Preparation:
        """Return how its images become what a model sees, as the site's card says it."""
        return Preparation(fit=self.image.fit, scale=self.image.scale)

    @property
    def table_file(self) -> Path:
        """Return the file that says which cases there are."""
        raise NotImplementedError

    @property
    def locations(self) -> tuple[Path, ...]:
        """Return the folders, zips or files that images and masks are read from."""
        raise NotImplementedError

    @property
    def pixel_settings(self) -> Any:
        """Return what beside `image` decides the pixels, as JSON can hold it."""
        return None


class ManifestDescription(DataDescription):
    """Images in a folder or zip, and a table with one row per image: the keys of every format with a manifest.

    Attributes
    ----------
    manifest : the file of the table
    images : folder or zip of the images; default: the manifest's folder
    masks : folder or zip of the masks of `columns.mask`; default: where the images are
    classes : class names, in the order of the label indices
    no_finding : multi-label with one label column: the word for an image without any finding; default: an empty cell
    columns : the roles of the manifest's columns
    unusable : what becomes of files that can't be used: "refuse" (default) the data, naming them all, or "leave-out" their
        cases, with a note that says how many
    ignore_labels : labels that mean "not labelled", 255 or -1 say: their rows are left out, with a note that says how many
    privileged : how privileged teachers read reports and table
    """

    manifest: FilePath
    images: FolderOrZip | None = None
    masks: FolderOrZip | None = None
    classes: ClassNames
    no_finding: str | None = None
    columns: Columns
    unusable: Unusable = "refuse"
    ignore_labels: tuple[str, ...] = ()
    privileged: Annotated[PrivilegedBlock, NOTHING_MEANS_DEFAULTS] = PrivilegedBlock()

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

    @property
    def table_file(self) -> Path:
        """Return the manifest."""
        return self.manifest

    @property
    def locations(self) -> tuple[Path, ...]:
        """Return where the images are, and where the masks are if that is elsewhere."""
        if self.columns.mask is None or self.mask_location == self.image_location:
            return (self.image_location,)
        return (self.image_location, self.mask_location)


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
        problems = "; ".join(_clause_of(item) for item in error.errors())
    except ValueError as error:
        problems = str(error)
    raise DataError(" ".join(f"Data file {origin}: {problems}".split()))  # names may hold line breaks


def _model_of(block: Mapping[str, Any]) -> type[DataDescription]:
    formats = data_formats()
    expected = f"expected {listed(list(formats), last='or')}"
    if "format" not in block:
        raise ValueError(f"key 'format' is missing{_misspelt_format(block)}; {expected}")
    found = block["format"]
    if isinstance(found, str) and found in formats:
        return formats[found].description
    if found == "phantom":
        raise ValueError('phantoms need no data file; set data.source to "phantom" in the run\'s configuration')
    raise ValueError(f"key 'format': found {found!r}{nearest(str(found), formats)}; {expected}")


def _misspelt_format(block: Mapping[str, Any]) -> str:
    near = [str(key) for key in block if nearest(str(key), ["format"])]
    return f" (there is '{near[0]}')" if near else ""


def _clause_of(error: Any) -> str:
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
