"""Statistics rounds of private runs: a classifier head out of sums with noise, in two releases of every site.

The first shows where the model's embeddings of all images have their centre, the second, with nearly all of a round's
budget, what tells the classes apart; both in a frame that public images have shown. See `chainward_shared.noisy_discriminant`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chainward_server.attempts import Attempted, attempted
from chainward_server.claims import check_length, check_noise, check_release
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.secure_rounds import card_of_all, summed_everywhere
from chainward_server.sites import Failure, Trained, Work
from chainward_shared.discriminant import Head
from chainward_shared.errors import ChainwardError
from chainward_shared.models import build_model
from chainward_shared.models.taps import Taps
from chainward_shared.noisy_discriminant import axes_for, centred, moments_help, noisy_discriminant, public_frame
from chainward_shared.preprocessing import scaled_for
from chainward_shared.privacy.dp_sgd import statistics_mechanisms
from chainward_shared.private_sums import Frame, NoisySums, SumsForm
from chainward_shared.protocol import MaskedSum, SharedNoise, StatisticsResult, StatisticsTask
from chainward_shared.public_images import public_images
from chainward_shared.recipes import PrivacyRecipe
from chainward_shared.weights import StateDict, digest

logger = logging.getLogger("chainward")

_BATCH = 32


@dataclass(frozen=True)
class _Answers:
    """What came of one release: the sum of those of all sites that answered, which these are, and why others are missing."""

    sums: NoisySums
    sites: list[str]
    failed: dict[str, str]
    unreached: list[str]
    bytes_down: int
    bytes_up: int


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
    logger.info(
        "private statistics round '%s': %d of %d sites, %d axes, %s second moments",
        key,
        len(second.sites),
        len(run.sites.ids),
        axes,
        "with" if form.moments else "without",
    )
    return HeadRecord(
        key=key,
        sites=second.sites,
        secure=run.secure,
        failed=second.failed,
        unreached=second.unreached,
        images=sum(run.sites.sizes[site] for site in second.sites),
        validation=0,
        shrinkage=min(1.0, max(0.0, head.shrinkage)),
        seconds=time.monotonic() - started,
        bytes_down=first.bytes_down + second.bytes_down,
        bytes_up=first.bytes_up + second.bytes_up,
    ), head


def _expected(run: Run, recipe: PrivacyRecipe) -> tuple[float, float]:
    """Return how many units take part, as the sites declare, and the noise of their second releases together, about."""
    cards = run.sites.cards
    private = sum(run.privacy.is_private(site) for site in cards)
    of_one = statistics_mechanisms(recipe)[-1].noise_multiplier
    adding = max(1, private)
    if (shared := _shared_noise(run, recipe, stage=-1)) is not None:
        of_one, adding = shared.each, len(cards)
    return recipe.share * sum(card.train for card in cards.values()), of_one * math.sqrt(adding)


def _shared_noise(run: Run, recipe: PrivacyRecipe, *, stage: int) -> SharedNoise | None:
    """Return which share of a release's noise each site adds; None: each adds all of it."""
    together = run.config.federation.secure_noise_from
    if not run.secure or together == 1:
        return None
    return SharedNoise.of(statistics_mechanisms(recipe)[stage].noise_multiplier, together)


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
        shared_noise=_shared_noise(run, recipe, stage=int(form.labels)),
    )
    groups = form.groups(len(run.sites.any_card.classes), multilabel=run.sites.any_card.task == "multilabel")
    models = {"model": state, "frame": frame.state()}

    def work(site: str) -> Work[StatisticsTask]:
        return Work(task.model_copy(update={"seen_head": run.privacy.seen_head(site)}), models)

    return (_in_secret if run.secure else _in_the_open)(run, key, work, form, groups)


def _in_secret(
    run: Run, key: str, work: Callable[[str], Work[StatisticsTask]], form: SumsForm, groups: int
) -> _Answers:
    """Add up releases of which the coordinator sees none; each site adds all of its noise, or the share that was agreed on."""

    def check(site: str, answer: MaskedSum) -> None:
        shared = work(site).task.shared_noise
        check_noise(answer.noise, answer.statement, private=run.privacy.is_private(site), shared=shared)
        run.privacy.take(answer.statement, site, key)

    what, retries = f"private statistics round '{key}'", run.config.chain.retries
    summed, failed = summed_everywhere(run.sites, what, work, retries=retries, check=check)
    release = summed.state["release"]
    check_length(release, summed.noise, card_of_all([run.sites.cards[site] for site in summed.sites]))
    return _Answers(
        NoisySums.of(release.numpy(), summed.noise, form, groups),
        summed.sites,
        {site: failure.reason for site, failure in failed.items()},
        [site for site, failure in failed.items() if failure.unreached],
        summed.bytes_down,
        summed.bytes_up,
    )


def _in_the_open(
    run: Run, key: str, work: Callable[[str], Work[StatisticsTask]], form: SumsForm, groups: int
) -> _Answers:
    """Add up the releases of all sites that can be used."""
    cards = run.sites.cards

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        return run.sites.statistics({site: work(site) for site in sites})

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
    return _Answers(
        NoisySums.of(total, noise, form, groups),
        [site for site, outcome in outcomes.items() if outcome.answer is not None],
        {site: _reason(outcome) for site, outcome in outcomes.items() if outcome.answer is None},
        [site for site, outcome in outcomes.items() if outcome.unreached],
        sum(outcome.bytes_down for outcome in outcomes.values()),
        sum(outcome.bytes_up for outcome in outcomes.values()),
    )


def _reason(outcome: Attempted[StatisticsResult]) -> str:
    return outcome.failure.reason if outcome.failure else "no reason given"
