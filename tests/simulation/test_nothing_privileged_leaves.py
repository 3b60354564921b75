"""Nothing privileged leaves a site: every message of a whole run is captured and searched, in both directions.

What is searched for: each report and each sentence of four words or more, table values, patient ids and file names, as
text; and every tensor of the privileged teachers, as bytes and as values, in whatever array or list of numbers it may hide.
Beside the clean runs stand leaks that are made on purpose: the same search finds each.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from PIL import Image

import chainward_client.handlers as handlers
import chainward_client.privileged.checks as checks
import chainward_simulations.client_app as simulated
from chainward_client.data.site_data import SPLITS, SiteData
from chainward_client.privileged import targets
from chainward_client.training import link
from chainward_client.training.privileged import PrivilegedTerm
from chainward_shared.errors import WeightsError
from chainward_shared.models import Architecture, skeleton
from chainward_shared.weights import as_sent

CLASSES = ("clear", "dense", "round", "wide")
SITES = ("ash", "birch")
TENSOR_KINDS = ("teacher weights", "embeddings", "logits", "projector", "vectors")
TEXT_KINDS = ("report", "sentence", "table value", "patient id", "file name")

ROW_OF_VALUES = 4
"""A row of a secret tensor is searched for if it has at least as many different values: fewer may be chance."""


@dataclass
class Secrets:
    """What must not be in any message, by kind."""

    texts: dict[str, set[str]] = field(default_factory=dict)
    tensors: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add_texts(self, kind: str, texts: set[str]) -> None:
        self.texts.setdefault(kind, set()).update(texts)

    def add_tensor(self, kind: str, tensor: torch.Tensor | np.ndarray) -> None:
        values = tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor
        self.tensors.setdefault(kind, []).append(np.array(values, dtype=np.float32))

    def add_site(self, data: SiteData) -> None:
        for split in SPLITS:
            cases = data.splits[split]
            self.add_texts("patient id", set(cases.patients.tolist()))
            reports = [text for text in cases.privileged.texts or () if text]
            sentences = {part.strip() for text in reports for part in re.split(r"[.;?!]", text)}
            self.add_texts("report", {text for text in reports if len(text.split()) > 1})
            self.add_texts("sentence", {part for part in sentences if len(part.split()) >= 4})


# the search


def _floats(content: Any) -> Iterator[list[float]]:
    """Yield every list of numbers in parsed JSON, and all its single numbers as one list."""
    single: list[float] = []

    def visit(node: Any) -> Iterator[list[float]]:
        if isinstance(node, dict):
            for value in node.values():
                yield from visit(value)
        elif isinstance(node, list):
            if node and all(isinstance(item, int | float) for item in node):
                yield [float(item) for item in node]
            else:
                for item in node:
                    yield from visit(item)
        elif isinstance(node, int | float):
            single.append(float(node))

    yield from visit(content)
    yield single


def _templates(messages: list[RecordDict]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors, without values, of every architecture that a message speaks of."""
    bodies = [json.loads(str(content.config_records["chainward"].get("body", "{}"))) for content in messages]
    described = [body.get(key) for body in bodies for key in ("architecture", "large_architecture")]
    different = {json.dumps(one) for one in described if one}
    return [skeleton(Architecture.model_validate_json(one)).state_dict() for one in different]


def _tensors(record: ArrayRecord, templates: list[dict[str, torch.Tensor]]) -> Iterator[np.ndarray]:
    """Yield the tensors of a model, or the arrays of anything else.

    A model travels as one array per dtype. Nearly every small value of half precision is in that somewhere: it is taken apart.
    """
    for template in templates if "halved" in record else ():
        with contextlib.suppress(WeightsError):
            yield from as_sent(record, template).values()
            return
    for array in record.values():
        yield array.numpy()


