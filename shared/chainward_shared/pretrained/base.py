"""The base of a model: the tensors that it takes from its start, known by their digest at both ends, and the file that holds
them on its way to a site that has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from chainward_shared.errors import WeightsError
from chainward_shared.models import Architecture, skeleton
from chainward_shared.models.architecture import Start
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.pretrained.loading import start_state
from chainward_shared.settings import Transfer
from chainward_shared.weights import StateDict, check_state, digest, load_file, rounded, save_file, shortest

PIECE_BYTES = 4_000_000
"""Of the file of a base in one message."""

HEADER_BYTES = 1_000_000
"""Allowed for names and metadata in the file of a base."""


def started(
    weights: Mapping[str, Tensor], card: WeightsCard, architecture: Architecture, part: str, transfer: Transfer
) -> tuple[Architecture, StateDict]:
    """Return the architecture that knows what it starts from, and the base.

    Parameters
    ----------
    architecture : of the model, without a start
    part : which part of it is trained

    Raises
    ------
    WeightsError
        The weights are not of this backbone.
    ModelError
        The backbone is built otherwise, or has no such part.
    """
    base = rounded(start_state(weights, card, architecture), transfer)
    start = Start(name=card.name, file=card.sha256, digest=digest(base), part=part)
    return architecture.model_copy(update={"start": start, "pixels": card.pixels(architecture.in_chans)}), base


def base_of_file(weights: Mapping[str, Tensor], card: WeightsCard, architecture: Architecture) -> StateDict | None:
    """Return the base of `architecture` as this machine makes it of a weights file; None if it is another one.

    Another processor may round a resampled position otherwise in its last bit.
    """
    plain = architecture.model_copy(update={"start": None})
    state = start_state(weights, card, plain)
    transfers: tuple[Transfer, ...] = ("half", "full")
    for transfer in transfers:
        base = rounded(state, transfer)
        if architecture.start is not None and digest(base) == architecture.start.digest:
            return base
    return None


def save_base(base: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> str:
    """Write a base to a file, each tensor that float16 holds as such, and return the file's SHA-256."""
    return save_file({name: shortest(tensor) for name, tensor in base.items()}, path, metadata)


def load_base(path: Path, architecture: Architecture) -> StateDict:
    """Return the base of an architecture out of its file.

    Raises
    ------
    WeightsError
        The file is damaged, or holds another base.
    """
    assert architecture.start is not None
    template = skeleton(architecture).state_dict()
    held, _ = load_file(path)
    if foreign := sorted(set(held) - set(template)):
        raise WeightsError(f"{path}: has '{foreign[0][:100]}', which '{architecture.name}' has not")
    base = {name: tensor.to(template[name].dtype) for name, tensor in held.items()}
    check_state(base, {name: template[name] for name in base})
    if digest(base) != architecture.start.digest:
        raise WeightsError(f"{path}: is not the base of {architecture.start.name} that the model starts from")
    return base


def most_bytes(architecture: Architecture) -> int:
    """Return how large the file of a base can be."""
    tensors = skeleton(architecture).state_dict().values()
    return HEADER_BYTES + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
