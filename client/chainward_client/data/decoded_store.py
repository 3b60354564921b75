"""A deployed site's images, decoded once and kept in its state folder.

Pixels lie in a file that is mapped into memory: opening takes no time, and memory doesn't grow with the data. They are found
again by what decides them: each file by its size and time (in a zip by size and CRC), how images are brought to their shape, the
scale of grey, and the versions of the decoders. What is written beside the pixels carries a code under the site's secret, so that
a file that was damaged, cut off or made elsewhere is told from the site's own; each image has a digest. What is new or has
changed is decoded, and the rest taken over: also from a store that was being made when its process was ended.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chainward_client.data.decoding import (
    IMAGES,
    JOURNAL,
    MASKS,
    Decoding,
    KeptRow,
    NoRoom,
    read_row,
    row_keys,
    signed,
    verified,
)
from chainward_client.data.description import DataDescription, load_description
from chainward_client.data.dicom_headers import digest_with
from chainward_client.data.formats import format_of
from chainward_client.data.image_store import files_below, keep_open, stamp
from chainward_client.data.scale import Scale
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedCases, SiteData
from chainward_client.data.sources import Decoded, decoded_in_memory, local_site, privileged_setup
from chainward_client.data.table import Table
from chainward_client.data.unusable import UnusableFiles
from chainward_client.kept_files import installed, mapped
from chainward_client.kept_records import for_the_owner_alone
from chainward_client.work_lock import WorkLock
from chainward_shared.errors import DataError, StoreError

logger = logging.getLogger("chainward.client")

LONGEST = 30 * 86_400.0
"""Seconds that the making of a store may take before another process ends it."""

INDEX = "index.json"
TRIED = 32
"""Images whose digests are compared whenever the store is opened."""

_PLAIN = ("classes", "task", "notes", "has_patient_ids", "left_out")
"""What of a site's data is JSON as it is, but for its tuples."""

_DECODERS = (
    "chainward",
    "numpy",
    "pillow",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pyjpegls",
)


