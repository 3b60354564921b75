"""An exported folder as a MONAI bundle: ``python -m monai.bundle run --config_file configs/inference.json`` in it."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from chainward_shared.model_record import ModelRecord

CONFIGS = ("configs/metadata.json", "configs/inference.json")


def bundle_files(record: ModelRecord, architecture: str) -> dict[str, str]:
    """Return the two files that make an export a bundle, by name. No code runs but `preprocessing.py`, and timm by it."""
    return {
        name: json.dumps(content, indent=1) + "\n"
        for name, content in zip(CONFIGS, (_metadata(record, architecture), _inference()), strict=True)
    }


def _metadata(record: ModelRecord, architecture: str) -> dict[str, Any]:
    size, classes = record.network_size, {str(k): name for k, name in enumerate(record.classes)}
    return {
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


def _inference() -> dict[str, Any]:
    return {
        "imports": ["$import pathlib", "$import preprocessing"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output": "$@bundle_root + '/answers.csv'",
        "endings": [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"],
        "files": "$sorted(str(f) for f in pathlib.Path(@dataset_dir).rglob('*') if f.suffix.lower() in @endings)",
        "datalist": "$[{'name': f, 'image': f} for f in @files]",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Lambdad", "keys": "image", "func": "$preprocessing.prepare"}],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 32,
            "shuffle": False,
            "num_workers": 0,
        },
        "network_def": "$preprocessing.network()",
        "run": ["$preprocessing.write_answers(@network_def, @dataloader, @output)"],
    }
