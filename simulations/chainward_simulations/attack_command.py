"""`chainward attack`: what is typed, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from chainward_server.cli import DEFAULT_DIR, RunsDir, open_run
from chainward_shared.console import PlainConsole

if TYPE_CHECKING:
    from chainward_simulations.attack import Attacked


def attack(
    run: Annotated[str, typer.Argument(help="Id of a simulated run, or path of its folder.")],
    directory: RunsDir = DEFAULT_DIR,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Also compare with two reference models, trained here: minutes, and stronger."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Guess from a simulated run's released models whom they were trained on, and print how well that works."""
    # Not before it is needed: other commands of `chainward` start without waiting for PyTorch.
    from chainward_client.privacy_audit.membership import FALSE_POSITIVE_RATES
    from chainward_simulations.attack import attack_stored

    folder = open_run(run, directory)
    found = attack_stored(folder, calibrate=calibrate, say=lambda line: typer.echo(line, err=True))
    if as_json:
        lines = [line.pop("attack") | line for line in map(asdict, found)]
        rates = list(FALSE_POSITIVE_RATES)
        content = {"schema": 1, "run": folder.state.run_id, "privacy": folder.config.privacy.mode, "attacks": lines}
        typer.echo(json.dumps(content | {"false_positive_rates": rates}, indent=1, allow_nan=False))
        return
    console = PlainConsole()
    console.print(_table(found, FALSE_POSITIVE_RATES))
    console.say(
        f"run {folder.state.run_id}, privacy {folder.config.privacy.mode}: AUC 0.5 is a coin; the last three columns are "
        "shares of the members. By patient, intervals of 95 % by bootstrap over patients."
    )
    if any(one.bound for one in found):
        console.say(
            "after 'of': what no attack can exceed, given all that the hospitals have spent in this run, were members and "
            "outsiders alike otherwise; luck can"
        )


def _table(found: Sequence[Attacked], rates: Sequence[float]) -> Table:
    from chainward_simulations.attack import ALL_SITES

    shares = [f"found at {100 * rate:g} % false" for rate in rates]
    table = Table("model", "attack", "patients of", "members", "outsiders", "AUC", *shares, "advantage")
    for column in table.columns[3:]:
        column.justify = "right"
    for one in found:
        result = one.attack
        table.add_row(
            one.model,
            one.kind,
            Text(one.site),
            str(result.members),
            str(result.outsiders),
            f"{result.auc:.3f} ({result.low:.3f} to {result.high:.3f})"
            + (f" of {one.bound.auc:.3f}" if one.bound else ""),
            *(
                "–"
                if share is None
                else f"{100 * share:.1f} %" + (f" of {100 * one.bound.found[k]:.1f} %" if one.bound else "")
                for k, share in enumerate(result.found)
            ),
            f"{result.advantage:.3f}",
            style="bold" if one.site == ALL_SITES else None,
        )
    return table
