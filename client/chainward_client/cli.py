"""The hospital's command, `chainward-site`. Results go to stdout, errors to stderr; 2: bad input.

An audit ends with 0: fine, 1: over budget or inconsistent, 2: damaged or unreadable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console

from chainward_client.keys import create_site_ledger, key_path, ledger_path
from chainward_client.site import load_site_config
from chainward_shared.errors import ChainwardError
from chainward_shared.privacy.audit import Audit, Finding, audit_ledger
from chainward_shared.privacy.console import print_audit, write_page
from chainward_shared.privacy.ledger import named_key_and_site
from chainward_shared.privacy.signing import fingerprint, load_public_key, public_key_path
from chainward_shared.privacy.statements import read_statements

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """Run the command; an error that a person can act on is one line and exit code 2."""
    try:
        app()
    except ChainwardError as error:
        errors.print(f"chainward-site: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


@app.command()
def keys(site_yaml: Annotated[Path, typer.Argument(help="The site's site.yaml.")]) -> None:
    """Make the site's key pair and its privacy ledger, if it has none; print the public key's fingerprint."""
    config = load_site_config(site_yaml)
    state = config.state_dir(site_yaml)
    ledger = create_site_ledger(state, config.site)
    console.print(f"site         {config.site}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"ledger       {ledger.path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"private key  {key_path(state)}  (keep it, and a copy, to yourself)", markup=False, soft_wrap=True)
    console.print(f"public key   {public_key_path(key_path(state))}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"fingerprint  {fingerprint(ledger.public_key)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def audit(
    what: Annotated[
        Path, typer.Argument(metavar="SITE_YAML|LEDGER", help="The site's site.yaml, or a ledger (.jsonl).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report for an ethics committee there.")] = None,
    told: Annotated[
        list[Path] | None,
        typer.Option(
            "--told", help="privacy.json of a run: compare with what the coordinator was told. May be repeated."
        ),
    ] = None,
) -> None:
    """Check the ledger's chain and signatures, recompute every epsilon, compare with the policy."""
    statements = [statement for path in told or [] for statement in read_statements(path)]
    audited = _audit(what, statements)
    if html is not None:
        write_page(audited, html)
    if as_json:
        typer.echo(json.dumps(audited.to_json(), indent=1))
    else:
        print_audit(audited, console)
        if html is not None:
            console.print(f"report: {html.absolute()}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(audited.exit_code)


def _audit(what: Path, told: list[object]) -> Audit:
    if what.suffix in (".yaml", ".yml"):
        config = load_site_config(what)
        state = config.state_dir(what)
        key = load_public_key(public_key_path(key_path(state)))
        return audit_ledger(
            ledger_path(state), key, config.site, terms=config.privacy.terms if config.privacy else None, told=told
        )
    public, site = named_key_and_site(what)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    found = (
        f"checked against the key that the ledger names itself, {fingerprint(public)}: compare it with the hospital's"
    )
    return audit_ledger(what, key, site, told=told, remarks=[Finding("note", found, str(what))])
