"""``chainward-site dry-run``: all that would leave is shown, what must not leave is found, nothing is spent or connected."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import chainward_client.handlers as handlers
import chainward_client.site
from chainward_client import cli
from chainward_client.data.site_data import Cases, PrivilegedCases, SiteData
from chainward_client.disclosure import PLAIN_WEIGHTS, PRIVATE_WEIGHTS, UNKNOWN, what_it_tells
from chainward_client.dry_run.run import DryRun, dry_run
from chainward_client.leaks import Found, Secrets, find_leaks
from chainward_client.planned_run import read_plan
from chainward_client.site_ledger import create_site_ledger, ledger_path
from chainward_shared import protocol
from chainward_shared.errors import ChainwardError, DataError
from chainward_shared.models import Start, resolve_architecture
from chainward_shared.models.start import travelling_template

PLAN = "chain.backbone='test_convnext' chain.batch-size=8 student.batch-size=8 federation.threads=1"
PRIVATE = f"{PLAN} privacy.mode='dp-sgd' privacy.epsilon=3"


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Path of the site.yaml of a hospital whose every text can be told from any other."""
    (tmp_path / "scans").mkdir()
    generator = np.random.default_rng(3)
    rows = ["scan,finding,person,part,report,zkreatinin,zward"]
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for i in range(count):
            name = f"zscan{split}{i:03d}"
            pixels = generator.normal(90, 25, (32, 32)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scans" / f"{name}.png")
            value = round(float(generator.uniform(40, 160)), 5)
            report = f"Zbefund {split} {i}. Hier ist alles wie zuvor {i}; kein Hinweis auf Neues."
            rows.append(
                f"{name},{('clear', 'dense')[i % 2]},zpat-{split}-{i:03d},{split},{report},{value},zward-{i % 2}"
            )
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "scans",
        "classes": ["clear", "dense"],
        "columns": {
            "image": "scan",
            "label": "finding",
            "patient": "person",
            "split": "part",
            "text": "report",
            "tabular": {
                "zkreatinin": {"kind": "number", "min": 0, "max": 300},
                "zward": {"kind": "category", "values": ["zward-0", "zward-1"]},
            },
        },
        "image": {"size": 32, "channels": 1},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(description))
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "oak", "data": "data.yaml", "state": "state"}))
    return path


def with_policy(site_yaml: Path, **policy: Any) -> Path:
    content = yaml.safe_load(site_yaml.read_text())
    content["privacy"] = {"epsilon": 10, "delta": 1e-5, "epsilon_per_run": 4, **policy}
    site_yaml.write_text(yaml.safe_dump(content))
    create_site_ledger(site_yaml.parent / "state", "oak")
    return site_yaml


@pytest.fixture(autouse=True)
def fresh_sites() -> Iterator[None]:
    yield
    chainward_client.site._local_site.cache_clear()


def run(site_yaml: Path, plan: str = PLAN) -> DryRun:
    return dry_run(site_yaml, read_plan(plan), steps=2)


def kinds(found: DryRun) -> list[str]:
    return [sent.kind for sent in found.sent]


# --- a clean site ---


@pytest.mark.slow
def test_every_byte_of_every_message_is_named_and_nothing_is_found(hospital):
    found = run(hospital)
    assert (found.exit_code, found.found, found.sockets) == (0, (), ())
    assert kinds(found) == ["hello", "site-card", "link-result", "student-result", "evaluate-result"]
    for sent in found.sent:
        assert sent.framing > 0, "arrays and fields are parts of the message, without overlap"
        assert sent.framing < 300 + 120 * (len(sent.arrays) + len(sent.fields)), "what has no name is small"
        assert all(one.tells != UNKNOWN for one in sent.fields), sent
        assert all(one.what != UNKNOWN for one in sent.arrays), sent
    assert {one.what for one in found.sent[2].arrays} == {PLAIN_WEIGHTS}
    assert {"report", "sentence", "table cell", "patient id", "file name", "path", "table number"} <= set(
        found.searched
    )
    assert found.searched["report"] == 36


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["head", "last-1"])
def test_from_a_start_the_question_about_the_weights_is_shown_and_only_what_is_trained_would_leave(
    trainable, hospital, tmp_path, monkeypatch
):
    monkeypatch.setenv("CHAINWARD_WEIGHTS", str(tmp_path / "weights"))
    model = timm.create_model("test_convnext")
    file = tmp_path / "start.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
    found = run(hospital, f"{PLAN} chain.start-from='{file}' chain.trainable='{trainable}' student.rounds=0")
    assert (found.exit_code, found.found, found.sockets) == (0, (), ())
    assert kinds(found) == ["hello", "site-card", "base-state", "link-result", "evaluate-result"]
    assert not found.sent[2].arrays, "of the weights it has, a site says that it has them"
    plain = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32, pretrained=True)
    start = Start(name="any", file="0" * 64, digest="0" * 64, part=trainable)
    trained = travelling_template(plain.model_copy(update={"start": start}))
    numbers = sum(tensor.numel() for tensor in trained.values())
    assert 2 * numbers <= sum(one.bytes for one in found.sent[3].arrays) < 4 * numbers + 2000
    assert not (hospital.parent / "state" / "bases").exists(), "what the dry run was made with is gone"


