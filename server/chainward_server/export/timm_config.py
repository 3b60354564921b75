"""The config.json with which timm loads an exported folder, and what timm's own transform makes of it."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from chainward_shared.model_record import ModelRecord
from chainward_shared.models import Architecture
from chainward_shared.pixels import scaling

CROP_MODES = {"crop": "center", "stretch": "squash"}
"""What timm calls the ways to a square. Its "border" is not "pad": it puts the mean where training had black."""


def timm_config(model: nn.Module, architecture: Architecture, record: ModelRecord) -> str:
    """Return the config.json with which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the weights.

    A model of a size that timm has no name for is refused by `timm.create_model` in words that name what loads it.
    ``timm.data.create_transform`` prepares images as the sites did, or, where it has no words for that, is refused: a KeyError
    that names `preprocessing.py`, which has.
    """
    channels = architecture.in_chans
    mean, std = scaling(architecture.pixels)
    arguments = {key: value for key, value in architecture.timm_kwargs().items() if key != "num_classes"}
    config = {
        "architecture": _name(architecture),
        "num_classes": architecture.num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": record.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": architecture.num_classes,
            "input_size": [channels, architecture.image_size, architecture.image_size],
            "fixed_input_size": "img_size" in arguments,
            "crop_pct": 1.0,
            **_way_to_a_square(record),
            "mean": mean if isinstance(mean, list) else [mean] * channels,
            "std": std if isinstance(std, list) else [std] * channels,
        },
        "chainward": record.in_short(),
    }
    return json.dumps(config, indent=1) + "\n"


def _name(architecture: Architecture) -> str:
    if not architecture.multiplied:
        return architecture.name
    return f"{architecture.name} of another width or depth, which timm has no name for: use network() in preprocessing"


def _way_to_a_square(record: ModelRecord) -> dict[str, Any]:
    """Return timm's fields for it; where they can't say it, an interpolation that timm refuses to look up."""
    fits = sorted({one.fit for one in record.preparations.values()})
    if len(fits) != 1:
        words = "the sites made images square in different ways" if fits else "nothing says how images became square"
        return {"interpolation": f"{words}: use preprocessing.py"}
    if record.size != record.network_size:
        return {"interpolation": "bicubic, then bilinear, which timm can't say: use preprocessing.py"}
    if fits[0] not in CROP_MODES:
        return {"interpolation": "bicubic between black bars, which timm can't say: use preprocessing.py"}
    return {"interpolation": "bicubic", "crop_mode": CROP_MODES[fits[0]]}
