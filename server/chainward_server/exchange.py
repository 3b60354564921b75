"""Asking sites and collecting their answers, over Flower's grid."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic

from flwr.app import Message
from flwr.serverapp import Grid

from chainward_server.approvals import Approvals
from chainward_server.request import WORKER_DIED, B, Reply, Request, read_reply
from chainward_server.sites import Failure
from chainward_shared.identity import proven_key
from chainward_shared.protocol import (
    AtWork,
    AtWorkRequest,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkTask,
    SimulatedSite,
    StatisticsTask,
    StudentTask,
    fingerprint,
    pack,
)

logger = logging.getLogger("chainward")

WORKER_PAUSE = 1.0
"""Seconds before a request is given to the worker in its place; twice as long the next time."""
POLL_SECONDS = 0.1
LONGEST_POLL = 0.5
"""Between two questions to Flower for answers: it grows while none comes, since each costs the SuperLink, too."""
PULLED_AT_ONCE = 4
"""Answers that are fetched together: of fifty sites, fifty models at once would not fit into a machine's memory."""
LOOK_SECONDS = 0.5
"""Between two looks at which nodes are connected."""
TELL_SECONDS = 30.0
HELLO_SECONDS = 30.0
CHECK_SECONDS = 60.0
"""In which a site must say whether it is at work, else the question counts as not asked."""
SENT_AGAIN = 2
"""Times that a request that was lost is sent again."""


@dataclass(frozen=True)
class Member:
    """A site that takes part: its id, the node it is reached at, in a simulation who it plays, and the public key that it
    has shown when it was first met, by which it is known again at another node."""

    site: str
    node_id: int
    simulated: SimulatedSite | None = None
    key: str | None = None


class Exchange:
    """Sends requests to the members and gives back typed replies, or the reason why there is none.

    Parameters
    ----------
    grid : Flower's grid
    members : the sites, by id
    hello : asks a node that is not known yet who it is: a deployed site may come back as another node. None: none will
    check_every : seconds between two questions to a silent site whether it is still at work; default: it is never asked
    """

    def __init__(
        self,
        grid: Grid,
        members: Mapping[str, Member],
        hello: HelloRequest | None = None,
        *,
        check_every: float = 0.0,
    ) -> None:
        self.grid, self.hello, self.check_every = grid, hello, check_every
        self.members = dict(members)
        self._strangers: set[int] = set()
        self.approvals: Approvals | None = None
        """The sites where a person approves runs; they get no work before that. None: there are none."""

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

        A request that gets lost (its site was restarted, or was away for too long) is sent again, `SENT_AGAIN` times at most;
        the site answers what it has done already from its store.

        Parameters
        ----------
        expected : the kind of answer that counts as one
        deadline : seconds to wait for an answer, from sending on; sites that have not answered by then have failed
        patience : seconds to wait for a site that is not connected; default: it has failed at once
        """
        asked = _Asked(self, requests, expected, deadline, patience)
        pause, looked = POLL_SECONDS, -math.inf
        while asked.open:
            if asked.unsent and time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                yield from asked.send(looked)
            waiting = list(asked.waiting)
            for start in range(0, len(waiting), PULLED_AT_ONCE):
                for message in self.grid.pull_messages(waiting[start : start + PULLED_AT_ONCE]):
                    pause = POLL_SECONDS
                    yield from asked.receive(message)
            yield from asked.overdue()
            if asked.open:
                time.sleep(pause)
                pause = min(1.05 * pause, max(POLL_SECONDS, LONGEST_POLL))

    def push(self, site: str, request: Request, deadline: float) -> str | None:
        """Send one request, to be answered within `deadline` seconds; return its id, None where Flower didn't take it."""
        content = pack(request.body, request.arrays)
        # A message that was not delivered by the deadline must not start work afterwards.
        node = self.members[site].node_id
        message = Message(content, dst_node_id=node, message_type=request.message_type, ttl=deadline)
        return next(iter(self.grid.push_messages([message])), None)

    def connected(self, sites: Iterable[str]) -> list[str]:
        """Return those of `sites` that are connected, perhaps as another node than before."""
        nodes = set(self.grid.get_node_ids())
        absent = [site for site in sites if self.members[site].node_id not in nodes]
        known = {member.node_id for member in self.members.values()}
        new = nodes - known - self._strangers
        if absent and new and self.hello is not None:
            self._recognise(new)
        return [site for site in sites if self.members[site].node_id in nodes]

    def _recognise(self, nodes: set[int]) -> None:
        """Ask nodes who they are, and note those that are a member again: that can show the member's key."""
        assert self.hello is not None
        for node, known in introduced(self.grid, nodes, self.hello, HELLO_SECONDS).items():
            if isinstance(known, Failure):
                continue  # asked again when it is looked for the next time
            site = known.hello.site or ""
            member = self.members.get(site)
            if member is None:
                self._strangers.add(node)
            elif member.key is None or known.key != member.key:
                self._strangers.add(node)
                logger.warning(
                    "node %s says that it is site '%s' and can't show that site's key; it is refused", node, site
                )
            else:
                logger.info("site '%s' is back, as node %s", site, node)
                self.members[site] = replace(member, node_id=node)


