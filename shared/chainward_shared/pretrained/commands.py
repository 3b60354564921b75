"""The commands ``weights add``, ``get``, ``list``, ``show`` and ``remove``, which coordinator and hospital have alike."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from chainward_shared.console import PlainConsole
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.pretrained.download import PREFIX, fetched

if TYPE_CHECKING:  # the store needs PyTorch, and most commands of the same program don't
    from chainward_shared.pretrained.store import WeightsStore

_HELP = "Pretrained weights as reviewed files: a store of files with their cards. Only `get` uses the network."

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Reference = Annotated[str, typer.Argument(help="NAME, NAME.TAG, or the SHA-256 (8 letters of it suffice).")]
Licence = Annotated[
    str | None, typer.Option(help="Licence of the weights. Default: as timm has it, where a tag is given.")
]
Numbers = Annotated[
    str | None, typer.Option(help="By channel, comma-separated. Default: as timm has it for the model.")
]


def weights_commands(place: Any, default: Any, open_store: Callable[[Path], "WeightsStore"]) -> typer.Typer:
    """Return the commands for one kind of store.

    Parameters
    ----------
    place : typer's description of the option or argument that says where the store is
    default : its default; ``...``: it must be given
    open_store : from its value to the store
    """
    app = typer.Typer(no_args_is_help=True, help=_HELP)
    where = inspect.Parameter(
        "where", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[Path, place]
    )
    for name, command in (("add", add), ("get", get), ("list", list_), ("show", show), ("remove", remove)):
        app.command(name)(_at(where, open_store, command))
    return app


def _at(
    where: inspect.Parameter, open_store: Callable[[Path], "WeightsStore"], command: Callable[..., None]
) -> Callable[..., None]:
    """Return `command` with the place of the store as its first parameter, instead of the store itself."""

    @functools.wraps(command)
    def with_place(where: Path, **others: Any) -> None:
        command(open_store(where), **others)

    _, *others = inspect.signature(command).parameters.values()
    parameters = [where, *(one.replace(default=... if one.default is one.empty else one.default) for one in others)]
    with_place.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_place.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_place


def add(
    store: "WeightsStore",
    file: Annotated[Path, typer.Argument(help="A .safetensors file, or .pth, .pt, .bin, which is converted.")],
    backbone: Annotated[str, typer.Option(help="timm model that the weights are of: NAME or NAME.TAG.")],
    licence: Licence = None,
    source: Annotated[str | None, typer.Option(help="Where the file is from, in words.")] = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> None:
    """Check a file of weights and take it into the store, with its card."""
    numbers = {"mean": _numbers(mean, "--mean"), "std": _numbers(std, "--std")}
    _print_card(store.add(file, backbone, licence=licence, source=source, **numbers))


def get(
    store: "WeightsStore",
    what: Annotated[str, typer.Argument(help=f"{PREFIX}NAME.TAG, from the Hugging Face hub.")],
    licence: Licence = None,
) -> None:
    """Download one of timm's weights files, and take it into the store."""
    file, name, source = fetched(what)
    _print_card(store.add(file, name, licence=licence, source=source))


def list_(store: "WeightsStore", as_json: AsJson = False) -> None:
    """List what is in the store."""
    cards, console = store.cards(), PlainConsole()
    if as_json:
        typer.echo(json.dumps([card.model_dump(by_alias=True) for card in cards], indent=1))
        return
    if not cards:
        console.say(f"no weights in {store.root}")
        return
    table = Table("name", "SHA-256", "parameters", "classes", "licence", box=None, padding=(0, 2, 0, 0))
    for card in cards:
        millions = f"{card.parameters / 1e6:.1f} M"
        table.add_row(card.name, card.sha256[:12], millions, str(card.num_classes or "-"), card.licence)
    console.print(table)


def show(store: "WeightsStore", reference: Reference, as_json: AsJson = False) -> None:
    """Show the card of a file, after comparing the file with it."""
    card = store.find(reference)
    store.load(card)
    if as_json:
        typer.echo(card.model_dump_json(by_alias=True, indent=1))
        return
    _print_card(card)
    PlainConsole().say(f"file           {store.path(card.sha256)}")


def remove(store: "WeightsStore", reference: Reference) -> None:
    """Remove a file and its card."""
    card = store.remove(reference)
    PlainConsole().say(f"removed {card.name} {card.sha256[:12]}")


def _print_card(card: WeightsCard) -> None:
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
        PlainConsole().say(f"{name:<14} {value}")


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"found {text!r}, expected numbers with commas, e.g. 0.5,0.5,0.5", param_hint=option
        ) from error
