"""The hospitals behind Flower's grid: tasks and models become messages, and answers become results again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord

from chainward_server.approvals import Approvals
from chainward_server.delivery import Delivery
from chainward_server.exchange import Exchange
from chainward_server.request import Reply, Request
from chainward_server.secure_sums import SecureSum
from chainward_server.sites import Failure, Result, Scored, Sites, Summable, Summed, Task, Trained, Work
from chainward_shared.config import FederationConfig
from chainward_shared.errors import WeightsError
from chainward_shared.evaluation.classification import PredictionCounts, counts_from_arrays
from chainward_shared.models import Architecture
from chainward_shared.models.start import travelling, travelling_template, whole
from chainward_shared.protocol import (
    EvaluateResult,
    EvaluateTask,
    LinkResult,
    LinkTask,
    MaskedSum,
    SiteCard,
    StatisticsResult,
    StatisticsTask,
    StudentResult,
    StudentTask,
)
from chainward_shared.protocol.run_plan import RunPlan
from chainward_shared.summands import summand_template
from chainward_shared.weights import StateDict, from_arrays, to_arrays


def _architecture(task: LinkTask | StudentTask | EvaluateTask | StatisticsTask, name: str) -> Architecture:
    """Return the architecture of the model that goes with a task under this name."""
    if isinstance(task, StudentTask) and task.large_architecture is not None and name.startswith("large_"):
        return task.large_architecture
    return task.architecture


class _Packed:
    """The models of one question to several sites, as arrays: one that goes to all of them is in memory once."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], tuple[StateDict, ArrayRecord]] = {}

    def of(self, work: Work[Task]) -> dict[str, ArrayRecord]:
        """Return the models that go with a site's work."""
        return {name: self._arrays(state, _architecture(work.task, name)) for name, state in work.models.items()}

    def _arrays(self, state: StateDict, architecture: Architecture) -> ArrayRecord:
        key = id(state), architecture.model_dump_json()  # kept with its arrays: no other model has its id meanwhile
        if key not in self._found:
            self._found[key] = state, to_arrays(travelling(state, architecture))
        return self._found[key][1]


