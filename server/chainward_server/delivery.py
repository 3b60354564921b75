"""Bringing the pretrained weights that a run starts from to the sites that have not got them: once, piece by piece."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord

from chainward_server.exchange import Exchange
from chainward_server.request import Reply, Request
from chainward_server.sites import Failure
from chainward_shared.config import FederationConfig
from chainward_shared.models import Architecture
from chainward_shared.pretrained.base import PIECE_BYTES, save_base
from chainward_shared.protocol import BaseState, BaseTask
from chainward_shared.weights import StateDict

logger = logging.getLogger("chainward")

TRIES = 3
"""Times that a site is asked again before it goes without."""


class Delivery:
    """The file of a base, as long as it is being sent.

    Parameters
    ----------
    exchange : sends requests to the members and brings back their replies
    federation : how long an answer, and a site that is not connected, is waited for
    run_id : the run whose models start from it
    """

    def __init__(
        self,
        exchange: Exchange,
        federation: FederationConfig,
        architecture: Architecture,
        base: StateDict,
        run_id: str,
    ) -> None:
        self.exchange, self.federation, self.architecture, self.run_id = exchange, federation, architecture, run_id
        with tempfile.TemporaryDirectory(prefix="chainward-base-") as folder:
            path = Path(folder) / "base.safetensors"
            save_base(base, path, {})
            self._contents = path.read_bytes()
        self._sha256 = hashlib.sha256(self._contents).hexdigest()

    def to(self, sites: Sequence[str]) -> dict[str, int]:
        """Ask the sites what they have, send what is missing, all at once, and return the bytes sent to each."""
        sent, tries = dict.fromkeys(sites, 0), dict.fromkeys(sites, TRIES)
        offsets: dict[str, int | None] = dict.fromkeys(sites)
        while offsets:
            requests = {site: self._request(site, offset) for site, offset in offsets.items()}
            federation = self.federation
            replies = self.exchange.ask(requests, BaseState, federation.hop_deadline, patience=federation.patience)
            for site, reply in replies.items():
                sent[site] += requests[site].bytes
                offset = self._next(site, reply, offsets[site], tries)
                if offset is None:
                    del offsets[site]
                else:
                    offsets[site] = offset
        return sent

    def _next(
        self, site: str, reply: Reply[BaseState] | Failure, last: int | None, tries: dict[str, int]
    ) -> int | None:
        """Return where the next piece for a site begins; None if it needs none, or gets none."""
        if isinstance(reply, Failure):
            tries[site] -= 1
            if reply.final or tries[site] == 0:
                logger.warning("%s; it goes without the weights that the run starts from", reply.reason)
                return None
            return last or 0
        if reply.body.complete:
            return None
        received = min(reply.body.received, len(self._contents))
        if last is None:
            missing = (len(self._contents) - received) / 1e6
            logger.info("%s has not got the weights that the run starts from: %.1f MB", site, missing)
        elif received <= last:
            tries[site] -= 1
            if tries[site] == 0:
                logger.warning("%s does not take the weights that the run starts from; it goes without", site)
                return None
        return received

    def _request(self, site: str, offset: int | None) -> Request:
        task = BaseTask(
            run_id=self.run_id,
            architecture=self.architecture,
            bytes=len(self._contents),
            sha256=self._sha256,
            offset=offset,
            simulated=self.exchange.members[site].simulated,
        )
        if offset is None:
            return Request("query", task)
        piece = np.frombuffer(self._contents[offset : offset + PIECE_BYTES], dtype=np.uint8)
        return Request("query", task, {"piece": ArrayRecord({"bytes": Array(piece)})})
