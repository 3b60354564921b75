"""The pretrained weights that a site's models start from, kept once: from the hospital's IT, or from the coordinator."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord
from pydantic import ValidationError

from chainward_client.site_config import SiteConfig, WeightsPolicy
from chainward_shared.errors import PolicyRefusal, WeightsError
from chainward_shared.files import written
from chainward_shared.models import Architecture
from chainward_shared.pretrained.base import PIECE_BYTES, base_of_file, load_base, most_bytes, save_base
from chainward_shared.pretrained.store import WeightsStore
from chainward_shared.protocol import BaseState, BaseTask
from chainward_shared.weights import StateDict, load_file

logger = logging.getLogger("chainward.client")

KEPT = 8
"""Bases that a site keeps; the one that was used longest ago goes first."""

_REVIEWED = "reviewed"


class Bases:
    """The bases of one site.

    Parameters
    ----------
    folder : where they are kept
    reviewed : the weights that the hospital's IT has put in place
    policy : "only-reviewed": a base counts only if it is made of one of these
    """

    def __init__(self, folder: Path, reviewed: WeightsStore, policy: WeightsPolicy = "any") -> None:
        self.folder, self.reviewed, self.policy = folder, reviewed, policy

    @classmethod
    def of_site(cls, config: SiteConfig, path: Path) -> Bases:
        """Return those of the site whose site.yaml is in `path`."""
        return cls(config.state_dir(path) / "bases", WeightsStore(config.weights_dir(path)), config.weights)

    def load(self, architecture: Architecture) -> StateDict | None:
        """Return the base that models of an architecture go on; None where they start from none.

        Raises
        ------
        WeightsError
            The site hasn't got it.
        PolicyRefusal
            The policy wants reviewed weights, and there are none of this digest.
        """
        start = architecture.start
        if start is None:
            return None
        path = self._path(start.digest)
        if path.exists() and self._allowed(path):
            try:
                base = load_base(path, architecture)
                os.utime(path)
                return base
            except WeightsError as error:
                logger.warning("%s; it is removed, and made or fetched anew", error)
                path.unlink(missing_ok=True)
        if (made := self._of_reviewed_file(architecture)) is not None:
            return made
        if self.policy == "only-reviewed":
            raise PolicyRefusal(
                f"this site trains from reviewed weights only (weights: only-reviewed), and has none of {start.name}, SHA-256 "
                f"{start.file}; its IT may add them with `chainward-site weights add`"
            )
        raise WeightsError(
            f"this site has not got the weights that the model starts from, {start.name} ({start.digest[:12]}); they are to be "
            "sent first"
        )

    def answer(self, task: BaseTask, piece: ArrayRecord | None, site: str) -> BaseState:
        """Return how much of a base is here, after adding the piece that came, if one did.

        Raises
        ------
        WeightsError
            The file is larger than such a base can be, a piece is not one, or the whole is not what was announced.
        PolicyRefusal
            As `load`.
        StoreError
            The site's disk is full or can't be written.
        """
        try:
            self.load(task.architecture)
            return BaseState(site=site, complete=True, received=task.bytes)
        except WeightsError:
            pass
        if task.bytes > most_bytes(task.architecture):
            raise WeightsError(f"a base of {task.bytes} bytes; expected at most {most_bytes(task.architecture)}")
        part = self.folder / f".{task.sha256}.part"
        received = part.stat().st_size if part.exists() else 0
        if piece is not None and task.offset == received:
            received = self._append(part, _bytes_of(piece), received, task)
        if received < task.bytes:
            return BaseState(site=site, complete=False, received=received)
        self._accept(part, task)
        return BaseState(site=site, complete=True, received=task.bytes)

    def _append(self, part: Path, contents: bytes, received: int, task: BaseTask) -> int:
        if received + len(contents) > task.bytes:
            raise WeightsError(f"a piece of {len(contents)} bytes at {received}; the whole has {task.bytes}")
        with written(part):
            self.folder.mkdir(parents=True, exist_ok=True)
            part.touch(mode=0o600)
            with part.open("ab") as file:
                file.write(contents)
        return received + len(contents)

    def _accept(self, part: Path, task: BaseTask) -> None:
        """Check what has arrived and keep it; whatever is wrong with it, the half file goes."""
        try:
            with part.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != task.sha256:
                raise WeightsError(
                    f"the weights that arrived have SHA-256 {found[:12]}; announced was {task.sha256[:12]}"
                )
            self.keep(load_base(part, task.architecture), task.architecture)
        finally:
            part.unlink(missing_ok=True)

    def keep(self, base: StateDict, architecture: Architecture, reviewed: str | None = None) -> None:
        """Keep a base that was checked, or needs no check; `reviewed`: SHA-256 of the reviewed file that it is made of.

        Raises
        ------
        StoreError
            The site's disk is full or can't be written.
        """
        assert architecture.start is not None
        path = self._path(architecture.start.digest)
        metadata = {"name": architecture.start.name} | ({} if reviewed is None else {_REVIEWED: reviewed})
        with written(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_base(base, path, metadata)
        newest_first = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in newest_first[KEPT:]:
            old.unlink(missing_ok=True)

    def _of_reviewed_file(self, architecture: Architecture) -> StateDict | None:
        assert architecture.start is not None
        card = self.reviewed.with_digest(architecture.start.file)
        if card is None:
            return None
        base = base_of_file(self.reviewed.load(card), card, architecture)
        if base is None:
            logger.warning("the weights %s in this site's store make another base than the coordinator's", card.name)
            return None
        self.keep(base, architecture, card.sha256)
        return base

    def _allowed(self, path: Path) -> bool:
        """Tell whether a base that is here may be used: by policy only one of a reviewed file that is still in the store."""
        if self.policy == "any":
            return True
        try:
            of_file = load_file(path)[1].get(_REVIEWED)
            return of_file is not None and self.reviewed.with_digest(of_file) is not None
        except (WeightsError, ValidationError):
            return False

    def _path(self, of_digest: str) -> Path:
        return self.folder / f"{of_digest}.safetensors"


def _bytes_of(record: ArrayRecord) -> bytes:
    array = record.get("bytes")
    if array is None or len(record) != 1 or len(array.data) > PIECE_BYTES + 1024 or array.stype != "numpy.ndarray":
        raise WeightsError(f"a piece of weights has at most {PIECE_BYTES} bytes, in one array")
    try:
        values = array.numpy()
    except Exception as error:
        raise WeightsError("a piece of weights can't be read; sent again?") from error
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 1:
        raise WeightsError("a piece of weights is not bytes; sent again?")
    return values.tobytes()
