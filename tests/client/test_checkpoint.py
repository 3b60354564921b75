"""A training that is interrupted goes on from its last epoch: to the same model, or inside the same reservation."""

from __future__ import annotations

import math

import pytest
import torch

from chainward_client import checkpoint as checkpoint_module
from chainward_client.checkpoint import Checkpoint
from chainward_client.private_site import PrivateSite
from chainward_client.private_training import PrivateTraining
from chainward_client.training.features import Features
from chainward_client.training.link import train_link
from chainward_client.training.student import train_student
from chainward_shared.config import RunConfig
from chainward_shared.models import Start, build_model, resolve_architecture
from chainward_shared.models.start import travelling_names
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_simulations.phantoms.cases import phantom_site


class Killed(BaseException):
    """What ends a process: nothing catches it."""


@pytest.fixture(scope="module")
def data():
    return phantom_site(0, 5)


@pytest.fixture(scope="module")
def architecture(data):
    images = data.splits["train"].images
    return resolve_architecture(
        "test_vit", num_classes=len(data.classes), in_chans=1, image_size=images.shape[-1], patch_size=16
    )


def recipes(**flat):
    config = RunConfig.from_flat(
        {
            "chain.epochs": 4,
            "chain.batch-size": 64,
            "student.epochs": 4,
            "student.batch-size": 64,
            "federation.precision": "fp32",
            "federation.threads": 1,
            "chain.label-fraction": 0.5,
        }
        | flat
    )
    return config.link_recipe(), config.student_recipe("distil")


class EveryEpoch(Checkpoint):
    """Writes itself down after every epoch, whatever that takes."""

    def save(self, *arguments, **named):
        self._written = -math.inf
        super().save(*arguments, **named)


def interrupted_after(monkeypatch, epoch, train, path):
    """Run `train` with a checkpoint until it has written `epoch`, then once more to its end."""
    real = Checkpoint.save

    def kill(self, epochs, *arguments, **named):
        real(self, epochs, *arguments, **named)
        if epochs == epoch:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", kill)
        with pytest.raises(Killed):
            train(EveryEpoch(path, "key"))
    assert path.exists()
    return train(EveryEpoch(path, "key"))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interrupted_link_ends_with_the_same_model_and_log(data, architecture, monkeypatch, tmp_path, epoch):
    recipe, _ = recipes(**{"chain.unlabelled-weight": 1.0, "chain.temperature-decay": 0.9})
    predecessor = dict(build_model(architecture, 7).state_dict())

    def train(checkpoint=None):
        return train_link(data, architecture, recipe, predecessor, strand=0, lap=0, checkpoint=checkpoint)

    state, log = train()
    resumed, resumed_log = interrupted_after(monkeypatch, epoch, train, tmp_path / "half.safetensors")
    assert_equal(resumed, state)
    assert resumed_log.model_copy(update={"seconds": log.seconds}) == log


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head", "last-2"])
def test_an_interrupted_link_that_trains_a_part_on_kept_features_ends_with_the_same_model(
    part, data, architecture, monkeypatch, tmp_path
):
    recipe, _ = recipes()
    start = Start(name="test_vit", file="0" * 64, digest="0" * 64, part=part)
    this = architecture.model_copy(update={"start": start})
    state = dict(build_model(this, 3).state_dict())
    base = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    trained = travelling_names(this)
    predecessor = {n: t + 0.01 if n in trained else t for n, t in state.items()}

    def train(checkpoint=None):
        features = Features(tmp_path / "features")
        return train_link(
            data,
            this,
            recipe,
            predecessor,
            strand=0,
            lap=0,
            base=base,
            features=features,
            checkpoint=checkpoint,
        )

    whole, log = train()
    resumed, resumed_log = interrupted_after(monkeypatch, 2, train, tmp_path / "half.safetensors")
    assert_equal(resumed, whole)
    assert resumed_log.model_copy(update={"seconds": log.seconds}) == log
    assert {name for name in whole if not torch.equal(whole[name], predecessor[name])} == trained


@pytest.mark.slow
def test_an_interrupted_student_ends_with_the_same_student_and_auxiliary_teacher(
    data, architecture, monkeypatch, tmp_path
):
    _, recipe = recipes()
    start, held = (dict(build_model(architecture, seed).state_dict()) for seed in (1, 2))

    def train(checkpoint=None):
        return train_student(data, architecture, recipe, start, held, round_index=1, checkpoint=checkpoint)

    whole = train()
    resumed = interrupted_after(monkeypatch, 2, train, tmp_path / "half.safetensors")
    assert_equal(resumed.student, whole.student)
    assert_equal(resumed.auxiliary, whole.auxiliary)
    assert resumed.auxiliary_kept == whole.auxiliary_kept


@pytest.fixture
def private(tmp_path):
    policy = PrivacyPolicy(epsilon=8.0, delta=1e-4)
    return PrivateSite.open(policy, tmp_path / "state", "site", create=True)