def _arrays(content: RecordDict, templates: list[dict[str, torch.Tensor]]) -> Iterator[np.ndarray]:
    """Yield all numbers of a message: its arrays, the numbers of its body, its metrics."""
    for record in content.array_records.values():
        yield from _tensors(record, templates)
    for config in content.config_records.values():
        for value in config.values():
            if isinstance(value, str) and value.startswith("{"):
                for numbers in _floats(json.loads(value)):
                    yield np.array(numbers, dtype=np.float64)
    for metrics in content.metric_records.values():
        yield np.array([np.ravel(value) for value in metrics.values()], dtype=np.float64)


def _telling(values: np.ndarray) -> np.ndarray:
    """Return the different values that aren't multiples of 1/8: those are flags, categories, zeros."""
    found = np.unique(values)
    return found[(found * 8) % 1 != 0]


def _pieces(tensors: list[np.ndarray]) -> list[np.ndarray]:
    """Return every tensor and every row of it, as the values that tell it."""
    pieces = []
    for tensor in tensors:
        rows = list(tensor) if tensor.ndim == 2 else []
        pieces += [piece for part in (tensor, *rows) if len(piece := _telling(part)) >= ROW_OF_VALUES]
    return pieces


def found_in(messages: list[RecordDict], secrets: Secrets) -> set[str]:
    """Return the kinds of secrets that are in the messages.

    A tensor, or a row of one, is there if its bytes are in the packed message, or if all its values are in one array or list
    of numbers, in whatever order and among whatever else; in an array of float16, rounded as its values are.
    """
    found = set()
    packed = [recorddict_to_proto(content).SerializeToString() for content in messages]
    for kind, texts in secrets.texts.items():
        needles = {form.encode() for text in texts for form in (text, json.dumps(text)[1:-1])}
        needles = {needle.lower() for needle in needles}
        if any(needle in message.lower() for message in packed for needle in needles):
            found.add(kind)
    templates = _templates(messages)
    arrays = [array for content in messages for array in _arrays(content, templates) if array.size >= ROW_OF_VALUES]
    arrays = [np.unique(array if array.dtype == np.float16 else array.astype(np.float32)) for array in arrays]
    for kind, tensors in secrets.tensors.items():
        telling = [tensor for tensor in tensors if len(_telling(tensor)) >= ROW_OF_VALUES]
        whole = [tensor.astype(dtype).tobytes() for tensor in telling for dtype in (np.float32, np.float16)]
        if any(needle in message for message in packed for needle in whole):
            found.add(kind)
        pieces = _pieces(tensors)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]
        values = np.concatenate(pieces)
        if any(np.logical_and.reduceat(np.isin(values.astype(array.dtype), array), starts).any() for array in arrays):
            found.add(kind)
    return found


# the runs


@pytest.fixture(scope="module")
def distinctive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Secrets]:
    """Path of a data file of two hospitals whose every cell can't be mistaken for anything else, and its secrets."""
    folder = tmp_path_factory.mktemp("distinctive")
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(7)
    secrets = Secrets()
    rows = ["picture,finding,person,part,hospital,report,zkreatinin,zward"]
    wards = ["zward-linden", "zward-magnolie"]
    for hospital in SITES:
        for number in range(40):
            label = number % 4
            name, person = f"zpic{hospital}{number:03d}x", f"zpat-{hospital}-{number:03d}"
            part = ("train", "train", "train", "val", "test")[number // 4 % 5]
            value = round(float(generator.uniform(40, 60) + 60 * label), 5)
            word = ("blau", "gelb", "grün", "weiß")[label]
            report = f"Zkurzbefund {hospital} {number}. Hier ist alles {word} wie zuvor {number}; zverlauf ohne besonderheit."
            ward = wards[int(generator.integers(2))]
            pixels = generator.normal(90, 25, (32, 32))
            pixels[4 : 10 + 4 * label, 6:16] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / f"{name}.png")
            rows.append(f"{name},{CLASSES[label]},{person},{part},{hospital},{report},{value},{ward}")
            secrets.add_texts("table value", {str(value), ward})
            secrets.add_texts("file name", {name})
    (folder / "cases.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    description = {
        "format": "csv",
        "manifest": "cases.csv",
        "images": "pictures",
        "classes": list(CLASSES),
        "columns": {
            "image": "picture",
            "label": "finding",
            "patient": "person",
            "split": "part",
            "site": "hospital",
            "text": "report",
            "tabular": {
                "zkreatinin": {"kind": "number", "min": 0, "max": 300},
                "zward": {"kind": "category", "values": wards},
            },
        },
        "image": {"size": 32, "channels": 1},
    }
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(description))
    return path, secrets


