"""Statistics rounds of private runs: a classifier head out of sums with noise, in two releases of every site.

The first shows where the model's embeddings of all images have their centre, the second, with nearly all of a round's
budget, what tells the classes apart; both in a frame that public images have shown. See `chainward_shared.noisy_discriminant`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chainward_server.attempts import Attempted, attempted
from chainward_server.claims import check_release
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.sites import Failure, Trained, Work
from chainward_shared.discriminant import Head
from chainward_shared.errors import ChainwardError
from chainward_shared.models import build_model
from chainward_shared.models.taps import Taps
from chainward_shared.noisy_discriminant import axes_for, centred, moments_help, noisy_discriminant, public_frame
from chainward_shared.preprocessing import scaled_for
from chainward_shared.privacy.dp_sgd import statistics_mechanisms
from chainward_shared.private_sums import Frame, NoisySums, SumsForm
from chainward_shared.protocol import StatisticsResult, StatisticsTask
from chainward_shared.public_images import public_images
from chainward_shared.recipes import PrivacyRecipe
from chainward_shared.weights import StateDict, digest

logger = logging.getLogger("chainward")

_BATCH = 32


@dataclass(frozen=True)
class _Answers:
    """What came of one release: the sum of those of all sites that answered, and how each fared."""

    sums: NoisySums
    outcomes: dict[str, Attempted[StatisticsResult]]


def private_head(run: Run, key: str, state: StateDict, *, prior_strength: float) -> tuple[HeadRecord, Head]:
    """Ask all sites for the two releases of a private statistics round, and return what came of it and the head.

    Sites without a privacy policy, in a run by policy, send the same sums without noise.

    Raises
    ------
    ChainwardError
        No site took part.
    """
    recipe = run.config.privacy_recipe()
    assert recipe is not None
    started = time.monotonic()
    units, noise = _expected(run, recipe)
    frame = public_frame(_public_embeddings(run, state), axes_for(units, noise))
    axes = len(frame.axes)
    first = _released(run, f"{key}-centre", state, recipe, frame, SumsForm(dimension=axes, labels=False, moments=False))
    frame = centred(frame, first.sums)
    of_moments = noise / SumsForm(dimension=axes, labels=True, moments=True).weights()["moments"]
    form = SumsForm(dimension=axes, labels=True, moments=moments_help(units, of_moments, axes))
    second = _released(run, key, state, recipe, frame, form)
    multilabel = run.sites.any_card.task == "multilabel"
    head = noisy_discriminant(frame, second.sums, multilabel=multilabel, prior_strength=prior_strength)
    outcomes = second.outcomes
    answered = [site for site, outcome in outcomes.items() if outcome.answer is not None]
    logger.info(
        "private statistics round '%s': %d of %d sites, %d axes, %s second moments",
        key,
        len(answered),
        len(outcomes),
        axes,
        "with" if form.moments else "without",
    )
    return HeadRecord(
        key=key,
        sites=answered,
        failed={site: _reason(outcome) for site, outcome in outcomes.items() if outcome.answer is None},
        unreached=[site for site, outcome in outcomes.items() if outcome.unreached],
        images=sum(run.sites.sizes[site] for site in answered),
        validation=0,
        shrinkage=min(1.0, max(0.0, head.shrinkage)),
        seconds=time.monotonic() - started,
        bytes_down=sum(outcome.bytes_down for of in (first, second) for outcome in of.outcomes.values()),
        bytes_up=sum(outcome.bytes_up for of in (first, second) for outcome in of.outcomes.values()),
    ), head


def _expected(run: Run, recipe: PrivacyRecipe) -> tuple[float, float]:
    """Return how many units take part, as the sites declare, and the noise of their second releases together, about."""
    cards = run.sites.cards
    private = sum(run.privacy.is_private(site) for site in cards)
    of_one = statistics_mechanisms(recipe)[-1].noise_multiplier
    return recipe.share * sum(card.train for card in cards.values()), of_one * math.sqrt(max(1, private))


def _public_embeddings(run: Run, state: StateDict) -> torch.Tensor:
    architecture = run.architecture
    model = build_model(architecture).eval()
    model.load_state_dict(state)
    found = []
    with Taps(model, embedding=True) as taps, torch.inference_mode():
        for images in public_images(architecture.in_chans, architecture.image_size).split(_BATCH):
            model(scaled_for(model, images))
            found.append(taps.embedding.double())
    return torch.cat(found)


def _released(run: Run, key: str, state: StateDict, recipe: PrivacyRecipe, frame: Frame, form: SumsForm) -> _Answers:
    """Ask all sites for one release, and add up what can be used."""
    task = StatisticsTask(
        run_id=run.checkpoints.run_id,
        hop=key,
        architecture=run.architecture,
        label_fraction=run.config.chain.label_fraction,
        seed=run.config.seed,
        threads=run.config.federation.cpu_threads,
        digest=digest(state),
        privacy=recipe,
        form=form,
        frame_digest=digest(frame.state()),
    )
    cards = run.sites.cards
    groups = form.groups(len(run.sites.any_card.classes), multilabel=run.sites.any_card.task == "multilabel")

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        models = {"model": state, "frame": frame.state()}
        asked = {site: task.model_copy(update={"seen_head": run.privacy.seen_head(site)}) for site in sites}
        return run.sites.statistics({site: Work(one, models) for site, one in asked.items()})

    def check(site: str, answer: Trained[StatisticsResult]) -> None:
        result = answer.result
        if (result.hop, result.site) != (key, site):
            raise ChainwardError(
                f"it answers round '{result.hop}' of site '{result.site}'; expected '{key}' of '{site}'"
            )
        if digest(answer.model) != result.digest:
            raise ChainwardError("its digest is not the one stated; the message was damaged on its way")
        check_release(answer.model["release"], result, cards[site], private=run.privacy.is_private(site))
        run.privacy.take(result.statement, site, key)

    outcomes = attempted(run.sites.ids, ask, check, retries=run.config.chain.retries)
    for outcome in outcomes.values():
        if outcome.answer is None:
            logger.warning("private statistics round '%s' goes on without a site: %s", key, _reason(outcome))
    answers = [outcome.answer for outcome in outcomes.values() if outcome.answer is not None]
    if not answers:
        raise ChainwardError(
            f"statistics round '{key}': no site took part in it (the log says why); set chain.head = 'trained', or resume the "
            "run when they can"
        )
    total = np.sum([answer.model["release"].numpy() for answer in answers], axis=0)
    noise = math.sqrt(sum(answer.result.noise**2 for answer in answers))
    return _Answers(NoisySums.of(total, noise, form, groups), outcomes)


def _reason(outcome: Attempted[StatisticsResult]) -> str:
    return outcome.failure.reason if outcome.failure else "no reason given"
