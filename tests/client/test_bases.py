"""The pretrained weights that a site's models start from: what a site takes in, what it refuses, and what its policy allows."""

from __future__ import annotations

import hashlib
import os
import stat

import numpy as np
import pytest
import timm
import torch
from flwr.app import Array, ArrayRecord
from pydantic import ValidationError
from safetensors.torch import save_file

from chainward_client.bases import KEPT, Bases
from chainward_shared.errors import PolicyRefusal, WeightsError
from chainward_shared.models import resolve_architecture
from chainward_shared.pretrained.base import PIECE_BYTES, base_of_file, load_base, most_bytes, save_base, started
from chainward_shared.pretrained.store import WeightsStore
from chainward_shared.protocol import BaseTask
from chainward_shared.weights import digest


def piece(contents):
    return ArrayRecord({"bytes": Array(np.frombuffer(contents, dtype=np.uint8))})


class Coordinator:
    """One that has weights, the base that it makes of them, and the file in which it sends them."""

    def __init__(self, folder, seed=0, part="head"):
        torch.manual_seed(seed)
        self.file = folder / f"{seed}.safetensors"
        save_file({name: t.clone() for name, t in timm.create_model("test_vit").state_dict().items()}, self.file)
        self.store = WeightsStore(folder / f"store-{seed}")
        self.card = self.store.add(self.file, "test_vit")
        plain = resolve_architecture("test_vit", num_classes=3, in_chans=1, image_size=64, pretrained=True)
        self.architecture, self.base = started(self.store.load(self.card), self.card, plain, part, "half")
        path = folder / f"base-{seed}.safetensors"
        save_base(self.base, path, {})
        self.contents = path.read_bytes()

    def task(self, offset=None, **changes):
        fields = {
            "run_id": "run",
            "architecture": self.architecture,
            "bytes": len(self.contents),
            "sha256": hashlib.sha256(self.contents).hexdigest(),
            "offset": offset,
        }
        return BaseTask(**{**fields, **changes})

    def send(self, bases, size=500_000):
        """Send what is missing; return how many bytes were sent."""
        state, sent = bases.answer(self.task(), None, "site"), 0
        while not state.complete:
            part = self.contents[state.received : state.received + size]
            state = bases.answer(self.task(state.received), piece(part), "site")
            sent += len(part)
        return sent


@pytest.fixture
def coordinator(tmp_path):
    return Coordinator(tmp_path)


@pytest.fixture
def bases(tmp_path):
    return Bases(tmp_path / "site" / "bases", WeightsStore(tmp_path / "site" / "weights"))


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_base_is_sent_once_and_kept(coordinator, bases):
    with pytest.raises(WeightsError, match="has not got the weights that the model starts from"):
        bases.load(coordinator.architecture)
    assert coordinator.send(bases) == len(coordinator.contents)
    assert same(bases.load(coordinator.architecture), coordinator.base)
    assert coordinator.send(bases) == 0
    (kept,) = bases.folder.iterdir()
    assert not stat.S_IMODE(kept.stat().st_mode) & 0o022


def test_a_base_travels_in_half_the_bytes_and_arrives_as_it_was(coordinator):
    numbers = sum(tensor.numel() for tensor in coordinator.base.values())
    assert len(coordinator.contents) < 2.2 * numbers
    assert all(tensor.dtype == torch.float32 for tensor in coordinator.base.values() if tensor.is_floating_point())


def test_an_architecture_without_a_start_needs_no_base(coordinator, bases):
    assert bases.load(coordinator.architecture.model_copy(update={"start": None})) is None


def test_a_transfer_that_broke_off_goes_on_where_it_was(coordinator, bases):
    first = bases.answer(coordinator.task(0), piece(coordinator.contents[:1000]), "site")
    assert (first.complete, first.received) == (False, 1000)
    half = next(bases.folder.iterdir())
    assert stat.S_IMODE(half.stat().st_mode) == 0o600
    again = bases.answer(coordinator.task(0), piece(coordinator.contents[:1000]), "site")
    assert again.received == 1000, "a piece that comes twice counts once"
    later = bases.answer(coordinator.task(5000), piece(coordinator.contents[5000:6000]), "site")
    assert later.received == 1000, "a piece that leaves a gap is not taken"
    assert coordinator.send(bases) == len(coordinator.contents) - 1000
    assert same(bases.load(coordinator.architecture), coordinator.base)


def test_bytes_that_are_not_those_announced_are_refused_and_forgotten(coordinator, bases):
    wrong = bytearray(coordinator.contents)
    wrong[-5] ^= 1
    with pytest.raises(WeightsError, match=r"the weights that arrived have SHA-256 .* announced was"):
        bases.answer(coordinator.task(0), piece(bytes(wrong)), "site")
    assert list(bases.folder.iterdir()) == []
    coordinator.send(bases)


def test_another_base_under_the_digest_of_this_one_is_refused(coordinator, bases, tmp_path):
    other = Coordinator(tmp_path, seed=1)
    lie = other.task(0, architecture=coordinator.architecture)
    with pytest.raises(WeightsError, match="is not the base of test_vit that the model starts from"):
        bases.answer(lie, piece(other.contents), "site")
    assert list(bases.folder.iterdir()) == []


@pytest.mark.parametrize("tensors", [{"evil": torch.ones(2)}, {"norm.weight": torch.ones(3)}, {}])
def test_a_file_of_other_tensors_is_refused(tensors, coordinator, bases, tmp_path):
    save_base(tensors, tmp_path / "other.safetensors", {})
    contents = (tmp_path / "other.safetensors").read_bytes()
    task = coordinator.task(0, bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest())
    with pytest.raises(WeightsError):
        bases.answer(task, piece(contents), "site")
    assert list(bases.folder.iterdir()) == []


