"""`docs/messages.md`: every message of a hospital, a coordinator and a run, what it means and what to do, out of the code.

``python -m chainward_simulations.messages`` prints the page. The messages are found in the source, where it raises (the doctor:
where a check fails); what they mean and what to do stands in `docs/messages.yaml`, by rooms and groups. A test holds that every
message is in a group of its room, that no group is empty, and that the page is up to date.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic.dataclasses import dataclass

from chainward_shared import errors
from chainward_shared.files import ADVICE

COLLECTED = frozenset({"ImageProblem", "ValueError", "unreadable", "counted", "_wrong_mode", "_refusal", "_report"})
"""What the code calls with a message, beside the errors of `chainward_shared.errors`: validators, and what collects problems."""

CHECKS = frozenset({"problem", "warning"})
"""What the doctor calls with the name of a check, what it found, and what to do."""

_RAISED = COLLECTED | {name for name in vars(errors) if name.endswith(("Error", "Refusal"))}
_HEAD = """# Messages

Every message about settings, data, weights, runs, meeting, privacy and the doctor's checks, with what it means and what to do.
Three dots stand for what a message fills in: a file, a row, a value.
`python -m chainward_simulations.messages > docs/messages.md`
writes this page out of the code and [messages.yaml](messages.yaml).
"""


@dataclass(frozen=True)
class Group:
    """Messages that mean the same.

    Attributes
    ----------
    title : of the group
    means, do : what is the case, and what to do
    says : regular expressions, which find its messages
    """

    title: str
    means: str
    do: str
    says: tuple[str, ...]

    def holds(self, message: str) -> bool:
        """Return whether a message is in the group."""
        return any(re.search(pattern, message) for pattern in self.says)


@dataclass(frozen=True)
class Room:
    """A part of the code, and the groups of its messages.

    Attributes
    ----------
    title : of the room
    places : modules and folders of modules, as in ``chainward_client/data``
    groups : of its messages
    """

    title: str
    places: tuple[str, ...]
    groups: tuple[Group, ...]

    def messages(self) -> list[str]:
        """Return the messages in the source of the room, each once, in the order of the files."""
        found = [
            message
            for place in self.places
            for path in _sources(place)
            for message in _messages_of(ast.parse(path.read_text(encoding="utf-8")))
        ]
        return list(dict.fromkeys(found))


def _sources(place: str) -> list[Path]:
    package, _, rest = place.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / rest
    if not path.exists():
        raise FileNotFoundError(f"docs/messages.yaml names {place}, which is not there")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _messages_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            message = _text(node.value)  # of keys that contradict each other
        elif isinstance(node, ast.Call) and node.args:
            message = _of_call(node)
        else:
            continue
        if re.search(r"[a-z]{2}", message.replace("…", "")) and " " in message:
            yield message


def _of_call(node: ast.Call) -> str:
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    parts = [_text(argument) for argument in node.args]
    if name in CHECKS and isinstance(node.func, ast.Name) and len(parts) == 3:
        found = ": ".join(parts[:2])
        return f"{found} ({parts[2]})" if parts[2].strip("… ") else found
    if name == "written":  # `chainward_shared.files`, which says the first half
        advice = [*node.args[2:], *(word.value for word in node.keywords if word.arg == "advice")]
        return f"…: can't be written (…); {_text(advice[0]) if advice else ADVICE}"
    if name not in _RAISED:
        return ""
    said = parts[1] if name in ("_report", "_refusal") and len(parts) > 1 else parts[-1]
    kind = parts[0].replace("{}", "…") if name == "ImageProblem" else ""
    return ": ".join(part for part in (kind, said) if part.strip("… "))


def _text(node: ast.expr) -> str:
    """Return the text of a string as it stands in the code, "…" for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return re.sub(r"…[… ]*…", "…", "".join(_text(value) for value in node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return _text(node.args[0])
    return "…"


def rooms(catalogue: Path) -> list[Room]:
    """Return the rooms of `docs/messages.yaml`."""
    return [
        Room(entry["room"], entry["places"], entry["groups"]) for entry in yaml.safe_load(catalogue.read_text("utf-8"))
    ]


def page(catalogue: Path) -> str:
    """Return the text of `docs/messages.md`."""
    parts = [_HEAD]
    for room in rooms(catalogue):
        found = room.messages()
        parts.append(f"## {room.title}\n")
        for group in room.groups:
            listed = "\n".join(f"- {message.replace('|', chr(92) + '|')}" for message in found if group.holds(message))
            parts.append(f"### {group.title}\n\n{group.means}\n\n**What to do.** {group.do}\n\n{listed}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page(Path(__file__).resolve().parents[2] / "docs" / "messages.yaml"))
