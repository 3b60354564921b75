"""``chainward check DATA.yaml``: what the doctor says of data, without a hospital around them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
import yaml

from chainward_client.doctor.report import Diagnosis, ok, print_diagnosis
from chainward_shared.console import PlainConsole
from chainward_shared.errors import DataError
from chainward_shared.files import write_atomically
from chainward_shared.words import listed


def check(
    data_yaml: Annotated[Path, typer.Argument(help="The data file, as a simulation's data.source names it.")],
    seed: Annotated[int, typer.Option(min=0, help="Draws the splits where the data have none.")] = 0,
    write_manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of format folders: write the manifest that says the same, to go on from."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for scripts; it names every unusable file.")
    ] = False,
) -> None:
    """Look at data before a run: can every file be read, what is in it, what is odd?

    Needs no hospital, key or ledger; all sites of the data are looked at as one. Exits with 1 if the data can't be used.
    """
    if not data_yaml.is_file():
        raise DataError(f"{data_yaml}: there is no such file; docs/data.md says what belongs in a data file")
    if write_manifest is not None:
        _write_manifest(data_yaml, write_manifest)
    diagnosis = examine_data(data_yaml, seed)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=1))
    else:
        print_diagnosis(diagnosis, PlainConsole())
    raise typer.Exit(diagnosis.exit_code)


def examine_data(data_yaml: Path, seed: int) -> Diagnosis:
    """Return what is right and wrong with data: all of a data file's cases, of whatever site, looked at as one."""
    from chainward_client.data.sources import read_table, site_data
    from chainward_client.doctor.data import checks_of, unusable_data
    from chainward_client.privileged.checks import with_privileged_notes
    from chainward_simulations.partition import partition_by_site
    from chainward_simulations.simulated_sites import simulated_splits

    path = data_yaml.absolute()
    try:
        table = read_table(path)
        splits = simulated_splits(table, seed, table.sites)
        data = with_privileged_notes(site_data("data", table, splits, np.arange(len(table)), notes=table.notes))
    except DataError as error:
        return Diagnosis(data_yaml.name, (unusable_data(path, error),), "data")
    checks = checks_of(path, data)
    if table.sites is not None:
        sites = partition_by_site(table.sites)
        counts = listed([f"{name} {len(rows)}" for name, rows in sites.items()], 12)
        checks.insert(0, ok("sites", f"{len(sites)}, with images: {counts}"))
    return Diagnosis(data_yaml.name, tuple(checks), "data")


def _write_manifest(data_yaml: Path, target: Path) -> None:
    """Write the manifest that stands for folders, and say which data file goes with it."""
    from chainward_client.data.description import load_description
    from chainward_client.data.formats.folders import FoldersDescription, folder_rows

    description = load_description(data_yaml)
    if not isinstance(description, FoldersDescription):
        raise DataError(f"{data_yaml.name}: --write-manifest is for 'format: folders'; the manifest is there already")
    if target.exists():
        raise DataError(f"{target} is there already; name a file that isn't")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(folder_rows(description.image_location))
    write_atomically(target, text.getvalue().encode())
    columns = ", ".join(f"{key}: {name}" for key, name in description.columns.by_key().items())
    block = {
        "format": "csv",
        "manifest": str(target.absolute()),
        "images": str(description.image_location),
        "classes": list(description.classes),
        "columns": description.columns.by_key(),
    }
    typer.echo(f"wrote {target} ({columns}); a data file for it, to which patients and more can be added:", err=True)
    typer.echo(yaml.safe_dump(block, sort_keys=False, allow_unicode=True), err=True)
