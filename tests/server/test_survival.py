"""A chain that does not break: sites that go, come back, come back as another node, and what is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from safetensors.torch import load_file
from whole_run import CHAIN_ONLY

from chainward_server import exchange
from chainward_server.exchange import Exchange, Member
from chainward_server.request import Reply, Request
from chainward_server.sites import Failure
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, ConfigError
from chainward_shared.identity import signed_hello
from chainward_shared.models import Architecture, skeleton
from chainward_shared.privacy.signing import public_text
from chainward_shared.protocol import (
    AtWork,
    AtWorkRequest,
    CardRequest,
    EvaluateResult,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkResult,
    LinkTask,
    StudentTask,
    kind_of,
    pack,
    unpack,
)
from chainward_shared.weights import digest, from_arrays, to_arrays

SITES = ["ash", "birch", "cedar", "dogwood"]
KEYS = {site: Ed25519PrivateKey.generate() for site in ("ash", "false ash")}
HELLO = HelloRequest(source="phantom", num_sites=0, label_skew=0.0)


@pytest.fixture(autouse=True)
def identity(loopback):
    """Flower knows which run this is, as in its own process."""
    loopback(1)


@pytest.fixture
def chain_only(settings):
    return settings | CHAIN_ONLY | {"chain.retries": 0}


def task_of(message, kind=LinkTask):
    """Return the task in a message and its site; (None, None) for another kind of message."""
    if kind_of(message.content) != kind.KIND:
        return None, None
    task, _ = unpack(message.content, kind)
    return task, SITES[task.simulated.index]


def failing(site, times):
    """Answer for `site` with silence, the first `times` times that it shall train a link."""
    left = [times]

    def interfere(message, answer):
        if task_of(message)[1] == site and left[0] > 0:
            left[0] -= 1
            return Message(pack(Hello(site="not what was asked")), reply_to=message)
        return answer()

    return interfere


def same_chain(first, second):
    """Whether the chains of two run folders are the same, bit for bit."""
    models = [load_file(folder.model_path("chain")) for folder in (first, second)]
    return all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# -- skip, revisit, stop


def test_a_site_that_failed_is_tried_again_at_the_end_of_the_lap(chain_only, coordinated, loopback):
    _, results = coordinated(chain_only | {"chain.on-failure": "revisit"}, loopback(2, failing("birch", 1)))
    assert [(link.site, link.status) for link in results.links] == [
        ("ash", "done"),
        ("birch", "skipped"),
        ("cedar", "done"),
        ("dogwood", "done"),
        ("birch", "done"),
    ]
    assert results.links[-1].predecessor == "dogwood"


def test_every_lap_is_made_up_for_at_its_own_end(chain_only, coordinated, loopback):
    settings = chain_only | {"chain.on-failure": "revisit", "chain.laps": 2}
    _, results = coordinated(settings, loopback(2, failing("birch", 1)))
    assert [link.site for link in results.links if link.status == "done"] == [
        *("ash", "cedar", "dogwood", "birch"),
        *("ash", "birch", "cedar", "dogwood"),
    ]


def test_a_site_that_fails_again_is_not_tried_for_ever(chain_only, coordinated, loopback):
    _, results = coordinated(chain_only | {"chain.on-failure": "revisit"}, loopback(2, failing("birch", 99)))
    assert [link.status for link in results.links if link.site == "birch"] == ["skipped", "skipped"]


def test_each_site_may_have_its_own_rule(chain_only, coordinated, loopback):
    settings = chain_only | {"chain.on-failure-at": "birch=revisit"}
    _, results = coordinated(settings, loopback(2, failing("birch", 1)))
    assert [link.site for link in results.links][-1] == "birch"
    _, results = coordinated(settings, loopback(2, failing("cedar", 1)))
    assert len(results.links) == 4
    with pytest.raises(ChainwardError, match="'stop' at this site"):
        coordinated(chain_only | {"chain.on-failure-at": "cedar=stop"}, loopback(2, failing("cedar", 1)))


def test_a_run_that_was_stopped_after_a_revisit_goes_on_to_the_same_model(chain_only, coordinated, loopback):
    settings = chain_only | {"chain.on-failure": "revisit", "chain.laps": 2}
    whole, _ = coordinated(settings, loopback(2, failing("birch", 1)))
    fail, calls = failing("birch", 1), []

    def stop(message, answer):
        task, site = task_of(message)
        if task is not None and (task.lap, site) == (1, "cedar"):
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
        return fail(message, answer)

    with pytest.raises(KeyboardInterrupt):
        coordinated(settings, loopback(2, stop))
    (name,) = {path.name for path in whole.path.parent.iterdir()} - {whole.path.name}
    resumed, results = coordinated(settings | {"output.resume": name}, loopback(2, fail))
    assert len(results.links) == 9
    assert same_chain(resumed, whole)


@pytest.mark.parametrize("text", ["birch", "birch=wait", "=stop", "birch=stop cedar=skip"])
def test_rules_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="expected SITE=skip, SITE=revisit or SITE=stop"):
        RunConfig.from_flat({"chain.on-failure-at": text})


def test_a_round_below_the_quorum_stops_the_run_which_can_be_resumed(settings, coordinated, loopback):
    settings |= {"student.quorum": 4, "chain.epochs": 1, "chain.compare-alone": False, "chain.retries": 0}
    settings |= {"student.rounds": 1, "student.finetune-rounds": 0, "federation.hop-deadline": 1.5}

    def silent(message, answer):
        return None if task_of(message, StudentTask)[1] == "cedar" else answer()

    with pytest.raises(ChainwardError, match=r"3 of 4 sites finished it, student.quorum is 4; site 'cedar'"):
        coordinated(settings, loopback(2, silent))
    folder = next(iter(Path(settings["output.dir"]).iterdir()))
    settings["federation.hop-deadline"] = 30.0
    _, results = coordinated(settings | {"output.resume": folder.name}, loopback(2))
    assert all(len(round_.sites) == 4 for round_ in results.student_rounds)


# -- weights that moved implausibly


def test_a_model_that_moved_implausibly_is_refused_and_survived(chain_only, coordinated, loopback):
    def swollen(message, answer):
        reply = answer()
        if task_of(message)[1] == "birch":
            body, arrays = unpack(reply.content, LinkResult)
            task, _ = unpack(message.content, LinkTask)
            template = skeleton(task.architecture).state_dict()
            state = {name: tensor * 50 for name, tensor in from_arrays(arrays["model"], template).items()}
            reply.content = pack(body.model_copy(update={"digest": digest(state)}), {"model": to_arrays(state)})
        return reply

    _, results = coordinated(chain_only, loopback(2, swollen))
    assert results.links[1].status == "skipped"
    assert "times their former length away" in results.links[1].reason
    assert "chain.max-drift allows 10" in results.links[1].reason


# -- sites that are not connected


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(exchange.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(exchange.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


class Nodes:
    """A grid whose nodes come and go by the clock: each is connected within its times, and says who it is."""

    def __init__(self, clock, nodes):
        self.clock, self.nodes, self.asked, self.replies = clock, nodes, [], {}

    def get_node_ids(self):
        return [node for node, (_, start, end) in self.nodes.items() if start <= self.clock.now < end]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = f"message-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = name
            self.asked.append((round(self.clock.now), message.metadata.dst_node_id, kind_of(message.content)))
            site = self.nodes[message.metadata.dst_node_id][0]
            hello = Hello(site=site.removeprefix("false "))
            if kind_of(message.content) == HelloRequest.KIND and site in KEYS:
                request, node = unpack(message.content, HelloRequest)[0], message.metadata.dst_node_id
                hello = signed_hello(hello, KEYS[site], nonce=request.nonce, node=node)
            self.replies[name] = Message(pack(hello), reply_to=message)
            ids.append(name)
        return ids

    def pull_messages(self, ids):
        return [self.replies.pop(name) for name in ids if name in self.replies]


def test_however_many_sites_have_answered_few_answers_are_in_memory_at_once(monkeypatch):
    """Each may be a model: those of fifty hospitals, fetched together, would not fit."""
    sites = {f"site-{number}": number for number in range(1, 12)}
    grid = Nodes(Clock(monkeypatch), {number: (site, 0, 999) for site, number in sites.items()})
    pulled, pull = [], grid.pull_messages
    grid.pull_messages = lambda ids: pulled.append(len(ids)) or pull(ids)
    talk = Exchange(grid, {site: Member(site, number) for site, number in sites.items()})
    answers = talk.ask(dict.fromkeys(sites, Request("query", CardRequest())), Hello, deadline=60.0)
    assert [answers[site].body.site for site in sites] == list(sites)
    assert max(pulled) == exchange.PULLED_AT_ONCE < len(sites)


def outcome(monkeypatch, nodes, patience, *, hello=HELLO):
    clock = Clock(monkeypatch)
    grid = Nodes(clock, nodes)
    talk = Exchange(grid, {"ash": Member("ash", 1, key=public_text(KEYS["ash"]))}, hello)
    answers = talk.ask({"ash": Request("query", CardRequest())}, Hello, deadline=60.0, patience=patience)
    return answers["ash"], clock.now, grid, talk


def test_a_site_that_comes_back_within_the_patience_is_asked_then(monkeypatch):
    answer, now, _, _ = outcome(monkeypatch, {1: ("ash", 90, 999)}, 300.0)
    assert isinstance(answer, Reply)
    assert 90 <= now < 92


def test_a_site_that_does_not_come_back_has_failed_after_the_patience(monkeypatch):
    answer, now, _, _ = outcome(monkeypatch, {1: ("ash", 999, 9999)}, 300.0)
    assert isinstance(answer, Failure)
    assert answer.reason == "site 'ash' is not connected (waited 300 s, federation.patience)"
    assert 300 <= now < 302


def test_without_patience_a_site_that_is_not_connected_has_failed_at_once(monkeypatch):
    answer, now, _, _ = outcome(monkeypatch, {1: ("ash", 999, 9999)}, 0.0)
    assert isinstance(answer, Failure)
    assert now == 0.0


def test_a_site_that_comes_back_as_another_node_is_recognised(monkeypatch):
    answer, _, grid, talk = outcome(monkeypatch, {1: ("ash", 999, 9999), 7: ("ash", 40, 9999)}, 300.0)
    assert isinstance(answer, Reply)
    assert talk.members["ash"].node_id == 7
    assert [(node, kind) for _, node, kind in grid.asked] == [(7, "hello-request"), (7, "card-request")]


@pytest.mark.parametrize("who", ["false ash", "false ash without a key"])
def test_another_node_that_says_the_name_of_an_absent_site_is_refused_by_name(monkeypatch, caplog, who):
    name = "false ash" if who == "false ash" else "ash"
    if who != "false ash":
        monkeypatch.setitem(KEYS, "ash", KEYS["ash"])
        monkeypatch.setattr(exchange, "proven_key", lambda hello, **asked: None)
    nodes = {1: ("ash", 100, 9999), 7: (name, 0, 9999)}
    answer, now, grid, talk = outcome(monkeypatch, nodes, 300.0)
    assert isinstance(answer, Reply)
    assert talk.members["ash"].node_id == 1
    assert now >= 100, "the rightful one is waited for"
    assert [node for _, node, _ in grid.asked] == [7, 1]
    assert "node 7 says that it is site 'ash' and can't show that site's key" in caplog.text


def test_another_sites_node_is_asked_once_and_left_alone(monkeypatch):
    nodes = {1: ("ash", 100, 9999), 7: ("oak", 0, 9999)}
    answer, _, grid, talk = outcome(monkeypatch, nodes, 300.0)
    assert isinstance(answer, Reply)
    assert [node for _, node, _ in grid.asked] == [7, 1]
    assert talk.members["ash"].node_id == 1


def test_in_a_simulation_no_node_is_asked_who_it_is(monkeypatch):
    answer, _, grid, _ = outcome(monkeypatch, {7: ("ash", 0, 9999)}, 3.0, hello=None)
    assert isinstance(answer, Failure)
    assert grid.asked == []


def test_a_repeated_lap_without_failures_is_what_it_was_without_the_rule(chain_only, coordinated, finished_chain):
    second, _ = coordinated(chain_only | {"chain.on-failure": "revisit"})
    assert same_chain(finished_chain.folder, second)


# -- requests that get lost on their way, or with the process that had them


class Restarted:
    """A grid with one site, whose fate each request meets in turn: seconds until it is answered; None: its process is gone;
    an error: Flower's. `at_work`: what the site says when it is asked whether anybody is."""

    def __init__(self, clock, fates, at_work=False):
        self.clock, self.fates, self.at_work, self.tasks, self.answers = clock, list(fates), at_work, [], {}
        self.questions = 0

    def get_node_ids(self):
        return [1]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = f"message-{len(self.answers)}"
            ids.append(name)
            message.metadata.__dict__["_message_id"] = name
            if kind_of(message.content) == AtWorkRequest.KIND:
                self.questions += 1
                self.answers[name] = (
                    self.clock.now + 4,
                    self._reply(message, AtWork(site="ash", at_work=self.at_work)),
                )
                continue
            fate = self.fates[len(self.tasks)]
            self.tasks.append(self.clock.now)
            if isinstance(fate, Error):
                self.answers[name] = (self.clock.now + 1, Message(fate, reply_to=message))
            else:
                scores = EvaluateResult(site=f"answer {len(self.tasks)}", scores={})
                self.answers[name] = (self.clock.now + (1e9 if fate is None else fate), self._reply(message, scores))
        return ids

    def _reply(self, message, body):
        return Message(pack(body), reply_to=message)

    def pull_messages(self, ids):
        there = [name for name in ids if self.answers[name][0] <= self.clock.now]
        return [self.answers[name][1] for name in there]