class _Asked(Generic[B]):
    """The requests of one `Exchange.stream`, and how each stands; its methods yield the sites that are settled.

    Attributes
    ----------
    unsent : requests that still have to be sent, by site
    waiting : sites by the id of a message that they have not answered
    """

    def __init__(
        self, exchange: Exchange, requests: Mapping[str, Request], expected: type[B], deadline: float, patience: float
    ) -> None:
        self.exchange, self.requests, self.expected = exchange, requests, expected
        self.deadline, self.patience = deadline, patience
        self.unsent, self.waiting = dict(requests), dict[str, str]()
        self._begun = time.monotonic()
        self._sent: dict[str, float] = {}
        self._rest, self._again = dict.fromkeys(requests, 0.0), dict.fromkeys(requests, 0)
        self._since = dict.fromkeys(requests, self._begun)
        self._told = -math.inf
        self._lookout = _Lookout(exchange, requests)

    @property
    def open(self) -> bool:
        """Whether a site is not settled yet."""
        return bool(self.unsent or self.waiting)

    def send(self, now: float) -> Iterator[tuple[str, Reply[B] | Failure]]:
        """Send what can be sent to sites that are connected and may have it, and give up those that are away for too long."""
        approvals = self.exchange.approvals
        held = approvals.held(self.exchange, self.unsent, self._begun) if approvals else {}
        self._since |= dict.fromkeys(held, now)  # their patience begins when they may have the work
        for site, failure in [(site, why) for site, why in held.items() if why is not None]:
            yield self._settled(site, failure)
        ready = [site for site in self.unsent if now >= self._rest[site] and site not in held]
        for site in self.exchange.connected(ready):
            self._sent[site] = time.monotonic()
            message_id = self.exchange.push(site, self.unsent.pop(site), self.deadline)
            if message_id is None:
                yield self._settled(site, Failure(f"site '{site}': Flower did not take the message", 0.0, lost=True))
            else:
                self.waiting[message_id] = site
        away = [site for site in self.unsent if site not in held]
        for site in [site for site in away if now >= self._rest[site] and now - self._since[site] >= self.patience]:
            gone = now - self._since[site]
            waited = f" (waited {gone:.0f} s, federation.patience)" if self.patience else ""
            yield self._settled(site, Failure(f"site '{site}' is not connected{waited}", gone, lost=True))
        self._tell_who_is_away([site for site in away if site in self.unsent], now)

    def receive(self, message: Message) -> Iterator[tuple[str, Reply[B] | Failure]]:
        """Read an answer; one that got lost, or waits for a person, is asked for again."""
        if message.metadata.reply_to_message_id not in self.waiting:
            return  # of a site that was asked twice, and has answered
        site = self.waiting.pop(message.metadata.reply_to_message_id)
        reply = read_reply(site, message, self.expected, time.monotonic() - self._sent[site])
        if isinstance(reply, Failure) and reply.lost:
            if site in self.unsent or site in self.waiting.values():
                return
            if self._again[site] < SENT_AGAIN:
                self._ask_again(site, reply.reason)
                return
        approvals = self.exchange.approvals
        if isinstance(reply, Failure) and reply.waiting and approvals and approvals.withdraw(site):
            self.unsent[site] = self.requests[site]
            return
        yield self._settled(site, reply)

    def overdue(self) -> Iterator[tuple[str, Reply[B] | Failure]]:
        """Give up the sites whose time is over, and ask those again that are not at work on what they were asked for."""
        for site in dict.fromkeys(self.waiting.values()):
            took = time.monotonic() - self._sent[site]
            if took > self.deadline:
                late = f"site '{site}' did not answer within {self.deadline:g} s"
                yield self._settled(site, Failure(late, took, lost=True))
        sent = {site: self._sent[site] for site in self.waiting.values() if site not in self.unsent}
        for site in self._lookout.idle(sent):
            if self._again[site] < SENT_AGAIN:
                # the earlier request stays awaited: its answer may be on its way, over a slow line
                self._ask_again(site, f"site '{site}' is not at work on what it was asked for")

    def _settled(self, site: str, outcome: Reply[B] | Failure) -> tuple[str, Reply[B] | Failure]:
        self.unsent.pop(site, None)
        for message_id in [message_id for message_id, other in self.waiting.items() if other == site]:
            del self.waiting[message_id]
        return site, outcome

    def _ask_again(self, site: str, why: str) -> None:
        logger.warning("%s; it is asked again", why)
        self.unsent[site], self._since[site] = self.requests[site], time.monotonic()
        self._again[site] += 1
        self._rest[site] = self._since[site] + (WORKER_PAUSE * self._again[site] if WORKER_DIED in why else 0.0)

    def _tell_who_is_away(self, sites: list[str], now: float) -> None:
        """Say now and then which sites are waited for."""
        left = max((self.patience - (now - self._since[site]) for site in sites), default=0.0)
        if left >= 1 and now - self._told > TELL_SECONDS:
            logger.warning("waiting up to %.0f s for %s to be connected", left, ", ".join(sites))
            self._told = now


