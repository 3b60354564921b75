"""What a site's data hold beside pixels, as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainward_client.data.description import DataDescription
from chainward_client.data.scale import Scale
from chainward_client.data.site_data import SPLITS, Cases, PrivilegedCases, SiteData
from chainward_client.data.sources import privileged_setup

_PLAIN = ("classes", "task", "notes", "has_patient_ids", "left_out")


def snapshot(data: SiteData) -> dict[str, Any]:
    """Return all of a deployed site's data that is neither pixels, nor the site's secret, nor in its data file."""
    return {name: getattr(data, name) for name in _PLAIN} | {
        "scale": None
        if (found := data.scale) is None
        else [found.low, found.high, found.images, found.values.tolist()],
        "splits": {split: _of_cases(data.splits[split]) for split in SPLITS},
    }


def restored(
    content: Mapping[str, Any],
    images: Tensor,
    masks: Tensor | None,
    *,
    site: str,
    key: bytes,
    description: DataDescription,
) -> SiteData:
    """Return the data that `snapshot` was made of.

    Parameters
    ----------
    images, masks : uint8, of all splits in the order of `SPLITS`
    site, key, description : as `local_site` was given them
    """
    splits, end = {}, 0
    for split in SPLITS:
        of_split = content["splits"][split]
        start, end = end, end + len(of_split["labels"])
        labels = torch.tensor(of_split["labels"], dtype=torch.int64 if content["task"] == "single" else torch.float32)
        privileged = PrivilegedCases(
            _tuples(of_split["texts"]), _tuples(of_split["table"]), None if masks is None else masks[start:end]
        )
        if content["task"] == "multilabel":
            labels = labels.reshape(-1, len(content["classes"]))
        splits[split] = Cases(images[start:end], labels, np.array(of_split["patients"], dtype=str), privileged)
    scale = None
    if content["scale"] is not None:
        *measured, values = content["scale"]
        scale = Scale(*measured, np.array(values, dtype=np.float32))
    return SiteData(
        site,
        splits=splits,
        privileged=privileged_setup(description),
        scale=scale,
        preparation=description.preparation,
        key=key,
        **{name: _tuples(content[name]) for name in _PLAIN},
    )


def _tuples(value: Any) -> Any:
    """Return lists that JSON made of tuples as tuples again, also in a mapping."""
    if isinstance(value, dict):
        return {name: _tuples(of_name) for name, of_name in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _of_cases(cases: Cases) -> dict[str, Any]:
    privileged = cases.privileged
    return {
        "labels": cases.labels.tolist(),
        "patients": cases.patients.tolist(),
        "texts": privileged.texts,
        "table": None if privileged.table is None else dict(privileged.table),
    }
