"""The process that coordinates a run: it stands in `run.json`, so that a run whose process is gone is known to be."""

from __future__ import annotations

import getpass
import os
import socket

import psutil
from pydantic import BaseModel, ConfigDict, Field

from chainward_shared.outside import Line

CLOCK_SLACK = 5.0
"""Seconds by which two readings of when a process began may differ: the system computes it from a clock that is set at times."""


class RunProcess(BaseModel):
    """A process, so that it is found again and no other is taken for it.

    Attributes
    ----------
    created : when it began, seconds since 1970; another process may get the same `pid` later
    host, user : where it runs, and as whom
    flower_home : its FLWR_HOME; None: Flower's default
    flower_run : Flower's own id of the run; None where Flower did not start it
    """

    model_config = ConfigDict(extra="forbid")

    pid: int = Field(ge=0, lt=2**32)
    created: float = Field(ge=0, le=1e12, allow_inf_nan=False)
    host: Line
    user: Line
    flower_home: Line | None = None
    flower_run: int | None = Field(default=None, ge=0, lt=2**64)

    @classmethod
    def current(cls, flower_run: int | None = None) -> RunProcess:
        """Return this process."""
        pid = os.getpid()
        return cls(
            pid=pid,
            created=psutil.Process(pid).create_time(),
            host=socket.gethostname(),
            user=user_name(),
            flower_home=os.environ.get("FLWR_HOME"),
            flower_run=flower_run,
        )

    def find(self) -> psutil.Process | None:
        """Return the process itself; None where it is gone, or was on another machine."""
        if not self.here:
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) <= CLOCK_SLACK
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

    @property
    def here(self) -> bool:
        """Whether it was started on this machine, so that one can know whether it is gone."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """Whether it was on this machine and has ended."""
        return self.here and self.find() is None


def user_name() -> str:
    """Return the name of the account that this process runs as, its number where it has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return str(os.getuid())
