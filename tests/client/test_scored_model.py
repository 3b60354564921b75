"""The model that a site scores: checked whenever it comes, built once where a process is many sites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord

from chainward_client import scoring as module
from chainward_client.bases import Bases
from chainward_client.scoring import scored_model
from chainward_client.site import OpenSite
from chainward_shared.errors import ProtocolError, WeightsError
from chainward_shared.models import build_model, resolve_architecture
from chainward_shared.pretrained.store import WeightsStore
from chainward_shared.protocol import EvaluateTask
from chainward_shared.weights import StateDict, digest, from_arrays, rounded, to_arrays

MODEL = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32)
WIDER = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)


@pytest.fixture(autouse=True)
def _nothing_scored_yet(monkeypatch):
    monkeypatch.setattr(module, "_last", None)


@pytest.fixture
def site(tmp_path: Path) -> OpenSite:
    bases = Bases(tmp_path / "bases", WeightsStore(tmp_path / "weights"))
    return OpenSite("ash", None, lambda: None, tmp_path, bases)  # type: ignore[arg-type, return-value]


def weights(seed: int, architecture=MODEL) -> StateDict:
    return rounded(dict(build_model(architecture, seed).state_dict()))


def asked(state: StateDict, architecture=MODEL) -> EvaluateTask:
    return EvaluateTask(run_id="r", architecture=architecture, splits=["val"], threads=1, digest=digest(state))


def same(model: torch.nn.Module, state: StateDict) -> bool:
    return digest(model.state_dict()) == digest(state)


def test_the_same_model_is_checked_and_built_once_and_every_other_one_anew(site, monkeypatch):
    read: list[str] = []
    monkeypatch.setattr(
        module, "incoming_state", lambda arrays, *rest: read.append("") or from_arrays(arrays, weights(0, rest[1]))
    )
    first, second, wider = weights(1), weights(2), weights(3, WIDER)
    for _ in range(3):
        assert same(scored_model(asked(first), {"model": to_arrays(first)}, site), first)
    assert len(read) == 1
    for state, architecture in ((second, MODEL), (wider, WIDER), (first, MODEL)):
        model = scored_model(asked(state, architecture), {"model": to_arrays(state)}, site)
        assert same(model, state)
    assert len(read) == 4


def test_other_bytes_under_the_digest_of_the_model_before_are_refused(site):
    state = weights(1)
    scored_model(asked(state), {"model": to_arrays(state)}, site)
    arrays = to_arrays(state)
    values = arrays["float16"].numpy().copy()
    values[0] += 1
    arrays["float16"] = Array(values)
    with pytest.raises(WeightsError, match="digest"):
        scored_model(asked(state), {"model": arrays}, site)
    assert same(scored_model(asked(state), {"model": to_arrays(state)}, site), state)


def test_the_bytes_of_the_model_before_under_another_digest_are_refused(site):
    state = weights(1)
    scored_model(asked(state), {"model": to_arrays(state)}, site)
    with pytest.raises(WeightsError, match="digest"):
        scored_model(asked(weights(2)), {"model": to_arrays(state)}, site)


@pytest.mark.parametrize("arrays", [{}, {"model": ArrayRecord()}])
def test_a_message_without_the_model_is_refused_also_after_one_with_it(site, arrays):
    state = weights(1)
    scored_model(asked(state), {"model": to_arrays(state)}, site)
    with pytest.raises((ProtocolError, WeightsError)):
        scored_model(asked(state), arrays, site)
