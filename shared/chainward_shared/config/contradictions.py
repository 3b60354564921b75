"""Keys of the run configuration that can't both hold, each in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from chainward_shared.bounds import MOST_EPOCHS, SMALLEST_LEARNING_RATE
from chainward_shared.config.output import OutputConfig
from chainward_shared.config.tables import PrivacyConfig, StudentConfig, kebab
from chainward_shared.errors import ConfigError, nearest
from chainward_shared.recipes import MAX_ENSEMBLE

if TYPE_CHECKING:
    from chainward_shared.config.run import RunConfig


def contradictions(config: RunConfig) -> Iterator[str]:
    """Yield one line for each pair of keys that can't both hold."""
    yield from _site_contradictions(config)
    yield from _chain_contradictions(config)
    if config.chain.start == "fresh" and config.chain.distillation_weight == config.chain.attention_weight == 0:
        yield (
            "chain.start = 'fresh' contradicts chain.distillation-weight = 0.0: nothing would pass from link to link; "
            "set chain.start='warm' or a distillation weight above 0"
        )
    yield from _student_contradictions(config.student)
    yield from _privacy_contradictions(config)
    output = Path(config.output.dir)
    if not output.is_absolute() and not config.output.dir.startswith("~"):
        yield (
            f"output.dir = {config.output.dir!r} is relative, and Flower runs apps in a folder of its own; "
            "give an absolute path, or one that starts with ~"
        )
    yield from _tracking_contradictions(config.output)
    if config.federation.secure_sums == "on":
        yield from secure_contradictions(config)
    if config.federation.secure_sums == "off" and config.federation.secure_noise_from > 1:
        yield (
            f"federation.secure-noise-from = {config.federation.secure_noise_from} contradicts federation.secure-sums = 'off': "
            "what leaves a site by itself needs all of its noise; set federation.secure-sums='on'"
        )


def _tracking_contradictions(output: OutputConfig) -> Iterator[str]:
    try:
        trackers = output.trackers
    except ConfigError as error:
        yield str(error)
        return
    to, address = output.track_to, output.track_to.startswith(("http://", "https://"))
    if to and not trackers:
        yield f"output.track-to = {to!r} says where to track, and output.track is 'none'; name a tracker, or leave it out"
    if output.track_models and "mlflow" not in trackers:
        yield "output.track-models = true is for MLflow, which output.track does not name; add mlflow, or leave it out"
    if address and "tensorboard" in trackers:
        yield f"output.track-to = {to!r} is an address, and TensorBoard writes into a folder; give a folder, or leave it out"
    if to and not address and ("://" in to or not (Path(to).is_absolute() or to.startswith("~"))):
        yield f"output.track-to = {to!r}: expected an absolute path, one that starts with ~, or an http address"


def _site_contradictions(config: RunConfig) -> Iterator[str]:
    sites, num_sites = config.expected_sites, config.federation.num_sites
    if len(set(sites)) != len(sites):
        yield f"federation.sites = {config.federation.sites!r} names a site twice; name each once"
    if sites and num_sites and len(sites) != num_sites:
        yield (
            f"federation.num-sites = {num_sites} contradicts federation.sites, which names {len(sites)}; drop one of the two"
        )
    count = num_sites or len(sites)
    if count and config.chain.strands > count:
        yield (
            f"chain.strands = {config.chain.strands} contradicts the number of sites, {count}: "
            "no site holds two strands at once; allowed: at most the number of sites"
        )
    if config.data.source == "phantom":
        if config.data.label_skew > 0:
            yield (
                f"data.label-skew = {config.data.label_skew} contradicts data.source = 'phantom': "
                "phantom sites have a class mix of their own; set data.label-skew=0 or name a data file"
            )
    elif not Path(config.data.source).is_absolute():
        yield (
            f"data.source = {config.data.source!r} is not an absolute path (Flower runs apps in a folder of its own); "
            "give the absolute path of a data file, or 'phantom'"
        )