@pytest.fixture(autouse=True)
def fresh_sites() -> Iterator[None]:
    """Sites opened by another test must not be taken for those of this one."""
    simulated._opened.cache_clear()
    yield
    simulated._opened.cache_clear()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """Collect every tensor of the privileged teachers that comes into being, and what the opened sites hold."""
    secrets = Secrets()
    train_teacher, privileged_targets = targets.train_teacher, link.privileged_targets
    simulated_site, initialise = simulated.simulated_site, PrivilegedTerm.__init__

    def watched_teacher(vectors: torch.Tensor, *arguments: Any) -> Any:
        secrets.add_tensor("vectors", vectors)
        teacher = train_teacher(vectors, *arguments)
        for tensor in teacher.state_dict().values():
            secrets.add_tensor("teacher weights", tensor)
        return teacher

    def watched_targets(*arguments: Any, **named: Any) -> Any:
        found = privileged_targets(*arguments, **named)
        assert found is not None
        secrets.add_tensor("embeddings", found.embeddings)
        secrets.add_tensor("logits", found.logits)
        return found

    def watched_init(term: PrivilegedTerm, *arguments: Any) -> None:
        initialise(term, *arguments)
        assert term.projector is not None
        secrets.add_tensor("projector", term.projector.weight.clone())
        projectors.append(term.projector.weight)

    def watched_site(*arguments: Any, **settings: Any) -> SiteData:
        data = simulated_site(*arguments, **settings)
        secrets.add_site(data)
        return data

    projectors: list[torch.Tensor] = []
    secrets.__dict__["trained_projectors"] = projectors  # the same tensors, as training leaves them
    monkeypatch.setattr(targets, "train_teacher", watched_teacher)
    monkeypatch.setattr(link, "privileged_targets", watched_targets)
    monkeypatch.setattr(PrivilegedTerm, "__init__", watched_init)
    monkeypatch.setattr(simulated, "simulated_site", watched_site)
    return secrets


@pytest.fixture
def run(settings, coordinated, loopback, watched, distinctive) -> Callable[..., tuple[list[RecordDict], Secrets]]:
    """Run a configuration with privileged teachers; return every message that crossed, and the secrets."""

    def captured(**changes: Any) -> tuple[list[RecordDict], Secrets]:
        messages: list[RecordDict] = []

        def listen(message: Message, answer: Callable[[], Message]) -> Message:
            messages.append(message.content)
            reply = answer()
            assert not reply.has_error(), reply.error
            messages.append(reply.content)
            return reply

        privileged = {
            "data.source": str(distinctive[0]),
            "privileged.mode": "all",
            "privileged.epochs": 2,
            "privileged.hidden": 8,
            "privileged.text-features": 64,
            "chain.epochs": 1,
        }
        coordinated(settings | privileged | changes, loopback(2, listen))
        for kind, texts in distinctive[1].texts.items():
            watched.add_texts(kind, texts)
        for projector in watched.__dict__["trained_projectors"]:
            watched.add_tensor("projector", projector)
        return messages, watched

    return captured


SHORT = {"student.rounds": 0, "chain.compare-alone": False}


