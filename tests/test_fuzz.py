"""Malformed messages and files, made by a fuzzer: one line that says what is wrong, nothing else, nothing half-written.

Files are damaged byte by byte, and documents (JSON, YAML) also piece by piece, with values of other kinds in other places.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loopback_grid import LoopbackGrid

import chainward_client.app
from chainward_client.data.sources import local_site
from chainward_client.node import SITE_CONFIG_KEY
from chainward_client.site_config import load_site_config
from chainward_client.site_ledger import create_site_ledger, ledger_path, open_site_ledger
from chainward_server.app import coordinate
from chainward_server.report.page import write_report
from chainward_server.run_folder import RunFolder
from chainward_shared import protocol
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, LedgerError
from chainward_shared.models import resolve_architecture
from chainward_shared.privacy.accounting import Mechanism
from chainward_shared.privacy.audit import audit_ledger, audit_statements
from chainward_shared.privacy.record import read_privacy_record
from chainward_shared.protocol import Body, pack, unpack
from chainward_shared.weights import to_arrays

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(-3, 3), max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes changed, cut off, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["change", "cut", "insert", "double", "zero"]))
        if how == "change" and data:
            data[where] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[where:]
        elif how == "insert":
            data[where:where] = draw(st.binary(min_size=1, max_size=8))
        elif how == "double":
            data[where:where] = data[where : where + draw(st.integers(1, 80))]
        else:
            data[where : where + 16] = bytes(len(data[where : where + 16]))
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A document in which a value was replaced, removed, renamed or put in, somewhere."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        parent, key = draw(st.sampled_from(list(_places(document))))
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            parent[key] = draw(JUNK)
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(JUNK)
        else:
            parent.append(draw(JUNK))
        if not list(_places(document)):
            break
    return document


def _places(document: Any):
    children = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in children:
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def one_line(error: BaseException) -> None:
    """An error for a person: a line with words in it."""
    assert str(error).strip()
    assert "\n" not in str(error)


# -- messages


ARCHITECTURE = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
LINK = protocol.LinkTask(
    run_id="run", hop="hop", strand=0, lap=0, architecture=ARCHITECTURE, recipe=RunConfig().link_recipe()
)
STUDENT = protocol.StudentTask(
    run_id="run",
    round=1,
    architecture=ARCHITECTURE,
    recipe=RunConfig().student_recipe("distil"),
    student_digest="ab" * 32,
)
EVALUATE = protocol.EvaluateTask(run_id="run", architecture=ARCHITECTURE, splits=["val"], threads=1, digest="ab" * 32)
LOG = protocol.TrainingLog(epochs=1, steps=1, images=1, loss=[0.5], seconds=1.0, precision="fp32")
BODIES: list[Body] = [
    LINK,
    STUDENT,
    EVALUATE,
    protocol.LinkResult(hop="hop", site="oak", digest="ab" * 32, training=LOG),
    protocol.Hello(site="oak"),
]


def enveloped(kind: object, body: object, version: object = protocol.PROTOCOL_VERSION) -> RecordDict:
    text = body if isinstance(body, str) else json.dumps(body)
    return RecordDict({"chainward": ConfigRecord({"protocol": version, "kind": kind, "body": text})})


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.KIND)
@FUZZ
@given(data=st.data())
def test_a_malformed_message_is_read_or_refused_in_one_line(body, data):
    content = enveloped(body.KIND, data.draw(altered(json.loads(body.model_dump_json()))))
    try:
        found, _ = unpack(content, type(body))
    except ChainwardError as error:
        one_line(error)
    else:
        assert isinstance(found, type(body))


@FUZZ
@given(
    kind=st.one_of(st.text(max_size=10), st.integers(-5, 5)),
    body=st.text(max_size=30),
    version=st.one_of(st.integers(-3, 9), st.text(max_size=3)),
)
def test_an_envelope_of_anything_is_refused_in_one_line(kind, body, version):
    with pytest.raises(ChainwardError) as caught:
        unpack(enveloped(kind, body, version), protocol.Hello)
    one_line(caught.value)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, small_consortium) -> Path:
    """The site.yaml of a deployed site on the small images."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "site.yaml").write_text(yaml.safe_dump({"site": "oak", "data": str(small_consortium), "state": "state"}))
    return folder / "site.yaml"


