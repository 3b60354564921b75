"""Nothing from outside is unbounded, and no text from outside acts where it ends: every field, every place."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledgers import KEY, gaussian, new_ledger, spend
from pydantic import BaseModel
from typer.testing import CliRunner
from written_run import a_run

from chainward_server.by_class import model_record
from chainward_server.cli import app
from chainward_server.export.card import model_card
from chainward_server.report.page import write_report
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_server.run_list import list_runs
from chainward_server.run_state import RunState
from chainward_server.watch.display import as_json, news, outcome, picture
from chainward_server.watch.snapshot import look
from chainward_shared import protocol
from chainward_shared.config import RunConfig
from chainward_shared.console import PlainConsole
from chainward_shared.errors import ChainwardError
from chainward_shared.evaluation.localisation import LocalisationSums
from chainward_shared.evaluation.scores import Scores
from chainward_shared.models import resolve_architecture
from chainward_shared.privacy.audit import audit_ledger, audit_statements
from chainward_shared.privacy.console import print_audit
from chainward_shared.privacy.policy import Terms
from chainward_shared.privacy.record import PrivacyRecord, read_privacy_record
from chainward_shared.privacy.report import render_audit
from chainward_shared.privacy.statements import Statement
from chainward_shared.protocol import TrainingLog, envelope

ANSWERS = (
    protocol.Hello,
    protocol.SiteCard,
    protocol.AtWork,
    protocol.LinkResult,
    protocol.StudentResult,
    protocol.EvaluateResult,
    protocol.StatisticsResult,
    protocol.BaseState,
    protocol.Refusal,
    protocol.RunPlanState,
    protocol.SumKeys,
    protocol.SumShares,
    protocol.MaskedSum,
    protocol.SumUnmasking,
)
FILES = (Results, RunState, Statement, LocalisationSums, Scores, TrainingLog)

HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mledger ash: fine\n\r\x08",
    "\u202egnp.exe\u2066\u200b\ufeff" + "e" + "\u0301" * 400,
    "</td></script><script>alert(1)</script><img src=x onerror=alert(2)>[link=http://evil]x[/link]{{7*7}}|`#\n---\n=1+1",
    "N" * 3_000_000,
)


# -- every field has bounds


def unbounded(schema: dict[str, Any]) -> Iterator[str]:
    """The places of a JSON schema at which a value of any size may stand, or a text that may hold anything."""
    known = schema.get("$defs", {})

    def walk(node: dict[str, Any], where: str, seen: tuple[str, ...]) -> Iterator[str]:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in seen:
                yield from walk(known[name], where, (*seen, name))
            return
        for key in ("anyOf", "oneOf", "allOf"):
            for part in node.get(key, ()):
                yield from walk(part, where, seen)
        if "enum" in node or "const" in node:
            return
        kind = node.get("type")
        pattern = str(node.get("pattern", ""))
        named = pattern.startswith("^[0-9a-f]{") or (pattern and "maxLength" in node)
        if kind == "string" and not (named or node.get("visible") or node.get("format") == "date-time"):
            yield f"{where}: text"
        if kind in ("integer", "number") and not (
            {"minimum", "exclusiveMinimum"} & node.keys() and {"maximum", "exclusiveMaximum"} & node.keys()
        ):
            yield f"{where}: {kind}"
        if kind == "array":
            if "maxItems" not in node:
                yield f"{where}: list"
            yield from walk(node.get("items", {}), f"{where}[]", seen)
        if kind == "object":
            for name, part in node.get("properties", {}).items():
                yield from walk(part, f"{where}.{name}", seen)
            more = node.get("additionalProperties")
            for pattern, part in node.get("patternProperties", {}).items():
                if "maxProperties" not in node or not pattern.startswith("^"):
                    yield f"{where}: mapping"
                yield from walk(part, f"{where}.*", seen)
                more = False
            if isinstance(more, dict):
                if "maxProperties" not in node or "propertyNames" not in node:
                    yield f"{where}: mapping"
                yield from walk(node.get("propertyNames", {}) | {"type": "string"}, f"{where} names", seen)
                yield from walk(more, f"{where}.*", seen)
            elif more is not False and not node.get("properties"):
                yield f"{where}: mapping of anything"

    yield from walk(schema, schema.get("title", "?"), ())


@pytest.mark.parametrize("model", [*ANSWERS, *FILES], ids=lambda model: model.__name__)
def test_every_field_of_an_answer_and_of_a_file_has_bounds_and_shows_what_it_holds(model):
    assert list(unbounded(model.model_json_schema())) == []


class Loose(BaseModel):
    text: str
    number: float
    count: int
    items: list[int]
    table: dict[str, int]


def test_the_search_for_unbounded_fields_finds_each_kind():
    found = {place.rpartition(": ")[2] for place in unbounded(Loose.model_json_schema())}
    assert found == {"text", "number", "integer", "list", "mapping"}


def test_no_answer_is_forgotten_here():
    asked = {"Task", "Request"}
    kinds = {kind for kind in protocol.Body.__subclasses__() if kind.__name__ not in ("SimulatedSite", "RunPlan")}
    assert {kind for kind in kinds if not any(kind.__name__.endswith(word) for word in asked)} == set(ANSWERS)


# -- every place where words end


def texts_of(document: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all texts in a document, names of fields and of entries included (as a path that ends in None)."""
    children = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(children):
        if isinstance(key, str):
            yield (*where, key, None)
        if isinstance(value, str):
            yield (*where, key)
        elif isinstance(value, dict | list):
            yield from texts_of(value, (*where, key))


