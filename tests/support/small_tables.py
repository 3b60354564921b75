"""Data files with a small manifest and tiny images, written for one test."""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

from chainward_client.data.site_data import SPLITS, SiteData


def make(folder: Path, rows: list[str], **columns: object) -> str:
    """Write a data file, its manifest and one 8x8 image per row; image i is filled with 2 * i."""
    lines = [f"i{index},{row}" for index, row in enumerate(rows)]
    (folder / "cases.csv").write_text("\n".join(["image,dx,patient,split,site", *lines]) + "\n", encoding="utf-8")
    for index in range(len(rows)):
        Image.new("L", (8, 8), 2 * index).save(folder / f"i{index}.png")
    roles = {"image": "image", "label": "dx", "patient": "patient", "split": "split", "site": "site"}
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "classes": ["healthy", "ill"],
        "columns": {key: name for key, name in (roles | columns).items() if name},
        "image": {"size": 8, "channels": 1},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(block), encoding="utf-8")
    return str(path)


def two_sites(folder: Path, **columns: str | None) -> str:
    """Twelve cases, each of its own patient: 6 at south (all splits), 6 at north."""
    rows = [
        f"{('healthy', 'ill')[index % 2]},p{index},{split},{site}"
        for site in ("south", "north")
        for index, split in enumerate(["train"] * 4 + ["val", "test"], start=0 if site == "south" else 6)
    ]
    return make(folder, rows, **columns)


def all_pixels(site: SiteData) -> set[int]:
    return {int(value) for split in SPLITS for value in site.splits[split].images[:, 0, 0, 0]}