@pytest.mark.parametrize(
    ("kind", "body"),
    [("train.link", LINK), ("train.student", STUDENT), ("evaluate", EVALUATE)],
    ids=lambda x: str(x)[:14],
)
@FUZZ
@given(data=st.data())
def test_a_deployed_site_answers_malformed_tasks_with_a_refusal_and_writes_nothing(kind, body, data, deployed):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    document = data.draw(altered(json.loads(body.model_dump_json())))
    document["simulated"] = document.get("simulated", 3) or 3  # never valid: a deployed site trains nothing here
    message = Message(enveloped(body.KIND, document), dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(
        run_id=1, node_id=1, node_config={SITE_CONFIG_KEY: str(deployed)}, state=RecordDict(), run_config={}
    )
    reply = chainward_client.app.app(message, context)
    with pytest.raises(protocol.SiteRefusal) as caught:
        unpack(reply.content, protocol.LinkResult)
    one_line(caught.value)
    assert str(deployed.parent) not in str(caught.value)
    assert not (deployed.parent / "state").exists()


@FUZZ
@given(data=st.data())
def test_arrays_of_other_shapes_and_names_are_refused_in_one_line(data):
    import torch

    name = data.draw(st.sampled_from(["predecessor", "model", "teacher", "weights"]))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    arrays = {name: to_arrays({"weight": torch.zeros(shape)})}
    try:
        content = pack(LINK, arrays)
        content["more"] = ArrayRecord()
        unpack(content, protocol.LinkTask)
    except ChainwardError as error:
        one_line(error)
    else:
        pytest.fail("a foreign array record was taken")


@FUZZ
@given(data=st.data())
def test_damaged_arrays_of_either_precision_are_read_whole_or_refused_in_one_line(data):
    import torch
    from flwr.app import Array

    from chainward_shared.weights import from_arrays

    state = {"weight": torch.arange(6.0).view(2, 3), "small": torch.full((3,), 1 / 3), "seen": torch.tensor(7)}
    arrays = to_arrays(state)
    name = data.draw(st.sampled_from(sorted(arrays)))
    sent = arrays[name]
    content = data.draw(damaged(sent.data))
    if data.draw(st.booleans()):
        arrays[name] = Array(sent.dtype, tuple(sent.shape), sent.stype, content)
    else:
        announced = data.draw(st.sampled_from(["float16", "float32", "float64", "uint8", "object", "<f2", ""]))
        shape = data.draw(st.sampled_from([(2, 3), (6,), (3,), (), (2, 3, 10**9), (-1,)]))
        arrays[name] = Array(announced, shape, sent.stype, content)
    try:
        arrived = from_arrays(arrays, state)
    except ChainwardError as error:
        one_line(error)
    else:
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in arrived.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in state.items()
        }
        assert all(bool(torch.isfinite(tensor).all()) for tensor in arrived.values())


# -- the site's files


SITE = {
    "site": "oak",
    "data": "data.yaml",
    "state": "state",
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "metrics": "noised", "metrics_epsilon": 0.5, "class_shares": {"a": 0.5}},
}


@FUZZ
@given(data=st.data())
def test_a_malformed_site_yaml_is_read_or_refused_in_one_line_that_names_it(data, tmp_path):
    path = tmp_path / "site.yaml"
    document = data.draw(altered(SITE))
    content = data.draw(st.one_of(st.just(yaml.safe_dump(document).encode()), damaged(yaml.safe_dump(SITE).encode())))
    path.write_bytes(content)
    try:
        load_site_config(path)
    except ChainwardError as error:
        one_line(error)
        assert "site.yaml" in str(error)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_malformed_manifest_or_description_is_read_or_refused_in_one_line(data, small_consortium, tmp_path):
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest = (small_consortium.parent / "cases.csv").read_bytes()
    document = yaml.safe_load(small_consortium.read_text()) | {"images": str(small_consortium.parent / "images")}
    if data.draw(st.booleans()):
        manifest = data.draw(damaged(manifest))
    else:
        document = data.draw(altered(document))
    (folder / "cases.csv").write_bytes(manifest)
    (folder / "data.yaml").write_text(yaml.safe_dump(document))
    try:
        local_site(folder / "data.yaml", "oak", b"key")
    except ChainwardError as error:
        one_line(error)


@pytest.fixture(scope="module")
def kept_ledger(tmp_path_factory) -> Path:
    """The state folder of a site that has spent something."""
    state = tmp_path_factory.mktemp("ledger")
    ledger = create_site_ledger(state, "oak")
    for number in range(3):
        reservation = ledger.reserve(
            Mechanism("dp-sgd", 1.0, 0.1, 10 + number),
            run="run",
            phase="link",
            hop=f"hop-{number}",
            unit="patient",
            delta=1e-5,
        )
        reservation.begin()
        ledger.commit(reservation, 10)
    return state


@FUZZ
@given(data=st.data())
def test_a_damaged_ledger_is_refused_in_one_line_or_says_no_less_than_was_spent(data, kept_ledger, tmp_path):
    state = tmp_path / "state"
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(kept_ledger, state)
    files = [ledger_path(state), next((state / "privacy").glob("ledger.jsonl.head*"))]
    path = data.draw(st.sampled_from(files))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    _, key = open_site_ledger(kept_ledger, "oak")
    audited = audit_ledger(ledger_path(state), key.public_key(), "oak")
    try:
        ledger, _ = open_site_ledger(state, "oak")
    except LedgerError as error:
        one_line(error)
        assert audited.exit_code == 2
    else:
        assert sum(mechanism.steps for mechanism in ledger.mechanisms()) >= 30


# -- the coordinator's files


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, small_consortium) -> Path:
    """The folder of a finished run with a private site."""
    config = RunConfig.from_flat(
        {
            "data.source": str(small_consortium),
            "output.dir": str(tmp_path_factory.mktemp("runs")),
            "chain.backbone": "test_convnext",
            "chain.epochs": 1,
            "chain.compare-alone": False,
            "student.rounds": 0,
            "privacy.mode": "by-policy",
            "privacy.simulated-sites": "birch",
            "privacy.delta": 1e-3,
        }
    )
    folder = RunFolder.create(config)
    coordinate(LoopbackGrid(2), folder)
    shutil.rmtree(folder.path / "simulated-sites")
    return folder.path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "config.toml", "metrics.json", "privacy.json"])
@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_a_damaged_run_folder_is_read_or_refused_in_one_line(name, data, kept_run, tmp_path, request):
    if name == "metrics.json":  # pictures are of nothing else
        request.getfixturevalue("drawn")
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(kept_run, path, ignore=shutil.ignore_patterns("models", "report.html"))
    content = (path / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        (path / name).write_text(json.dumps(data.draw(altered(json.loads(content)))))
    else:
        (path / name).write_bytes(data.draw(damaged(content)))
    try:
        folder = RunFolder.open(path)
        audit_statements(folder.state.run_id, read_privacy_record(path / "privacy.json").statements)
        write_report(folder)
    except ChainwardError as error:
        one_line(error)
        assert not list(path.glob("*.part"))
