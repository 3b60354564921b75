"""Who a hospital is: a key of its own, with which it signs the answer to a question that is asked only once."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chainward_shared.privacy.signing import canonical_json, is_signed, public_text, sign
from chainward_shared.protocol import Hello

_PURPOSE = "hello"


def signed_hello(hello: Hello, key: Ed25519PrivateKey, *, nonce: str, node: int) -> Hello:
    """Return a site's hello with its public key and its signature.

    Parameters
    ----------
    nonce : the coordinator's, of the request that is answered: an answer is good for that request alone
    node : Flower's id of the node that is asked: another node can't pass the question on
    """
    signature = sign(key, _PURPOSE, _content(hello.site, nonce, node))
    return hello.model_copy(update={"key": public_text(key), "signature": signature})


def proven_key(hello: Hello, *, nonce: str, node: int) -> str | None:
    """Return the public key that a hello proves to hold; None where it proves nothing."""
    if hello.key is None or hello.signature is None:
        return None
    return hello.key if is_signed(hello.key, _PURPOSE, _content(hello.site, nonce, node), hello.signature) else None


def _content(site: str | None, nonce: str, node: int) -> bytes:
    return canonical_json({"site": site, "nonce": nonce, "node": str(node)})
