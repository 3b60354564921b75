"""Where the models look, through a whole run: only sums leave a site, and they say what one process would."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file
from whole_run import CHAIN_ONLY

from chainward_client.evaluation import localisation_values
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.localisation import METRICS, LocalisationValues
from chainward_shared.models import build_model, resolve_architecture
from chainward_shared.models.of_run import student_architecture
from chainward_shared.protocol import EvaluateResult, unpack
from chainward_simulations.runner import open_sites

PHANTOMS = {
    "data.source": "phantom",
    "federation.num-sites": 3,
    "chain.backbone": "test_convnext",
    "chain.epochs": 1,
    "student.rounds": 1,
    "student.epochs": 1,
    "student.finetune-rounds": 0,
    "chain.compare-alone": False,
    "federation.precision": "fp32",
    "federation.threads": 1,
}


@pytest.fixture(scope="module")
def sites():
    return open_sites(RunConfig.from_flat(PHANTOMS))


def model_of(sites):
    images = next(iter(sites.values())).splits["test"].images
    architecture = resolve_architecture(
        "test_convnext", num_classes=5, in_chans=images.shape[1], image_size=images.shape[-1]
    )
    return architecture, build_model(architecture, seed=0)


def localise(state, architecture, sites, config):
    """Return each image's scores over all sites."""
    model = build_model(architecture, seed=0)
    model.load_state_dict(state)
    threads, size = config.federation.cpu_threads, architecture.image_size
    return LocalisationValues.joined(
        localisation_values(model, data.splits["test"], threads, image_size=size) for data in sites.values()
    )


def resampled(column):
    """Return the ends of a 95 % interval of a mean over images: percentiles of 1,000 resamples."""
    means = np.random.default_rng(0).choice(column, (1_000, len(column))).mean(axis=1)
    return np.quantile(means, (0.025, 0.975))


def test_a_run_reports_the_figures_of_one_process(coordinated, tmp_path, sites, loopback):
    answers = []

    def watch(message, answer):
        reply = answer()
        if message.metadata.message_type.startswith("evaluate"):
            answers.append(unpack(reply.content, EvaluateResult))
        return reply

    config = RunConfig.from_flat(PHANTOMS)
    folder, results = coordinated({**PHANTOMS, "output.dir": str(tmp_path)}, loopback(3, watch))
    architecture, _ = model_of(sites)
    small = student_architecture(config.student, architecture)
    for name, design in (("chain", architecture), ("student", small)):
        values = localise(load_file(folder.model_path(name)), design, sites, config)
        found = results.localization[name]
        assert found.pooled.n == len(values) > 50
        assert list(found.sites) == list(sites)
        assert sum(part.n for part in found.sites.values()) == found.pooled.n
        assert found.pooled.left_out == values.left_out
        for metric in METRICS:
            pooled, expected = getattr(found.pooled, metric), getattr(values, metric)
            assert pooled.mean == pytest.approx(expected.mean(), rel=1e-6)
            low, high = resampled(expected)
            assert (pooled.low, pooled.high) == pytest.approx((low, high), abs=0.25 * (high - low))
    report = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Where the models look" in report
    localised = [(body, arrays) for body, arrays in answers if body.localisation is not None]
    assert len(localised) == 6  # two models at three sites
    assert all(not arrays and not body.scores for body, arrays in localised)
    assert all(body.localisation is None for body, arrays in answers if arrays)


@pytest.mark.slow
def test_without_regions_the_report_is_silent(finished_run):
    folder, results = finished_run.folder, finished_run.results
    assert results.localization == {}
    assert json.loads((folder.path / "metrics.json").read_text())["localization"] == {}
    assert "Where the models look" not in (folder.path / "report.html").read_text(encoding="utf-8")


def test_a_backbone_whose_attention_cant_be_read_is_no_reason_to_fail(coordinated, settings):
    _, results = coordinated(settings | CHAIN_ONLY | {"chain.backbone": "dla46_c", "federation.sites": "ash"})
    assert results.final["chain"].pooled.n > 0
    assert results.localization == {}


@pytest.mark.slow
def test_a_site_leaves_out_what_has_no_region(sites):
    cases = next(iter(sites.values())).splits["test"]
    masks = cases.privileged.masks.clone()
    masks[::3], masks[1] = 0, 1
    blanked = replace(cases, privileged=replace(cases.privileged, masks=masks))
    _, model = model_of(sites)
    values, whole = localisation_values(model, blanked, threads=1), localisation_values(model, cases, threads=1)
    kept = [row for row in range(len(cases)) if row % 3 and row != 1]
    assert values.rows.tolist() == kept
    assert values.left_out == len(cases) - len(kept)
    assert values.lift.tolist() == pytest.approx(whole.lift[kept].tolist(), rel=1e-3)
    none = localisation_values(model, blanked.take([0, 1, 3]), threads=1)
    assert (len(none), none.left_out) == (0, 3)
    nothing = replace(cases, privileged=replace(cases.privileged, masks=None))
    assert localisation_values(model, nothing, threads=1) is None


@pytest.mark.slow
def test_a_model_of_smaller_images_is_scored_on_the_original_mask(sites):
    cases = next(iter(sites.values())).splits["test"]
    _, model = model_of(sites)
    large = localisation_values(model, cases, threads=1)
    small = localisation_values(model, cases, threads=1, image_size=32)
    assert small.rows.tolist() == large.rows.tolist()
    assert small.lift.tolist() != large.lift.tolist()