@pytest.mark.slow
def test_the_sums_of_a_statistics_round_are_shown_and_a_site_with_too_few_images_declines(hospital):
    plan = f"{PLAN} chain.head='statistics' student.head='statistics'"
    found = run(hospital, plan)
    assert (found.exit_code, found.found) == (0, ())
    of_chain, of_student = (sent for sent in found.sent if sent.kind == "statistics-result")
    for sent in (of_chain, of_student):
        assert {one.record for one in sent.arrays} == {"sums"}
        assert all(one.what != UNKNOWN for one in sent.arrays)
        assert all(one.tells != UNKNOWN for one in sent.fields)
    content = yaml.safe_load(hospital.read_text())
    hospital.write_text(yaml.safe_dump(content | {"limits": {"statistics_images": 1_000}}))
    declined = [sent for sent in run(hospital, plan).sent if sent.asked == "statistics-task"]
    assert ["at least 1000" in one.reason for one in declined] == [True, True]


@pytest.mark.slow
def test_a_private_dry_run_spends_nothing_and_leaves_nothing_behind(hospital):
    with_policy(hospital, metrics="noised", metrics_epsilon=0.5)
    state = hospital.parent / "state"
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    assert ledger_path(state) in before
    found = run(hospital, f"{PRIVATE} chain.head='statistics' student.head='statistics'")
    assert (found.exit_code, found.private) == (0, True)
    releases = [sent for sent in found.sent if sent.asked == "statistics-task"]
    assert [sent.kind for sent in releases] == ["statistics-result"] * 4, "two for the model and two for the student"
    assert all(one.what != UNKNOWN for sent in releases for one in sent.arrays)
    assert all(one.tells != UNKNOWN for sent in releases for one in sent.fields)
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    assert [path.name for path in state.iterdir()] == ["privacy"]
    link, evaluated = found.sent[2], found.sent[-1]
    assert {one.what for one in link.arrays} == {PRIVATE_WEIGHTS}
    fields = {one.path: one.value for one in link.fields}
    assert fields["training.loss"] == "[]"
    assert float(fields["statement.epsilon_run"]) <= 3.0
    assert "evaluate-result" in kinds(found)
    assert {one.path: one.value for one in evaluated.fields}["release"] == '"noised"'


def test_a_plan_that_the_policy_forbids_is_shown_as_the_refusal_that_would_leave(hospital):
    with_policy(hospital)
    found = run(hospital)
    assert found.exit_code == 1
    assert found.sent[2].kind == "refusal"
    assert "requires differential privacy" in (found.sent[2].reason or "")


# --- leaks, made on purpose ---


def test_a_report_in_the_notes_of_a_training_is_found_and_ends_with_1(hospital, monkeypatch):
    train_link = handlers.train_link

    def leaky(data: SiteData, *arguments: Any, **settings: Any) -> Any:
        state, log = train_link(data, *arguments, **settings)
        texts = data.splits["train"].privileged.texts
        return state, log.model_copy(update={"notes": [f"by the way: {(texts or ('',))[3]}"]})

    monkeypatch.setattr(handlers, "train_link", leaky)
    found = run(hospital, f"{PLAN} student.rounds=0")
    assert found.exit_code == 1
    assert {"report", "sentence"} <= {one.kind for one in found.found}
    assert {one.asked for one in found.found} == {"link-task"}


def test_an_array_that_is_none_of_the_models_is_found(hospital, monkeypatch):
    train_link = handlers.train_link

    def leaky(data: SiteData, *arguments: Any, **settings: Any) -> Any:
        state, log = train_link(data, *arguments, **settings)
        return {**state, "extra": data.splits["train"].images.float()}, log

    monkeypatch.setattr(handlers, "train_link", leaky)
    found = run(hospital, f"{PLAN} student.rounds=0")
    (one,) = found.found
    assert one.kind == "array"
    assert one.what.startswith("model: array 'halved': uint8 (")
    assert "all such values of the model" in one.what