def _chain_contradictions(config: RunConfig) -> Iterator[str]:
    chain, privileged = config.chain, config.privileged
    sites, count = config.expected_sites, config.federation.num_sites or len(config.expected_sites)
    try:
        stray = [site for site in chain.failures_at() if site not in sites]
        if sites and stray:
            yield f"chain.on-failure-at names '{stray[0]}'{nearest(stray[0], sites)}, which federation.sites does not"
    except ConfigError as error:
        yield str(error)
    if count and config.student.rounds and config.student.quorum > count:
        yield f"student.quorum = {config.student.quorum} contradicts the number of sites, {count}; allowed: at most that"
    if chain.unlabelled_weight > 0 and chain.label_fraction == 1:
        yield (
            f"chain.unlabelled-weight = {chain.unlabelled_weight} contradicts chain.label-fraction = 1.0, which leaves no "
            "image without a label; lower the fraction or set chain.unlabelled-weight=0"
        )
    yield from _start_contradictions(config)
    if chain.epochs * chain.laps > MOST_EPOCHS:
        yield (
            f"chain.epochs = {chain.epochs} contradicts chain.laps = {chain.laps}: a site alone trains for the epochs of all "
            f"laps, {chain.epochs * chain.laps:,}; allowed: at most {MOST_EPOCHS:,}"
        )
    yield from _strand_contradictions(config)
    yield from _head_contradictions(config)
    yield from _image_contradictions(config)
    if privileged.mode != "off" and privileged.logit_weight == 0 and privileged.embedding_weight == 0:
        yield (
            f"privileged.mode = '{privileged.mode}' contradicts privileged.logit-weight = 0 and "
            "privileged.embedding-weight = 0: nothing would be learnt from the teachers; set one of them, or mode off"
        )


def _image_contradictions(config: RunConfig) -> Iterator[str]:
    privileged = config.privileged
    if not privileged.image:
        return
    if privileged.mode == "off":
        yield "privileged.image = true contradicts privileged.mode = 'off': there are no teachers that could see it; set mode"
    elif not config.chain.start_from:
        yield (
            "privileged.image = true contradicts chain.start-from = '': random weights see nothing in an image; set "
            "chain.start-from, or privileged.image=false"
        )
    elif privileged.target != "links":
        yield (
            f"privileged.image = true contradicts privileged.target = '{privileged.target}': students don't carry the start "
            "through which teachers see; set privileged.target='links'"
        )


def _start_contradictions(config: RunConfig) -> Iterator[str]:
    chain = config.chain
    if chain.trainable != "all" and not chain.start_from:
        yield (
            f"chain.trainable = '{chain.trainable}' contradicts chain.start-from = '': the rest would stay random; set "
            "chain.start-from, or chain.trainable='all'"
        )
    if chain.trainable == "head" and chain.attention_weight > 0:
        yield (
            f"chain.attention-weight = {chain.attention_weight} contradicts chain.trainable = 'head': what is frozen attends as "
            "its predecessor does; set chain.attention-weight=0 or train more than the head"
        )
    if config.student.source == "start" and not chain.start_from:
        yield (
            "student.source = 'start' contradicts chain.start-from = '': there is no start to select weights out of; set "
            "chain.start-from, or student.source='chain'"
        )
    if "/" in chain.start_from and not Path(chain.start_from).expanduser().is_absolute():
        yield (
            f"chain.start-from = {chain.start_from!r} is a relative path (Flower runs apps in a folder of its own); give an "
            "absolute one, or the name of weights in the store"
        )


def _strand_contradictions(config: RunConfig) -> Iterator[str]:
    chain = config.chain
    if chain.merge != "best" and chain.strands == 1:
        yield f"chain.merge = '{chain.merge}' contradicts chain.strands = 1: there is nothing to merge; set chain.strands"
    if chain.merge == "ensemble" and (config.student.rounds == 0 or config.student.large_weight == 0):
        yield (
            "chain.merge = 'ensemble' needs students that learn from the strands; "
            "set student.rounds and student.large-weight above 0"
        )
    if chain.merge == "ensemble" and chain.strands > MAX_ENSEMBLE:
        yield f"chain.merge = 'ensemble' takes at most {MAX_ENSEMBLE} strands, found chain.strands = {chain.strands}"
    if chain.order == "weakest-next" and chain.strands > 1:
        yield (
            f"chain.order = 'weakest-next' contradicts chain.strands = {chain.strands}: two strands could want the same "
            "site; set chain.strands=1 or another order"
        )


def _head_contradictions(config: RunConfig) -> Iterator[str]:
    chain = config.chain
    if chain.refit != "end" and chain.head == "trained":
        yield f"chain.refit = '{chain.refit}' contradicts chain.head = 'trained', which computes no classifier; set chain.head"
    if chain.refit in ("no", "links") and chain.merge == "average" and chain.strands > 1:
        yield (
            f"chain.refit = '{chain.refit}' contradicts chain.merge = 'average': an average of classifiers is none "
            "of the averaged features; set chain.refit='end'"
        )
    if chain.refit == "links" and config.privacy.mode != "off":
        yield (
            f"chain.refit = 'links' contradicts privacy.mode = '{config.privacy.mode}': every site would pay for a statistics "
            "round after every link; set chain.refit='end'"
        )
    if chain.laps == 0:
        yield from _contradictions_without_links(config)


