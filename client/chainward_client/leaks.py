"""Is anything in an answer that must not leave? Searches a serialised message for a site's reports, cells, ids and files.

Short words and whole numbers occur by chance, in weights and in counts. So what is searched for depends on where: in texts
every secret of four characters or more, as a whole word; among the bytes of arrays every one of eight printable characters or
more; numbers of a table by their value, from five significant digits on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.common.serde import recorddict_to_proto
from pydantic import BaseModel

from chainward_client.data.site_data import SPLITS, SiteData
from chainward_shared import protocol

WORD = 4
"""Characters from which on a secret is searched for in texts."""
RUN_OF_TEXT = 8
"""Printable characters from which on a secret is searched for among the bytes of arrays."""
DIGITS = 5
"""Significant digits from which on a number is taken for one particular cell."""
ROW = 6
"""A column of numbers is searched for in arrays if it has at least as many different values that aren't plain."""
BESIDE = 32
"""Neighbours of a float16 number, to either side, that tell how likely it is among the values of an array by chance."""
CHANCE = 1e-9
"""A column whose values are all in a float16 array counts as found if chance would do that less often."""

_PRINTABLE = re.compile(rb"[\x20-\x7e]{%d,}" % RUN_OF_TEXT)
_TOKEN_EDGE = r"[^\W_]"
_SENTENCE = re.compile(r"[.;?!\n]")


@dataclass(frozen=True)
class Found:
    """Something that must not leave: its kind, what and where (shortened: it stays on the hospital's own screen), and in
    the answer to which kind of request."""

    kind: str
    what: str
    asked: str


@dataclass(frozen=True)
class Secrets:
    """What must not be in any answer, by kind.

    Attributes
    ----------
    texts : reports, sentences, cells, ids, names of files, paths
    numbers : cells that are numbers, by their value
    columns : all numbers of a table's column, float32 (n,), by the column's name
    """

    texts: dict[str, set[str]] = field(default_factory=dict)
    numbers: set[float] = field(default_factory=set)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, data: SiteData) -> Secrets:
        """Return the secrets among a site's cases."""
        secrets = cls()
        for split in SPLITS:
            cases = data.splits[split]
            if data.has_patient_ids:
                secrets.add("patient id", set(cases.patients.tolist()))
            reports = {text for text in cases.privileged.texts or () if text}
            secrets.add("report", reports)
            sentences = {part.strip() for text in reports for part in _SENTENCE.split(text)}
            secrets.add("sentence", {part for part in sentences if len(part.split()) >= WORD})
            for name, values in (cases.privileged.table or {}).items():
                secrets._add_column(name, [value for value in values if value is not None])
        return secrets

    def add(self, kind: str, texts: Set[str]) -> None:
        """Add secrets of a kind; those that are too short to be told from chance are left out."""
        telling = {" ".join(text.split()) for text in texts}
        self.texts.setdefault(kind, set()).update(text for text in telling if len(text) >= WORD)

    def _add_column(self, name: str, values: list[float | str]) -> None:
        self.add("table cell", {value for value in values if isinstance(value, str)})
        numbers = [float(value) for value in values if not isinstance(value, str)]
        self.numbers.update(value for value in numbers if _is_particular(value))
        plain = np.array(numbers, dtype=np.float32)
        plain = np.unique(plain[(plain * 8) % 1 != 0])
        before = self.columns.get(name, np.empty(0, np.float32))
        if len(plain) or len(before):
            self.columns[name] = np.unique(np.concatenate([before, plain]))

    @property
    def counts(self) -> dict[str, int]:
        """How many secrets of each kind there are."""
        return {kind: len(texts) for kind, texts in self.texts.items() if texts} | (
            {"table number": len(self.numbers)} if self.numbers else {}
        )

    def without(self, words: Set[str]) -> Secrets:
        """Return the secrets without single words that a message holds anyway: `words`, and those of the protocol."""
        known = {word.casefold() for word in words} | PROTOCOL_WORDS
        texts = {
            kind: {text for text in of_kind if text.casefold() not in known} for kind, of_kind in self.texts.items()
        }
        return Secrets(texts, self.numbers, self.columns)


def _is_particular(value: float) -> bool:
    digits = np.format_float_positional(abs(value), trim="-").replace(".", "").strip("0")
    return bool(np.isfinite(value)) and len(digits) >= DIGITS


def _protocol_words() -> frozenset[str]:
    """Return the words that the protocol itself has: names of fields and kinds, and the values of choices."""
    words = {"train", "val", "test", "chainward"}
    for thing in vars(protocol).values():
        if isinstance(thing, type) and issubclass(thing, BaseModel) and thing.__module__.startswith(protocol.__name__):
            for node in _nodes(thing.model_json_schema()):
                if isinstance(node, dict):
                    words.update(node.get("properties", {}))
                    words.update(str(value) for value in (*node.get("enum", ()), node.get("const", "")))
            words.add(getattr(thing, "KIND", ""))
    return frozenset(word.casefold() for word in words)