def scored(monkeypatch, fates, *, check_every=120.0, at_work=False, deadline=7200.0):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 1.0)
    grid = Restarted(clock, fates, at_work)
    talk = Exchange(grid, {"ash": Member("ash", 1)}, HELLO, check_every=check_every)
    architecture = Architecture(name="test_convnext", num_classes=2, in_chans=1, image_size=32)
    task = EvaluateTask(run_id="a", architecture=architecture, splits=["val"], threads=1, digest="0" * 64)
    outcomes = list(talk.stream({"ash": Request("evaluate", task)}, EvaluateResult, deadline))
    assert [site for site, _ in outcomes] == ["ash"]
    return outcomes[0][1], grid, clock.now


def test_what_a_restarted_site_was_asked_for_is_asked_again_long_before_the_deadline(monkeypatch):
    answer, grid, now = scored(monkeypatch, [None, 5])
    assert answer.body.site == "answer 2"
    assert grid.questions == 2
    assert 240 < now < 270


def test_a_site_that_says_it_is_at_work_is_left_to_it(monkeypatch):
    answer, grid, now = scored(monkeypatch, [3600], at_work=True)
    assert answer.body.site == "answer 1"
    assert len(grid.tasks) == 1
    assert 25 < grid.questions < 32
    assert now < 3603