def with_text(document: Any, where: tuple[Any, ...], text: str) -> Any:
    document = json.loads(json.dumps(document))
    *parents, key = [step for step in where if step is not None]
    inner = document
    for step in parents:
        inner = inner[step]
    if where[-1] is None:
        inner[text] = inner.pop(key)
    else:
        inner[key] = text
    return document


def is_a_key(where: tuple[Any, ...]) -> bool:
    """Whether a place is the name of a field of ours, which is not for others to choose."""
    return where[-1] is None and where[:-1] != ("sites", "ash")


def one_of_each(places: Iterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """One place for each field, of however many records have it."""
    by_field = {tuple(step for step in where if not isinstance(step, int))[-3:]: where for where in places}
    return sorted(by_field.values(), key=str)


def every_command(path: Path) -> Iterator[tuple[str, str]]:
    """What the commands print of a run folder."""
    runner = CliRunner()
    for words in (["runs"], ["runs", "--json"]):
        yield " ".join(words), runner.invoke(app, [*words, "--dir", str(path.parent)]).output
    for words in (["watch", path.name], ["watch", path.name, "--json"]):
        result = runner.invoke(app, [*words, "--dir", str(path.parent), "--interval", "0.1", "--timeout", "0.1"])
        yield " ".join(words[::2]), result.output + str(result.exception or "")


def every_output(path: Path) -> Iterator[tuple[str, str]]:
    """All that people are shown of a run folder, by where; an error that names what is wrong counts."""
    try:
        run = look(path)
        console = PlainConsole(file=io.StringIO(), width=150)
        console.print(picture(run))
        yield "picture", console.file.getvalue()  # type: ignore[attr-defined]
        yield "watch", "\n".join([*news(None, run), *outcome(run), json.dumps(as_json(run, "end"))])
        yield "list", repr(list_runs(path.parent))
        folder = RunFolder.open(path)
        yield "report", write_report(folder).read_text()
        record = read_privacy_record(path / "privacy.json")
        audit = audit_statements(folder.state.run_id, record.statements, record.trained)
        yield from audit_outputs(audit)
        results = folder.load_results()
        assert results is not None
        yield "card", card_of(folder, results, record, audit)
    except ChainwardError as error:
        yield "error", str(error)


def audit_outputs(audit: Any) -> Iterator[tuple[str, str]]:
    console = PlainConsole(file=io.StringIO(), width=150)
    print_audit(audit, console)
    yield "audit", console.file.getvalue()  # type: ignore[attr-defined]
    yield "audit page", render_audit(audit)
    yield "audit JSON", json.dumps(audit.to_json(), ensure_ascii=False, indent=1)


def card_of(folder: RunFolder, results: Results, record: PrivacyRecord, audit: Any) -> str:
    architecture = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32)
    return model_card(
        folder,
        "chain",
        results,
        architecture=architecture,
        parameters=10,
        privacy=record,
        audit=audit,
        files=[],
        onnx=None,
        onnx_input="pixels",
        record=model_record(folder.run_id, "chain", architecture, results.data, results.by_class.get("chain")),
    )


