"""The recipe of a link: cross-entropy on the site's own labels, with the predecessor and the site's own privileged
teachers as teachers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from chainward_client.checkpoint import Checkpoint
from chainward_client.data.site_data import Cases, SiteData
from chainward_client.data.splits import keep_label_fraction, labelled_by_key
from chainward_client.precision import best_device
from chainward_client.private_site import Prepared, PrivateWork, R
from chainward_client.private_training import PrivateTraining, keeps_labels
from chainward_client.privileged.results import SeenImages
from chainward_client.privileged.targets import privileged_targets
from chainward_client.training.features import Features
from chainward_client.training.loop import train
from chainward_client.training.objective import Batch, Objective
from chainward_client.training.passes import StartImages
from chainward_client.training.privileged import PrivilegedTerm
from chainward_shared.distillation.attention import attention_transfer
from chainward_shared.distillation.losses import class_counts, classification_loss, distillation_loss, teacher_trust
from chainward_shared.distillation.schedules import annealed_temperature
from chainward_shared.models import Architecture, build_model
from chainward_shared.models.private_ready import check_private_ready
from chainward_shared.models.start import initial_model
from chainward_shared.models.taps import Taps, embedding_size
from chainward_shared.models.trunk import Trunk, trunk_of
from chainward_shared.protocol import StatisticsTask, TrainingLog
from chainward_shared.recipes import LinkRecipe, TrainingRecipe
from chainward_shared.seeds import derive_seed
from chainward_shared.weights import StateDict


class LinkObjective(Objective):
    """``L = (1-a) CE + a w T^2 KL(predecessor || link) + b AT + P`` on labelled images and ``c T^2 KL`` on unlabelled ones
    (distillation: Hinton et al. 2015, arXiv:1503.02531; AT, attention transfer: Zagoruyko and Komodakis 2017,
    arXiv:1612.03928). P is the privileged teachers' part, `PrivilegedTerm`. Without a predecessor, CE + P.

    Parameters
    ----------
    model : the link's model, to look into where attention or embeddings are compared
    predecessor : frozen teacher, or None for the first link and for a hospital alone
    counts : training cases of each class at this site, as of `class_counts`
    privileged : the term of the site's privileged teachers, or None where it has none
    """

    def __init__(
        self,
        recipe: LinkRecipe,
        model: nn.Module,
        predecessor: nn.Module | None,
        counts: Tensor,
        privileged: PrivilegedTerm | None = None,
    ) -> None:
        teaches = recipe.distillation_weight > 0 or recipe.attention_weight > 0 or recipe.unlabelled_weight > 0
        self.recipe, self.counts, self.privileged = recipe, counts, privileged
        self.predecessor = predecessor if teaches else None
        attends = self.predecessor is not None and recipe.attention_weight > 0
        self.taps = self.predecessor_taps = None
        if attends or privileged is not None:
            self.taps = Taps(model, attention=attends, embedding=privileged is not None)
        if attends and self.predecessor is not None:
            self.predecessor_taps = Taps(self.predecessor, attention=True)
        self.temperature = recipe.temperature
        self.sums: dict[str, float] = {}
        self.seen = self.seen_unlabelled = 0

    def start(self, device: torch.device, steps_per_epoch: int) -> None:
        self.counts = self.counts.to(device)
        if self.predecessor is not None:
            self.predecessor.to(device).eval().requires_grad_(False)
        if self.privileged is not None:
            self.privileged.to(device)

    def extra_modules(self) -> list[nn.Module]:
        return [] if self.privileged is None else [self.privileged]

    def start_epoch(self, epoch: int) -> None:
        self.temperature = annealed_temperature(epoch, self.recipe.temperature, self.recipe.temperature_decay)
        self.sums, self.seen, self.seen_unlabelled = {}, 0, 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        view = batch.view()
        n = len(batch.labels)
        logits = model(view).float()
        recipe = self.recipe
        loss = classification_loss(logits[:n], batch.labels, self.counts, recipe.class_balance, recipe.prior_strength)
        self.seen += n
        if self.predecessor is not None:
            weight = self.recipe.distillation_weight
            with torch.no_grad():
                teacher_logits = self.predecessor(view).float()
                trust = teacher_trust(teacher_logits[:n], batch.labels, self.recipe.teacher_trust)
            apart = distillation_loss(logits, teacher_logits, self.temperature, multilabel=batch.labels.ndim == 2)
            self._note("teacher_trust", trust)
            loss = (1 - weight) * loss + weight * trust * apart[:n]
            if self.predecessor_taps is not None and self.taps is not None:
                attention = attention_transfer(
                    [stage[:n] for stage in self.taps.attention],
                    [stage[:n] for stage in self.predecessor_taps.attention],
                )
                self._note("attention", attention)
                loss = loss + self.recipe.attention_weight * attention
        if self.privileged is not None and self.taps is not None:
            guided = self.privileged.losses(logits[:n], self.taps.embedding[:n], batch.rows)
            self._note("privileged", guided)
            loss = loss + guided
        if len(view) == n or self.predecessor is None:
            return loss
        self.seen_unlabelled += len(view) - n
        self._note("unlabelled_loss", apart[n:])
        return torch.cat([loss, self.recipe.unlabelled_weight * apart[n:]])

    def _note(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.detach().sum())

    def epoch_log(self) -> dict[str, float]:
        means = {
            name: total / (self.seen_unlabelled if name == "unlabelled_loss" else self.seen)
            for name, total in self.sums.items()
        }
        return means if self.predecessor is None else {"temperature": self.temperature, **means}


Labelling = TrainingRecipe | StatisticsTask
"""What decides which training cases have a label: a recipe, or a task that needs none."""


def labelled_rows(data: SiteData, recipe: Labelling, *, private: bool = False) -> np.ndarray:
    """Return which training cases keep their labels under the recipe's label fraction, ascending.

    At a deployed hospital each patient's, by its secret and the patient alone. In a simulation by the run's seed: a fraction of
    each class, or, `private`, each patient's by a hash of the patient.
    """
    cases = data.splits["train"]
    if recipe.label_fraction == 1.0:
        return np.arange(len(cases))
    if data.key is not None:
        return labelled_by_key(cases.patients, recipe.label_fraction, data.key)
    if private:
        return keeps_labels(cases.patients, recipe.label_fraction, recipe.seed, data.site)
    return keep_label_fraction(cases.labels.numpy(), recipe.label_fraction, recipe.seed, data.site)


def labelled_cases(data: SiteData, recipe: Labelling, *, private: bool = False) -> Cases:
    """Return the training cases that the recipe's label fraction leaves; `private` as in `labelled_rows`."""
    cases = data.splits["train"]
    return cases if recipe.label_fraction == 1.0 else cases.take(labelled_rows(data, recipe, private=private))


