"""Where the chain looks without and with privileged teachers: a picture for a study that has arms of both."""

from __future__ import annotations

from collections.abc import Sequence

from chainward_shared.errors import DataError
from chainward_shared.models import Architecture
from chainward_shared.weights import StateDict
from chainward_simulations.examples import example_figure
from chainward_simulations.study.configured_arms import ConfiguredArm
from chainward_simulations.study.store import StudyFolder, chain_file, load_chain
from chainward_simulations.study.workers import open_sites


def attention_pictures(
    folder: StudyFolder, configured: Sequence[ConfiguredArm], seed: int, reference: str | None
) -> bytes | None:
    """Return test images with their regions, and where the chain looks without and with privileged teachers, as PNG.

    Compared are, of `seed`, the first chain without privileged teachers (the reference arm if it is one) and the first
    with. None where the study lacks one of them, or no test image has a region.
    """
    chains = [arm for arm in configured if arm.arm.trainer == "chain" and folder.record_of(arm.name, seed)]
    chains.sort(key=lambda arm: arm.name != reference)
    without = next((arm for arm in chains if arm.config.privileged.mode == "off"), None)
    guided = next((arm for arm in chains if arm.config.privileged.mode != "off"), None)
    if without is None or guided is None:
        return None
    models = {name: _model(folder, arm.of_seed(seed)) for name, arm in (("without", without), ("with", guided))}
    found = {f"{name} teachers": model for name, model in models.items() if model is not None}
    if len(found) < len(models):
        return None
    try:
        return example_figure(found, open_sites(without.of_seed(seed).config), seed=seed, only_regions=True)
    except DataError:
        return None


def _model(folder: StudyFolder, arm: ConfiguredArm) -> tuple[Architecture, StateDict] | None:
    chain = load_chain(chain_file(folder.path, arm.chain_digest(), arm.config.seed))
    return None if chain is None else (chain.architecture, chain.model)
