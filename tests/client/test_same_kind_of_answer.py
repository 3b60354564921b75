"""What a private site answers does not depend on single records in kind: not by its type, its fields, its words or its ledger.

A coordinator chooses weights, architectures and recipes as it likes. Two hospitals that differ in one patient are asked the
same; whatever is asked, both must answer alike but for what noise covers: numbers in models and in noised scores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from private_hospital import (
    ARCHITECTURES,
    LEAVING,
    REQUESTS,
    WEIGHTS,
    answer,
    architecture,
    failing,
    hospital,
    scores,
    state_of,
)

from chainward_client import scoring
from chainward_client.node import PRIVATE_REASON
from chainward_client.private_training import PrivateTraining
from chainward_client.site_key import site_key, site_key_path
from chainward_client.site_ledger import open_site_ledger
from chainward_shared.errors import ModelError, PolicyRefusal, StoreError
from chainward_shared.protocol import kind_of


def shape_of(value: Any, key: str = "") -> Any:
    """Return what is left of an answer without its numbers: fields, their types, lengths of lists, and words."""
    if isinstance(value, dict):
        return {key: shape_of(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    if isinstance(value, str) and key not in {"digest", "hash", "signature", "public_key", "time"}:
        return value
    return type(value).__name__


def ledger_of(node_config: dict[str, str]) -> list[Any]:
    ledger, _ = open_site_ledger(Path(node_config["site-config"]).parent / "state", "ash")
    return [(spending.reserved.phase, spending.reserved.mechanism, spending.counted) for spending in ledger.spendings()]


def kind_of_answer(node_config: dict[str, str], *request: Any) -> Any:
    content = answer(node_config, *request)
    arrays = {
        record: {name: (array.shape, array.dtype) for name, array in entries.items()}
        for record, entries in content.array_records.items()
    }
    body = json.loads(str(content.config_records["chainward"]["body"]))
    return kind_of(content), shape_of(body), arrays, sorted(content.metric_records), ledger_of(node_config)


@pytest.fixture(params=REQUESTS)
def asked(request) -> str:
    return request.param


@pytest.fixture
def neighbours(tmp_path, asked) -> list[dict[str, str]]:
    """Two hospitals, the second without one patient; their secrets are the same."""
    found = [hospital(tmp_path / "with"), hospital(tmp_path / "without", LEAVING[asked])]
    key = site_key(tmp_path / "with" / "state")
    site_key(tmp_path / "without" / "state")
    site_key_path(tmp_path / "without" / "state").write_text(key.hex())
    return found


@pytest.mark.slow
def test_whatever_the_weights_are_the_answer_is_of_the_same_kind(neighbours, asked):
    for weights in WEIGHTS:
        model = architecture()
        request = REQUESTS[asked](model, state_of(model, weights))
        one, other = (kind_of_answer(node, *request) for node in neighbours)
        assert one == other, weights


@pytest.mark.slow
def test_whatever_the_architecture_is_the_answer_is_of_the_same_kind(neighbours, asked):
    for name, model in ARCHITECTURES.items():
        try:
            state = state_of(model, "as they come")
        except ModelError:  # nobody can build it
            state = {"nothing": torch.zeros(1)}
        request = REQUESTS[asked](model, state)
        before = ledger_of(neighbours[0])
        one, other = (kind_of_answer(node, *request) for node in neighbours)
        assert one == other, name
        if one[0] == "refusal":
            assert one[-1] == before, f"{name}: what doesn't fit is refused before anything is reserved"


@pytest.mark.parametrize("asked", ["link", "student"], indirect=True)
def test_work_that_fails_says_the_same_and_costs_the_same_whatever_went_wrong_and_when(neighbours, asked, monkeypatch):
    model = architecture()
    request = REQUESTS[asked](model, state_of(model, "as they come"))
    failures = [
        (0, ModelError("a weight is not finite")),
        (0, IndexError("Target 2 is out of bounds.")),
        (2, StoreError("/secret/path: can't be written")),
        (2, PolicyRefusal("image 7 has no patient")),
    ]
    answers, honest = [], PrivateTraining.step
    for after, error in failures:
        node, before = neighbours[0], len(ledger_of(neighbours[0]))
        monkeypatch.setattr(PrivateTraining, "step", failing(after, error, honest))
        *told, ledger = kind_of_answer(node, *request)
        answers.append((told, ledger[before:]))
    assert all(one == answers[0] for one in answers)
    (kind, body, *_), ((_, reserved, counted),) = answers[0]
    assert (kind, body["reason"], body["final"]) == ("refusal", PRIVATE_REASON, "bool")
    assert counted == reserved, "charged in full"


@pytest.mark.parametrize("asked", ["scores"], indirect=True)
def test_scoring_that_fails_after_its_charge_says_nothing_of_why(neighbours, asked, monkeypatch):
    model = architecture()
    broken = failing(0, IndexError("Target 2 is out of bounds."), print)
    monkeypatch.setattr(scoring, "class_probabilities", lambda *arguments, **_: broken(*arguments))
    kind, body, _, _, ledger = kind_of_answer(neighbours[0], *scores(model, state_of(model, "as they come")))
    assert (kind, body["reason"]) == ("refusal", PRIVATE_REASON)
    assert [phase for phase, _, _ in ledger] == ["scores"]


@pytest.mark.parametrize("asked", ["link", "student", "scores"], indirect=True)
@pytest.mark.parametrize("declared", [False, True])
def test_a_grey_scale_that_depends_on_all_patients_is_refused_before_anything_is_spent(tmp_path, asked, declared):
    node = hospital(tmp_path / "deep")
    for path in (tmp_path / "deep").glob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 16).save(path)
    described = yaml.safe_load((tmp_path / "deep" / "data.yaml").read_text())
    if declared:
        described["image"]["scale"] = [0, 4095]
    (tmp_path / "deep" / "data.yaml").write_text(yaml.safe_dump(described))
    model = architecture()
    kind, body, *_, ledger = kind_of_answer(node, *REQUESTS[asked](model, state_of(model, "as they come")))
    assert (kind == "refusal") == (not declared)
    assert bool(ledger) == declared
    if not declared:
        assert "image.scale" in body["reason"]