def unlabelled_cases(data: SiteData, recipe: TrainingRecipe, *, private: bool = False) -> Cases:
    """Return the training cases whose labels the recipe's label fraction leaves out; their labels must not be used."""
    cases = data.splits["train"]
    rest = np.setdiff1d(np.arange(len(cases)), labelled_rows(data, recipe, private=private))
    return cases.take(rest)


def privileged_term(
    data: SiteData,
    cases: Cases,
    recipe: TrainingRecipe,
    model: nn.Module,
    state_dir: Path | None,
    *names: str | int,
    work: PrivateWork | None = None,
    image: SeenImages | None = None,
) -> PrivilegedTerm | None:
    """Return the privileged teachers' part of a training on `cases`; None without teachers at this site.

    Parameters
    ----------
    state_dir : folder in which the site keeps its teachers; None: trained anew
    names : name the training, for the projector's initial weights
    work : the teachers train privately, and this is what they spend through; None: they don't
    image : the images of `cases` through the start, for teachers that see them
    """
    if recipe.privileged is None:
        return None
    targets = privileged_targets(data, cases, recipe.privileged, recipe, state_dir, work=work, image=image)
    if targets is None:
        return None
    seed = derive_seed(recipe.seed, *names, "projector")
    return PrivilegedTerm(targets, recipe.privileged, embedding_size(model), seed)


def prepared_for(
    work: PrivateWork | None, recipe: R, data: SiteData, cases: Cases, architecture: Architecture
) -> Prepared[R]:
    """Return the recipe as this site follows it, and the class counts: those of `cases` without privacy.

    Raises
    ------
    ModelError
        The backbone can't be trained privately. Said before privileged teachers spend anything.
    PolicyRefusal
        See `PrivateWork.prepared`.
    """
    if work is None:
        return Prepared(recipe, class_counts(cases.labels, len(data.classes)), [])
    prepared = work.prepared(recipe, data)
    check_private_ready(architecture, best_device().type)
    return prepared


