"""`docs/messages.md`: every message about data and `site.yaml`, what it means and what to do, out of the code.

``python -m chainward_simulations.messages`` prints the page. The messages are found in the source, where it raises; what
they mean and what to do stands in `docs/messages.yaml`, by groups. A test holds that every message is in a group, that no group
is empty, and that the page is up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

import chainward_client

RAISED = frozenset({"DataError", "ImageProblem", "unreadable", "_unreadable", "_wrong_mode", "_refusal", "_report"})
"""What the code calls with a message: errors, and what collects them."""

_PARTS = ("data", "site.py", "site_key.py")
_HEAD = """# Messages

Every message about data files, manifests, images and `site.yaml`, with what it means and what to do. Three dots stand for what a
message fills in: a file, a row, a value. `python -m chainward_simulations.messages > docs/messages.md` writes this page out of
the code and [messages.yaml](messages.yaml).
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


def messages() -> list[str]:
    """Return the messages in the source of the client's data and configuration, each once, in the order of the files."""
    root = Path(chainward_client.__file__).parent
    paths = [path for part in _PARTS for path in (sorted((root / part).glob("*.py")) or [root / part])]
    found = [message for path in paths for message in _messages_of(ast.parse(path.read_text(encoding="utf-8")))]
    return list(dict.fromkeys(found))


def _messages_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name not in RAISED or not node.args:
            continue
        said = node.args[1] if name in ("_report", "_refusal") and len(node.args) > 1 else node.args[-1]
        kind = _text(node.args[0]).replace("{}", "…") if name == "ImageProblem" else ""
        message = ": ".join(part for part in (kind, _text(said)) if part.strip("… "))
        if re.search(r"[a-z]{2}", message.replace("…", "")):
            yield message


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


def groups(catalogue: Path) -> list[Group]:
    """Return the groups of `docs/messages.yaml`."""
    return [Group(**{**entry, "says": tuple(entry["says"])}) for entry in yaml.safe_load(catalogue.read_text("utf-8"))]


def page(catalogue: Path) -> str:
    """Return the text of `docs/messages.md`."""
    found = messages()
    parts = [_HEAD]
    for group in groups(catalogue):
        listed = "\n".join(f"- {message.replace('|', chr(92) + '|')}" for message in found if group.holds(message))
        parts.append(f"## {group.title}\n\n{group.means}\n\n**What to do.** {group.do}\n\n{listed}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page(Path(__file__).resolve().parents[2] / "docs" / "messages.yaml"))