def test_a_base_larger_than_the_model_can_be_is_refused_before_a_byte_of_it_is_kept(coordinator, bases):
    with pytest.raises(WeightsError, match="expected at most"):
        bases.answer(coordinator.task(0, bytes=most_bytes(coordinator.architecture) + 1), piece(b"x"), "site")
    assert not bases.folder.exists()


def test_more_bytes_than_announced_are_refused(coordinator, bases):
    with pytest.raises(WeightsError, match=r"a piece of .* the whole has 10"):
        bases.answer(coordinator.task(0, bytes=10), piece(b"x" * 11), "site")


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord({}),
        ArrayRecord({"other": Array(np.zeros(3, np.uint8))}),
        ArrayRecord({"bytes": Array(np.zeros(3, np.float32))}),
        ArrayRecord({"bytes": Array(np.zeros((3, 1), np.uint8))}),
        ArrayRecord({"bytes": Array(np.zeros(3, np.uint8)), "more": Array(np.zeros(3, np.uint8))}),
        ArrayRecord({"bytes": Array(np.zeros(PIECE_BYTES + 2000, np.uint8))}),
        ArrayRecord({"bytes": Array("uint8", (3,), "numpy.ndarray", b"abc")}),
        ArrayRecord({"bytes": Array("uint8", (3,), "pickle", b"abc")}),
    ],
)
def test_a_piece_that_is_none_is_refused(record, coordinator, bases):
    with pytest.raises(WeightsError, match="piece of weights"):
        bases.answer(coordinator.task(0), record, "site")


def test_a_question_about_a_model_that_starts_from_nothing_is_none(coordinator):
    with pytest.raises(ValidationError, match="starts from nothing that could be sent"):
        coordinator.task(architecture=coordinator.architecture.model_copy(update={"start": None}))


def test_a_base_that_was_damaged_on_disk_is_fetched_again(coordinator, bases):
    coordinator.send(bases)
    (kept,) = bases.folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="has not got"):
        bases.load(coordinator.architecture)
    assert coordinator.send(bases) == len(coordinator.contents)


def test_a_site_whose_it_has_put_the_file_in_place_is_sent_nothing(coordinator, bases):
    bases.reviewed.add(coordinator.file, "test_vit")
    assert coordinator.send(bases) == 0
    assert same(bases.load(coordinator.architecture), coordinator.base)


def test_a_site_makes_the_base_of_its_file_for_each_way_to_travel(coordinator, tmp_path):
    plain = coordinator.architecture.model_copy(update={"start": None, "pixels": None})
    weights = coordinator.store.load(coordinator.card)
    for transfer in ("half", "full"):
        architecture, base = started(weights, coordinator.card, plain, "last-1", transfer)
        assert same(base_of_file(weights, coordinator.card, architecture), base)
        assert digest(base) == architecture.start.digest
    other = Coordinator(tmp_path, seed=2)
    assert base_of_file(weights, coordinator.card, other.architecture) is None


class TestOnlyReviewed:
    @pytest.fixture
    def strict(self, bases):
        return Bases(bases.folder, bases.reviewed, "only-reviewed")

    def test_weights_that_nobody_reviewed_are_refused_in_words(self, coordinator, strict):
        with pytest.raises(PolicyRefusal, match=r"reviewed weights only .*none of test_vit, SHA-256 .*weights add"):
            strict.load(coordinator.architecture)
        with pytest.raises(PolicyRefusal, match="only-reviewed"):
            strict.answer(coordinator.task(0), piece(coordinator.contents), "site")
        assert not strict.folder.exists()

    def test_a_base_that_was_sent_before_the_policy_does_not_count(self, coordinator, bases, strict):
        coordinator.send(bases)
        with pytest.raises(PolicyRefusal):
            strict.load(coordinator.architecture)

    def test_a_coordinator_can_not_declare_a_base_reviewed(self, coordinator, bases, strict, tmp_path):
        strict.reviewed.add(Coordinator(tmp_path, seed=5).file, "test_vit")
        (card,) = strict.reviewed.cards()
        save_base(coordinator.base, tmp_path / "b.safetensors", {"reviewed": card.sha256})
        coordinator.contents = (tmp_path / "b.safetensors").read_bytes()
        coordinator.send(bases)
        with pytest.raises(PolicyRefusal):
            strict.load(coordinator.architecture)

    def test_reviewed_weights_are_used_until_they_are_taken_away(self, coordinator, strict):
        strict.reviewed.add(coordinator.file, "test_vit")
        assert same(strict.load(coordinator.architecture), coordinator.base)
        assert same(strict.load(coordinator.architecture), coordinator.base)
        strict.reviewed.remove("test_vit")
        with pytest.raises(PolicyRefusal):
            strict.load(coordinator.architecture)


def test_the_bases_used_longest_ago_make_room(coordinator, bases, tmp_path):
    coordinator.send(bases)
    (first,) = bases.folder.iterdir()
    os.utime(first, (1, 1))
    for number in range(KEPT):
        (bases.folder / f"{number:064x}.safetensors").write_bytes(b"")
    Coordinator(tmp_path, seed=1).send(bases)
    assert len(list(bases.folder.iterdir())) == KEPT and not first.exists()


def test_a_base_of_its_own_file_is_read_back_checked(coordinator, tmp_path):
    path = tmp_path / "base.safetensors"
    save_base(coordinator.base, path, {})
    assert same(load_base(path, coordinator.architecture), coordinator.base)