def assert_everything_was_watched(secrets: Secrets, text_kinds: tuple[str, ...]) -> None:
    for kind in text_kinds:
        assert secrets.texts[kind], f"no {kind} to search for"
    for kind in TENSOR_KINDS:
        assert _pieces(secrets.tensors[kind]), f"no {kind} to search for"


@pytest.mark.slow
def test_nothing_privileged_is_in_any_message_of_a_whole_run(run):
    messages, secrets = run(**{"privileged.target": "both", "student.rounds": 1})
    assert_everything_was_watched(secrets, TEXT_KINDS)
    kinds = {str(content.config_records["chainward"]["kind"]) for content in messages}
    assert {"site-card", "link-task", "link-result", "student-result", "evaluate-result"} <= kinds
    assert found_in(messages, secrets) == set()


@pytest.mark.slow
def test_nothing_privileged_of_phantoms_is_in_any_message(run):
    messages, secrets = run(**{"data.source": "phantom", "federation.sites": "site-6,site-5", **SHORT})
    assert_everything_was_watched(secrets, ("report", "sentence", "patient id"))
    assert found_in(messages, secrets) == set()


# the search can fail: leaks made on purpose


@pytest.mark.slow
def test_texts_that_leak_in_notes_are_found_each_by_its_kind(run, distinctive, monkeypatch):
    def leaky(data: SiteData) -> tuple[str, ...]:
        texts = Secrets(dict(distinctive[1].texts))
        texts.add_site(data)
        return tuple(f"by the way: {sorted(texts.texts[kind])[3]}" for kind in leaking)

    monkeypatch.setattr(checks, "privileged_notes", leaky)
    leaking = TEXT_KINDS
    messages, secrets = run(**SHORT)
    assert found_in(messages, secrets) == set(TEXT_KINDS)
    # and one kind is not taken for another
    cards = [content for content in messages if content.config_records["chainward"]["kind"] == "site-card"]
    for kind in TEXT_KINDS:
        body = json.loads(str(cards[0].config_records["chainward"]["body"]))
        body["notes"] = [note for note, of in zip(body["notes"][-5:], TEXT_KINDS, strict=True) if of == kind]
        alone = RecordDict({"chainward": ConfigRecord({"body": json.dumps(body)})})
        # a report is made of sentences
        assert found_in([alone], secrets) == ({"report", "sentence"} if kind == "report" else {kind})


def telling_part(tensors: list[np.ndarray], part: str) -> np.ndarray:
    """Return the last tensor of a kind, or the last row of one, that the search can tell from chance."""
    parts = tensors if part == "whole" else [row for t in tensors if t.ndim == 2 for row in t]
    parts = [part for part in parts if len(_telling(part)) >= ROW_OF_VALUES]
    # rows of vectors are flags and a few equal numbers: only the whole is telling
    return parts[-1] if parts else telling_part(tensors, "whole")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["whole", "row", "backwards"])
def test_tensors_that_leak_are_found_each_by_its_kind_wherever_they_hide(run, watched, monkeypatch, hidden):
    """Inside an array that may leave, under its own name and shape. A log has one number an epoch (`test_claims`)."""
    train_link = handlers.train_link

    def leaky(*arguments: Any, **settings: Any) -> Any:
        state, log = train_link(*arguments, **settings)
        arrays = sorted((t for t in state.values() if t.is_floating_point()), key=lambda t: -t.numel())
        for kind, array in zip(TENSOR_KINDS, arrays, strict=False):
            secret = telling_part(watched.tensors[kind], "whole" if hidden == "whole" else "row").ravel()
            values = torch.from_numpy(secret[::-1].copy() if hidden == "backwards" else secret)
            assert array.numel() > len(values)
            array.view(-1)[1 : 1 + len(values)] = values
        return state, log

    monkeypatch.setattr(handlers, "train_link", leaky)
    messages, secrets = run(**SHORT)
    assert found_in(messages, secrets) == set(TENSOR_KINDS)
