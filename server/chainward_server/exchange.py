"""Asking sites and collecting their answers, over Flower's grid."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import Body, Hello, HelloRequest, SimulatedSite, SiteRefusal, pack, unpack
from chainward_shared.weights import byte_count

logger = logging.getLogger("chainward")

POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""Between two looks at which nodes are connected."""
TELL_SECONDS = 30.0
HELLO_SECONDS = 30.0


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
    """Why there is no usable answer, in one line. `refused`: the site itself said no; `final`: and will say so again."""

    reason: str
    seconds: float
    refused: bool = False
    final: bool = False


class Exchange:
    """Sends requests to the members and gives back typed replies, or the reason why there is none.

    Parameters
    ----------
    grid : Flower's grid
    members : the sites, by id
    hello : asks a node that is not known yet who it is: a deployed site may come back as another node. None: none will
    """

    def __init__(self, grid: Grid, members: Mapping[str, Member], hello: HelloRequest | None = None) -> None:
        self.grid, self.hello = grid, hello
        self.members = dict(members)
        self._strangers: set[int] = set()

    def ask(
        self, requests: Mapping[str, Request], expected: type[B], deadline: float, *, patience: float = 0.0
    ) -> dict[str, Reply[B] | Failure]:
        """Send every request at once, wait for all, and return what came back in the order of `requests`."""
        outcome = dict(self.stream(requests, expected, deadline, patience=patience))
        return {site: outcome[site] for site in requests}

    def stream(
        self, requests: Mapping[str, Request], expected: type[B], deadline: float, *, patience: float = 0.0
    ) -> Iterator[tuple[str, Reply[B] | Failure]]:
        """Send every request as soon as its site is connected and yield each site's outcome as it arrives.

        Parameters
        ----------
        expected : the kind of answer that counts as one
        deadline : seconds to wait for an answer, from sending on; sites that have not answered by then have failed
        patience : seconds to wait for a site that is not connected; default: it has failed at once
        """
        started = time.monotonic()
        unsent, waiting, sent = dict(requests), dict[str, str](), dict[str, float]()
        looked = told = -math.inf
        while unsent or waiting:
            now = time.monotonic()
            if unsent and now - looked > LOOK_SECONDS:
                looked = now
                for site in self._connected(unsent):
                    sent[site] = time.monotonic()
                    message_id = self._push(site, unsent.pop(site), deadline)
                    if message_id is None:
                        yield site, Failure(f"site '{site}': Flower did not take the message", 0.0)
                    else:
                        waiting[message_id] = site
                if now - started >= patience:
                    for site in unsent:
                        waited = f" (waited {now - started:.0f} s, federation.patience)" if patience else ""
                        yield site, Failure(f"site '{site}' is not connected{waited}", now - started)
                    unsent.clear()
                elif unsent and now - told > TELL_SECONDS:
                    told = now
                    left = patience - (now - started)
                    logger.warning("waiting up to %.0f s for %s to be connected", left, ", ".join(unsent))
            for message in self.grid.pull_messages(list(waiting)) if waiting else ():
                site = waiting.pop(message.metadata.reply_to_message_id)
                yield site, _read(site, message, expected, time.monotonic() - sent[site])
            for message_id, site in list(waiting.items()):
                if time.monotonic() - sent[site] > deadline:
                    del waiting[message_id]
                    seconds = time.monotonic() - sent[site]
                    yield site, Failure(f"site '{site}' did not answer within {deadline:g} s", seconds)
            if unsent or waiting:
                time.sleep(POLL_SECONDS)

    def _push(self, site: str, request: Request, deadline: float) -> str | None:
        content = pack(request.body, request.arrays)
        # A message that was not delivered by the deadline must not start work afterwards.
        node = self.members[site].node_id
        message = Message(content, dst_node_id=node, message_type=request.message_type, ttl=deadline)
        return next(iter(self.grid.push_messages([message])), None)

    def _connected(self, sites: Iterable[str]) -> list[str]:
        """Return those of `sites` that are connected, perhaps as another node than before."""
        nodes = set(self.grid.get_node_ids())
        absent = [site for site in sites if self.members[site].node_id not in nodes]
        known = {member.node_id for member in self.members.values()}
        new = nodes - known - self._strangers
        if absent and new and self.hello is not None:
            self._recognise(new)
        return [site for site in sites if self.members[site].node_id in nodes]

    def _recognise(self, nodes: set[int]) -> None:
        """Ask nodes who they are, and note those that are a member again."""
        asked = Exchange(self.grid, {str(node): Member(str(node), node) for node in nodes})
        hello = Request("query", self.hello) if self.hello is not None else None
        assert hello is not None
        for name, answer in asked.ask(dict.fromkeys(asked.members, hello), Hello, deadline=HELLO_SECONDS).items():
            if isinstance(answer, Failure):
                continue  # asked again when it is looked for the next time
            site = answer.body.site
            if site not in self.members:
                self._strangers.add(int(name))
                continue
            logger.info("site '%s' is back, as node %s", site, name)
            self.members[site] = replace(self.members[site], node_id=int(name))


def _read(site: str, message: Message, expected: type[B], seconds: float) -> Reply[B] | Failure:
    if message.has_error():
        words = (message.error.reason or "no reason given").strip().splitlines()
        return Failure(f"site '{site}' failed: {words[-1]} (Flower error {message.error.code})", seconds)
    content: RecordDict = message.content
    try:
        body, arrays = unpack(content, expected)
    except SiteRefusal as refusal:
        return Failure(f"site '{site}' refused: {refusal}", seconds, refused=True, final=refusal.final)
    except ChainwardError as error:
        return Failure(f"site '{site}': {error}", seconds)
    return Reply(body, arrays, seconds, sum(byte_count(record) for record in arrays.values()), message)
