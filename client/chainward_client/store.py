"""What a site keeps on disk between messages: a message may be answered by another process than the one before it."""

from __future__ import annotations

import re
from pathlib import Path

from chainward_shared.errors import ChainwardError
from chainward_shared.models import Architecture
from chainward_shared.weights import StateDict, load_file, save_file


class SiteStore:
    """The auxiliary teachers of one site in one run, by round.

    Parameters
    ----------
    root : the site's state folder
    run_id : run that the files belong to; a resumed run keeps its id
    """

    KEPT_ROUNDS = 2
    """A round may be asked for again (its reply was lost, the run was resumed): the round before it is kept as well."""

    def __init__(self, root: Path, run_id: str) -> None:
        # the id comes in a message: whatever it is, the folder lies directly in the site's own
        self.folder = root / (re.sub(r"[^A-Za-z0-9._-]", "_", run_id).lstrip(".") or "_")

    def save_auxiliary(self, state: StateDict, architecture: Architecture, after_round: int) -> None:
        """Keep the auxiliary teacher as it is after `after_round` (1-based; 0: as it was selected).

        Raises
        ------
        ChainwardError
            The state folder can't be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(state, self._path(after_round), architecture.to_metadata())
        except OSError as error:
            raise ChainwardError(
                f"{self.folder}: can't be written ({error.strerror}); free space or fix its rights"
            ) from error
        for old in range(after_round - self.KEPT_ROUNDS + 1):
            self._path(old).unlink(missing_ok=True)

    def load_auxiliary(self, before_round: int) -> StateDict | None:
        """Return the newest auxiliary teacher from before `before_round` (1-based), or None if there is none."""
        for after_round in range(before_round - 1, -1, -1):
            if self._path(after_round).exists():
                return load_file(self._path(after_round))[0]
        return None

    def _path(self, after_round: int) -> Path:
        return self.folder / f"auxiliary-round-{after_round:04d}.safetensors"