class FlowerSites(Sites):
    """Sites that are reached through Flower.

    Parameters
    ----------
    exchange : sends requests to the members and brings back their replies
    federation : how long an answer, and a site that is not connected, is waited for
    run_id : of the run, as the sites are told it
    """

    def __init__(
        self, exchange: Exchange, cards: Mapping[str, SiteCard], federation: FederationConfig, run_id: str = "run"
    ) -> None:
        super().__init__(cards)
        self.run_id = run_id
        self.exchange, self.federation = exchange, federation
        self._start: tuple[Architecture, StateDict] | None = None

    @property
    def simulated(self) -> bool:
        """Whether the sites are simulated."""
        return any(member.simulated is not None for member in self.exchange.members.values())

    @property
    def keys(self) -> dict[str, str]:
        """The public keys that the sites have shown when they were met, by site."""
        return {site: member.key for site, member in self.exchange.members.items() if member.key is not None}

    def share(self, architecture: Architecture, base: StateDict) -> dict[str, int]:
        self._start = architecture, base
        waiting = self.exchange.approvals.waiting if self.exchange.approvals else []
        now = [site for site in self.ids if site not in waiting]
        # simulated sites have one folder for what all of them start from: the first fills it
        groups = [[site] for site in now] if self.simulated else [now]
        return dict.fromkeys(self.ids, 0) | self._deliver(groups)

    def announce(self, plan: RunPlan, note: Callable[[Mapping[str, float]], None]) -> None:
        """Ask the people at those sites where runs are approved; they get no work before. `note`: as of `Approvals`."""
        asking = [site for site, card in self.cards.items() if card.approval]
        if not self.simulated:
            patience = self.federation.approval_patience
            approvals = Approvals(plan, asking, patience, note=note, admitted=self._admitted)
            self.exchange.approvals = approvals
            approvals.announce(self.exchange)

    def _admitted(self, site: str) -> None:
        """Bring a site whose person has approved the run after all the weights that it starts from."""
        self._deliver([[site]])

    def _deliver(self, groups: Sequence[Sequence[str]]) -> dict[str, int]:
        """Bring the weights that the run starts from, if it starts from any, to each group of sites in turn."""
        if self._start is None:
            return {}
        delivery, sent = Delivery(self.exchange, self.federation, *self._start, self.run_id), dict[str, int]()
        for group in groups:
            sent |= delivery.to(group)
        return sent

    def train_links(self, work: Mapping[str, Work[LinkTask]]) -> Iterator[tuple[str, Trained[LinkResult] | Failure]]:
        # Simulated sites share a machine: all of them alone take as long as one after the other. Nobody waits for such a
        # comparison to be possible.
        alone = any(one.task.trained_alone for one in work.values())
        deadline = self.federation.hop_deadline * (len(work) if alone else 1)
        patience = 0.0 if alone else self.federation.patience
        return self._train("train.link", work, LinkResult, "model", deadline, patience)

    def train_students(
        self, work: Mapping[str, Work[StudentTask]]
    ) -> Iterator[tuple[str, Trained[StudentResult] | Failure]]:
        deadline = self.federation.hop_deadline * len(work)
        return self._train("train.student", work, StudentResult, "student", deadline, self.federation.patience)

    def statistics(
        self, work: Mapping[str, Work[StatisticsTask]]
    ) -> Iterator[tuple[str, Trained[StatisticsResult] | Failure]]:
        deadline = self.federation.hop_deadline * (len(work) if self.simulated else 1)
        return self._train("evaluate.statistics", work, StatisticsResult, "sums", deadline, self.federation.patience)

    def summed(
        self,
        work: Mapping[str, Work[Summable]],
        *,
        weights: Mapping[str, float] | None = None,
        check: Callable[[str, MaskedSum], None] = lambda site, answer: None,
    ) -> Summed:
        task = next(iter(work.values())).task
        one_after_another, packed = self.simulated or isinstance(task, StudentTask), _Packed()
        return SecureSum(
            self.exchange,
            work,
            summand_template(task, self.any_card.task),
            lambda site: packed.of(work[site]),
            threshold=self.federation.secure_threshold,
            deadline=self.federation.hop_deadline * (len(work) if one_after_another else 1),
            brief=self.federation.deadline,
            weights=weights,
            check=check,
            patience=self.federation.patience,
        ).run()

    def evaluate(self, work: Mapping[str, Work[EvaluateTask]]) -> dict[str, Scored | Failure]:
        requests = self._requests("evaluate", work)
        replies = self.exchange.ask(requests, EvaluateResult, self.federation.hop_deadline)
        return {site: self._scored(site, work[site].task, reply) for site, reply in replies.items()}

    def _train(
        self,
        message_type: str,
        work: Mapping[str, Work[Task]],
        expected: type[Result],
        name: str,
        deadline: float,
        patience: float,
    ) -> Iterator[tuple[str, Trained[Result] | Failure]]:
        """Ask for trainings or statistics; `name`: of the arrays in the answer."""
        requests = self._requests(message_type, work)
        for site, reply in self.exchange.stream(requests, expected, deadline, patience=patience):
            down = requests[site].bytes
            if isinstance(reply, Failure):
                yield site, replace(reply, bytes_down=down)
                continue
            try:
                if name not in reply.arrays:
                    raise WeightsError("there are no arrays in it")
                model = self._tensors(reply.arrays[name], work[site].task)
            except WeightsError as error:
                reason = f"site '{site}' sent a {name} that can't be used: {error}"
                yield site, Failure(reason, reply.seconds, bytes_down=down, bytes_up=reply.bytes)
                continue
            yield site, Trained(reply.body, model, reply.seconds, down, reply.bytes)

    def _requests(self, message_type: str, work: Mapping[str, Work[Task]]) -> dict[str, Request]:
        """Return what the sites are sent."""
        packed, requests = _Packed(), {}
        for site, one in work.items():
            task = one.task.model_copy(update={"simulated": self.exchange.members[site].simulated})
            requests[site] = Request(message_type, task, packed.of(one))
        return requests

    def _tensors(self, arrays: ArrayRecord, task: LinkTask | StudentTask | EvaluateTask | StatisticsTask) -> StateDict:
        """Return the model of which the part that was trained came; of a statistics task, the sums."""
        architecture = task.architecture
        if isinstance(task, StatisticsTask):
            return from_arrays(arrays, summand_template(task, self.any_card.task))
        base = self._start[1] if self._start and architecture.start else None
        return whole(from_arrays(arrays, travelling_template(architecture)), architecture, base)

    def _scored(self, site: str, task: EvaluateTask, reply: Reply[EvaluateResult] | Failure) -> Scored | Failure:
        if isinstance(reply, Failure):
            return reply
        if reply.body.release == "withhold":
            return Scored(reply.body)
        classes, kind = task.architecture.num_classes, self.any_card.task
        try:
            counts: dict[str, PredictionCounts] = {
                split: counts_from_arrays(reply.arrays[f"counts_{split}"], classes, kind) for split in task.splits
            }
        except (KeyError, WeightsError) as error:
            return Failure(f"site '{site}' sent scores that can't be used: {error}", reply.seconds)
        return Scored(reply.body, counts)
