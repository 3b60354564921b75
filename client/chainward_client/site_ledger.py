"""Where a site keeps its key and its privacy ledger, how both come to be, and how they are opened."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chainward_client.kept_records import for_the_owner_alone
from chainward_shared.errors import LedgerError, PrivacyError
from chainward_shared.files import written
from chainward_shared.privacy.ledger import Ledger
from chainward_shared.privacy.signing import create_key, load_key


def ledger_path(state_dir: Path) -> Path:
    """Return where the ledger of a site with this state folder lies; head and lock lie beside it."""
    return state_dir / "privacy" / "ledger.jsonl"


def key_path(state_dir: Path) -> Path:
    """Return where the site's private key lies; the public one lies beside it as ``ledger.key.pub``."""
    return state_dir / "privacy" / "ledger.key"


@for_the_owner_alone()
def create_site_ledger(state_dir: Path, site: str) -> Ledger:
    """Return the site's ledger, made with its key if the site has neither.

    Only `chainward-site keys`, and a simulation, call it: a ledger that is gone must not be replaced in silence.

    Raises
    ------
    LedgerError
        There is a key and no ledger, which is then lost, or a ledger and no key; or the ledger is damaged.
    PrivacyError
        The key can't be read or written.
    """
    path, secret = ledger_path(state_dir), key_path(state_dir)
    unfinished = path.with_name(".creating")  # a crash between key and ledger must not look like a lost ledger
    with written(path.parent, PrivacyError):
        if not secret.exists():
            if path.exists():
                raise LedgerError(f"{secret}: missing, but there is a ledger that it signed; restore the key")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            unfinished.touch()
            create_key(secret)
        if not unfinished.exists():
            return open_site_ledger(state_dir, site)[0]
        if b"\n" not in (path.read_bytes() if path.exists() else b""):  # not even its first entry
            Ledger.create(path, site, load_key(secret))
        unfinished.unlink()
    return open_site_ledger(state_dir, site)[0]


def open_site_ledger(state_dir: Path, site: str) -> tuple[Ledger, Ed25519PrivateKey]:
    """Return the site's ledger and key, both of which must be there.

    Raises
    ------
    LedgerError
        The ledger is missing or damaged.
    PrivacyError
        The key is missing or can't be used.
    """
    path, secret = ledger_path(state_dir), key_path(state_dir)
    key = load_key(secret)
    if not path.exists():
        raise LedgerError(
            f"{path}: the ledger is gone, but the key that signed it is there; restore it. "
            "A new one would forget what was spent"
        )
    return Ledger.open(path, key, site), key
