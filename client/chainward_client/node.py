"""Whose data a node works on: a deployed one is the hospital that its own site.yaml says, and nothing else."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from chainward_client.approval.record import Approvals
from chainward_client.bases import Bases
from chainward_client.journal import Journal
from chainward_client.limits import check_limits
from chainward_client.private_site import declared_units
from chainward_client.site import OpenSite, open_site
from chainward_client.site_config import SiteConfig, load_site_config
from chainward_client.site_key import identity
from chainward_client.store import SiteStore
from chainward_shared.errors import ApprovalNeeded, ModelError, PolicyRefusal, ProtocolError, WeightsError
from chainward_shared.identity import signed_hello
from chainward_shared.protocol import (
    AtWork,
    AtWorkRequest,
    BaseTask,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkTask,
    Refusal,
    SimulatedSite,
    StatisticsTask,
    StudentTask,
    fingerprint,
)
from chainward_shared.protocol.run_plan import PlannedTask, RunPlan, RunPlanState

SITE_CONFIG_KEY = "site-config"
"""Key of the node configuration that names a hospital's site.yaml."""

PRIVATE_REASON = "something is wrong at the site with its data, its disk or its software; the site's own log says what"

SHAREABLE = (PolicyRefusal, ApprovalNeeded, ModelError, ProtocolError, WeightsError)
"""Errors whose words may leave a hospital: they speak of the request. All others may name files, rows and patients."""

LONGEST_WAIT = 7 * 86_400.0
"""Seconds for which a request may wait for another one at most, whatever its sender says."""

Task = LinkTask | StudentTask | EvaluateTask | StatisticsTask