class DecodedStore:
    """The decoded images of one site.

    Parameters
    ----------
    state : the site's state folder; the store is `images` in it
    site : id of the site
    key : the site's secret
    """

    def __init__(self, state: Path, site: str, key: bytes) -> None:
        self.state, self.site, self.key = state.absolute(), site, key
        self.folder = self.state / "images"
        self._secret = hashlib.blake2b(b"decoded images 1", key=key[:64], digest_size=32).digest()

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def open(self, data: Path) -> SiteData:
        """Return what `local_site` does of a data file, images decoded only where they haven't been before.

        Where the disk has no room, or the folder can't be written, they are decoded in memory.

        Raises
        ------
        DataError
            The data can't be used.
        """
        description = load_description(data)
        if not format_of(description).keeps_decoded:
            return local_site(description, self.site, self.key)  # what else its reader looks at isn't known here
        found = self._find(description)
        if found is not None:
            return found
        try:
            with for_the_owner_alone():
                self.folder.mkdir(parents=True, exist_ok=True)
                self.folder.chmod(0o700)
            with WorkLock(self.folder / "at-work.lock").hold(LONGEST):
                found = self._find(description)  # whoever held the lock has made it
                return self._make(description) if found is None else found
        except NoRoom as problem:
            logger.warning("%s; images are decoded in memory, for every message anew", problem)
        except (OSError, StoreError) as error:
            logger.warning(
                "%s can't be used (%s); images are decoded in memory, for every message anew", self.folder, error
            )
        return local_site(description, self.site, self.key)

    def find(self, data: Path) -> SiteData | None:
        """Return the data if their images have been decoded and nothing has changed since; nothing is written.

        Raises
        ------
        DataError
            The data file can't be used.
        """
        return self._find(load_description(data))

    # --- finding ---

    def _find(self, description: DataDescription) -> SiteData | None:
        for index in sorted(self.folder.glob(f"*/{INDEX}")):
            try:
                content = verified(index.read_bytes(), self._secret)
                if content is None:
                    logger.warning("%s: damaged, or not this site's; images are decoded anew", index.parent)
                elif content["base"] == self._base(description) and content["seen"] == self._seen(
                    description, content["used"]
                ):
                    if self._is_whole(index.parent, content):
                        return self._opened(index.parent, content, description)
                    logger.warning("%s: damaged; images that aren't what was written are decoded anew", index.parent)
            except (OSError, ValueError):
                continue
        return None

    def _base(self, description: DataDescription) -> str:
        """Return the digest of the data file, the manifest, and the versions of what decodes."""
        manifest = b""
        if description.table_file not in description.locations:  # else by size and time, like images
            manifest = description.table_file.read_bytes()
        content = [self.site, type(description).__name__, description.model_dump_json(), _versions()]
        return hashlib.sha256(json.dumps(content).encode() + manifest).hexdigest()

    def _seen(self, description: DataDescription, used: Sequence[Sequence[str]]) -> str:
        """Return the digest of the names of all files, and of the size and time of those that are used."""
        found = hashlib.sha256()
        for location, names in zip(description.locations, used, strict=True):
            if location.is_file():
                stamps = [stamp(location)]
            else:
                own = f"{self.state}{os.sep}"
                files = {name: entry for name, entry in files_below(location) if not entry.path.startswith(own)}
                found.update("\0".join(sorted(files)).encode("utf-8", "surrogateescape"))
                stamps = [stamp(Path(files[name]) if name in files else location / name) for name in names]
            for of_file in stamps:
                found.update(b"%d %d\n" % of_file)
        return found.hexdigest()

    def _is_whole(self, folder: Path, content: dict[str, Any]) -> bool:
        if any(stamp(folder / name) != tuple(noted) for name, noted in content["files"].items()):
            return False
        return all(
            read_row("", KeptRow(folder, int(row), digest), content["shape"], masks=content["masks"])
            for row, digest in content["tried"].items()
        )

    def _opened(self, folder: Path, content: dict[str, Any], description: DataDescription) -> SiteData:
        """Return the data that `_beside_pixels` was made of."""
        shape, data = (content["rows"], *content["shape"]), content["data"]
        images = mapped(folder / IMAGES, np.uint8, shape)
        masks = mapped(folder / MASKS, np.uint8, (shape[0], *shape[2:])) if content["masks"] else None
        splits, end = {}, 0
        for split in SPLITS:
            of_split = data["splits"][split]
            start, end = end, end + len(of_split["labels"])
            labels = torch.tensor(of_split["labels"], dtype=torch.int64 if data["task"] == "single" else torch.float32)
            if data["task"] == "multilabel":
                labels = labels.reshape(-1, len(data["classes"]))
            privileged = PrivilegedCases(
                _tuples(of_split["texts"]), _tuples(of_split["table"]), None if masks is None else masks[start:end]
            )
            splits[split] = Cases(images[start:end], labels, np.array(of_split["patients"], dtype=str), privileged)
        scale = None
        if data["scale"] is not None:
            low, high, measured, values = data["scale"]
            scale = Scale(low, high, measured, np.array(values, dtype=np.float32))
        return SiteData(
            self.site,
            splits=splits,
            privileged=privileged_setup(description),
            scale=scale,
            preparation=description.preparation,
            key=self.key,
            **{name: _tuples(data[name]) for name in _PLAIN},
        )

    # --- making ---

    def _make(self, description: DataDescription) -> SiteData:
        """Decode what hasn't been, and leave one store: this."""
        digest_with(self._secret)
        folder = self.folder / secrets.token_hex(8)
        settings = json.dumps([description.image.model_dump(mode="json"), description.pixel_settings, _versions()])
        making: list[Decoding] = []
        # Before anything is read or decoded: what changes meanwhile is noticed next time.
        content: dict[str, Any] = {"base": self._base(description)}

        def decode(table: Table, rows: np.ndarray) -> Decoded:
            keys, content["used"] = row_keys(table, rows, settings)
            content["seen"] = self._seen(description, content["used"])
            making.append(Decoding(folder, self._secret, table, rows, keys))
            try:
                return making[0].run()
            except UnusableFiles:
                raise
            except DataError:  # a box, say, that is no file: all of them in one message
                return decoded_in_memory(table, rows)

        try:
            with keep_open(), for_the_owner_alone():
                opened = local_site(description, self.site, self.key, decode)
                if len(making[0].digests) != sum(len(cases) for cases in opened.splits.values()):
                    return opened  # decoded in memory after all
                self._write_index(folder, making[0], content | {"data": _beside_pixels(opened)})
        except DataError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for other in self.folder.iterdir():
            if other != folder and other.is_dir() and not other.is_symlink():
                shutil.rmtree(other, ignore_errors=True)
        return opened

    def _write_index(self, folder: Path, made: Decoding, content: dict[str, Any]) -> None:
        digests = made.digests
        tried = np.unique(np.linspace(0, len(digests) - 1, TRIED).astype(int)).tolist()
        names = [name for name in (IMAGES, MASKS, JOURNAL) if (folder / name).exists()]
        content |= {
            "rows": len(digests),
            "shape": made.shape,
            "masks": MASKS in names,
            "files": {name: stamp(folder / name) for name in names},
            "tried": {row: digests[row] for row in tried},
        }
        part = folder / f"{INDEX}.part"
        part.write_bytes(signed(content, self._secret))
        part.replace(folder / INDEX)


def expected_bytes(data: SiteData) -> int:
    """Return what the decoded images of a site take."""
    parts = [cases.images.numel() for cases in data.splits.values()]
    parts += [cases.privileged.masks.numel() for cases in data.splits.values() if cases.privileged.masks is not None]
    return sum(parts)


@cache
def _versions() -> list[str]:
    return [f"{name} {found}" for name in _DECODERS if (found := installed(name)) is not None]


def _beside_pixels(data: SiteData) -> dict[str, Any]:
    """Return all of a deployed site's data that is neither pixels, nor the site's secret, nor in its data file; as for JSON."""
    scale = data.scale
    return {name: getattr(data, name) for name in _PLAIN} | {
        "scale": None if scale is None else [scale.low, scale.high, scale.images, scale.values.tolist()],
        "splits": {
            split: {
                "labels": cases.labels.tolist(),
                "patients": cases.patients.tolist(),
                "texts": cases.privileged.texts,
                "table": None if cases.privileged.table is None else dict(cases.privileged.table),
            }
            for split, cases in data.splits.items()
        },
    }


def _tuples(value: Any) -> Any:
    """Return lists that JSON made of tuples as tuples again, also in a mapping."""
    if isinstance(value, dict):
        return {name: _tuples(of_name) for name, of_name in value.items()}
    return tuple(value) if isinstance(value, list) else value
