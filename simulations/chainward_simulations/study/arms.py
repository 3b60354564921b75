"""The arms of a study: what each trains, as one table of trainers and overrides of the run configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from chainward_shared.config import ConfigScalar
from chainward_shared.errors import StudyError, nearest
from chainward_simulations.study.further import further_baselines
from chainward_simulations.study.settings import parse_assignments, typed

PROXIMAL_WEIGHT = 0.01
"""mu of FedProx."""
EACH_EPOCH = -1
"""Of an arm's `rounds`: as many as there are epochs."""

WITHOUT_TRAINING = ("thumbnails", "linear-pixels", "linear-probe", "statistics", "alone-statistics")
"""Trainers that follow from sums, or fit a linear model: no gradient goes through a network."""

_OF_THE_DATA = ("seed", "data.source", "data.label-skew", "federation.", "output.")
_OWN_OPTIONS = ("arm", "rounds", "mu")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Arm:
    """One way to train, before it meets a configuration.

    Attributes
    ----------
    trainer : "alone", "alone-long", "federated", "cyclic", "chain", "student", one of `WITHOUT_TRAINING`, or the name of a
        further baseline
    about : one line for people
    overrides : keys of the run configuration in which the arm differs from the study's settings
    laps : for the arms of several laps, which share the epochs of one among them; 0: as the configuration says
    rounds : of FedAvg; 0: the number nearest to `ROUNDS` that divides the epochs; `EACH_EPOCH`
    mu : weight of FedProx's proximal term
    refit : the model gets a head from the statistics of all sites in the end
    long : with as many passes over the images as a chain and its student take together
    """

    name: str
    trainer: str
    about: str
    overrides: Mapping[str, ConfigScalar] = field(default_factory=dict)
    laps: int = 0
    rounds: int = 0
    mu: float = 0.0
    refit: bool = False
    long: bool = False


def _overriding(trainer: str, name: str, about: str, settings: str = "") -> Arm:
    """Return an arm; `settings` as they are typed, ``"chain.strands=2 chain.merge=average"``."""
    return Arm(name, trainer, about, typed(parse_assignments([settings], name), name))


