"""``chainward-site dry-run``: the real handlers on the site's own cases, without a network, and all that would have left.

A throw-away state folder with a throw-away key and ledger stands in for the site's own: what is drawn here leaves nobody's
hands, so it costs no privacy, and the site's budget is not touched. Both are deleted at the end.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from chainward_client.app import app
from chainward_client.data.image_store import ImageStore
from chainward_client.data.manifest import Manifest
from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import read_table
from chainward_client.dry_run.no_network import no_network
from chainward_client.dry_run.questions import questions
from chainward_client.dry_run.sent import Sent, leaves, taken_apart
from chainward_client.leaks import Found, Secrets, find_leaks
from chainward_client.node import SITE_CONFIG_KEY
from chainward_client.site import OpenSite, open_site
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_client.site_ledger import create_site_ledger
from chainward_shared.config import RunConfig
from chainward_shared.errors import DataError, WeightsError
from chainward_shared.evaluation.classification import counts_from_arrays
from chainward_shared.files import written
from chainward_shared.models import skeleton
from chainward_shared.models.start import travelling_template
from chainward_shared.privacy.policy import PrivacyPolicy
from chainward_shared.protocol import Body, EvaluateTask, LinkTask, StatisticsTask, StudentTask, pack
from chainward_shared.summands import summand_template
from chainward_shared.weights import StateDict, as_sent

_NODE = 1


@dataclass(frozen=True)
class DryRun:
    """What a dry run showed.

    Attributes
    ----------
    site : its id
    private : whether it trained with differential privacy
    sent : the answers in the order in which they would leave
    searched : how many secrets of each kind were searched for
    found : secrets that are in an answer, and arrays that are none of the model's; must be empty
    sockets : attempts to use the network; must be empty
    notes : what a person should know of this dry run
    """

    site: str
    private: bool
    sent: tuple[Sent, ...]
    searched: Mapping[str, int]
    found: tuple[Found, ...]
    sockets: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all answers together."""
        return sum(one.bytes for one in self.sent)

    @property
    def exit_code(self) -> int:
        """0: fine. 1: something is in it that must not leave, the network was tried, or the site refused."""
        refused = any(one.reason is not None for one in self.sent)
        return 1 if self.found or self.sockets or refused else 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "site": self.site,
            "verdict": "problem" if self.exit_code else "fine",
            "private": self.private,
            "bytes": self.bytes,
            "messages": [{**asdict(one), "framing": one.framing} for one in self.sent],
            "searched": dict(self.searched),
            "found": [asdict(one) for one in self.found],
            "sockets": list(self.sockets),
            "notes": list(self.notes),
        }


def dry_run(site_yaml: Path, plan: RunConfig | None = None, steps: int = 4) -> DryRun:
    """Let the site answer as in a run, and return what would have left it.

    Parameters
    ----------
    plan : the run that the coordinator means to start; default: the default run, private where the site has a policy
    steps : of each training, about: at least one epoch of as many cases as these steps take

    Raises
    ------
    ChainwardError
        site.yaml or the data can't be used, or a backbone doesn't suit them.
    """
    if not 1 <= steps <= 1000:
        raise DataError(f"--steps {steps}: expected 1 to 1000; a dry run is not a training")
    config = load_site_config(site_yaml)
    plan = plan or _usual_plan(config.privacy)
    data_path = (site_yaml.parent / Path(config.data).expanduser()).resolve()
    own_state = config.state_dir(site_yaml).absolute()
    with no_network() as attempts, _throw_away(site_yaml, config, data_path, own_state) as copy:
        context = {SITE_CONFIG_KEY: str(copy)}
        site = open_site(copy)
        requests = list(questions(plan, site, steps))
        answers = [_answer(request, message_type, arrays, context) for message_type, request, arrays in requests]
        secrets = _secrets(site.data, data_path, (site_yaml, own_state, copy))
    asked = [request for _, request, _ in requests]
    found: list[Found] = []
    for request, answer in zip(asked, answers, strict=True):
        tensors, foreign = _tensors(answer, request, site.data)
        found += find_leaks(answer, secrets.without(_said_anyway(request, site)), tensors, request.KIND)
        found += foreign
    private = plan.privacy.mode != "off" and config.privacy is not None
    return DryRun(
        site=config.site,
        private=private,
        sent=tuple(taken_apart(r, a, private=private) for r, a in zip(asked, answers, strict=True)),
        searched=secrets.counts,
        found=tuple(found),
        sockets=tuple(dict.fromkeys(attempts)),
        notes=_notes(plan, site.data, private),
    )


