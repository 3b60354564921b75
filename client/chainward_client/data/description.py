"""The description of a site's data: the `data` block of a `site.yaml`, or a data file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from chainward_client.data.columns import SEPARATOR, Block, Columns, refuse_repeats
from chainward_client.data.description_errors import clause_of, yaml_problem
from chainward_client.data.folder_layout import folder_layout
from chainward_client.data.paths import FilePath, Folder, FolderOrZip, ManifestPath, beside_data_file, folder_or_zip
from chainward_shared.errors import DataError, nearest
from chainward_shared.task import Task
from chainward_shared.words import listed

Fit = Literal["pad", "crop", "stretch"]


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


def _class_names(names: tuple[str, ...]) -> tuple[str, ...]:
    refuse_repeats(names, "class")
    return names


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


Unusable = Literal["refuse", "leave-out"]


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
    unusable : what becomes of files that can't be used: "refuse" (default) the data, naming them all, or "leave-out" their
        cases, with a note that says how many
    ignore_labels : labels that mean "not labelled", 255 or -1 say: their rows are left out, with a note that says how many
    privileged : how privileged teachers read reports and table
    """

    format: Literal["csv"]
    manifest: ManifestPath
    images: FolderOrZip | None = None
    masks: FolderOrZip | None = None
    task: Task = "single"
    classes: ClassNames
    no_finding: str | None = None
    columns: Columns
    image: OptionalImageShape = ImageShape()
    unusable: Unusable = "refuse"
    ignore_labels: tuple[str, ...] = ()
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
    classes : class names; default: the labels that occur, or as many as the labels have columns
    image : what every image is brought to
    ignore_labels : labels that mean "not labelled", 255 or -1 say: their images are left out, with a note that says how many
    """

    format: Literal["npz"]
    images: FilePath
    task: Task = "single"
    classes: ClassNames | None = None
    image: OptionalImageShape = ImageShape()
    ignore_labels: tuple[int, ...] = ()


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

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.image.scale is not None and (self.dicom.window is not None or self.dicom.view != 1):
            given = "dicom.window" if self.dicom.window is not None else "dicom.view"
            raise ValueError(f"both 'image.scale' and '{given}' say which values are black and white; keep one of them")
        return self

    @property
    def block(self) -> DicomBlock:
        """Return how pictures come out of the files; `image.scale` is one window for all, like `dicom.window`."""
        if self.image.scale is None:
            return self.dicom
        low, high = self.image.scale
        return self.dicom.model_copy(update={"window": OwnWindow(center=(low + high) / 2, width=high - low)})


class FoldersDescription(CsvDescription):
    """Images in folders that are called what they show: ``CLASS/...``, or ``SPLIT/CLASS/...`` with train, val and test.

    It stands for the manifest that could be written of it, and has no other columns.

    Attributes
    ----------
    images : the folder or zip that holds them
    classes : names of the folders, in the order of the label indices; default: those that are there, sorted
    image, unusable : as in `CsvDescription`
    """

    format: Literal["folders"]  # type: ignore[assignment]
    images: FolderOrZip

    @model_validator(mode="before")
    @classmethod
    def _as_a_manifest(cls, block: Any, info: ValidationInfo) -> Any:
        if not isinstance(block, Mapping):
            return block
        foreign = [str(key) for key in block if key not in ("format", "images", "classes", "image", "unusable")]
        if foreign:
            known = ("format", "images", "classes", "image", "unusable")
            named = ", ".join(f"'{key}'{nearest(key, known)}" for key in foreign)
            raise ValueError(
                f"'format: folders' has no key {named}; known: {', '.join(known)}. More needs a manifest: "
                "`chainward check DATA.yaml --write-manifest FILE` writes one to begin with"
            )
        if not isinstance(block.get("images"), str | Path):
            return block
        location = folder_or_zip(beside_data_file(Path(block["images"]), info))
        layout = folder_layout(location)
        columns = {"image": "image", "label": "label"} | ({"split": "split"} if layout.has_splits else {})
        return {**block, "manifest": location, "classes": block.get("classes") or layout.classes, "columns": columns}


DataDescription = CsvDescription | DicomDescription | NpzDescription | FoldersDescription
_Formats = type[CsvDescription] | type[DicomDescription] | type[NpzDescription] | type[FoldersDescription]
_FORMATS: dict[str, _Formats] = {
    "csv": CsvDescription,
    "dicom": DicomDescription,
    "npz": NpzDescription,
    "folders": FoldersDescription,
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
        raise DataError(f"Data file {path} is not valid YAML: {yaml_problem(error)}") from None
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
        problems = "; ".join(clause_of(item) for item in error.errors())
    except ValueError as error:
        problems = str(error)
    raise DataError(" ".join(f"Data file {origin}: {problems}".split()))  # names may hold line breaks


def _model_of(block: Mapping[str, Any]) -> _Formats:
    if "format" not in block:
        raise ValueError(f"key 'format' is missing{_misspelt_format(block)}; expected csv, dicom, npz or folders")
    from chainward_client.data.formats import further_formats  # they are built on this module

    found = block["format"]
    formats: dict[str, _Formats] = {**_FORMATS, **{name: one.description for name, one in further_formats().items()}}
    if isinstance(found, str) and found in formats:
        return formats[found]
    if found == "phantom":
        raise ValueError('phantoms need no data file; set data.source to "phantom" in the run\'s configuration')
    raise ValueError(
        f"key 'format': found {found!r}{nearest(str(found), formats)}; expected {listed(list(formats), last='or')}"
    )


def _misspelt_format(block: Mapping[str, Any]) -> str:
    near = [str(key) for key in block if nearest(str(key), ["format"])]
    return f" (there is '{near[0]}')" if near else ""