class Node(ABC):
    """The site that a node is, as the handlers of its messages see it.

    Parameters
    ----------
    node_config : the configuration with which Flower started the node
    """

    @abstractmethod
    def __init__(self, node_config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def hello(self, request: HelloRequest, node: int) -> Hello:
        """Say which site this is; `node`: Flower's id of the node that was asked."""

    @abstractmethod
    def at_work(self, request: AtWorkRequest) -> AtWork:
        """Say whether one of the site's processes is at work on a task."""

    @abstractmethod
    def open(self, simulated: SimulatedSite | None) -> OpenSite:
        """Return the site; `simulated`: which one the message wants it to be."""

    def open_for_sum(self, run_id: str, simulated: SimulatedSite | None) -> OpenSite:
        """Return the site for a message about a secure sum of a run, for which no data are read."""
        return self.open(simulated)

    @abstractmethod
    def bases(self, task: BaseTask) -> tuple[str, Bases]:
        """Return the site's id and its pretrained weights, without reading its data."""

    @abstractmethod
    def consider(self, plan: RunPlan) -> RunPlanState:
        """Return how the plan of a run stands at the site: approved, refused, or waiting for a person."""

    @abstractmethod
    def at_work_on(self, task: Task, seconds: float) -> AbstractContextManager[OpenSite]:
        """Open the site, for `seconds` at most, to work on a task."""

    def note(self, asked: RecordDict, answer: RecordDict | None = None, seconds: float = 0.0) -> None:
        """Write down that a request has come, or what it was answered with; by default nowhere."""
        return

    @staticmethod
    @abstractmethod
    def refusal(error: Exception) -> Refusal | None:
        """Return what the coordinator is told of an error; None where the error itself may be seen."""


class DeployedNode(Node):
    """A hospital. What a message says about a site to play is refused; there is no code here that could.

    Raises
    ------
    ProtocolError
        The node's configuration does not say where the site.yaml is.
    DataError
        The site.yaml can't be used.
    """

    def __init__(self, node_config: Mapping[str, Any]) -> None:
        self._path = site_yaml_path(node_config)
        self._config: SiteConfig = load_site_config(self._path)

    def hello(self, request: HelloRequest, node: int) -> Hello:
        key = identity(self._config.state_dir(self._path))
        return signed_hello(Hello(site=self._config.site), key, nonce=request.nonce, node=node)

    def at_work(self, request: AtWorkRequest) -> AtWork:
        return AtWork(site=self._config.site, at_work=self._store(request.run_id).lock(request.task).held)

    def open(self, simulated: SimulatedSite | None) -> OpenSite:
        self._refuse_to_play(simulated)
        return open_site(self._path)

    def open_for_sum(self, run_id: str, simulated: SimulatedSite | None) -> OpenSite:
        if load_site_config(self._path).runs == "ask":
            self._approvals.approved(run_id)
        return self.open(simulated)

    def bases(self, task: BaseTask) -> tuple[str, Bases]:
        self._admit(task)
        return self._config.site, Bases.of_site(self._config, self._path)

    def consider(self, plan: RunPlan) -> RunPlanState:
        check_limits(plan, self._config.limits)
        approval = self._approvals.ask(plan, self._units) if self._config.runs == "ask" else "approved"
        return RunPlanState(site=self._config.site, approval=approval, plan=plan.digest)

    def note(self, asked: RecordDict, answer: RecordDict | None = None, seconds: float = 0.0) -> None:
        Journal(self._config.state_dir(self._path)).note(asked, answer, seconds)

    @contextmanager
    def at_work_on(self, task: Task, seconds: float) -> Iterator[OpenSite]:
        """Let the site be seen at work on the task, from before its data are read."""
        self._admit(task)
        seconds = seconds if 0 <= seconds <= LONGEST_WAIT else LONGEST_WAIT
        with self._store(task.run_id).lock(fingerprint(task)).hold(seconds):
            yield open_site(self._path)
            self._require_approval(task)  # it may have been taken back, and then nothing leaves

    @staticmethod
    def refusal(error: Exception) -> Refusal:
        """Keep to the site's own log what may name files, rows and patients, as any exception may."""
        reason = str(error) if isinstance(error, SHAREABLE) else PRIVATE_REASON
        return Refusal(reason=reason, final=isinstance(error, PolicyRefusal), waiting=isinstance(error, ApprovalNeeded))

    @property
    def _approvals(self) -> Approvals:
        return Approvals(self._config.state_dir(self._path))

    def _admit(self, task: Task | BaseTask) -> None:
        self._refuse_to_play(task.simulated)
        check_limits(task, self._config.limits)
        self._require_approval(task)

    def _require_approval(self, task: PlannedTask) -> None:
        if load_site_config(self._path).runs == "ask":  # read again: it may have changed while the site was at work
            self._approvals.require(task)

    def _units(self) -> int | None:
        """Return the patients (or images) that the site declares; None where it has no privacy policy. Without a declaration
        they are counted, as for the card."""
        policy = self._config.privacy
        return None if policy is None else policy.units or declared_units(policy, open_site(self._path).data)

    def _store(self, run_id: str) -> SiteStore:
        return SiteStore(self._config.state_dir(self._path), run_id)

    def _refuse_to_play(self, simulated: SimulatedSite | None) -> None:
        if simulated is not None:
            raise ProtocolError(
                f"site '{self._config.site}' knows who it is from its own site.yaml and refuses to play simulated site "
                f"{simulated.index}; simulations run with `flwr run simulations/six_sites`"
            )


def site_yaml_path(node_config: Mapping[str, Any]) -> Path:
    """Return the path of the site.yaml that a deployed node was started with.

    Raises
    ------
    ProtocolError
        It was started without, or with something like it.
    """
    path = node_config.get(SITE_CONFIG_KEY)
    if isinstance(path, str) and path.strip():
        return Path(path)
    keys = {str(key).lower().replace("_", "-"): str(key)[:64] for key in node_config}
    meant = difflib.get_close_matches(SITE_CONFIG_KEY, keys, n=1)
    if SITE_CONFIG_KEY in node_config:
        found = f"its '{SITE_CONFIG_KEY}' is empty or no text"
    else:
        found = f"it has '{keys[meant[0]]}'" if meant else "it has none"
    raise ProtocolError(
        f"this node must be started with '{SITE_CONFIG_KEY}' in its node configuration, and {found}; start it with "
        f"--node-config '{SITE_CONFIG_KEY}=\"/path/to/site.yaml\"'. Until then it does nothing"
    )
