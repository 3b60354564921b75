"""What was asked of this site and what it answered, a line each: names, sizes and times, and nothing of the data.

For the people at the hospital (`chainward-site watch --web`). The file is cut when it is long, and work goes on where it can't be
written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError

from chainward_shared.errors import ChainwardError
from chainward_shared.files import write_atomically
from chainward_shared.outside import Bytes, HopKey, Line, RunId, Seconds, SiteId
from chainward_shared.protocol import (
    BaseState,
    BaseTask,
    Body,
    EvaluateTask,
    LinkTask,
    Refusal,
    StatisticsTask,
    StudentTask,
    SumKeysTask,
    SumSharesTask,
    SumTask,
    SumUnmaskTask,
    kind_of,
    unpack,
)
from chainward_shared.weights import byte_count

logger = logging.getLogger("chainward.client")

MOST_BYTES = 2_000_000
"""Of the file; then the older half of it goes."""

_WORK: Mapping[str, type[Body]] = {
    kind.KIND: kind
    for kind in (
        LinkTask,
        StudentTask,
        EvaluateTask,
        StatisticsTask,
        BaseTask,
        SumTask,
        SumKeysTask,
        SumSharesTask,
        SumUnmaskTask,
    )
}
"""The requests that are written down; who is there, what is described and whether somebody is at work is asked all the time."""
_BRIEF = (BaseTask, SumKeysTask, SumSharesTask, SumUnmaskTask)
"""Requests without work of their own, of which only the answer is written down."""


class Entry(BaseModel):
    """One line. `outcome`: "begun", "sent", "refused", "waits" (for approval); `bytes`: of the arrays in the answer;
    `seconds`: from the request to the answer."""

    model_config = ConfigDict(extra="ignore")

    time: datetime
    kind: Line
    run: RunId
    hop: HopKey | SiteId | None = None
    outcome: Line
    bytes: Bytes = 0
    seconds: Seconds = 0.0
    reason: Line | None = None


class Journal:
    """The journal of one site.

    Parameters
    ----------
    state_dir : its state folder; where there is none yet, nothing is written down
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "journal.jsonl"

    def note(self, asked: RecordDict, answer: RecordDict | None = None, seconds: float = 0.0) -> None:
        """Write down that work on a request begins, or what it was answered with, after `seconds`."""
        if answer is None:
            self._note(asked, "begun")
        elif kind_of(answer) == Refusal.KIND:
            refusal, _ = unpack(answer, Refusal)
            self._note(asked, "waits" if refusal.waiting else "refused", seconds=seconds, reason=refusal.reason)
        elif kind_of(answer) != BaseState.KIND or unpack(answer, BaseState)[0].complete:
            size = sum(byte_count(record) for record in answer.array_records.values())
            self._note(asked, "sent", bytes=size, seconds=seconds)

    def last(self, count: int) -> list[Entry]:
        """Return the newest lines, the newest first; lines that can't be read are left out."""
        try:
            lines = self.path.read_bytes().splitlines()[-count:]
        except OSError:
            return []
        found = []
        for line in reversed(lines):
            with suppress(ValidationError):
                found.append(Entry.model_validate_json(line))
        return found

    def _note(self, asked: RecordDict, outcome: str, **facts: Any) -> None:
        try:
            kind = _WORK.get(kind_of(asked))
            task = None if kind is None else unpack(asked, kind)[0]
        except ChainwardError:
            return  # a request that can't be read is refused, and the log says why
        if task is None or not self.path.parent.is_dir() or (isinstance(task, _BRIEF) and outcome == "begun"):
            return
        try:
            named = task.round if isinstance(task, SumKeysTask | SumSharesTask | SumUnmaskTask) else task
            entry = Entry(
                time=datetime.now(UTC),
                kind=task.KIND,
                run=getattr(named, "run_id", ""),
                hop=getattr(named, "hop", None),
                outcome=outcome,
                **facts,
            )
            self._append(entry.model_dump_json(exclude_defaults=True).encode() + b"\n")
        except (OSError, ValidationError) as error:
            logger.warning("%s: can't be written (%s); work goes on", self.path, error)

    def _append(self, line: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, line)
            size = os.fstat(file).st_size
        finally:
            os.close(file)
        if size > MOST_BYTES:
            newest = self.path.read_bytes()[-MOST_BYTES // 2 :].split(b"\n", 1)[-1]
            write_atomically(self.path, newest, mode=0o600)
