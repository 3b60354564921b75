"""Flower's grid without Flower: the coordinator talks to the real client app in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import chainward_client.app
import chainward_simulations.client_app

Interference = Callable[[Message, Callable[[], Message]], Message | None]
"""Sees a message and may answer it as the site would, otherwise, wrongly, or (None) not at all."""


class LoopbackGrid(Grid):
    """Flower's grid without Flower: a message is answered at once, by the real client app, in this process.

    Every message is serialised and read again on its way, as it would be on a wire. With `hospitals`, paths of site.yaml, the
    nodes are these, and not simulated sites.
    """

    def __init__(self, nodes: int, interference: Interference | None = None, *, hospitals: Sequence[Path] = ()) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower's process would know
        self.nodes = list(range(101, 101 + nodes))
        self.interference = interference
        self.hospitals = hospitals
        self.app = chainward_client.app.app if hospitals else chainward_simulations.client_app.app
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            index = self.nodes.index(message.metadata.dst_node_id)
            context = Context(
                run_id=1,
                node_id=message.metadata.dst_node_id,
                node_config={"site-config": str(self.hospitals[index])}
                if self.hospitals
                else {"partition-id": index, "num-partitions": 1},
                state=RecordDict(),
                run_config={},
            )

            def answer(message: Message = message, context: Context = context) -> Message:
                try:
                    return self.app(message, context)
                except Exception as error:  # as Flower reports it
                    return Message(Error(code=2, reason=repr(error)), reply_to=message)

            reply = self.interference(message, answer) if self.interference else answer()
            if reply is not None:
                self.replies[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
