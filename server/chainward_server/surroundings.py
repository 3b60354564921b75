"""Where a run works: as whom, with which installation, in whose SuperLink. `flwr run` hands a simulation to whatever SuperLink
listens on its port, and that may be another person's."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from chainward_server.run_folder import RunFolder
from chainward_server.run_process import user_name
from chainward_shared import __version__

logger = logging.getLogger("chainward")

FOLLOWED = "CHAINWARD_FOLLOWED"
"""Set where `chainward run` has started the SuperLink: it says itself what Ctrl-C does."""


@dataclass(frozen=True)
class Surroundings:
    """What a process takes from whoever started it. `flower_home`: empty where Flower's default counts; `prefix`: of Python."""

    user: str
    home: str
    flower_home: str
    prefix: str

    @classmethod
    def current(cls) -> Surroundings:
        """Return those of this process."""
        return cls(user_name(), str(Path("~").expanduser()), os.environ.get("FLWR_HOME", ""), sys.prefix)

    @classmethod
    def of(cls, process: psutil.Process) -> Surroundings:
        """Return those of another process; what may not be seen of another person's is empty.

        Raises
        ------
        psutil.Error
            It is gone.
        """
        user = process.username()
        try:
            environment = process.environ()
            executable = process.cmdline()[0]
        except (psutil.AccessDenied, IndexError):
            return cls(user, "", "", "")
        prefix = str(Path(executable).parent.parent) if Path(executable).is_absolute() else ""
        return cls(user, environment.get("HOME", ""), environment.get("FLWR_HOME", ""), prefix)

    def differences(self, other: Surroundings) -> list[str]:
        """Return in words where a person's surroundings, `other`, are not these, in which the run works."""
        if self.user != other.user:
            return [f"it works as user {self.user!r} and not as {other.user!r}"]
        pairs = (
            ("home folder", self.home, other.home),
            ("FLWR_HOME", self.flower_home or "the default", other.flower_home or "the default"),
            ("installation", self.prefix, other.prefix),
        )
        return [f"its {what} is {ours} and not {theirs}" for what, ours, theirs in pairs if theirs and ours != theirs]


def tell(folder: RunFolder) -> None:
    """Say where the run works, what Ctrl-C does to it, and whether it works for someone in another's SuperLink."""
    here = Surroundings.current()
    process = folder.state.process
    logger.info(
        "process %d of %s, home %s, chainward %s of %s",
        process.pid if process else os.getpid(),
        here.user,
        here.home,
        __version__,
        here.prefix,
    )
    for problem in _foreign(here):
        logger.warning(
            "%s. `flwr run` uses the SuperLink that listens on its port, whoever started it; for one of your own set "
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT and FLWR_LOCAL_CONTROL_API_PORT to free ports, or use `chainward run`",
            problem,
        )
    if FOLLOWED not in os.environ:
        logger.info(
            "Ctrl-C ends this log and not the run. To follow it: chainward watch %s  To stop it: chainward stop %s",
            folder.how_to_name,
            folder.how_to_name,
        )


def _foreign(here: Surroundings) -> list[str]:
    """Return what is not as it is for the one who has typed `flwr run`; empty where that is not known, or all is alike."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if not (any(Path(word).name == "flwr" for word in words[:2]) and "run" in words[1:3]):
                continue
            differences = here.differences(Surroundings.of(process))
        except psutil.Error:
            continue
        if not differences:
            return []
        found.append(f"this run is not at home with the `flwr run` of process {process.pid}: {', '.join(differences)}")
    return found
