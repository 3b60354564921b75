"""How a ledger's lines and its head are written as bytes, and read back: each checked for itself and against those before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from chainward_shared.errors import LedgerError
from chainward_shared.privacy.entries import NO_HASH, SCHEMA, Entry, Head
from chainward_shared.privacy.signing import canonical_json, fingerprint, is_signed, public_text, sign
from chainward_shared.words import first_problem

_ENTRY, _HEAD = "ledger entry", "ledger head"


class LedgerFormat:
    """The form of one site's ledger.

    Parameters
    ----------
    path : the ledger's file; its head lies beside it
    site, key : whose
    """

    def __init__(self, path: Path, site: str, key: Ed25519PrivateKey | Ed25519PublicKey) -> None:
        self.path, self.site, self.public_key = path, site, public_text(key)
        self.head_path = path.with_name(f"{path.name}.head")

    def _line(self, entry: Entry, key: Ed25519PrivateKey) -> tuple[Entry, bytes]:
        """Return the entry with its hash and signature, and its line."""
        content = entry.model_dump(mode="json", by_alias=True, exclude={"hash", "signature"})
        digest = hashlib.sha256(canonical_json(content)).hexdigest()
        signature = sign(key, _ENTRY, digest.encode())
        line = canonical_json({**content, "hash": digest, "signature": signature}) + b"\n"
        return entry.model_copy(update={"hash": digest, "signature": signature}), line

    def _head_bytes(self, head: Head, key: Ed25519PrivateKey) -> bytes:
        """Return what the head's file holds."""
        content = {"schema": SCHEMA, "site": self.site, **head.model_dump()}
        return canonical_json({**content, "signature": sign(key, _HEAD, canonical_json(content))}) + b"\n"

    def _parse_entry(self, line: bytes, number: int, before: Sequence[Entry]) -> Entry:
        """Return entry `number`, 1-based, that follows those before.

        Raises
        ------
        LedgerError
            It is damaged, edited, of another site or key, or contradicts those before.
        """

        def bad(why: str) -> LedgerError:
            return LedgerError(
                f"{self.path}: entry {number} is damaged ({why}); restore the ledger from a copy that is whole"
            )

        raw = self._parsed(line, f"entry {number}", bad)
        try:
            entry = Entry.model_validate(raw)
        except ValidationError as error:
            raise bad(first_problem(error)) from error
        content = {name: value for name, value in raw.items() if name not in ("hash", "signature")}
        if hashlib.sha256(canonical_json(content)).hexdigest() != entry.hash:
            raise bad("its content does not match its hash: it was edited")
        if entry.site != self.site:
            raise LedgerError(f"{self.path}: entry {number} is of site '{entry.site}', expected '{self.site}'")
        if entry.sequence != number:
            raise bad(f"it is numbered {entry.sequence}: entries were removed, added or reordered")
        if entry.previous != (before[-1].hash if before else NO_HASH):
            raise bad("it does not follow the entry before: entries were removed, added or edited")
        if not is_signed(self.public_key, _ENTRY, entry.hash.encode(), entry.signature):
            raise LedgerError(
                f"{self.path}: entry {number} is not signed with the key {fingerprint(self.public_key)}; "
                "use the key that the ledger was made with"
            )
        if problem := self._contradiction(entry, before):
            raise bad(problem)
        return entry

    def _contradiction(self, entry: Entry, before: Sequence[Entry]) -> str | None:
        if (entry.state == "created") != (entry.sequence == 1):
            return "a ledger starts with one entry 'created', and has no other"
        if entry.public_key not in (None, self.public_key):
            return "it names another key than signed it"
        if entry.reservation is None:
            return None
        if not 1 <= entry.reservation < entry.sequence or before[entry.reservation - 1].state != "reserved":
            return f"entry {entry.reservation}, which it ends, is no reservation"
        if any(other.reservation == entry.reservation for other in before):
            return f"it ends reservation {entry.reservation} a second time"
        reserved = before[entry.reservation - 1].mechanism
        assert reserved is not None
        if entry.mechanism is not None and (
            entry.mechanism.steps > reserved.steps
            or entry.mechanism.model_copy(update={"steps": reserved.steps}) != reserved
        ):
            return f"it commits something else than entry {entry.reservation} reserved"
        return None

    def _parse_head(self, content: bytes) -> Head:
        """Return the head that a file's content is.

        Raises
        ------
        LedgerError
            It is damaged, edited, or of another site or key.
        """

        def bad(why: str) -> LedgerError:
            return LedgerError(f"{self.head_path}: damaged ({why}); restore the ledger and its head from a whole copy")

        raw = self._parsed(content, "the head", bad)
        signature = raw.pop("signature", None)
        if raw.get("site") != self.site:
            raise LedgerError(f"{self.head_path}: it is of site '{raw.get('site')}', expected '{self.site}'")
        if not is_signed(self.public_key, _HEAD, canonical_json(raw), str(signature)):
            raise bad(f"it is not signed with the key {fingerprint(self.public_key)}")
        return Head(sequence=raw["sequence"], hash=raw["hash"])

    def _parsed(self, content: bytes, what: str, bad: Callable[[str], LedgerError]) -> dict[str, Any]:
        try:
            raw = json.loads(content)
            if not isinstance(raw, dict) or canonical_json(raw) + b"\n" != content:
                raise bad("it is not written as a ledger writes")
        except (ValueError, RecursionError) as error:
            raise bad("it is not JSON") from error
        if (found := raw.get("schema")) != SCHEMA:
            newer = isinstance(found, int) and found > SCHEMA
            raise LedgerError(
                f"{self.path}: {what} is of schema {found!r}, expected {SCHEMA}; "
                + ("a newer Chainward wrote it: update this one" if newer else "restore the ledger from a whole copy")
            )
        return raw


def named_key_and_site(path: Path) -> tuple[str, str]:
    """Return the public key and the site that a ledger names in its first entry: what it says, not yet checked.

    Raises
    ------
    LedgerError
        The file can't be read, or its first line is no first entry.
    """
    try:
        with path.open("rb") as file:
            raw = json.loads(file.readline(1_000_000))
        public, site = raw["public_key"], raw["site"]
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except OSError as error:
        raise LedgerError(f"{path}: can't be read ({error.strerror}); name a site.yaml or a ledger") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LedgerError(
            f"{path}: its first line is not the first entry of a ledger; name a site.yaml or a ledger"
        ) from error
    return public, str(site)