_chain, _student = partial(_overriding, "chain"), partial(_overriding, "student")
_TABLE = (
    Arm("alone", "alone", "each site by itself, with the epochs of its links: mean over the sites, best site noted"),
    Arm("alone-long", "alone-long", "each site by itself, with as many steps as the whole chain takes"),
    Arm("alone-statistics", "alone-statistics", "each site's own head from statistics on the frozen start"),
    Arm("thumbnails", "thumbnails", "no network: discriminant on thumbnails of 14 px, from the sites' sums"),
    Arm("linear-pixels", "linear-pixels", "no network: logistic regression on the union's images at 32 px"),
    Arm("linear-probe", "linear-probe", "logistic regression on the union's embeddings by the frozen start"),
    Arm("statistics", "statistics", "the head from the sums of all sites on the frozen start; nothing is trained"),
    Arm("fedavg", "federated", "federated averaging (McMahan et al. 2017), by default 4 rounds"),
    Arm("fedprox", "federated", "FedAvg held near the round's start (Li et al. 2020), mu = 0.01", mu=PROXIMAL_WEIGHT),
    Arm("fedavg-each-epoch", "federated", "FedAvg, one epoch a round", rounds=EACH_EPOCH),
    Arm("fedprox-each-epoch", "federated", "FedProx, one epoch a round", rounds=EACH_EPOCH, mu=PROXIMAL_WEIGHT),
    Arm(
        "fedavg-long",
        "federated",
        "FedAvg, one epoch a round, with the passes of chain and student together",
        rounds=EACH_EPOCH,
        long=True,
    ),
    Arm("cyclic", "cyclic", "weights handed from site to site, cross-entropy only, one lap", laps=1),
    Arm("cyclic-3", "cyclic", "the same in three laps of a third of the epochs", laps=3),
    _chain("chain", "the chain as the settings say"),
    _chain("chain-refit", "head from statistics: of the start, and anew at the end", "chain.head=statistics"),
    _chain("chain-refit-links", "and a new head after every link", "chain.head=statistics chain.refit=links"),
    _chain("chain-no-distillation", "without the predecessor's logits", "chain.distillation-weight=0.0"),
    _chain("chain-attention", "with attention transfer, weight 1", "chain.attention-weight=1.0"),
    _chain("chain-no-attention", "without attention transfer", "chain.attention-weight=0.0"),
    _chain("chain-annealing", "temperature times 0.9 from epoch to epoch", "chain.temperature-decay=0.9"),
    _chain("chain-no-annealing", "one temperature in all epochs", "chain.temperature-decay=1.0"),
    _chain("chain-no-trust", "the predecessor counts the same where it is wrong", "chain.teacher-trust=none"),
    _chain("chain-fresh", "every link starts from the run's initial weights", "chain.start=fresh"),
    _chain("chain-reversed", "the sites in reverse order", "chain.order=reversed"),
    _chain("chain-weakest-next", "next the site where the model is weakest", "chain.order=weakest-next"),
    _chain("chain-guarded", "links that cost over 0.05 at earlier sites are refused", "chain.max-forgetting=0.05"),
    _chain("chain-shuffled", "the sites in an order drawn by the seed", "chain.order=shuffled"),
    _chain(
        "chain-unlabelled", "with the images that the label fraction leaves, weight 1", "chain.unlabelled-weight=1.0"
    ),
    _chain("chain-no-unlabelled", "without the images that the label fraction leaves", "chain.unlabelled-weight=0.0"),
    replace(_chain("chain-laps-2", "two laps of half the epochs; chain-laps-K for K"), laps=2),
    _chain("chain-strands-2", "two strands, the better one by validation; chain-strands-K for K", "chain.strands=2"),
    _chain(
        "chain-strands-average",
        "two strands, their weights averaged; chain-strands-K-average for K",
        "chain.strands=2 chain.merge=average",
    ),
    _chain("chain-privileged", "with the sites' privileged teachers, all that there are", "privileged.mode=all"),
    _chain("chain-privileged-logits", "of them only the logits", "privileged.mode=all privileged.embedding-weight=0.0"),
    _chain(
        "chain-privileged-embedding", "of them only the embedding", "privileged.mode=all privileged.logit-weight=0.0"
    ),
    _chain("chain-privileged-text", "only teachers that read reports", "privileged.mode=text"),
    _chain("chain-privileged-table", "only teachers that read tables", "privileged.mode=table"),
    _chain(
        "chain-privileged-blanked",
        "with label words blanked in the reports",
        "privileged.mode=all privileged.blank-label-words=true",
    ),
    _chain(
        "chain-privileged-image",
        "teachers that see the image too, through the pretrained start",
        "privileged.mode=all privileged.image=true privileged.target=links",
    ),
    _student("student", "the compact student of the chain's model, as the settings say"),
    _student("student-random", "from random weights instead of a selection", "student.start=random"),
    _student("student-single", "auxiliary teacher from the same selection as the student", "student.start=single"),
    _student("student-of-start", "selected out of the pretrained start, not the chain's model", "student.source=start"),
    _student("student-refitted", "its classifier from the sites' sums at the end", "student.head=statistics"),
    _student("student-frozen", "auxiliary teacher stays as it was selected", "student.auxiliary=frozen"),
    _student(
        "student-plain", "one selection, cross-entropy only", "student.start=single student.distillation-weight=0.0"
    ),
    _student(
        "student-from-large",
        "plain distillation from the chain's model: random start, no auxiliary teacher",
        "student.start=random student.distillation-weight=0.0 student.large-weight=1.0",
    ),
    _student(
        "student-selected-from-large",
        "the same from one selection of the chain's weights",
        "student.start=single student.distillation-weight=0.0 student.large-weight=1.0",
    ),
    _student("student-dual-and-large", "auxiliary and large model as teachers", "student.large-weight=1.0"),
    _student(
        "student-ensemble",
        "taught by two strands of the chain together",
        "chain.strands=2 chain.merge=ensemble student.large-weight=1.0",
    ),
)
_FURTHER = tuple(Arm(name, name, baseline.about) for name, baseline in further_baselines().items())
_REFIT = ("federated", "cyclic", *further_baselines())
"""Trainers of one network, whose head can be refitted."""
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*_TABLE[:2], *_FURTHER, *_TABLE[2:])}


