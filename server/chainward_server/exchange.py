"""Asking sites and collecting their answers, over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import Body, SimulatedSite, SiteRefusal, pack, unpack
from chainward_shared.weights import byte_count

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Member:
    """A site that takes part: its id, the node it is reached at, and, in a simulation, who it plays."""

    site: str
    node_id: int
    simulated: SimulatedSite | None = None


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


B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class Reply(Generic[B]):
    """A site's answer. `seconds`: from sending to receiving; `bytes`: of the arrays; `message`: Flower's own."""

    body: B
    arrays: dict[str, ArrayRecord]
    seconds: float
    bytes: int
    message: Message


@dataclass(frozen=True)
class Failure:
    """Why there is no usable answer, in one line. `refused`: the site itself said no."""

    reason: str
    seconds: float
    refused: bool = False


class Exchange:
    """Sends requests to the members and gives back typed replies, or the reason why there is none.

    Parameters
    ----------
    grid : Flower's grid
    members : the sites, by id
    """

    def __init__(self, grid: Grid, members: Mapping[str, Member]) -> None:
        self.grid = grid
        self.members = dict(members)

    def ask(self, requests: Mapping[str, Request], expected: type[B], deadline: float) -> dict[str, Reply[B] | Failure]:
        """Send every request at once, wait for all, and return what came back in the order of `requests`."""
        outcome = dict(self.stream(requests, expected, deadline))
        return {site: outcome[site] for site in requests}

    def stream(
        self, requests: Mapping[str, Request], expected: type[B], deadline: float
    ) -> Iterator[tuple[str, Reply[B] | Failure]]:
        """Send every request at once and yield each site's outcome as it arrives.

        Parameters
        ----------
        expected : the kind of answer that counts as one
        deadline : seconds to wait for the slowest; sites that have not answered by then have failed
        """
        connected = set(self.grid.get_node_ids())
        started = time.monotonic()
        waiting: dict[str, str] = {}
        for site, request in requests.items():
            node = self.members[site].node_id
            if node not in connected:
                yield site, Failure(f"site '{site}' is not connected", 0.0)
                continue
            content = pack(request.body, request.arrays)
            # A message that was not delivered by the deadline must not start work afterwards.
            message = Message(content, dst_node_id=node, message_type=request.message_type, ttl=deadline)
            ids = list(self.grid.push_messages([message]))
            if ids:
                waiting[ids[0]] = site
            else:
                yield site, Failure(f"site '{site}': Flower did not take the message", 0.0)
        while waiting:
            for message in self.grid.pull_messages(list(waiting)):
                site = waiting.pop(message.metadata.reply_to_message_id)
                yield site, _read(site, message, expected, time.monotonic() - started)
            if time.monotonic() - started > deadline:
                break
            if waiting:
                time.sleep(POLL_SECONDS)
        for site in waiting.values():
            yield site, Failure(f"site '{site}' did not answer within {deadline:g} s", time.monotonic() - started)


def _read(site: str, message: Message, expected: type[B], seconds: float) -> Reply[B] | Failure:
    if message.has_error():
        words = (message.error.reason or "no reason given").strip().splitlines()
        return Failure(f"site '{site}' failed: {words[-1]} (Flower error {message.error.code})", seconds)
    content: RecordDict = message.content
    try:
        body, arrays = unpack(content, expected)
    except SiteRefusal as refusal:
        return Failure(f"site '{site}' refused: {refusal}", seconds, refused=True)
    except ChainwardError as error:
        return Failure(f"site '{site}': {error}", seconds)
    return Reply(body, arrays, seconds, sum(byte_count(record) for record in arrays.values()), message)
