"""Text and numbers from outside: bounded, and nothing in a text that a reader can't see."""

from __future__ import annotations

import io
import json
import logging
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.live import Live
from rich.table import Table
from rich.text import Text

from chainward_shared import outside, protocol
from chainward_shared.console import PlainConsole, VisibleRecord
from chainward_shared.errors import ChainwardError
from chainward_shared.outside import MARKS_IN_A_ROW, MAX_LINE, MAX_LINES, visible, visible_lines, visible_values
from chainward_shared.protocol import envelope

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J\x1b[31mledger ash: fine\n",
    "\x1b]8;;http://evil.example\x1b\\a link\x1b]8;;\x1b\\",
    "fine\r\x1b[Kall is well",
    "overwritten\x08\x08\x08\x08",
    "\x9b31mone byte of CSI",
    "\u202egnp.exe",
    "a\u2066b\u2069c\u200e\u200f\u061c",
    "zero\u200bwidth\u200c\u200d\ufeff\u2060\u00ad",
    "tags \U000e0041\U000e0042",
    "filled \u3164\u115f\u1160\uffa0\u2800",
    "e" + "\u0301\u0489" * 500,
    "half a character \ud800",
    "nul\x00byte",
    "next\x85line\u2028line\u2029paragraph\x0b\x0c",
    "[bold red]x[/] [link=http://evil.example]click[/link] [/foo]",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "</script>{{7*7}}${7*7}<%= 7*7 %>",
    "=cmd|'/c calc'!A1",
    "| a | table | [x](javascript:alert(1)) `code` # head",
    "---\nfront: matter\n...",
    "%s %n {0.__class__} %(message)s",
    "N" * 1_000_000,
]

ALL_TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=[])), st.text(max_size=3_000))


def unseen(text: str) -> list[str]:
    """The characters of a text that a reader can't see or that change how others are shown."""
    return [c for c in text if unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp")]


def longest_flood(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if unicodedata.category(character)[0] == "M" else 0
        longest = max(longest, run)
    return longest


@given(ALL_TEXT)
@settings(max_examples=300, deadline=None)
def test_visible_text_holds_nothing_that_can_not_be_seen_and_stays_as_it_is_from_then_on(text):
    shown = visible(text, 500)
    assert not unseen(shown)
    assert longest_flood(shown) <= MARKS_IN_A_ROW
    assert len(shown) <= 500
    assert visible(shown, 500) == shown
    shown.encode()


@given(st.text(st.characters(categories=["L", "N", "P", "S"], exclude_characters=outside._INVISIBLE), max_size=200))
def test_text_in_any_script_stays_as_it_was_written(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202eabc", "\\u202eabc"),
        ("\U000e0041", "\\U000e0041"),
        ("12\u00a0mm\u202f5", "12 mm 5"),
        ("x" * 11, "xxxxxxxxx…"),
        ("Größe Ärzte ελλάδα 病院 ✓", None),
        ("Größe ✓ →", "Größe ✓ →"),
    ],
)
def test_what_can_not_be_seen_is_written_as_an_escape(written, shown):
    assert visible(written, 10 if shown is None or "…" in shown else None) == (shown or "Größe Ärz…")


def test_a_line_that_was_put_into_a_log_message_can_not_pass_for_one_of_its_own():
    assert visible_lines("one\r\n12:00:00  all is well\x1b[2J") == "one\\r\n  12:00:00  all is well\\x1b[2J"


@given(
    st.recursive(
        ALL_TEXT | st.none() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(ALL_TEXT, inner),
        max_leaves=5,
    )
)
@settings(max_examples=50, deadline=None)
def test_every_text_of_a_document_is_made_visible_names_included(document):
    assert not unseen(json.dumps(visible_values(document), ensure_ascii=False))


# -- where text ends


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_acts_on_a_terminal_printed_in_a_table_or_live(text):
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, color_system=None, width=120)
    table = Table("a", "b", title=text[:500])
    table.add_row(text[:2000], Text(text[:2000]))
    console.say(text)
    console.print(table)
    assert not [c for c in unseen(out.getvalue()) if c != "\n"]
    if "link=" in text:
        assert "[link=http://evil.example]click[/link]" in out.getvalue()
    with Live(Text(text[:2000]), console=console, refresh_per_second=1):
        pass
    # Rich's own sequences, which move the cursor, are among these; none of the text's is
    for acting in ("\x07", "\x08", "\x1b[31m", "\x1b[2J", "\x1b]", "\x9b", "\u202e", "\r\x1b[K"):
        assert acting not in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_acts_on_a_terminal_from_any_logger_not_as_a_message_an_argument_or_a_traceback(text):
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    before = logging.getLogRecordFactory()
    loggers = [logging.getLogger(name) for name in ("chainward.client", "flwr", "ray")]
    logging.setLogRecordFactory(VisibleRecord)
    try:
        for logger in loggers:
            logger.addHandler(handler)
            logger.error("it said %s", text)
            logger.error(text.replace("%", "%%"))
            try:
                raise ValueError(text)
            except ValueError:
                logger.exception("a defect")
    finally:
        logging.setLogRecordFactory(before)
        for logger in loggers:
            logger.removeHandler(handler)
    assert not [c for c in unseen(out.getvalue()) if c != "\n"]
    lines = out.getvalue().splitlines()
    own = [line for line in lines if line[:4].isdigit()]
    assert len(own) == 9, "a line of the text's own looks like a record"


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_is_one_visible_line_of_bounded_length_whatever_it_quotes(text):
    words = str(ChainwardError(f"{text}: can't be used"))
    assert not unseen(words)
    assert len(words) <= outside.LONGEST


