"""The answers of a site, taken apart into arrays and fields, and what each of them can tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto

from chainward_client.disclosure import what_it_tells
from chainward_shared.protocol import Body, Refusal, kind_of


@dataclass(frozen=True)
class SentArray:
    """One array of an answer: its record and name, shape, dtype, bytes, and what it is."""

    record: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    what: str


@dataclass(frozen=True)
class SentField:
    """One value of an answer's body, or of its metrics: where it stands, its text (shortened), and what it can tell."""

    path: str
    value: str
    bytes: int
    tells: str


@dataclass(frozen=True)
class Sent:
    """One answer, taken apart.

    Attributes
    ----------
    asked, kind : what the coordinator asked for, and the kind of the answer; a "refusal" says why nothing else came
    bytes : of the whole message, as it is on the wire; those of arrays and fields, and the rest: names, shapes, brackets
    """

    asked: str
    kind: str
    bytes: int
    arrays: tuple[SentArray, ...]
    fields: tuple[SentField, ...]

    @property
    def reason(self) -> str | None:
        """Why the site refused; None where it didn't."""
        given = (one.value for one in self.fields if one.path == "reason")
        return next(given, "") if self.kind == Refusal.KIND else None

    @property
    def framing(self) -> int:
        """Bytes that are neither an array's nor a value's: names, shapes, brackets, the version of the protocol."""
        return self.bytes - sum(one.bytes for one in self.arrays) - sum(one.bytes for one in self.fields)


def taken_apart(request: Body, answer: RecordDict, *, private: bool) -> Sent:
    """Return the answer to `request` with every array and value in it; `private`: it came of private training."""
    kind = kind_of(answer)
    arrays = tuple(
        SentArray(
            record, name, tuple(array.shape), array.dtype, len(array.data), what_it_tells(kind, record, private=private)
        )
        for record, entries in answer.array_records.items()
        for name, array in entries.items()
    )
    fields: list[SentField] = []
    for key, value in answer.config_records["chainward"].items():
        if key == "body":
            for path, leaf in leaves(json.loads(str(value))):
                text = json.dumps(leaf, ensure_ascii=False)
                fields.append(_field(kind, path, text, private))
        else:
            fields.append(_field("envelope", key, str(value), private))
    for key, number in answer.metric_records.get("metrics", {}).items():
        fields.append(_field(kind, f"metrics.{key}", str(number), private))
    size = len(recorddict_to_proto(answer).SerializeToString())
    return Sent(request.KIND, kind, size, arrays, tuple(fields))


def _field(kind: str, path: str, text: str, private: bool) -> SentField:
    shown = text if len(text) <= 60 or kind == Refusal.KIND else f"{text[:57]}..."
    return SentField(path, shown, len(text.encode()), what_it_tells(kind, path, private=private))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of parsed JSON with its path; a list of plain values is one of them."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list) and any(isinstance(item, dict | list) for item in node):
        for position, item in enumerate(node):
            yield from leaves(item, f"{path}[{position}]")
    else:
        yield path, node