def acting(where: str, text: str) -> list[str]:
    """What in an output acts on whoever looks at it."""
    unseen = [c for c in set(text) if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]
    found = [f"{ord(c):#x}" for c in unseen]
    if where == "card":
        text = re.sub(r"`[^`\n]*`", "", text)  # in a code span of Markdown all is shown as it is
    if where in ("report", "audit page", "card"):
        found += [tag for tag in ("<script", "<img src=x") if tag in text]
    return found


@pytest.mark.slow  # 20 s each
@pytest.mark.parametrize("name", ["run.json", "metrics.json", "privacy.json"])
def test_no_text_in_a_file_of_a_run_acts_where_people_are_shown_it(name, tmp_path, request):
    if name == "metrics.json":  # pictures are of nothing else
        request.getfixturevalue("drawn")
    folder = a_run(tmp_path)
    file = folder.path / name
    whole = json.loads(file.read_bytes())
    clean = {where: len(text) for where, text in every_output(folder.path)}
    assert len(clean) == 8, "an untouched run is shown everywhere"
    found = []
    places = [where for where in one_of_each(texts_of(whole)) if name != "privacy.json" or not is_a_key(where)]
    for number, where in enumerate(places):
        text = HOSTILE[number % len(HOSTILE)]  # each text at every fourth place; the next test has all at one
        file.write_text(json.dumps(with_text(whole, where, text)))
        for output, shown in every_output(folder.path):
            found += [f"{name} {where}: {what} in {output}" for what in acting(output, shown)]
            if len(shown) > 200_000 + 2 * clean.get(output, 0):
                found.append(f"{name} {where}: {len(shown)} characters in {output}")
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("run.json", ("reason",)),
        ("metrics.json", ("data", "sites", 0, "notes", 0)),
        ("metrics.json", ("links", 1, "reason")),
        ("metrics.json", ("student_rounds", 0, "failed", "ash")),
        ("metrics.json", ("data", "classes", 0)),
        ("privacy.json", ("statement",)),
        ("privacy.json", ("sites", "ash", None)),
    ],
)
def test_words_of_a_site_are_shown_and_do_nothing(name, where, text, tmp_path, request):
    if "classes" in where:  # of these words, the only ones in a picture
        request.getfixturevalue("drawn")
    folder = a_run(tmp_path)
    file = folder.path / name
    file.write_text(json.dumps(with_text(json.loads(file.read_bytes()), where, text)))
    outputs = dict([*every_output(folder.path), *every_command(folder.path)])
    assert "report" in outputs, outputs
    for output, shown in outputs.items():
        assert acting(output, shown) == [], output
        assert len(shown) < 500_000


@pytest.mark.parametrize("text", [text[:250] for text in HOSTILE])
def test_what_a_coordinator_once_wrote_into_a_ledger_is_shown_by_its_audit_and_does_nothing(text, tmp_path):
    ledger = new_ledger(tmp_path, "ash")
    spend(ledger, gaussian(20), 20, run=text, hop=text)
    audit = audit_ledger(ledger.path, KEY.public_key(), "ash", terms=Terms(epsilon=4.0, delta=1e-5))
    assert audit.verdict == "fine", "the ledger itself keeps every character that its hashes are over"
    outputs = dict(audit_outputs(audit))
    assert sorted(outputs) == ["audit", "audit JSON", "audit page"]
    for output, shown in outputs.items():
        assert acting(output, shown) == [], output


@pytest.mark.parametrize("text", [*HOSTILE, "..", "../../escaped", "/etc", "a" * 129, "x\x00y"])
@pytest.mark.parametrize("field", ["run_id", "hop"])
def test_a_coordinator_can_not_name_a_run_or_a_piece_of_work_by_more_than_a_name(field, text):
    architecture = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32)
    task = protocol.LinkTask(
        run_id="run", hop="hop", strand=0, lap=0, architecture=architecture, recipe=RunConfig().link_recipe()
    )
    body = json.dumps({**json.loads(task.model_dump_json()), field: text})
    with pytest.raises(ChainwardError, match=f"bad field: {field}: ") as raised:
        envelope._parse(body, protocol.LinkTask)
    assert acting("error", str(raised.value)) == []
