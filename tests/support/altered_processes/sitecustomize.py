"""What drills do inside the processes of a deployment: Python imports this at its start where the folder is on PYTHONPATH.

No program has a switch for any of it. Of the modules named below a process gets the real one, with one function wrapped.

CHAINWARD_DRILL_DIES_AT : names a file; a hospital dies at the first message of the kind that the file holds, and the file is gone
CHAINWARD_DRILL_POST : names a folder, into which a copy of all that reaches the coordinator is written
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class _Altered(importlib.abc.MetaPathFinder):
    """Changes a module right after it was loaded, whoever imports it."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            self.change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _mortal(handlers: Any) -> None:
    """Let the hospital die, SuperNode and all that it has started, when a message of a kind reaches its client app."""
    order = Path(os.environ["CHAINWARD_DRILL_DIES_AT"])

    def mortal(handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(message: Any, node: Any) -> Any:
            if order.exists() and order.read_text() == handlers.kind_of(message.content):
                order.unlink()
                os.kill(os.getsid(0), signal.SIGKILL)
                os.killpg(0, signal.SIGKILL)
            return handler(message, node)

        return handle

    handlers.query, handlers.statistics = mortal(handlers.query), mortal(handlers.statistics)


def _copied(grids: Any) -> None:
    """Write down every message that the coordinator's process gets: its text, and its arrays as they are."""
    import numpy as np

    folder, pull = Path(os.environ["CHAINWARD_DRILL_POST"]), grids.HttpGrid.pull_messages

    def pull_messages(grid: Any, message_ids: Any) -> Any:
        messages = list(pull(grid, message_ids))
        for message in messages:
            if not message.has_content():
                continue
            name = f"{len(list(folder.glob('*.json'))):05d}"
            arrays = {
                f"{record}/{key}": array.numpy()
                for record, of in message.content.array_records.items()
                for key, array in of.items()
            }
            np.savez(folder / f"{name}.npz", **arrays)
            envelope = dict(message.content.config_records["chainward"])
            others = sorted(set(message.content) - {"chainward", *message.content.array_records})
            (folder / f"{name}.json").write_text(json.dumps(envelope | {"others": others}, default=str))
        return messages

    grids.HttpGrid.pull_messages = pull_messages


for _name, _module, _change in (
    ("CHAINWARD_DRILL_DIES_AT", "chainward_client.handlers", _mortal),
    ("CHAINWARD_DRILL_POST", "flwr.superlink.grid.http_grid", _copied),
):
    if _name in os.environ:
        sys.meta_path.insert(0, _Altered(_module, _change))
