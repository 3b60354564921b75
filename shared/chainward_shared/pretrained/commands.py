"""The commands ``weights add``, ``get``, ``list``, ``show`` and ``remove``, which coordinator and hospital have alike."""

# no `from __future__ import annotations`: typer reads the annotations, in which `place` is a local name

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.pretrained.download import PREFIX, fetched
from chainward_shared.pretrained.store import WeightsStore

_HELP = "Pretrained weights as reviewed files: a store of files with their cards. Only `get` uses the network."


def weights_commands(place: Any, default: Any, open_store: Callable[[Path], WeightsStore]) -> typer.Typer:
    """Return the commands for one kind of store.

    Parameters
    ----------
    place : typer's description of the option or argument that says where the store is
    default : its default; ``...``: it must be given
    open_store : from its value to the store
    """
    app = typer.Typer(no_args_is_help=True, help=_HELP)
    console = Console()
    Place = Annotated[Path, place]
    AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
    Reference = Annotated[str, typer.Argument(help="NAME, NAME.TAG, or the SHA-256 (8 letters of it suffice).")]
    Licence = Annotated[
        str | None, typer.Option(help="Licence of the weights. Default: as timm has it, where a tag is given.")
    ]
    Numbers = Annotated[
        str | None, typer.Option(help="By channel, comma-separated. Default: as timm has it for the model.")
    ]

    def say(card: WeightsCard) -> None:
        _print_card(card, console)

    @app.command()
    def add(
        where: Place = default,
        file: Annotated[
            Path, typer.Argument(help="A .safetensors file, or .pth, .pt, .bin, which is converted.")
        ] = ...,  # type: ignore[assignment]
        backbone: Annotated[str, typer.Option(help="timm model that the weights are of: NAME or NAME.TAG.")] = ...,  # type: ignore[assignment]
        licence: Licence = None,
        source: Annotated[str | None, typer.Option(help="Where the file is from, in words.")] = None,
        mean: Numbers = None,
        std: Numbers = None,
    ) -> None:
        """Check a file of weights and take it into the store, with its card."""
        say(
            open_store(where).add(
                file,
                backbone,
                licence=licence,
                source=source,
                mean=_numbers(mean, "--mean"),
                std=_numbers(std, "--std"),
            )
        )

    @app.command()
    def get(
        where: Place = default,
        what: Annotated[str, typer.Argument(help=f"{PREFIX}NAME.TAG, from the Hugging Face hub.")] = ...,  # type: ignore[assignment]
        licence: Licence = None,
    ) -> None:
        """Download one of timm's weights files, and take it into the store."""
        file, name, source = fetched(what)
        say(open_store(where).add(file, name, licence=licence, source=source))

    @app.command("list")
    def list_files(where: Place = default, as_json: AsJson = False) -> None:
        """List what is in the store."""
        store = open_store(where)
        cards = store.cards()
        if as_json:
            typer.echo(json.dumps([card.model_dump(by_alias=True) for card in cards], indent=1))
            return
        if not cards:
            console.print(f"no weights in {store.root}", markup=False, soft_wrap=True)
            return
        table = Table("name", "SHA-256", "parameters", "classes", "licence", box=None, padding=(0, 2, 0, 0))
        for card in cards:
            table.add_row(
                card.name,
                card.sha256[:12],
                f"{card.parameters / 1e6:.1f} M",
                str(card.num_classes or "-"),
                card.licence,
            )
        console.print(table)

    @app.command()
    def show(where: Place = default, reference: Reference = ..., as_json: AsJson = False) -> None:  # type: ignore[assignment]
        """Show the card of a file, after comparing the file with it."""
        store = open_store(where)
        card = store.find(reference)
        store.load(card)
        if as_json:
            typer.echo(card.model_dump_json(by_alias=True, indent=1))
            return
        say(card)
        console.print(f"file           {store.path(card.sha256)}", markup=False, highlight=False, soft_wrap=True)

    @app.command()
    def remove(where: Place = default, reference: Reference = ...) -> None:  # type: ignore[assignment]
        """Remove a file and its card."""
        card = open_store(where).remove(reference)
        console.print(f"removed {card.name} {card.sha256[:12]}", markup=False, highlight=False)

    return app


def _print_card(card: WeightsCard, console: Console) -> None:
    head = (
        f"of {card.num_classes} classes; another takes its place where a run has others" if card.num_classes else "none"
    )
    read = "" if card.precision == "float32" else ", read as float32"
    lines = {
        "name": card.name,
        "SHA-256": card.sha256,
        "licence": card.licence,
        "source": card.source,
        "parameters": f"{card.parameters / 1e6:.2f} million ({card.precision}{read})",
        "classifier": head,
        "images": f"{card.input_size[1]} x {card.input_size[2]}, channels {card.input_size[0]}, {card.interpolation}",
        "mean": ", ".join(f"{value:g}" for value in card.mean),
        "std": ", ".join(f"{value:g}" for value in card.std),
    }
    if card.original_sha256:
        lines["converted from"] = card.original_sha256
    for name, value in lines.items():
        console.print(f"{name:<14} {value}", markup=False, highlight=False, soft_wrap=True)


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"found {text!r}, expected numbers with commas, e.g. 0.5,0.5,0.5", param_hint=option
        ) from error
