"""What a site keeps on disk between messages: a message may be answered by another process than the one before it."""

from __future__ import annotations

import logging
import re
import shutil
import time
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import ValidationError

from chainward_client.checkpoint import Checkpoint
from chainward_client.work_lock import WorkLock
from chainward_shared.errors import StoreError, WeightsError
from chainward_shared.files import written
from chainward_shared.models import Architecture
from chainward_shared.protocol import Body, EvaluateTask, StatisticsTask, fingerprint
from chainward_shared.weights import StateDict, digest, load_file, save_file
from chainward_shared.words import first_problem

logger = logging.getLogger("chainward.client")

B = TypeVar("B", bound=Body)


class SiteStore:
    """The finished work and the auxiliary teachers of one site in one run.

    Parameters
    ----------
    root : the site's state folder
    run_id : run that the files belong to; a resumed run keeps its id
    """

    KEPT_ROUNDS = 2
    """A round may be asked for again (its reply was lost, the run was resumed): the round before it is kept as well."""

    KEPT_DAYS = 30
    KEPT_BYTES = 20 * 10**9
    """What `tidy` leaves of other runs."""

    KEPT_ANSWERS: ClassVar[dict[str, int]] = {EvaluateTask.KIND: 256, StatisticsTask.KIND: 256}
    """The newest answers to each kind of task that are kept, default 3: a coordinator asks again for the last one, or the
    one before it. Noised scores and sums are small, and new ones cost privacy."""

    def __init__(self, root: Path, run_id: str) -> None:
        # the id comes in a message: whatever it is, the folder lies directly in `runs`, where nothing else of the site is
        self.folder = root / "runs" / (re.sub(r"[^A-Za-z0-9._-]", "_", run_id).lstrip(".") or "_")

    def tidy(self) -> None:
        """Remove what other runs left: of long ago, and the oldest beyond a size."""
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        runs = [path for path in others if path.is_dir() and not path.is_symlink()]
        runs.sort(key=_changed, reverse=True)
        total = 0
        for run in runs:
            total += sum(file.stat().st_size for file in run.iterdir() if file.is_file())
            if total > self.KEPT_BYTES or time.time() - _changed(run) > self.KEPT_DAYS * 86_400:
                logger.info("%s: removed, a run of long ago", run)
                shutil.rmtree(run, ignore_errors=True)

    def save_answer(self, task: Body, body: Body, state: StateDict) -> None:
        """Keep the answer to a task, before it is sent.

        Raises
        ------
        StoreError
            The state folder can't be written.
        """
        metadata = {"body": body.model_dump_json(), "digest": digest(state)}
        self._write(state, self._answer_path(task), metadata)
        kept = sorted(self.folder.glob(f"{task.KIND}-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        for old in kept[: -self.KEPT_ANSWERS.get(task.KIND, 3)]:
            old.unlink(missing_ok=True)
        self.checkpoint(task).remove()

    def load_answer(self, task: Body, expected: type[B]) -> tuple[B, StateDict] | None:
        """Return the answer that was given to the same task before; None if there is none that can be used."""
        path = self._answer_path(task)
        if not path.exists():
            return None
        try:
            state, metadata = load_file(path)
            if metadata.get("digest") != digest(state):
                raise WeightsError(f"{path}: not what was written")
            body = expected.model_validate_json(metadata.get("body", ""))
        except (WeightsError, ValidationError, OSError) as error:
            logger.warning("%s: damaged (%s); the work is done again", path, first_problem(error))
            return None
        logger.info("the same was asked before; the stored answer is sent again")
        return body, state

    def checkpoint(self, task: Body) -> Checkpoint:
        """Return where the training of a task writes itself down."""
        key = fingerprint(task)
        return Checkpoint(self.folder / f"half-{key[:32]}.safetensors", key)

    def lock(self, task: str) -> WorkLock:
        """Return the lock that whoever works on a task holds; `task`: its fingerprint."""
        return WorkLock(self.folder / f"at-work-{task[:32]}.lock")

    def secure_sum(self, task: str) -> Path:
        """Return where the site's part in the secure sum of a task is kept; `task`: its fingerprint."""
        return self.folder / f"sum-{task[:32]}.json"

    def save_auxiliary(self, state: StateDict, architecture: Architecture, after_round: int) -> None:
        """Keep the auxiliary teacher as it is after `after_round` (1-based; 0: as it was selected).

        Raises
        ------
        StoreError
            The state folder can't be written.
        """
        path = self.folder / f"auxiliary-round-{after_round:04d}.safetensors"
        self._write(state, path, architecture.to_metadata())
        for kept_after, path in self._auxiliaries():
            if kept_after <= after_round - self.KEPT_ROUNDS:
                path.unlink(missing_ok=True)

    def load_auxiliary(self, before_round: int) -> StateDict | None:
        """Return the newest auxiliary teacher from before `before_round` (1-based), or None if there is none.

        Raises
        ------
        StoreError
            Its file is damaged.
        """
        kept = [(after_round, path) for after_round, path in self._auxiliaries() if after_round < before_round]
        if not kept:
            return None
        try:
            return load_file(max(kept)[1])[0]
        except WeightsError as error:
            raise StoreError(f"{error}; remove it, and a retry brings the teacher anew") from error

    def _auxiliaries(self) -> list[tuple[int, Path]]:
        """Return the auxiliary teachers that are kept, with the round after which each was."""
        files = self.folder.glob("auxiliary-round-*.safetensors")
        named = ((re.fullmatch(r"auxiliary-round-(\d+)", path.stem), path) for path in files)
        return [(int(number[1]), path) for number, path in named if number]

    def _write(self, state: StateDict, path: Path, metadata: dict[str, str]) -> None:
        with written(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(state, path, metadata)

    def _answer_path(self, task: Body) -> Path:
        return self.folder / f"{task.KIND}-{fingerprint(task)[:32]}.safetensors"


def _changed(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.iterdir()), default=folder.stat().st_mtime)