def killed_privately(private, data, architecture, monkeypatch, path, *, at_step):
    """A private link whose process is killed: what it reserved stays open, as a killed process leaves it."""
    recipe, _ = recipes(
        **{
            "privacy.mode": "dp-sgd",
            "privacy.delta": 1e-4,
            "student.rounds": 0,
            "privacy.batch-size": 16,
            "chain.label-fraction": 1.0,
        }
    )
    steps = []
    real = PrivateTraining.finish_step

    def kill(self):
        steps.append(1)
        if len(steps) == at_step:
            raise Killed
        real(self)

    def train():
        work = private.work("run", "hop")
        return train_link(
            data,
            architecture,
            recipe,
            None,
            strand=0,
            lap=0,
            work=work,
            checkpoint=EveryEpoch(path, "key"),
        )

    with monkeypatch.context() as patch:
        patch.setattr(PrivateTraining, "finish_step", kill)
        patch.setattr(type(private.ledger), "commit", lambda *arguments: None)  # a killed process commits nothing
        with pytest.raises(Killed):
            train()
    return train


@pytest.mark.slow
def test_a_private_training_goes_on_inside_its_reservation_and_pays_once(
    private, data, architecture, monkeypatch, tmp_path
):
    path = tmp_path / "half.safetensors"
    train = killed_privately(private, data, architecture, monkeypatch, path, at_step=9)
    planned = private.ledger.spendings()[0].reserved.mechanism.steps
    done = []
    real = PrivateTraining.finish_step
    monkeypatch.setattr(PrivateTraining, "finish_step", lambda self: (done.append(1), real(self))[1])
    _, log = train()
    (spending,) = private.ledger.spendings()
    assert spending.end.state == "committed"
    assert spending.end.mechanism.steps == planned == log.steps
    assert planned / 4 <= planned - len(done) < 9, "at least an epoch was kept, and no step twice but those of the last"


@pytest.mark.slow
def test_a_moving_average_costs_nothing(data, architecture, tmp_path):
    """What the ledger holds of a training with it is what it holds of one without."""
    spendings = []
    for decay in (0.0, 0.9999):
        private = PrivateSite.open(PrivacyPolicy(epsilon=8.0, delta=1e-4), tmp_path / str(decay), "site", create=True)
        recipe, _ = recipes(
            **{"privacy.mode": "dp-sgd", "privacy.delta": 1e-4, "student.rounds": 0, "privacy.average-decay": decay}
        )
        assert recipe.privacy.average_decay == decay
        train_link(data, architecture, recipe, None, strand=0, lap=0, alone=False, work=private.work("run", "hop"))
        (spending,) = private.ledger.spendings()
        spendings.append((spending.reserved.mechanism, spending.end.mechanism))
    assert spendings[0] == spendings[1]


@pytest.mark.slow
def test_a_private_checkpoint_without_its_open_reservation_is_of_no_use(
    private, data, architecture, monkeypatch, tmp_path
):
    path = tmp_path / "half.safetensors"
    train = killed_privately(private, data, architecture, monkeypatch, path, at_step=9)
    reservation = private.ledger.resume("run", "link", "hop")
    private.ledger.commit(reservation, 8)
    with pytest.raises(Exception, match="over what the run asks for"):
        train()
    assert not path.exists()


def test_another_training_and_a_damaged_file_start_anew(data, architecture, tmp_path):
    recipe, _ = recipes(**{"chain.epochs": 1})
    path = tmp_path / "half.safetensors"
    saved = EveryEpoch(path, "key")
    saved.save(1, {"loss": [1.0]}, {"parameter.0": torch.ones(3)}, last=False)
    assert Checkpoint(path, "key").load().epoch == 1
    assert Checkpoint(path, "another").load() is None
    path.write_bytes(path.read_bytes()[:-1])
    assert Checkpoint(path, "key").load() is None
    state, _ = train_link(data, architecture, recipe, None, strand=0, lap=0, checkpoint=EveryEpoch(path, "key"))
    assert_equal(state, train_link(data, architecture, recipe, None, strand=0, lap=0)[0])


def test_epochs_that_are_sooner_done_again_than_written_are_not_written(tmp_path):
    checkpoint = Checkpoint(tmp_path / "half.safetensors", "key")
    checkpoint.save(1, {}, {"parameter.0": torch.ones(3)}, last=False)
    assert not checkpoint.path.exists()


def test_writing_down_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])

    def slow_disk(*_):
        written.append(now[0])
        now[0] += 3.0

    monkeypatch.setattr(checkpoint_module, "save_file", slow_disk)
    checkpoint = Checkpoint(tmp_path / "half.safetensors", "key")
    for epoch in range(1, 101):
        now[0] += 10.0
        checkpoint.save(epoch, {}, {}, last=False)
    assert written[0] == 10.0
    assert 3.0 * len(written) < 0.05 * now[0] + 3.0
    assert len(written) > 10
