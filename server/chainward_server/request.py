"""One request to a site, and what came back of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import ErrorCode

from chainward_server.sites import Failure
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import Body, SiteRefusal, unpack
from chainward_shared.weights import byte_count

B = TypeVar("B", bound=Body)

WORKER_DIED = "the process that simulates it has died"
"""What is said of a worker of a simulation that was killed, perhaps for want of memory."""
_OF_RAY = re.compile(r"ray\.exceptions\.|Worker exit type|worker process has died")
"""Ray's words about a worker that died: many, and some of them quote the command lines of other programs."""
LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
"""Flower's errors that say nothing of the work: the site was away, or its process was killed."""


@dataclass(frozen=True)
class Request:
    """One message to one site. `message_type`: "query", "train.link", "train.student", "evaluate"."""

    message_type: str
    body: Body
    arrays: Mapping[str, ArrayRecord] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(byte_count(record) for record in self.arrays.values())


@dataclass(frozen=True)
class Reply(Generic[B]):
    """A site's answer. `seconds`: from sending to receiving; `bytes`: of the arrays."""

    body: B
    arrays: dict[str, ArrayRecord]
    seconds: float
    bytes: int


def read_reply(site: str, message: Message, expected: type[B], seconds: float) -> Reply[B] | Failure:
    """Return what a site's message says, or why it is not what was expected of it."""
    if message.has_error():
        words = (message.error.reason or "no reason given").strip().splitlines()
        if WORKER_DIED in words[0] or _OF_RAY.search(message.error.reason or ""):
            return Failure(f"site '{site}': {WORKER_DIED}", seconds, lost=True)
        lost = message.error.code in LOST
        return Failure(f"site '{site}' failed: {words[-1]} (Flower error {message.error.code})", seconds, lost=lost)
    content: RecordDict = message.content
    try:
        body, arrays = unpack(content, expected)
    except SiteRefusal as refusal:
        return Failure(
            f"site '{site}' refused: {refusal}",
            seconds,
            refused=not refusal.waiting,
            final=refusal.final,
            waiting=refusal.waiting,
        )
    except ChainwardError as error:
        return Failure(f"site '{site}': {error}", seconds, malformed=True)
    return Reply(body, arrays, seconds, sum(byte_count(record) for record in arrays.values()))
