"""The table of a run's output: its folder, and where it is tracked beside that."""

from __future__ import annotations

from pydantic import Field

from chainward_shared.config.tables import Table, ids_in
from chainward_shared.errors import ConfigError, nearest


class OutputConfig(Table):
    """Where the run folder goes."""

    dir: str = Field(
        "~/.chainward/runs", description="Folder of the run folders: absolute, or under the home folder with ~"
    )
    resume: str = Field("", description="Id (or absolute path) of a stopped run to continue. Empty: a new run")
    track: str = Field(
        "none",
        max_length=100,
        description="Where the run is tracked beside its folder: none, mlflow (extra `track-mlflow`), tensorboard (extra "
        "`track-tensorboard`), or both, comma-separated",
    )
    track_to: str = Field(
        "",
        max_length=1_000,
        description="Folder of what trackers write, absolute or with ~; or the address of an MLflow server (http, https). "
        "Empty: `tracking` in output.dir; without an address nothing leaves this machine",
    )
    track_models: bool = Field(
        False, description="Also give the final model files to MLflow, and not only their digests"
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in ``track``, each once.

        Raises
        ------
        ConfigError
            One is unknown, or "none" is beside others.
        """
        names = tuple(dict.fromkeys(ids_in(self.track)))
        known = ("none", "mlflow", "tensorboard")
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"output.track = {self.track!r}: there is no tracker '{unknown[0]}'{nearest(unknown[0], known)}; allowed: none, "
                "mlflow, tensorboard, or both"
            )
        if "none" in names and len(names) > 1:
            raise ConfigError(f"output.track = {self.track!r}: 'none' and a tracker; leave out one of them")
        return tuple(name for name in names if name != "none")
