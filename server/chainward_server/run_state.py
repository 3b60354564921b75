"""`run.json`: which piece of work of a run has been done, and how the run stands."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainward_server.run_process import RunProcess
from chainward_shared import __version__
from chainward_shared.outside import MAX_RECORDS, BySite, Digest, HopKey, Line, Moment, RunId, Word

Phase = Literal["rendezvous", "chain", "alone", "students", "evaluation", "report", "done"]


Status = Literal["running", "finished", "incomplete", "failed", "stopped"]


class RunState(BaseModel):
    """`run.json`.

    Attributes
    ----------
    config : SHA-256 of config.toml: cut in the right place, the file would still be one; None in runs of earlier versions
    models : SHA-256 of each model file, by name without suffix
    finished : names of finished pieces of work: hops, sites trained alone, student rounds
    status : "incomplete": it came to its end, with less than was asked for; "stopped": by a person
    process : the process that coordinates it; None in runs of earlier versions
    resumable : whether resuming may help a run that has ended; None while it goes on
    waiting : sites where a person has not approved the run yet, and since when
    threads : of a training, where the configuration leaves the number open; None before it is settled
    keys : public keys of deployed sites, as they were when the run began: nobody else is taken for one of them
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    run_id: RunId
    status: Status = "running"
    reason: Line | None = None
    phase: Phase = "rendezvous"
    started: Moment
    updated: Moment
    version: Word = __version__
    config: Digest | None = None
    models: dict[HopKey, Digest] = Field(default_factory=dict, max_length=MAX_RECORDS)
    finished: list[HopKey] = Field(default_factory=list, max_length=MAX_RECORDS)
    process: RunProcess | None = None
    resumable: bool | None = None
    waiting: BySite[Moment] = Field(default_factory=dict)
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    keys: BySite[Digest] = Field(default_factory=dict)


def keys_of_earlier_runs(run: Path) -> dict[str, str]:
    """Return the public key that each site had in the newest run folder beside `run` that knows it."""
    keys: dict[str, str] = {}
    for path in sorted(run.parent.glob("*/run.json")):  # their names begin with the time
        if path.parent != run:
            with suppress(OSError, ValidationError):
                keys |= RunState.model_validate_json(path.read_bytes()).keys
    return keys


def iso(moment: datetime) -> str:
    """Return a time as `run.json` holds it, to the second."""
    return moment.isoformat(timespec="seconds")
