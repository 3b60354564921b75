"""What surrounds a student's training at a site: privileged teachers, large models sent along, images of its own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from timm.models import VisionTransformer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from chainward_client.app import app
from chainward_client.data.site_data import Cases, PrivilegedCases, SiteData
from chainward_client.evaluation import class_probabilities
from chainward_client.privileged.results import PrivilegedTargets
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch
from chainward_client.training.privileged import PrivilegedTerm
from chainward_client.training.student import StudentObjective, train_student
from chainward_shared.config import RunConfig
from chainward_shared.models import Architecture, build_model, resolve_architecture
from chainward_shared.models.taps import Taps, embedding_size
from chainward_shared.preprocessing import resized, to_float
from chainward_shared.protocol import Refusal, StudentResult, StudentTask, kind_of, pack, unpack
from chainward_shared.recipes import PrivilegedRecipe, StudentRecipe
from chainward_shared.weights import StateDict, digest, to_arrays

PRIVILEGED = PrivilegedRecipe(use="text", logit_weight=0.3, embedding_weight=0.4, temperature=2.0, epochs=3)


def recipe(stage="distil", **changes) -> StudentRecipe:
    settings = {"student.epochs": 1, "student.batch-size": 8, "federation.precision": "fp32", "federation.threads": 1}
    return RunConfig.from_flat(settings).student_recipe(stage).model_copy(update=changes)


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)


def weights_of(architecture: Architecture, seed: int) -> StateDict:
    return {name: tensor.detach().clone() for name, tensor in build_model(architecture, seed).state_dict().items()}


def random_cases(n: int) -> Cases:
    images = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2] * n)[:n]
    texts = tuple(f"a report that says {'abc'[int(label)] * 3}" for label in labels)
    return Cases(images, labels, np.array([f"patient-{i}" for i in range(n)]), PrivilegedCases(texts=texts))


def site_data(n: int = 30) -> SiteData:
    cases = random_cases(n)
    return SiteData("oak", ("a", "b", "c"), {"train": cases, "val": cases, "test": cases})


# --- privileged teachers ---


def term_for(n: int, model: nn.Module) -> PrivilegedTerm:
    generator = torch.Generator().manual_seed(5)
    targets = PrivilegedTargets(
        logits=torch.randn(n, 3, generator=generator),
        taught=torch.ones(n, 3, dtype=torch.bool),
        embeddings=nn.functional.normalize(torch.randn(n, 6, generator=generator)),
        present=torch.ones(n, 6, dtype=torch.bool),
        multilabel=False,
        report={},
    )
    return PrivilegedTerm(targets, PRIVILEGED, embedding_size(model), seed=1)


def test_privileged_teachers_guide_the_student_by_the_rows_of_its_batch(architecture):
    cases, model = random_cases(12), build_model(architecture, 1).eval()
    rows = torch.tensor([7, 0, 3, 11])
    batch = [
        Batch(cases.images[rows], cases.labels[rows], rows, None, "none", torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    term = term_for(12, model)
    plain = StudentObjective(recipe(), None, torch.tensor([4, 4, 4]), 0)
    guided = StudentObjective(
        recipe(), None, torch.tensor([4, 4, 4]), 0, privileged=(term, Taps(model, embedding=True))
    )
    for objective in (plain, guided):
        objective.start(torch.device("cpu"), 1)
        objective.start_epoch(0)
    without, found = plain.losses(model, batch[0]), guided.losses(model, batch[1])
    images = to_float(cases.images[rows])
    embedding = model.forward_head(model.forward_features(images), pre_logits=True)
    expected = term.losses(model(images), embedding, rows)
    torch.testing.assert_close(found - without, expected, rtol=1e-4, atol=1e-5)
    assert guided.epoch_log()["privileged"] == pytest.approx(float(expected.mean().detach()), rel=1e-4)
    assert plain.epoch_log() == {}


def test_the_projector_is_trained_along_and_does_not_leave_with_the_student(architecture):
    model = build_model(architecture, 1)
    term = term_for(12, model)
    objective = StudentObjective(recipe(), None, torch.ones(3), 0, privileged=(term, Taps(model, embedding=True)))
    assert [id(p) for p in objective.extra_parameters()] == [id(term.projector.weight)]
    trained = train_student(
        site_data(), architecture, recipe(privileged=PRIVILEGED), weights_of(architecture, 1), None, round_index=0
    )
    assert trained.student.keys() == weights_of(architecture, 1).keys()
    assert len(trained.log.privileged) == 1


@pytest.mark.slow
def test_privileged_teachers_change_self_distillation_and_leave_fine_tuning_alone(architecture):
    def trained(stage, privileged):
        given = recipe(stage, privileged=privileged)
        return digest(
            train_student(site_data(), architecture, given, weights_of(architecture, 1), None, round_index=0).student
        )

    assert trained("distil", PRIVILEGED) != trained("distil", None)
    assert trained("finetune", PRIVILEGED) == trained("finetune", None)


# --- images of the student's own size ---


def test_a_model_is_scored_on_images_of_its_own_size(architecture):
    model, cases = build_model(architecture, 1).eval(), random_cases(12)
    found = class_probabilities(model, cases, 3, 1, image_size=48)
    with torch.inference_mode():
        expected = model(to_float(resized(cases.images, 48))).double().softmax(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - class_probabilities(model, cases, 3, 1)).max() > 1e-6


def test_images_of_the_right_size_are_scored_bit_for_bit_as_they_are(architecture):
    model, cases = build_model(architecture, 1).eval(), random_cases(12)
    assert np.array_equal(
        class_probabilities(model, cases, 3, 1, image_size=32), class_probabilities(model, cases, 3, 1)
    )


# --- large models at the site ---


@pytest.fixture
def asked_large():
    """Return how many images each pass of a ViT took, the large models of these tests."""
    seen = []

    def note(module, given, found):
        if isinstance(module, VisionTransformer):
            seen.append(len(given[0]))

    hook = register_module_forward_hook(note)
    yield seen
    hook.remove()


LARGE = resolve_architecture("test_vit", num_classes=3, in_chans=1, image_size=32, patch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(("augmentation", "passes"), [("none", 1), ("upright", 3)])
def test_large_models_are_asked_once_about_images_that_every_epoch_shows_alike(
    augmentation, passes, architecture, asked_large
):
    data, small, large = site_data(), weights_of(architecture, 1), weights_of(LARGE, 2)
    given = recipe(large_weight=1.0, augmentation=augmentation, epochs=3)
    found = train_student(
        data, architecture, given, small, None, round_index=0, large=[large], large_architecture=LARGE
    )
    assert sum(asked_large) == passes * 30
    model, teacher = build_model(architecture, 1), build_model(LARGE, 2)
    objective = StudentObjective(given, None, torch.tensor([10, 10, 10]), 0, large=[teacher], large_size=32)
    log = train(model, data.splits["train"], given, objective, "student", "distil", "oak", "round", 0)
    assert found.log.loss == pytest.approx(log.loss, rel=1e-3)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.student[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.fixture
def hospital(small_consortium, tmp_path):
    """Node configuration of a deployed hospital."""
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "ash", "data": str(small_consortium), "state": str(tmp_path / "state")}))
    return {"site-config": str(path)}


def answer(task: StudentTask, arrays: dict[str, StateDict], node_config: dict) -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = pack(task, {name: to_arrays(state) for name, state in arrays.items()})
    message = Message(content, dst_node_id=7, message_type="train.student")
    context = Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config={})
    return app(message, context).content


def task_with_large(architecture: Architecture, state: StateDict, expected: str) -> StudentTask:
    return StudentTask(
        run_id="r",
        round=1,
        architecture=architecture,
        recipe=recipe(large_weight=1.0),
        student_digest=digest(state),
        auxiliary_digest=digest(state),
        large_architecture=architecture,
        large_digests=[expected],
    )


@pytest.mark.slow
def test_a_site_learns_from_the_large_model_that_comes_with_the_task(architecture, hospital):
    small, large = weights_of(architecture, 1), weights_of(architecture, 2)
    task = task_with_large(architecture, small, digest(large))
    content = answer(task, {"student": small, "auxiliary": small, "large_0": large}, hospital)
    assert kind_of(content) == StudentResult.KIND
    result, _ = unpack(content, StudentResult)
    without = replace_large(task)
    plain, _ = unpack(answer(without, {"student": small, "auxiliary": small}, hospital), StudentResult)
    assert result.digest != plain.digest


def replace_large(task: StudentTask) -> StudentTask:
    changes = {"recipe": recipe(), "large_architecture": None, "large_digests": []}
    return StudentTask(**(task.model_dump() | changes))


def test_a_large_model_that_is_missing_or_another_than_stated_is_refused(architecture, hospital):
    small, large = weights_of(architecture, 1), weights_of(architecture, 2)
    task = task_with_large(architecture, small, digest(large))
    for arrays, words in (
        ({"student": small, "auxiliary": small}, "lacks the arrays 'large_0'"),
        ({"student": small, "auxiliary": small, "large_0": small}, "'large_0' don't have the digest"),
    ):
        refusal, _ = unpack(answer(task, arrays, hospital), Refusal)
        assert words in refusal.reason
