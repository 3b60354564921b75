"""Deployed hospitals on disk, each with its own part of the small consortium."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def deployed_hospitals(
    consortium: Path, folder: Path, names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path]:
    """Write a data file and a site.yaml for each hospital, and return the paths of the latter; `settings`: further keys."""
    rows = (consortium.parent / "cases.csv").read_text().splitlines()
    found = {}
    for name in names:
        own = folder / name
        own.mkdir()
        (own / "cases.csv").write_text("\n".join([rows[0], *(row for row in rows[1:] if row.endswith(name))]) + "\n")
        description = yaml.safe_load(consortium.read_text())
        del description["columns"]["site"]
        description["images"] = str(consortium.parent / "images")
        (own / "data.yaml").write_text(yaml.safe_dump(description))
        found[name] = own / "site.yaml"
        site = {"site": name, "data": "data.yaml", "state": "state", **settings.get(name, {})}
        found[name].write_text(yaml.safe_dump(site))
    return found
