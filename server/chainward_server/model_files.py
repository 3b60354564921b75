"""What stands in a run folder's model files beside the weights. Needs PyTorch, which whoever only reads records need not load."""

from __future__ import annotations

import json
from pathlib import Path

from chainward_shared import __version__
from chainward_shared.familiarity import Familiarity
from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture
from chainward_shared.pixels import preprocessing_metadata
from chainward_shared.pretrained.begin import Beginning
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.task import Task
from chainward_shared.weights import load_file

_CARD = "chainward.weights_card"


def model_metadata(
    architecture: Architecture, classes: list[str], task: Task, record: ModelRecord | Familiarity | None
) -> dict[str, str]:
    """Return what a model's file says of it."""
    return {
        **architecture.to_metadata(),
        **preprocessing_metadata(architecture.pixels),
        "chainward.classes": json.dumps(classes),
        "chainward.task": task,
        "chainward.version": __version__,
        **({} if record is None else record.to_metadata()),
    }


def base_metadata(begun: Beginning) -> dict[str, str]:
    """Return what the file of the pretrained weights that a run starts from says of them."""
    assert begun.card is not None
    return {**begun.architecture.to_metadata(), _CARD: begun.card.model_dump_json(by_alias=True)}


def load_beginning(path: Path, sha256: str) -> Beginning:
    """Return what a run began with, out of that file.

    Raises
    ------
    WeightsError
        The file is damaged.
    """
    state, metadata = load_file(path, sha256)
    return Beginning(Architecture.from_metadata(metadata), state, WeightsCard.model_validate_json(metadata[_CARD]))
