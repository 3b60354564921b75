"""Images in a folder or zip, and a CSV manifest with one row per image."""

from __future__ import annotations

from typing import Literal

from chainward_client.data.description import ManifestDescription
from chainward_client.data.formats import data_format
from chainward_client.data.manifest import Manifest, read_manifest


class CsvDescription(ManifestDescription):
    """As `ManifestDescription`; `manifest` is a CSV file."""

    format: Literal["csv"]


@data_format("csv", CsvDescription, keeps_decoded=True)
def read_csv(description: CsvDescription) -> Manifest:
    """Return the checked manifest."""
    return read_manifest(description)
