"""What a run asks of this hospital, in words: what `chainward-site approve` and the page show before a person decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chainward_client.approval.record import AskedRun
from chainward_client.disclosure import PLAIN_WEIGHTS, PRIVATE_WEIGHTS
from chainward_client.policy import asked_of_site, asked_units, check_request, check_run, whole_run
from chainward_client.site_config import SiteConfig
from chainward_client.site_ledger import open_site_ledger
from chainward_shared.errors import ModelError, PolicyRefusal, PrivacyError
from chainward_shared.models import Architecture, count_parameters, skeleton
from chainward_shared.models.start import travelling_template
from chainward_shared.privacy.accounting import spent
from chainward_shared.protocol.run_plan import RunPlan
from chainward_shared.recipes import LinkRecipe, PrivacyRecipe, StudentRecipe, TrainingRecipe


@dataclass(frozen=True)
class Paragraph:
    """A few lines under one title; `warns`: a person should not overlook them."""

    title: str
    lines: tuple[str, ...]
    warns: bool = False


def plan_in_words(asked: AskedRun, config: SiteConfig, site_yaml: Path) -> list[Paragraph]:
    """Return what a plan is, what it would cost here, and what would leave, for somebody who decides on it."""
    plan = asked.plan
    return [
        _who(asked),
        Paragraph("What is trained here", tuple(_trainings(plan))),
        Paragraph("The weights it starts from", tuple(_start(plan.model))),
        _cost(asked, config, site_yaml),
        Paragraph("What leaves the hospital", tuple(_leaves(plan, config))),
        Paragraph(
            "What the approval is bound to",
            (
                f"plan {plan.digest}",
                "Another recipe, model, start or epsilon is another plan, and waits for an approval of its own.",
            ),
        ),
    ]


def _who(asked: AskedRun) -> Paragraph:
    plan = asked.plan
    said = f"“{plan.asked_by}”" if plan.asked_by else "nothing (federation.contact is not set)"
    return Paragraph(
        "Who asks",
        (
            f"run {plan.run_id}, first asked {asked.asked:%Y-%m-%d %H:%M} UTC",
            f"the coordinator says of itself, which nobody has checked: {said}",
        ),
    )


def _trainings(plan: RunPlan) -> list[str]:
    often = f"{plan.links} times" if plan.links > 1 else "once"
    if plan.links > 1:
        counts = [f"{n} {what}" for n, what in ((plan.laps, "laps"), (plan.strands, "strands")) if n > 1]
        often += f" ({', '.join(counts)})"
    lines = [f"a link of the chain, {often}: {_model(plan.model)}; {_recipe(plan.link)}"] if plan.links else []
    if plan.alone is not None:
        lines.append(
            f"the same model without the other hospitals, once, for comparison: {_recipe(plan.alone)} "
            "(not where differential privacy would have to pay for it)"
        )
    if plan.student is not None and plan.students:
        stages = "; ".join(f"{_STAGE[one.stage]}: {_recipe(one)}" for one in plan.students)
        lines.append(f"a compact student, {plan.rounds} rounds: {_model(plan.student)}; {stages}")
    for whose, model, summed in (
        ("the classifier", plan.model, plan.statistics),
        ("the student's classifier", plan.student, plan.student_statistics),
    ):
        if summed and model is not None:
            lines.append(f"{whose} comes from sums over the embeddings of this hospital's images in {_model(model)}")
    if any(recipe.privileged is not None for recipe in (plan.link, *plan.students)):
        lines.append("teachers that read this hospital's reports or tables are trained here, and stay here")
    return lines


_STAGE = {"distil": "self-distillation", "finetune": "fine-tuning"}


def _model(architecture: Architecture) -> str:
    size = f"{architecture.image_size} pixels, {architecture.num_classes} classes"
    try:
        millions = count_parameters(skeleton(architecture)) / 1e6
    except ModelError:
        return f"{architecture.name} ({size})"
    return f"{architecture.name}, {millions:.3g} million parameters ({size})"


def _recipe(recipe: LinkRecipe | StudentRecipe | TrainingRecipe) -> str:
    labels = "" if recipe.label_fraction == 1 else f", {100 * recipe.label_fraction:.3g} % of the labels"
    return f"{recipe.epochs} epochs at learning rate {recipe.learning_rate:.3g}, batches of {recipe.batch_size}{labels}"


def _start(model: Architecture) -> list[str]:
    if model.start is None:
        return ["none: the first link starts from random weights"]
    trained = sum(tensor.numel() for tensor in travelling_template(model).values())
    whole = count_parameters(skeleton(model))
    return [
        f"{model.start.name}, file SHA-256 {model.start.file}",
        f"as tensors {model.start.digest}",
        f"trained, and sent, is the part “{model.start.part}”, {100 * trained / whole:.3g} % of the model",
    ]


def _cost(asked: AskedRun, config: SiteConfig, site_yaml: Path) -> Paragraph:
    title, recipe, policy = "What it costs in privacy", asked.plan.link.privacy, config.privacy
    if recipe is None or policy is None:
        if policy is not None and policy.required:
            return Paragraph(
                title, ("the run has no differential privacy; this site's policy would refuse to train",), True
            )
        lines = ["no differential privacy: nothing bounds what the trained weights tell of a single patient"]
        if recipe is not None and recipe.sites == "all":
            lines = ["the run wants differential privacy, and this site has no policy: it would refuse to train"]
        return Paragraph(title, tuple(lines), True)
    try:
        guided = any(one.privileged is not None for one in (asked.plan.link, *asked.plan.students))
        check_run(policy, private=True, unit=recipe.unit, privileged=guided)
        ledger, _ = open_site_ledger(config.state_dir(site_yaml), config.site)
        at_most = asked_of_site(policy, recipe)
        units = asked_units(recipe, policy.units or asked.units or 1)
        before = spent(ledger.mechanisms(), policy.delta)
        lines = [_asked_epsilon(at_most)]
        if at_most.run:
            mechanisms = whole_run(policy, at_most, units)
            cost = spent(mechanisms, policy.delta)
            together = spent([*ledger.mechanisms(), *mechanisms], policy.delta)
            lines.append(
                f"carried out to its end it would spend epsilon {cost:.3g} at delta {policy.delta:g} per {policy.unit}, of "
                f"{units} declared {policy.unit}s"
            )
            lines.append(f"spent so far {before:.3g} of {policy.epsilon:g}; after the run {together:.3g}")
            if not ledger.mechanisms(asked.plan.run_id):
                check_request(policy, ledger, mechanisms, asked.plan.run_id)
        else:
            lines.append(f"spent so far {before:.3g} of {policy.epsilon:g}")
    except PolicyRefusal as refusal:
        return Paragraph(title, (f"this site would refuse: {refusal}",), True)
    except PrivacyError as error:
        return Paragraph(title, (f"can't be said: {error}",), True)
    return Paragraph(title, tuple(lines), at_most.epsilon is None)


def _asked_epsilon(recipe: PrivacyRecipe) -> str:
    if recipe.epsilon is None:
        return (
            f"the run names no epsilon, but noise {recipe.noise_multiplier:g}: it may spend all that the policy leaves"
        )
    return (
        f"the run may spend at most epsilon {recipe.epsilon:g} at delta {recipe.delta:g} here, all its trainings and noised "
        "scores together"
    )


def _leaves(plan: RunPlan, config: SiteConfig) -> list[str]:
    private = plan.link.privacy is not None and config.privacy is not None
    tells = PRIVATE_WEIGHTS if private else PLAIN_WEIGHTS
    models = "the weights of the chain's model" + (" and of the student" if plan.student is not None else "")
    lines = [f"{models}, after every training; {tells}"]
    if plan.statistics or plan.student_statistics:
        if private:
            lines.append("sums over the embeddings of the images, with noise that the budget pays for")
            if plan.noise_from > 1:
                lines.append(
                    f"of that noise this site adds one of {plan.noise_from} shares, and relies on {plan.noise_from - 1} other "
                    "sites in a secure sum to add theirs and tell nobody"
                )
        elif config.privacy is not None:
            lines.append("no sums over embeddings: this site has a privacy policy, and refuses them")
        else:
            lines.append(
                "sums over the embeddings of the images, and how many there are: of a class of one image that image's embedding"
            )
    release = "exact" if config.privacy is None else config.privacy.metrics
    if release == "withhold":
        lines.append("no scores: the policy withholds them")
    elif release == "noised" and config.privacy is not None and config.privacy.metrics_epsilon is not None:
        most, each = config.privacy.metrics_releases, config.privacy.metrics_epsilon
        lines.append(
            f"scores of models on this hospital's images with noise, at most {most} times, epsilon {each:g} each"
        )
    else:
        lines.append(
            "scores of models on this hospital's images as they are, and counts of right and wrong answers by class "
            f"(of at most {config.scores.per_run} models, of at least {config.scores.min_cases} cases)"
        )
    return [*lines, "no image, report, table, file name or patient id"]