@dataclass(frozen=True)
class Introduced:
    """What a node says of itself. `key`: the public key that it has shown to hold; None: none."""

    hello: Hello
    key: str | None


def introduced(
    grid: Grid, nodes: Iterable[int], hello: HelloRequest, deadline: float
) -> dict[int, Introduced | Failure]:
    """Ask nodes who they are, each with a question of its own, and return what they say."""
    asked = {node: hello.model_copy(update={"nonce": secrets.token_hex(32)}) for node in nodes}
    exchange = Exchange(grid, {str(node): Member(str(node), node) for node in asked})
    requests = {str(node): Request("query", question) for node, question in asked.items()}
    found: dict[int, Introduced | Failure] = {}
    for name, answer in exchange.ask(requests, Hello, deadline).items():
        node = int(name)
        found[node] = (
            answer
            if isinstance(answer, Failure)
            else Introduced(answer.body, proven_key(answer.body, nonce=asked[node].nonce, node=node))
        )
    return found


class _Lookout:
    """Finds the sites that have a request and are not at work on it: a site may be restarted before Flower notices, and what
    it was asked for is gone with its old process.

    Parameters
    ----------
    exchange : asks the sites
    requests : what they were asked for
    """

    def __init__(self, exchange: Exchange, requests: Mapping[str, Request]) -> None:
        self.exchange, self.every = exchange, exchange.check_every
        self._tasks = {
            site: (task.run_id, fingerprint(task))
            for site, task in ((site, request.body) for site, request in requests.items())
            if isinstance(task, LinkTask | StudentTask | EvaluateTask | StatisticsTask)
        }
        self._asked: dict[str, tuple[str, float]] = {}
        self._last: dict[str, float] = {}
        self._idle: dict[str, int] = {}
        self._pause = dict.fromkeys(requests, self.every)

    def idle(self, waiting: Mapping[str, float]) -> list[str]:
        """Return those of the `waiting` sites (and when their request was sent) that have said twice in a row, `every`
        seconds apart, that nobody there is at work."""
        if not self.every:
            return []
        now, found = time.monotonic(), []
        for message in self.exchange.grid.pull_messages(list(self._asked)) if self._asked else ():
            site, _ = self._asked.pop(message.metadata.reply_to_message_id)
            answer = read_reply(site, message, AtWork, 0.0)
            self._idle[site] = (
                self._idle.get(site, 0) + 1 if isinstance(answer, Reply) and not answer.body.at_work else 0
            )
            if self._idle[site] >= 2 and site in waiting:
                self._idle[site] = 0
                found.append(site)
        for message_id, (site, asked) in list(self._asked.items()):
            if site not in waiting:
                del self._asked[message_id]
            elif now - asked > CHECK_SECONDS:
                del self._asked[message_id]
                self._pause[site] *= 2  # a machine that can't answer in time has enough to do
        busy = {site for site, _ in self._asked.values()}
        for site, sent in waiting.items():
            if (
                site in self._tasks
                and site not in busy
                and now - max(sent, self._last.get(site, 0.0)) > self._pause[site]
            ):
                self._last[site] = now
                run_id, task = self._tasks[site]
                request = Request("query", AtWorkRequest(run_id=run_id, task=task))
                pushed = self.exchange.push(site, request, CHECK_SECONDS)
                if pushed is not None:
                    self._asked[pushed] = (site, now)
        return found