def find_arm(name: str) -> Arm:
    """Return the arm of this name, also ``chain-laps-5``, ``cyclic-4``, ``chain-strands-3-average``, ``union-refit``.

    Raises
    ------
    StudyError
        There is none; the message names the nearest.
    """
    if name in ARMS:
        return ARMS[name]
    if match := re.fullmatch(r"(cyclic|chain-laps)-([1-9]\d{0,2})", name):
        like = ARMS["cyclic" if match[1] == "cyclic" else "chain-laps-2"]
        return replace(like, name=name, about=f"{match[2]} laps that share the epochs of one", laps=int(match[2]))
    if match := re.fullmatch(r"chain-strands-([1-9]\d{0,2})(-average)?", name):
        like = ARMS["chain-strands-average" if match[2] else "chain-strands-2"]
        about = f"{match[1]} strands, {'their weights averaged' if match[2] else 'the best one by validation'}"
        return replace(like, name=name, about=about, overrides={**like.overrides, "chain.strands": int(match[1])})
    plain = name.removesuffix("-refit")
    if plain != name and plain in ARMS and ARMS[plain].trainer in _REFIT:
        return replace(
            ARMS[plain], name=name, about=f"{plain}, its head refitted from the sums of all sites", refit=True
        )
    raise StudyError(f"there is no arm '{name}'{nearest(name, ARMS)}; `chainward study --help` lists the arms")


def custom_arm(definition: str) -> Arm:
    """Return the arm of ``--arm NAME='key=value key=value'``.

    Besides keys of the run configuration: ``arm`` (the arm to start from, default chain), ``rounds`` and ``mu``.

    Raises
    ------
    StudyError, ConfigError
        The name, a key or a value can't be used.
    """
    name, equals, text = definition.partition("=")
    name = name.strip()
    if not equals or not _NAME.fullmatch(name):
        raise StudyError(
            f"--arm {definition!r}: expected NAME='key=value key=value', NAME of small letters, digits, '-', '_' and '.'"
        )
    source = f"--arm {name}:"
    assignments = parse_assignments([text], source)
    own = {key: assignments.pop(key) for key in _OWN_OPTIONS if key in assignments}
    like = find_arm(own.get("arm", "chain"))
    if fixed := next((key for key in assignments if key.startswith(_OF_THE_DATA)), None):
        raise StudyError(
            f"{source} {fixed} is the same for all arms of a study, or their figures can't be compared; use --set"
        )
    for key in ("rounds", "mu"):
        if key in own and like.trainer != "federated":
            raise StudyError(f"{source} {key} is an option of fedavg and fedprox, and this starts from '{like.name}'")
    overrides = typed(assignments, source)
    words = [f"{key}={value}" for key, value in {**own, **assignments}.items() if key != "arm"]
    return replace(
        like,
        name=name,
        about=f"{like.name} with {' '.join(words)}" if words else f"the same as {like.name}",
        overrides={**like.overrides, **overrides},
        rounds=int(_number(own.get("rounds"), like.rounds, "rounds", source, least=1, whole=True)),
        mu=_number(own.get("mu"), like.mu, "mu", source, least=0),
    )


def _number(text: str | None, default: float, key: str, source: str, *, least: float, whole: bool = False) -> float:
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < 1e6 or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise StudyError(f"{source} {key}={text}: expected {kind} of at least {least:g}")
    return value
