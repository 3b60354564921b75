"""The envelope of every message: one pydantic model, carried as JSON, and the arrays that its kind may carry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError

from chainward_shared import __version__
from chainward_shared.errors import ProtocolError
from chainward_shared.outside import Line
from chainward_shared.words import first_problem

PROTOCOL_VERSION = 5

MAX_BODY = 2**23
"""Characters of a message's body: a thousand times what a usual one has. Arrays are not among them."""


class Body(BaseModel):
    """Base of the messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    KIND: ClassVar[str]
    ARRAYS: ClassVar[frozenset[str]] = frozenset()
    """Names of the array records that may travel with this kind of message."""


class Refusal(Body):
    """A site's word that it can't or won't, in one line for a person. `final`: its policy says no; asking again is no use.
    `waiting`: a person there has not approved the run yet; asking later may help."""

    KIND: ClassVar[str] = "refusal"

    reason: Line
    final: bool = False
    waiting: bool = False


class SiteRefusal(ProtocolError):
    """A site refused; the message is its own one line. `final`, `waiting`: as of a `Refusal`."""

    def __init__(self, reason: str, *, final: bool = False, waiting: bool = False) -> None:
        super().__init__(reason)
        self.final, self.waiting = final, waiting


def fingerprint(task: Body) -> str:
    """Return the SHA-256 of all that decides the answer to a task: a request with the same one has the same answer."""
    # not what comes along to be sure: an auxiliary teacher is sent again although the site has its own
    deciding = task.model_dump_json(exclude={"simulated", "seen_head", "auxiliary_digest"})
    return hashlib.sha256(f"{task.KIND} {deciding}".encode()).hexdigest()


B = TypeVar("B", bound=Body)

_ENVELOPE = "chainward"


def pack(body: Body, arrays: Mapping[str, ArrayRecord] | None = None) -> RecordDict:
    """Return `body` and its arrays as the content of a Flower message.

    Raises
    ------
    ProtocolError
        An array record is not on the allow-list of this kind of message.
    """
    arrays = dict(arrays or {})
    if foreign := sorted(set(arrays) - body.ARRAYS):
        raise ProtocolError(f"a message '{body.KIND}' may not carry the arrays '{foreign[0]}'")
    envelope = ConfigRecord({"protocol": PROTOCOL_VERSION, "kind": body.KIND, "body": body.model_dump_json()})
    return RecordDict({_ENVELOPE: envelope, **arrays})


def kind_of(content: RecordDict) -> str:
    """Return the kind of a packed message.

    Raises
    ------
    ProtocolError
        Not one of ours, or of another protocol version.
    """
    envelope = content.config_records.get(_ENVELOPE)
    if envelope is None or "kind" not in envelope or "body" not in envelope:
        raise ProtocolError(
            "a message without Chainward's envelope arrived; is another app running on this federation?"
        )
    if envelope.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(
            f"a message of protocol version {envelope.get('protocol')!r} arrived; this side (chainward {__version__}) "
            f"speaks {PROTOCOL_VERSION}; install the same version on both sides"
        )
    return str(envelope["kind"])


def unpack(content: RecordDict, expected: type[B]) -> tuple[B, dict[str, ArrayRecord]]:
    """Return the typed body of a message and its array records by name.

    Raises
    ------
    ProtocolError
        Another kind, a field that is missing or wrong, or arrays that this kind may not carry; a `Refusal` raises
        `SiteRefusal` with the site's own words.
    """
    kind = kind_of(content)
    text = str(content.config_records[_ENVELOPE]["body"])
    if kind == Refusal.KIND and expected is not Refusal:
        refusal = _parse(text, Refusal)
        raise SiteRefusal(refusal.reason, final=refusal.final, waiting=refusal.waiting)
    if kind != expected.KIND:
        raise ProtocolError(f"a message '{kind}' arrived where '{expected.KIND}' was expected")
    body = _parse(text, expected)
    arrays = dict(content.array_records)
    if foreign := sorted(set(arrays) - expected.ARRAYS):
        raise ProtocolError(f"a message '{kind}' carries the arrays '{foreign[0]}', which it may not")
    return body, arrays


def _parse(text: str, expected: type[B]) -> B:
    if len(text) > MAX_BODY:
        raise ProtocolError(f"a message '{expected.KIND}' of {len(text)} characters; at most {MAX_BODY} are read")
    try:
        return expected.model_validate_json(text)
    except ValidationError as error:
        raise ProtocolError(f"a message '{expected.KIND}' with a bad field: {first_problem(error)}") from error
