"""The hospital's command, `chainward-site`. Results go to stdout, errors to stderr; 2: bad input.

An audit ends with 0: fine, 1: over budget or inconsistent, 2: damaged or unreadable; check and dry-run with 0: fine, 1: a
problem.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chainward_client.approval.commands import approval_commands
from chainward_client.site_config import load_site_config
from chainward_client.site_key import identity, site_key, site_key_path
from chainward_client.site_ledger import create_site_ledger, key_path, ledger_path
from chainward_shared.console import PlainConsole, run_command
from chainward_shared.errors import DataError, PrivacyError
from chainward_shared.pretrained.commands import weights_commands
from chainward_shared.privacy.audit import audit_ledger
from chainward_shared.privacy.console import print_audit, write_page
from chainward_shared.privacy.empirical import Empirical
from chainward_shared.privacy.findings import Audit, Finding
from chainward_shared.privacy.ledger_format import named_key_and_site
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.record import read_privacy_record
from chainward_shared.privacy.signing import fingerprint, load_public_key, public_key_path, public_text

if TYPE_CHECKING:
    from chainward_shared.pretrained.store import WeightsStore

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = PlainConsole()
errors = PlainConsole(stderr=True)


def main() -> None:
    """Run the command; an error that a person can act on is one line and exit code 2."""
    run_command(app, "chainward-site")


def _weights_of(site_yaml: Path) -> WeightsStore:
    from chainward_shared.pretrained.store import WeightsStore

    return WeightsStore(load_site_config(site_yaml).weights_dir(site_yaml))


app.add_typer(
    weights_commands(typer.Argument(metavar="SITE_YAML", help="The site's site.yaml."), ..., _weights_of),
    name="weights",
)
approval_commands(app)


@app.command()
def keys(site_yaml: Annotated[Path, typer.Argument(help="The site's site.yaml.")]) -> None:
    """Make the site's secret, key pair and privacy ledger, if it has none; print the fingerprints of its keys."""
    config = load_site_config(site_yaml)
    state = config.state_dir(site_yaml)
    ledger = create_site_ledger(state, config.site)
    site_key(state)
    console.say(f"site         {config.site}")
    console.say(f"ledger       {ledger.path}")
    console.say(f"private key  {key_path(state)}  (keep it, and a copy, to yourself)")
    console.say(f"secret       {site_key_path(state)}  (deals patients to splits; the same)")
    console.say(f"public key   {public_key_path(key_path(state))}")
    console.say(f"fingerprint  {fingerprint(ledger.public_key)}")
    partner = f"{config.site}: {fingerprint(public_text(identity(state)))}"
    console.say(f"for partners {partner}  (secure_sums.partners in their site.yaml)")


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write into; made where it isn't there.")],
    site: Annotated[str | None, typer.Option(help="Id under which the coordinator knows this hospital.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A finished data file (.yaml); or a manifest (.csv), an .npz file, or a folder of images."),
    ] = None,
    non_interactive: Annotated[
        bool, typer.Option("--non-interactive", help="Ask nothing. Also where the input is not a terminal.")
    ] = False,
) -> None:
    """Write a hospital's site.yaml, data file, keys and ledger, and a checklist of where each value comes from."""
    from chainward_client.init import initialise, suggested_site

    if not non_interactive and _on_a_terminal():
        if site is None:
            site = str(
                typer.prompt("Id of this hospital, as the coordinator has it", default=suggested_site(folder), err=True)
            )
        if data is None:
            answer = str(
                typer.prompt("Data file, manifest, or folder of images (empty: fill in later)", default="", err=True)
            )
            data = Path(answer) if answer.strip() else None
    if site is None:
        raise DataError("--site is missing: the id under which the coordinator knows this hospital")
    made = initialise(folder, site, data)
    for path in made.written:
        console.say(f"wrote        {path}")
    console.say(f"fingerprint  {made.fingerprint}")
    console.say(f"next: CHECKLIST.md says who knows which value; then `chainward-site check {made.site_yaml}`")


