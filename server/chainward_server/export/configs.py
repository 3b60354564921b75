"""What lets timm and MONAI load an exported folder.

It is a MONAI bundle: ``python -m monai.bundle run --config_file configs/inference.json`` in it. No code runs but
`preprocessing.py`, and timm by it.
"""

from __future__ import annotations

import json
from importlib.metadata import version
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


def bundle_metadata(record: ModelRecord, architecture: str) -> str:
    """Return the metadata.json of the bundle."""
    size, classes = record.network_size, {str(k): name for k, name in enumerate(record.classes)}
    metadata = {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": "1.0.0",
        "changelog": {"1.0.0": f"the {record.model} of run {record.run}"},
        "monai_version": "1.3.0",
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("timm", "pillow", "safetensors")},
        "task": "Multi-label image classification" if record.task == "multilabel" else "Image classification",
        "description": f"{architecture}, trained as a chain of hospitals. Research only; not a medical device.",
        "authors": "The sites that trained it",
        "copyright": "none is stated; see README.md",
        "intended_use": "Research only. Not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": record.channels,
                    "spatial_shape": [size, size],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {"0": "grey"} if record.channels == 1 else {"0": "R", "1": "G", "2": "B"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": "classes",
                    "num_channels": len(record.classes),
                    "spatial_shape": [1],
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": classes,
                }
            },
        },
    }
    return json.dumps(metadata, indent=1) + "\n"