def _nodes(node: Any) -> Iterator[Any]:
    """Yield parsed JSON, and all that is in it: values, and the keys of objects."""
    yield node
    if isinstance(node, dict):
        node = [*node, *node.values()]
    if isinstance(node, list):
        for item in node:
            yield from _nodes(item)


PROTOCOL_WORDS = _protocol_words()


def find_leaks(answer: RecordDict, secrets: Secrets, tensors: Iterable[np.ndarray], asked: str) -> list[Found]:
    """Return which secrets are in the answer to a request of the kind `asked`, a line each.

    `tensors` : what its arrays hold, taken apart. In a million weights, nearly every value of half precision occurs: a column of
    a table stands out in one tensor, and not in an array of all of them.
    """
    found: dict[tuple[str, str], Found] = {}

    def note(kind: str, what: str, where: str) -> None:
        shown = what if len(what) <= 40 else f"{what[:37]}..."
        found.setdefault((kind, what), Found(kind, f"'{shown}' {where}", asked))

    packed = recorddict_to_proto(answer).SerializeToString()
    texts = _folded(" \x00 ".join(_texts(answer)))
    words = set(re.findall(r"[^\W_]+(?:[^\s\x00\"',;:()\[\]{}]*[^\W_]+)*", texts))
    runs = b"\x00".join(_PRINTABLE.findall(packed)).lower()
    for kind, of_kind in secrets.texts.items():
        for secret in of_kind:
            needle = _folded(secret)
            if needle in words or (needle in texts and _is_whole(needle, texts)):
                note(kind, secret, "in a text")
            elif (part := _longest_plain(needle)) and part in runs:
                note(kind, secret, "among the bytes")
    for value in set(_numbers(answer)) & secrets.numbers:
        note("table number", repr(value), "among the numbers")
    arrays = [np.unique(tensor) for tensor in tensors]
    for name, column in secrets.columns.items():
        if len(column) >= ROW and any(_holds(array, column) for array in arrays):
            note("table column", name, "as values of an array")
    return list(found.values())


def _holds(array: np.ndarray, column: np.ndarray) -> bool:
    """Return whether all values of a column (n,), float32, are among the sorted values of an array, and hardly by chance."""
    if array.dtype != np.float16:
        return bool(np.isin(column, array.astype(np.float32)).all())
    with np.errstate(over="ignore"):
        wanted = np.unique(column.astype(np.float16))
    if len(wanted) < ROW or not np.isin(wanted, array).all():
        return False
    # There are few float16 numbers, and many weights: how many of the numbers beside each wanted one occur as well?
    others, asked = _places(np.setdiff1d(array, wanted)), _places(wanted)

    def beside(places: np.ndarray) -> np.ndarray:
        return np.searchsorted(places, asked + BESIDE, "right") - np.searchsorted(places, asked - BESIDE, "left")

    share = (beside(others) + 1) / (2 * BESIDE + 2 - beside(asked))
    return bool(np.log(share).sum() < np.log(CHANCE))


def _places(values: np.ndarray) -> np.ndarray:
    """Return where sorted float16 values stand among all float16 numbers, counted from 0."""
    bits = values.view(np.uint16).astype(np.int64)
    return np.where(bits < 0x8000, bits, 0x8000 - bits)


def _folded(text: str) -> str:
    return " ".join(text.split(" ")).casefold()


def _is_whole(needle: str, text: str) -> bool:
    """Return whether `needle` occurs in `text` not as a part of longer words or numbers."""
    for match in re.finditer(re.escape(needle), text):
        before, after = text[: match.start()][-2:], text[match.end() :][:2]
        joined = re.search(rf"{_TOKEN_EDGE}$|\d\.$", before) if needle[0].isalnum() else None
        follows = re.match(rf"{_TOKEN_EDGE}|\.\d", after) if needle[-1].isalnum() else None
        if not joined and not follows:
            return True
    return False


def _longest_plain(needle: str) -> bytes:
    """Return the longest run of printable ASCII of a secret, empty if it is too short to be told from chance."""
    runs = _PRINTABLE.findall(needle.encode())
    return max(runs, key=len, default=b"")


def _texts(answer: RecordDict) -> Iterator[str]:
    """Yield every text of a message: names of records and arrays, and the texts in its configs and in their JSON."""
    for name, record in answer.array_records.items():
        yield name
        yield from record
    for record_name, metrics in answer.metric_records.items():
        yield record_name
        yield from metrics
    for config in answer.config_records.values():
        for key, value in config.items():
            yield key
            if not isinstance(value, str):
                continue
            try:
                yield from (node for node in _nodes(json.loads(value)) if isinstance(node, str))
            except ValueError:
                yield value


def _numbers(answer: RecordDict) -> Iterator[float]:
    """Yield every number of a message's texts and metrics."""
    configs = (value for config in answer.config_records.values() for value in config.values())
    parsed = [json.loads(value) for value in configs if isinstance(value, str) and value[:1] in ("{", "[")]
    for node in _nodes([*parsed, *map(dict, answer.metric_records.values())]):
        if isinstance(node, int | float) and not isinstance(node, bool):
            yield float(node)