def spending(
    work: PrivateWork | None,
    prepared: Prepared[R],
    data: SiteData,
    guide: PrivilegedTerm | None,
    checkpoint: Checkpoint | None,
    *,
    phase: str,
    unlabelled: Cases | None = None,
) -> AbstractContextManager[PrivateTraining | None]:
    """Return the context of a training that spends through `work`; without privacy one that holds nothing."""
    if work is None:
        return nullcontext()
    return work.training(
        prepared.recipe,
        data,
        phase=phase,
        unlabelled_patients=None if unlabelled is None else unlabelled.patients,
        private_teachers=guide is None or guide.private,
        checkpoint=checkpoint,
    )


def _through_trunk(
    features: Features, model: nn.Module, cases: Cases, others: Cases | None, recipe: LinkRecipe
) -> tuple[Cases, Cases | None, Trunk | None]:
    """Return the cases with features in the place of images, and the trunk; as they were, without, where there are none."""
    of_cases = features.of(model, cases.images, recipe.augmentation, recipe.threads)
    if of_cases is None:
        return cases, others, None
    seen, trunk = of_cases
    if others is not None and len(others):
        of_others = features.of(model, others.images, recipe.augmentation, recipe.threads)
        if of_others is None:
            return cases, others, None
        others = replace(others, images=of_others[0])
    return replace(cases, images=seen), others, trunk


def _called(teacher: nn.Module | None, trunk: Trunk | None) -> nn.Module | None:
    """Return what is called of the predecessor: all of it, or, where images come as a trunk's features, the rest."""
    of_teacher = None if teacher is None or trunk is None else trunk_of(teacher)
    return teacher if of_teacher is None else of_teacher.rest


def train_link(
    data: SiteData,
    architecture: Architecture,
    recipe: LinkRecipe,
    predecessor: StateDict | None,
    *,
    strand: int,
    lap: int,
    alone: bool = False,
    base: StateDict | None = None,
    features: Features | None = None,
    state_dir: Path | None = None,
    work: PrivateWork | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[StateDict, TrainingLog]:
    """Train one link at a site and return the refined weights and how it went.

    Parameters
    ----------
    predecessor : weights that the previous link handed on; None for the first link and for a hospital alone
    strand, lap : 0-based; with the site they name the random choices of this link
    alone : name them otherwise, so that a hospital alone is not the chain's first link in disguise
    base : the pretrained weights that the architecture starts from; None where it starts from none
    features : where the output of a frozen trunk is kept; None: every image goes through it in every epoch
    state_dir : folder in which the site keeps its privileged teachers; None: trained anew for each link
    work : what a private training spends through; None: the site trains without privacy
    checkpoint : where the training writes itself down

    Raises
    ------
    ModelError
        The training fails, or the backbone can't be trained privately.
    PrivacyError
        Policy, budget or ledger don't allow a private training.
    """
    private = work is not None
    cases = labelled_cases(data, recipe, private=private)
    prepared = prepared_for(work, recipe, data, cases, architecture)
    recipe = prepared.recipe
    model, teacher, others, trunk = initial_model(architecture, recipe.seed, base), None, None, None
    if predecessor is not None:
        teacher = build_model(architecture, recipe.seed)
        teacher.load_state_dict(predecessor)
        if recipe.start == "warm":
            model.load_state_dict(predecessor)
        if recipe.unlabelled_weight > 0:
            others = unlabelled_cases(data, recipe, private=private)
    image = None if base is None else StartImages(architecture, base, cases.images, recipe.threads, features)
    if features is not None and recipe.attention_weight == 0:
        cases, others, trunk = _through_trunk(features, model, cases, others, recipe)
    names = ("alone" if alone else "link", data.site, "strand", strand, "lap", lap)
    guide = privileged_term(data, cases, recipe, model, state_dir, *names, work=work, image=image)
    objective = LinkObjective(recipe, model, _called(teacher, trunk), prepared.counts, guide)
    with spending(work, prepared, data, guide, checkpoint, phase=names[0], unlabelled=others) as privately:
        log = train(
            model,
            cases,
            recipe,
            objective,
            *names,
            unlabelled=None if others is None else others.images,
            layer_decay=recipe.layer_decay,
            trunk=trunk,
            private=privately,
            checkpoint=checkpoint,
        )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return state, log.model_copy(update={"notes": prepared.notes})
