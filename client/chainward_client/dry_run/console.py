"""A dry run on a terminal: every message that would have left, array by array and field by field."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from chainward_client.dry_run.run import DryRun
from chainward_client.dry_run.sent import Sent
from chainward_shared.console import PlainConsole


def print_dry_run(run: DryRun, console: PlainConsole) -> None:
    """Print the messages, what was searched for and found, and the outcome."""
    for sent in run.sent:
        console.print(_fields(sent))
        if sent.arrays:
            console.print(_arrays(sent))

    for note in run.notes:
        console.say(note)
    searched = ", ".join(f"{count:,} of kind {kind}" for kind, count in run.searched.items())
    console.say(f"searched for: {searched or 'nothing; the site has no secret texts'}")
    for found in run.found:
        console.say(f"MUST NOT LEAVE: {found.kind} {found.what}, in the answer to {found.asked}", "red")
    for attempt in run.sockets:
        console.say(f"TRIED THE NETWORK: {attempt}", "red")
    for sent in run.sent:
        if sent.reason is not None:
            console.say(f"refused: {sent.asked}: {sent.reason}", "red")
    if not run.found:
        console.say("none of it is in any message, and every array is one of the model's or a count")
    if not run.sockets:
        console.say("no socket was opened (this process was guarded)")
    verdict = "a problem" if run.exit_code else "fine"
    how = "with differential privacy" if run.private else "without differential privacy"
    console.say(
        f"site {run.site}: {len(run.sent)} messages, {run.bytes:,} bytes, trained {how}: {verdict}",
        "red" if run.exit_code else "green",
    )


def _fields(sent: Sent) -> Table:
    of_arrays = sum(one.bytes for one in sent.arrays)
    table = Table(
        "field",
        "value",
        "bytes",
        "what it can tell",
        title=f"answer to {sent.asked}: {sent.kind}",
        title_justify="left",
        caption=f"{sent.bytes:,} bytes: {of_arrays:,} in {len(sent.arrays)} arrays, "
        f"{sum(one.bytes for one in sent.fields):,} in {len(sent.fields)} fields, {sent.framing:,} names and brackets",
        caption_justify="left",
    )
    table.columns[2].justify = "right"
    for one in sent.fields:
        table.add_row(Text(one.path), Text(one.value), f"{one.bytes:,}", Text(one.tells))
    return table


def _arrays(sent: Sent) -> Table:
    table = Table("array", "shape", "type", "bytes", caption_justify="left")
    table.columns[3].justify = "right"
    for one in sent.arrays:
        table.add_row(Text(f"{one.record}: {one.name}"), "x".join(map(str, one.shape)), one.dtype, f"{one.bytes:,}")
    said = dict.fromkeys(f"{one.record}: {one.what}" for one in sent.arrays)
    table.caption = "\n".join(said)
    return table