@app.command()
def check(
    site_yaml: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Also look at the way to the SuperLink.")
    ] = None,
    root_certificates: Annotated[
        Path | None, typer.Option(help="The coordinator's root certificate (PEM), as the SuperNode gets it.")
    ] = None,
    auth_key: Annotated[
        Path | None, typer.Option(help="The SuperNode's private key, as the SuperNode gets it.")
    ] = None,
    health: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask the SuperLink's gRPC health server (it has no TLS).")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="RUN.toml|'KEY=VALUE ...'", help="The planned run's configuration: what would it cost here?"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Look whether this hospital is ready: configuration, data, machine, ledger, and, if asked, network and plan.

    Nothing is trained, spent, changed or sent.
    """
    from chainward_client.doctor.examination import examine  # loads PyTorch, which takes seconds
    from chainward_client.doctor.network import Endpoint
    from chainward_client.doctor.report import print_diagnosis
    from chainward_client.planned_run import read_plan

    diagnosis = examine(
        site_yaml,
        superlink=None if superlink is None else Endpoint.parse(superlink, "--superlink"),
        root_certificates=root_certificates,
        auth_key=auth_key,
        health=None if health is None else Endpoint.parse(health, "--health"),
        plan=None if plan is None else read_plan(plan),
    )
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=1))
    else:
        print_diagnosis(diagnosis, console)
    raise typer.Exit(diagnosis.exit_code)


@app.command("dry-run")
def dry_run_command(
    site_yaml: Annotated[Path, typer.Argument(help="The site's site.yaml.")],
    plan: Annotated[
        str | None,
        typer.Option(metavar="RUN.toml|'KEY=VALUE ...'", help="The planned run's configuration. Default: a usual one."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each training, about.", min=1, max=1000)] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Train a few steps without a network and show all that would leave, by name and byte. The budget is not touched."""
    from chainward_client.dry_run.console import print_dry_run
    from chainward_client.dry_run.run import dry_run  # loads PyTorch, which takes seconds
    from chainward_client.planned_run import read_plan

    found = dry_run(site_yaml, None if plan is None else read_plan(plan), steps)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_dry_run(found, console)
    raise typer.Exit(found.exit_code)


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
    empirical: Annotated[
        bool,
        typer.Option("--empirical", help="Also try the private training that is installed here: checks and attack."),
    ] = False,
    sabotage: Annotated[
        bool,
        typer.Option("--sabotage", help="With --empirical: also try broken versions, to see that each is found out."),
    ] = False,
    epsilon: Annotated[
        float | None, typer.Option(help="With --empirical: epsilon to attack at. Default: the policy's, at most 4.")
    ] = None,
    canaries: Annotated[
        int | None, typer.Option(help="With --empirical: planted patients to attack, default 2000.", min=8, max=20_000)
    ] = None,
) -> None:
    """Check the ledger's chain and signatures, recompute every epsilon, compare with the policy."""
    if not empirical and (sabotage or epsilon is not None or canaries is not None):
        raise PrivacyError("--sabotage, --epsilon and --canaries say how the training is tried; give --empirical too")
    statements = [statement for path in told or [] for statement in read_privacy_record(path).statements]
    audited, terms = _audit(what, statements)
    if empirical:
        audited = audited.with_empirical(_tried(terms, epsilon, canaries, sabotage))
    if html is not None:
        write_page(audited, html)
    if as_json:
        typer.echo(json.dumps(audited.to_json(), indent=1))
    else:
        print_audit(audited, console)
        if html is not None:
            console.say(f"report: {html.absolute()}")
    raise typer.Exit(audited.exit_code)


def _tried(terms: Terms | None, epsilon: float | None, canaries: int | None, sabotage: bool) -> Empirical:
    from chainward_client.privacy_audit.one_run import CANARIES  # they load PyTorch, which takes seconds
    from chainward_client.privacy_audit.trial import attacked_epsilon, try_training

    attacked, delta, source = attacked_epsilon(terms)
    if epsilon is not None:
        attacked, source = epsilon, "as asked"
    return try_training(
        attacked, delta, source, canaries=canaries or CANARIES, sabotage=sabotage, say=partial(typer.echo, err=True)
    )


def _audit(what: Path, told: list[object]) -> tuple[Audit, Terms | None]:
    if what.suffix in (".yaml", ".yml"):
        config = load_site_config(what)
        state = config.state_dir(what)
        key = load_public_key(public_key_path(key_path(state)))
        terms = config.privacy.terms if config.privacy else None
        return audit_ledger(ledger_path(state), key, config.site, terms=terms, told=told), terms
    public, site = named_key_and_site(what)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    found = (
        f"checked against the key that the ledger names itself, {fingerprint(public)}: compare it with the hospital's"
    )
    return audit_ledger(what, key, site, told=told, remarks=[Finding("note", found, str(what))]), None