def _usual_plan(policy: PrivacyPolicy | None) -> RunConfig:
    if policy is None:
        return RunConfig()
    return RunConfig.from_flat(
        {
            "privacy.mode": "dp-sgd",
            "privacy.epsilon": min(8.0, policy.epsilon_per_run or policy.epsilon),
            "privacy.delta": policy.delta,
            "privacy.unit": policy.unit,
        }
    )


def _notes(plan: RunConfig, data: SiteData, private: bool) -> tuple[str, ...]:
    notes = [
        "the site's own ledger was not touched: key, ledger and state of this dry run were made for it, and deleted"
    ]
    if private:
        notes.append(
            "noise was drawn as in a run; the plan of so few steps has another noise multiplier than the run's, which "
            "`chainward-site check --plan` computes"
        )
    if plan.privileged.mode != "off" and data.splits["train"].privileged.texts is None and not data.privileged.columns:
        notes.append("the plan asks for privileged teachers; this site has neither reports nor table for them")
    return tuple(notes)


@contextmanager
def _throw_away(site_yaml: Path, config: SiteConfig, data: Path, own_state: Path) -> Iterator[Path]:
    """Hand out the path of a copy of site.yaml that has the same policy, and state, key and ledger of its own.

    It lies in the site's state folder where there is one: what privileged teachers leave is as private as the reports.
    """
    parent = own_state if own_state.is_dir() else Path(tempfile.gettempdir())
    with written(parent):
        folder = Path(tempfile.mkdtemp(prefix=".dry-run-", dir=parent))
    try:
        content = yaml.safe_load(site_yaml.read_text(encoding="utf-8"))
        copy = folder / "site.yaml"
        copy.write_text(
            yaml.safe_dump(
                {**content, "data": str(data), "state": str(folder / "state"), "weights": "any", "runs": "any"}
            ),
            encoding="utf-8",
        )
        create_site_ledger(folder / "state", config.site)
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            logging.getLogger("chainward.client").error("%s: can't be deleted; do so, it may hold private data", folder)


def _answer(
    request: Body, message_type: str, arrays: Mapping[str, ArrayRecord], node_config: dict[str, Any]
) -> RecordDict:
    """Return what the client app answers, the way Flower calls it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, _NODE, 1  # Flower's process would know
    message = Message(pack(request, arrays), dst_node_id=_NODE, message_type=message_type)
    context = Context(run_id=1, node_id=_NODE, node_config=dict(node_config), state=RecordDict(), run_config={})
    return app(message, context).content


def _tensors(answer: RecordDict, request: Body, data: SiteData) -> tuple[list[np.ndarray], list[Found]]:
    """Return the tensors in the arrays of an answer, and which arrays are not those of the model, or of the counts of scores."""
    templates: dict[str, StateDict] = {}
    if isinstance(request, LinkTask):
        templates["model"] = travelling_template(request.architecture)
    elif isinstance(request, StatisticsTask):
        templates["sums"] = summand_template(request, data.task)
    elif isinstance(request, StudentTask):
        templates["student"] = skeleton(request.architecture).state_dict()
    tensors: list[np.ndarray] = []
    foreign = []
    for record, entries in answer.array_records.items():
        try:
            if isinstance(request, EvaluateTask):
                counts_from_arrays(entries, len(data.classes), data.task)
            elif record in templates:
                tensors += as_sent(entries, templates[record]).values()
                continue
            else:
                raise WeightsError("the model has no such arrays")
        except WeightsError as error:
            foreign.append(Found("array", f"{record}: {error}", request.KIND))
        tensors += [array.numpy() for array in entries.values()]
    return tensors, foreign


def _secrets(data: SiteData, data_path: Path, paths: Sequence[Path]) -> Secrets:
    """Return every text, cell, id, file name and path of the site."""
    secrets = Secrets.of(data)
    table = read_table(data_path)
    files: set[str] = set()
    if isinstance(table, Manifest):
        files.update(table.images.tolist())
        with ImageStore(table.description.image_location) as store:
            members = [Path(member) for member in store.members]
        files.update(name for member in members for name in (member.name, member.stem))
    secrets.add("file name", files)
    parents = {str(path) for path in (*paths, data_path)} | {str(path.parent) for path in (*paths, data_path)}
    secrets.add("path", {path for path in parents if len(path) > 3})
    return secrets


def _said_anyway(request: Body, site: OpenSite) -> set[str]:
    """Return the words that an answer may hold, whatever cells say the same: those of the question, classes and site."""
    words = {site.data.site, *site.data.classes}
    words.update(
        str(leaf)
        for _, value in leaves(json.loads(request.model_dump_json()))
        for leaf in (value if isinstance(value, list) else [value])
    )
    return words