def test_whatever_opens_a_socket_is_stopped_and_named(hospital, monkeypatch):
    train_link = handlers.train_link

    def telephoning(*arguments: Any, **settings: Any) -> Any:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
        return train_link(*arguments, **settings)

    monkeypatch.setattr(handlers, "train_link", telephoning)
    found = run(hospital, f"{PLAN} student.rounds=0")
    assert found.exit_code == 1
    assert found.sockets
    assert found.sent[2].kind == "refusal"
    socket.socket().close()  # and the guard is gone with the dry run


# --- the search ---


def site_with(texts: tuple[str | None, ...], patients: list[str], table: dict[str, Any]) -> SiteData:
    n = len(patients)
    cases = Cases(
        torch.zeros(n, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(n, dtype=torch.int64),
        np.array(patients),
        PrivilegedCases(texts=texts, table=table),
    )
    empty = cases.take([])
    return SiteData("oak", ("a", "b"), {"train": cases, "val": empty, "test": empty})


def message(body: Any = None, **arrays: np.ndarray) -> RecordDict:
    content = RecordDict({"chainward": ConfigRecord({"protocol": 2, "kind": "x", "body": json.dumps(body)})})
    for name, values in arrays.items():
        content[name] = ArrayRecord({"weights": Array(values)})
    return content


def leaks_in(answer: RecordDict, secrets: Secrets) -> list[Found]:
    tensors = [array.numpy() for record in answer.array_records.values() for array in record.values()]
    return find_leaks(answer, secrets, tensors, "x")


SECRETS = Secrets.of(
    site_with(
        ("Großer Befund, links. Kein Vergleich mit der Voraufnahme.", None, "short", "word", None, None, None, None),
        ["p-0017", "1234", "miller", "12", "p5", "p6", "p7", "p8"],
        {
            "lab": (53.48213, 12.0, None, 1.25, 61.20347, 70.11111, 81.90123, 90.33333),
            "kind": ("melanoma", "left", "patient", "train", None, None, None, None),
        },
    )
)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"notes": ["see großer befund, links. kein vergleich mit der voraufnahme."]}, "report"),
        ({"notes": ["Kein Vergleich mit der Voraufnahme"]}, "sentence"),
        ({"reason": "row of p-0017 is bad"}, "patient id"),
        ({"miller": 1}, "patient id"),
        ({"reason": "patient 1234"}, "patient id"),
        ({"a": ["MELANOMA"]}, "table cell"),
        ({"loss": [0.1, 53.48213]}, "table number"),
    ],
)
def test_each_kind_of_secret_is_found_in_a_body(body, kind):
    assert kind in {found.kind for found in leaks_in(message(body), SECRETS)}


@pytest.mark.parametrize(
    "body",
    [
        {"loss": [0.1234, 1234.5, 12.0, 1.25], "images": 1234},
        {"digest": "ab1234cd", "hop": "p-00175", "a": "millers"},
        {"time": "2030-01-01T10:00:00.1234Z"},
        {},
    ],
)
def test_what_only_looks_like_a_secret_is_not_taken_for_one(body):
    assert leaks_in(message(body), SECRETS) == []


def test_words_of_the_question_and_of_the_protocol_are_no_leak_though_a_cell_says_the_same():
    body = {"unit": "patient", "split": "train", "site": "left"}
    assert {found.kind for found in leaks_in(message(body), SECRETS)} == {"table cell"}
    assert leaks_in(message(body), SECRETS.without({"left"})) == []
    assert leaks_in(message({"note": "it was melanoma there"}), SECRETS.without({"right"})) != []


def test_secrets_hidden_in_arrays_are_found_as_text_and_as_values():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=20_000).astype(np.float32)
    assert leaks_in(message({}, model=weights), SECRETS) == []
    text = np.frombuffer(b"Kein Vergleich mit der Voraufnahme..", dtype=np.float32)
    hidden = weights.copy()
    hidden[100 : 100 + len(text)] = text
    assert {found.kind for found in leaks_in(message({}, model=hidden), SECRETS)} == {"sentence"}
    column = next(iter(SECRETS.columns.values()))
    hidden = weights.copy()
    hidden[7 : 7 + 9 * len(column) : 9] = column[::-1]
    more = Secrets.of(
        site_with(
            (None,) * 9,
            [f"patient-{i}" for i in range(9)],
            {"lab": tuple(float(x) + 0.00007 * x for x in range(41, 50))},
        )
    )
    hidden[200 : 200 + 9] = more.columns["lab"]
    assert "table column" in {found.kind for found in leaks_in(message({}, model=hidden), more)}
    assert leaks_in(message({}, model=weights), more) == []


