"""Statistics rounds of private runs: a classifier head out of sums with noise, in two releases of every site.

The first shows where the model's embeddings of all images have their centre, the second, with nearly all of a round's
budget, what tells the classes apart; both in a frame that public images have shown. See `chainward_shared.noisy_discriminant`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from chainward_server.attempts import attempted, check_answer
from chainward_server.claims import check_length, check_noise
from chainward_server.context import Run
from chainward_server.results import HeadRecord
from chainward_server.secure_rounds import card_of_all, summed_everywhere
from chainward_server.sites import Failure, Summed, Trained, Work
from chainward_shared.discriminant import Head
from chainward_shared.errors import ChainwardError
from chainward_shared.models import Architecture, build_model
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


def private_head(
    run: Run, key: str, state: StateDict, architecture: Architecture, *, prior_strength: float
) -> tuple[HeadRecord, Head]:
    """Ask all sites for the two releases of a private statistics round, and return what came of it and the head.

    `state`, `architecture`: of the model over whose embeddings it goes, the chain's or the student. Sites without a privacy
    policy, in a run by policy, send the same sums without noise.

    Raises
    ------
    ChainwardError
        No site took part.
    """
    recipe = run.config.privacy_recipe()
    assert recipe is not None
    started = time.monotonic()
    units, noise = _expected(run, recipe)
    frame = public_frame(_public_embeddings(architecture, state), axes_for(units, noise))
    axes = len(frame.axes)
    form = SumsForm(dimension=axes, labels=False, moments=False)
    first, centre = _released(run, f"{key}-centre", architecture, state, recipe, frame, form)
    frame = centred(frame, first)
    of_moments = noise / SumsForm(dimension=axes, labels=True, moments=True).weights()["moments"]
    form = SumsForm(dimension=axes, labels=True, moments=moments_help(units, of_moments, axes))
    second, summed = _released(run, key, architecture, state, recipe, frame, form)
    multilabel = run.sites.any_card.task == "multilabel"
    head = noisy_discriminant(frame, second, multilabel=multilabel, prior_strength=prior_strength)
    logger.info(
        "private statistics round '%s': %d of %d sites, %d axes, %s second moments",
        key,
        len(summed.sites),
        len(run.sites.ids),
        axes,
        "with" if form.moments else "without",
    )
    both = replace(summed, bytes_down=centre.bytes_down + summed.bytes_down, bytes_up=centre.bytes_up + summed.bytes_up)
    record = HeadRecord(
        key=key,
        secure=run.secure,
        images=sum(run.sites.sizes[site] for site in summed.sites),
        validation=0,
        seconds=time.monotonic() - started,
        **both.account,
    )
    return record, head


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


def _public_embeddings(architecture: Architecture, state: StateDict) -> torch.Tensor:
    network, found = build_model(architecture).eval(), []
    network.load_state_dict(state)
    with Taps(network, embedding=True) as taps, torch.inference_mode():
        for images in public_images(architecture.in_chans, architecture.image_size).split(_BATCH):
            network(scaled_for(network, images))
            found.append(taps.embedding.double())
    return torch.cat(found)


def _released(
    run: Run,
    key: str,
    architecture: Architecture,
    state: StateDict,
    recipe: PrivacyRecipe,
    frame: Frame,
    form: SumsForm,
) -> tuple[NoisySums, Summed]:
    """Ask all sites for one release, and add up what can be used."""
    task = StatisticsTask(
        run_id=run.checkpoints.run_id,
        hop=key,
        architecture=architecture,
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

    summed = (_in_secret if run.secure else _in_the_open)(run, key, work)
    return NoisySums.of(summed.state["release"].numpy(), summed.noise, form, groups), summed


def _in_secret(run: Run, key: str, work: Callable[[str], Work[StatisticsTask]]) -> Summed:
    """Add up releases of which the coordinator sees none; each site adds all of its noise, or the share that was agreed on."""

    def check(site: str, answer: MaskedSum) -> None:
        shared = work(site).task.shared_noise
        check_noise(answer.noise, answer.statement, private=run.privacy.is_private(site), shared=shared)
        run.privacy.take(answer.statement, site, key)

    what, retries = f"private statistics round '{key}'", run.config.chain.retries
    summed = summed_everywhere(run.sites, what, work, retries=retries, check=check)
    check_length(summed.state["release"], summed.noise, card_of_all([run.sites.cards[site] for site in summed.sites]))
    return summed


def _in_the_open(run: Run, key: str, work: Callable[[str], Work[StatisticsTask]]) -> Summed:
    """Add up the releases of all sites that can be used."""
    started = time.monotonic()

    def ask(sites: Sequence[str], attempt: int) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        return run.sites.statistics({site: work(site) for site in sites})

    def check(site: str, answer: Trained[StatisticsResult]) -> None:
        check_answer(answer, "round", key, site)
        check_noise(answer.result.noise, answer.result.statement, private=run.privacy.is_private(site))
        check_length(answer.model["release"], answer.result.noise, run.sites.cards[site])
        run.privacy.take(answer.result.statement, site, key)

    outcomes = attempted(run.sites.ids, ask, check, retries=run.config.chain.retries)
    answers = outcomes.answers.values()
    total = sum((answer.model["release"] for answer in answers), torch.zeros(1, dtype=torch.float64))
    noise = math.sqrt(sum(answer.result.noise**2 for answer in answers))
    summed = outcomes.summed({"release": total}, time.monotonic() - started, noise=noise)
    for reason in summed.reasons.values():
        logger.warning("private statistics round '%s' goes on without a site: %s", key, reason)
    if not answers:
        raise ChainwardError(
            f"statistics round '{key}': no site took part in it (the log says why); set chain.head = 'trained', or resume the "
            "run when they can"
        )
    return summed
