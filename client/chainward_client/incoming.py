"""Weights that arrive with a message."""

from __future__ import annotations

from flwr.app import ArrayRecord

from chainward_shared.errors import ProtocolError, WeightsError
from chainward_shared.models import Architecture, skeleton
from chainward_shared.weights import StateDict, digest, from_arrays


def incoming_state(
    arrays: ArrayRecord | None, name: str, architecture: Architecture, expected: str | None
) -> StateDict:
    """Return the weights called `name` out of a message.

    Parameters
    ----------
    architecture : names, shapes and dtypes that they must have
    expected : digest that the message states

    Raises
    ------
    ProtocolError
        They are not there.
    WeightsError
        They are not those of the architecture, or have another digest.
    """
    if arrays is None:
        raise ProtocolError(f"the message lacks the arrays '{name}'")
    state = from_arrays(arrays, skeleton(architecture).state_dict())
    if digest(state) != expected:
        raise WeightsError(f"the arrays '{name}' don't have the digest that the message states; sent again?")
    return state