def test_an_answer_on_a_slow_line_counts_although_it_was_asked_for_again(monkeypatch):
    answer, grid, now = scored(monkeypatch, [400, 400])
    assert answer.body.site == "answer 1"
    assert len(grid.tasks) == 2
    assert now < 403


def test_a_request_is_sent_three_times_at_most(monkeypatch):
    answer, grid, now = scored(monkeypatch, [None, None, None])
    assert answer.reason == "site 'ash' did not answer within 7200 s"
    assert len(grid.tasks) == 3
    assert now > 7200


def test_nobody_is_asked_whether_he_works_where_that_is_switched_off(monkeypatch):
    answer, grid, _ = scored(monkeypatch, [None], check_every=0.0)
    assert isinstance(answer, Failure)
    assert grid.questions == 0


def test_a_request_that_flower_could_not_deliver_is_sent_again(monkeypatch):
    gone = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="Node Unavailable")
    answer, grid, now = scored(monkeypatch, [gone, 5])
    assert answer.body.site == "answer 2"
    assert now < 20
    answer, grid, _ = scored(monkeypatch, [gone, gone, gone])
    assert answer.reason == "site 'ash' failed: Node Unavailable (Flower error 5)"
    assert len(grid.tasks) == 3


def test_an_exception_at_a_site_is_no_lost_request(monkeypatch):
    answer, grid, _ = scored(monkeypatch, [Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="KeyError: 3")])
    assert isinstance(answer, Failure)
    assert len(grid.tasks) == 1