# -- types


class Answer(BaseModel):
    model_config = ConfigDict(validate_assignment=True)

    line: outside.Line = ""
    lines: outside.Lines = []
    site: outside.SiteId = "oak"
    run: outside.RunId = "run"
    hop: outside.HopKey = "hop"
    loss: outside.PerEpoch[outside.Loss] = []
    fraction: outside.Fraction = 0.0
    seconds: outside.Seconds = 0.0
    count: outside.Count = 0


@given(ALL_TEXT)
@settings(max_examples=200, deadline=None)
def test_a_field_of_text_can_not_hold_the_raw_thing_neither_at_first_nor_later(text):
    answer = Answer(line=text, lines=[text] * 40)
    answer.line = text
    for held in (answer.line, *answer.lines):
        assert not unseen(held)
        assert len(held) <= MAX_LINE
    assert len(answer.lines) == MAX_LINES
    assert answer.lines[-1] == "and 9 more"


@pytest.mark.parametrize("site", ["St. Mary's (north)", "Köln-2", "病院", "a", "x" * 64, "oak_3 & elm"])
def test_an_id_of_a_site_is_a_name_as_people_write_them(site):
    assert Answer(site=site).site == site


@pytest.mark.parametrize(
    "text", [*HOSTILE, "", "..", "../up", "/etc", "a/b", "a\\b", " a", "a\n", "x" * 65, "a:b", "$(x)"]
)
def test_an_id_of_a_site_a_run_or_a_hop_that_could_be_read_as_more_than_a_name_is_refused(text):
    for field, longer in (("site", ""), ("run", "x" * 64), ("hop", "x" * 64)):
        with pytest.raises(ValidationError):
            Answer(**{field: text + longer if text.startswith("x") else text})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 10**30), ("count", -1), ("count", 1.5), ("count", 10**9 + 1), ("fraction", 1.1), ("fraction", float("nan")),
        ("seconds", float("inf")), ("seconds", -1.0), ("loss", [float("nan")]), ("loss", [0.0] * 100_001),
    ],
)  # fmt: skip
def test_a_number_that_can_not_be_is_refused(field, value):
    with pytest.raises(ValidationError):
        Answer(**{field: value})


def test_a_loss_that_ran_away_is_large_and_a_fraction_above_one_by_rounding_is_one():
    assert Answer(loss=[float("inf"), -1e300, 0.1]).loss == [1e12, -1e12, 0.1]
    assert Answer(fraction=1.0000000000000002).fraction == 1.0


@example({"site": "\x1b", "kind": "hello"})
@given(st.dictionaries(ALL_TEXT, ALL_TEXT | st.integers(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_an_error_about_a_message_quotes_no_name_of_its_fields_raw(body):
    with pytest.raises(ChainwardError) as raised:
        envelope._parse(json.dumps({**body, "": 1}), protocol.Hello)
    assert not unseen(str(raised.value))
    assert len(str(raised.value)) <= outside.LONGEST


def test_a_message_of_many_megabytes_is_refused_before_it_is_read():
    with pytest.raises(ChainwardError, match="at most 8388608 are read"):
        envelope._parse(json.dumps({"reason": "N" * 9_000_000}), protocol.Refusal)
