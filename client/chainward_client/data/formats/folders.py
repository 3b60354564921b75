"""Images in folders that are called what they show: which classes and splits there are, and the manifest that says the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image
from pydantic import ValidationInfo, model_validator

from chainward_client.data.description import FolderOrZip, ManifestDescription, beside_data_file, folder_or_zip
from chainward_client.data.formats import data_format
from chainward_client.data.image_store import ImageStore
from chainward_client.data.manifest import Manifest, read_manifest
from chainward_client.data.manifest_file import cells_of
from chainward_client.data.unusable import counted
from chainward_shared.errors import DataError, nearest

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def folder_rows(location: Path) -> list[list[str]]:
    """Return header and rows of the manifest that says the same as the folders of a folder or zip: image, label, perhaps split.

    Images are paths inside the location, sorted. Files that are no images by their ending, and hidden files and folders, are
    passed over.

    Raises
    ------
    DataError
        If there are no images, or some of them lie in no class folder.
    """
    endings = Image.registered_extensions()
    with ImageStore(location) as store:
        paths = [PurePosixPath(member) for member in store.members]
    paths = [path for path in paths if path.suffix.lower() in endings and not _hidden(path)]
    if not paths:
        raise DataError(
            f"{location.name} holds no images; expected a folder per class, or train, val and test with such folders"
        )
    top = _common_folders(paths)
    above = {path.parts[top].lower() for path in paths if len(path.parts) > top + 1}
    has_splits = bool(above) and above <= _SPLITS.keys()
    class_at = top + has_splits
    stray = [f"'{path}'" for path in paths if len(path.parts) < class_at + 2]
    if stray:
        where = "SPLIT/CLASS/image" if has_splits else "CLASS/image"
        raise DataError(
            f"{location.name}: {counted('image in no class folder', 'images in no class folder', stray, 3)}; expected {where}"
        )
    rows = [[str(path), path.parts[class_at]] for path in paths]
    if not has_splits:
        return [["image", "label"], *rows]
    splits = [_SPLITS[path.parts[top].lower()] for path in paths]
    return [["image", "label", "split"], *([*row, split] for row, split in zip(rows, splits, strict=True))]


def _common_folders(paths: list[PurePosixPath]) -> int:
    """Return how many folders all lie in before the first that can be a class: the one that a zip was made of, say."""
    top = 0
    while min(len(path.parts) for path in paths) > top + 2 and len({path.parts[top] for path in paths}) == 1:
        if paths[0].parts[top].lower() in _SPLITS:
            break
        top += 1
    return top


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


class FoldersDescription(ManifestDescription):
    """Images in folders that are called what they show: ``CLASS/...``, or ``SPLIT/CLASS/...`` with train, val and test.

    It stands for the manifest that could be written of it, and has no other columns.

    Attributes
    ----------
    images : the folder or zip that holds them
    classes : names of the folders, in the order of the label indices; default: those that are there, sorted
    image, unusable : as in `ManifestDescription`
    """

    format: Literal["folders"]
    images: FolderOrZip
    manifest: FolderOrZip

    @model_validator(mode="before")
    @classmethod
    def _as_a_manifest(cls, block: Any, info: ValidationInfo) -> Any:
        if not isinstance(block, Mapping):
            return block
        known = ("format", "images", "classes", "image", "unusable")
        foreign = [str(key) for key in block if key not in known]
        if foreign:
            named = ", ".join(f"'{key}'{nearest(key, known)}" for key in foreign)
            raise ValueError(
                f"'format: folders' has no key {named}; known: {', '.join(known)}. More needs a manifest: "
                "`chainward check DATA.yaml --write-manifest FILE` writes one to begin with"
            )
        if not isinstance(block.get("images"), str | Path):
            return block
        location = folder_or_zip(beside_data_file(Path(block["images"]), info))
        header, *rows = folder_rows(location)
        classes = block.get("classes") or sorted({row[1] for row in rows})
        return {**block, "manifest": location, "classes": classes, "columns": {name: name for name in header}}


@data_format("folders", FoldersDescription, keeps_decoded=True)
def read_folders(description: FoldersDescription) -> Manifest:
    """Return the checked manifest that the folders stand for."""
    return read_manifest(description, cells_of(folder_rows(description.image_location)))