def secure_contradictions(config: RunConfig) -> Iterator[str]:
    """Yield what a run can't do whose sums are secure: it sees neither the student nor the scores of a single site."""
    chain, student = config.chain, config.student
    if student.rounds and student.aggregation != "mean":
        yield (
            f"student.aggregation = '{student.aggregation}' contradicts secure sums, in which nobody sees the students of single "
            "sites; set student.aggregation='mean'"
        )
    if chain.laps and chain.order == "weakest-next":
        yield "chain.order = 'weakest-next' contradicts secure sums, in which nobody sees the scores of single sites; set another"
    if chain.laps and chain.max_forgetting < 1:
        yield (
            f"chain.max-forgetting = {chain.max_forgetting:g} contradicts secure sums, in which nobody sees the scores of single "
            "sites; set chain.max-forgetting=1"
        )


def _contradictions_without_links(config: RunConfig) -> Iterator[str]:
    chain = config.chain
    if chain.head == "trained":
        yield "chain.laps = 0 contradicts chain.head = 'trained': nothing would be learnt; set chain.head='statistics'"
    for key, contradicts, instead in (
        ("compare-alone", chain.compare_alone, "false"),
        ("strands", chain.strands > 1, "1"),
        ("refit", chain.refit != "end", "'end'"),
    ):
        if contradicts:
            yield f"chain.laps = 0 contradicts chain.{key}: no link is trained; set chain.{key}={instead}"


def _privacy_contradictions(config: RunConfig) -> Iterator[str]:
    privacy, default = config.privacy, PrivacyConfig()
    if privacy.mode == "off":
        given = [name for name in PrivacyConfig.model_fields if getattr(privacy, name) != getattr(default, name)]
        for name in given:
            yield (
                f"privacy.{kebab(name)} = {getattr(privacy, name)!r} contradicts privacy.mode = 'off', under which nothing is "
                "private; set privacy.mode to 'dp-sgd' or 'by-policy'"
            )
        return
    if config.federation.precision == "bf16":
        yield "federation.precision = 'bf16' is not verified for private training; set it to 'auto' or 'fp32'"
    try:
        budgets = privacy.simulated_budgets()
    except ConfigError as error:
        yield str(error)
        return
    private = privacy.simulated_site_ids
    if private and (stray := [site for site in budgets if site and site not in private]):
        yield (
            f"privacy.simulated-budget names '{stray[0]}', which privacy.simulated-sites doesn't; a site without a policy "
            "has no budget"
        )


def _student_contradictions(student: StudentConfig) -> Iterator[str]:
    default = StudentConfig()
    if student.model and (student.width, student.depth) != (default.width, default.depth):
        yield (
            f"student.model = {student.model!r} contradicts student.width = {student.width} and student.depth = "
            f"{student.depth}: a named model has a size of its own; set either"
        )
    if student.rounds == 0 and student.head != default.head:
        yield f"student.head = {student.head!r} contradicts student.rounds = 0, which trains no student; drop one of the two"
    if student.rounds == 0 and student.finetune_rounds > default.finetune_rounds:
        yield (
            f"student.finetune-rounds = {student.finetune_rounds} contradicts student.rounds = 0, which trains no student"
        )
    if student.learning_rate * student.finetune_factor < SMALLEST_LEARNING_RATE:
        yield (
            f"student.finetune-factor = {student.finetune_factor:g} contradicts student.learning-rate = "
            f"{student.learning_rate:g}: fine-tuning would have a rate below {SMALLEST_LEARNING_RATE:g}; raise one of the two"
        )
    for key in ("selection", "heads", "layers"):
        if student.start == "random" and getattr(student, key) != getattr(default, key):
            yield (
                f"student.{key} = {getattr(student, key)!r} contradicts student.start = 'random', which selects nothing; "
                "drop one of the two"
            )
    if student.auxiliary == "frozen":
        for key in ("ema_schedule", "ema_decay", "frozen_epochs"):
            if getattr(student, key) != getattr(default, key):
                yield (
                    f"student.{kebab(key)} = {getattr(student, key)!r} contradicts student.auxiliary = 'frozen', which "
                    "never moves; drop one of the two"
                )