def test_a_column_hidden_in_arrays_of_half_precision_is_found_unless_any_weights_hold_such_values():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=200_000).astype(np.float16)

    def site_with_column(values: np.ndarray) -> Secrets:
        ids = [f"patient-{i}" for i in range(len(values))]
        return Secrets.of(site_with((None,) * len(values), ids, {"lab": tuple(values.tolist())}))

    telling, common = site_with_column(generator.uniform(20, 50, 12)), site_with_column(generator.uniform(0.2, 0.5, 12))
    assert leaks_in(message({}, model=weights), telling) == []
    assert leaks_in(message({}, model=weights), common) == [], "200,000 weights hold most numbers of this size"
    hidden = weights.copy()
    hidden[7 : 7 + 9 * 12 : 9] = telling.columns["lab"][::-1]
    assert [found.kind for found in leaks_in(message({}, model=hidden), telling)] == ["table column"]
    few = weights[:300].copy()
    assert leaks_in(message({}, model=few), common) == []
    few[50:62] = common.columns["lab"]
    assert [found.kind for found in leaks_in(message({}, model=few), common)] == ["table column"]


@pytest.mark.slow
def test_a_site_answers_in_half_precision_as_the_plan_says(hospital):
    sent = {
        transfer: run(hospital, f"{PLAN} federation.transfer='{transfer}'").sent[2] for transfer in ("half", "full")
    }
    assert {one.dtype for one in sent["half"].arrays if one.bytes > 10_000} == {"float16"}
    assert {one.dtype for one in sent["full"].arrays if one.bytes > 10_000} == {"float32"}
    weights = {transfer: sum(one.bytes - 128 for one in of.arrays) for transfer, of in sent.items()}
    assert weights["half"] < 0.52 * weights["full"]


def test_every_field_that_a_site_sends_is_described():
    """A new field of an answer must be described before it can leave unexplained."""

    def paths(schema: dict[str, Any], whole: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in schema.get("properties", {}).items():
            inner = [value, *value.get("anyOf", ()), *([value["items"]] if "items" in value else ())]
            named = [whole["$defs"][one["$ref"].rpartition("/")[2]] for one in inner if "$ref" in one]
            if not named:
                yield f"{prefix}{name}"
            for one in named:
                yield from paths(one, whole, f"{prefix}{name}.")

    for body in (
        protocol.Hello,
        protocol.SiteCard,
        protocol.LinkResult,
        protocol.StudentResult,
        protocol.EvaluateResult,
        protocol.StatisticsResult,
        protocol.SumKeys,
        protocol.SumShares,
        protocol.MaskedSum,
        protocol.SumUnmasking,
        protocol.RunPlanState,
        protocol.Refusal,
    ):
        schema = body.model_json_schema()
        for path in [*paths(schema, schema), *body.ARRAYS]:
            assert what_it_tells(body.KIND, path, private=False) != UNKNOWN, f"{body.KIND}: {path}"
    assert what_it_tells("site-card", "new_field", private=False) == UNKNOWN


# --- the command ---


@pytest.mark.slow
def test_the_command_prints_tables_and_json(hospital):
    result = CliRunner().invoke(cli.app, ["dry-run", str(hospital), "--plan", f"{PLAN} student.rounds=0", "--json"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout[result.stdout.index("{\n") :])
    assert (written["verdict"], written["found"], written["sockets"]) == ("fine", [], [])
    assert sum(one["bytes"] for one in written["messages"]) == written["bytes"]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("chain.lap=2", "did you mean 'chain.laps'"),
        ("nonsense", "KEY=VALUE"),
        ("chain.laps=two", "not a number"),
        ("absent.toml", "can't be read"),
    ],
)
def test_a_plan_that_can_not_be_read_is_refused_in_one_line(plan, says):
    with pytest.raises(ChainwardError, match=says) as caught:
        read_plan(plan)
    assert "\n" not in str(caught.value)


def test_a_plan_is_read_from_an_app_and_from_a_run_folder(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config.chain]\nlaps = 3\n")
    (tmp_path / "config.toml").write_text("seed = 7\n[chain]\nlaps = 2\n")
    assert read_plan(str(tmp_path / "pyproject.toml")).chain.laps == 3
    assert (read_plan(str(tmp_path / "config.toml")).seed, read_plan("chain.laps=4 seed=1").chain.laps) == (7, 4)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_dry_run_is_not_a_training(hospital, steps):
    with pytest.raises(DataError, match="--steps"):
        dry_run(hospital, None, steps)
