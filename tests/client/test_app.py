"""What the client answers, and what it keeps to itself."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from in_process_run import equal

import chainward_client.handlers as handlers
from chainward_client.app import app
from chainward_shared.config import RunConfig
from chainward_shared.models import resolve_architecture, skeleton
from chainward_shared.protocol import (
    AtWorkRequest,
    Body,
    CardRequest,
    EvaluateTask,
    Hello,
    HelloRequest,
    LinkResult,
    LinkTask,
    Refusal,
    SimulatedSite,
    SiteCard,
    StudentTask,
    pack,
    unpack,
)
from chainward_shared.weights import digest, from_arrays, rounded


def ask(content: RecordDict, node_config: dict, message_type: str = "query") -> RecordDict:
    """Return the client's answer."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(content, dst_node_id=7, message_type=message_type)
    context = Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config={})
    return app(message, context).content


@pytest.fixture
def hospital(small_consortium, tmp_path):
    """Node configuration of a deployed hospital."""
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"site": "ash", "data": str(small_consortium), "state": str(tmp_path / "state")}))
    return {"site-config": str(path)}


def simulated(source: str, state_dir: str = "") -> SimulatedSite:
    return SimulatedSite(index=0, source=source, num_sites=0, label_skew=0.0, seed=0, state_dir=state_dir)


def requests(site: SimulatedSite) -> dict[str, tuple[Body, str]]:
    """Return one message of each kind that tells a node which site to play, and the type of the message."""
    config = RunConfig.from_flat({"chain.epochs": 1, "federation.threads": 1})
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    asked = {"architecture": architecture, "simulated": site, "run_id": "r"}
    link, student = config.link_recipe(), config.student_recipe("finetune")
    return {
        "hello": (HelloRequest(source=site.source, num_sites=0, label_skew=0.0), "query"),
        "at work": (AtWorkRequest(run_id="r", task="0" * 64), "query"),
        "card": (CardRequest(simulated=site), "query"),
        "link": (LinkTask(hop="h", strand=0, lap=0, recipe=link, **asked), "train.link"),
        "student": (StudentTask(round=1, recipe=student, student_digest="0" * 64, **asked), "train.student"),
        "scores": (EvaluateTask(splits=["test"], threads=1, digest="0" * 64, **asked), "evaluate"),
    }


def test_a_deployed_hospital_knows_who_it_is_from_its_own_file(hospital):
    hello, _ = unpack(ask(pack(HelloRequest(source="phantom", num_sites=6, label_skew=0.0)), hospital), Hello)
    assert (hello.site, hello.simulated_sites) == ("ash", [])
    card, _ = unpack(ask(pack(CardRequest()), hospital), SiteCard)
    assert (card.site, card.classes, card.synthetic) == ("ash", ["a", "b", "c"], False)


def test_what_is_wrong_with_a_deployed_hospitals_data_stays_in_its_own_log(hospital, tmp_path, caplog):
    (tmp_path / "cases.csv").write_text("image,label,patient,split\nscan-of-mrs-miller,zzz,miller,train\n")
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump(
            {
                "format": "csv",
                "manifest": "cases.csv",
                "classes": ["a", "b"],
                "columns": {"image": "image", "label": "label", "patient": "patient", "split": "split"},
                "image": {"size": 32, "channels": 1},
            }
        )
    )
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"site": "ash", "data": "data.yaml"}))
    answer, _ = unpack(ask(pack(CardRequest()), hospital), Refusal)
    assert "own log" in answer.reason
    for private in ("miller", "zzz", "cases.csv", str(tmp_path)):
        assert private not in answer.reason
    assert "zzz" in caplog.text


@pytest.mark.parametrize(
    ("node_config", "found"),
    [
        ({}, "it has none"),
        ({"partition-id": 0, "num-partitions": 2}, "it has none"),
        ({"site_config": "/etc/site.yaml"}, "it has 'site_config'"),
        ({"site-Config": "/etc/site.yaml"}, "it has 'site-Config'"),
        ({"siteconfig": "/etc/site.yaml", "other": 1}, "it has 'siteconfig'"),
        ({"site-confg": "/etc/site.yaml"}, "it has 'site-confg'"),
        ({"site-config": ""}, "is empty or no text"),
        ({"site-config": True}, "is empty or no text"),
    ],
)
@pytest.mark.parametrize("kind", ["hello", "at work", "card", "link", "student", "scores"])
def test_a_site_that_was_not_told_its_site_yaml_does_nothing_whatever_it_is_told_to_play(
    small_consortium, tmp_path, node_config, found, kind
):
    body, message_type = requests(simulated(str(small_consortium), str(tmp_path / "state")))[kind]
    answer, _ = unpack(ask(pack(body), node_config, message_type), Refusal)
    assert "'site-config' in its node configuration" in answer.reason
    assert found in answer.reason
    assert str(small_consortium.parent) not in answer.reason
    assert "site.yaml" not in answer.reason.replace("/path/to/site.yaml", "")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("kind", ["card", "link", "student", "scores"])
@pytest.mark.parametrize("source", ["phantom", "/etc/passwd", "/no/such"])
def test_a_deployed_hospital_plays_no_simulated_site(hospital, tmp_path, kind, source):
    body, message_type = requests(simulated(source, str(tmp_path / "elsewhere")))[kind]
    answer, _ = unpack(ask(pack(body), hospital, message_type), Refusal)
    assert "'ash' knows who it is" in answer.reason
    assert source not in answer.reason
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_the_deployed_program_holds_no_code_that_plays_a_site():
    code = "import sys, chainward_client.app; print([name for name in sys.modules if 'simul' in name or 'phantom' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [name for name in ast.literal_eval(done.stdout) if name.startswith("chainward")] == []


def test_a_message_of_another_app_is_refused_in_one_line(hospital):
    answer, _ = unpack(ask(RecordDict({"config": ConfigRecord({"lr": 0.1})}), hospital), Refusal)
    assert "envelope" in answer.reason
    assert "\n" not in answer.reason


@pytest.mark.parametrize("transfer", ["half", "full"])
def test_a_link_is_rounded_as_it_travels_before_it_is_stored_and_sent_again_bit_for_bit(
    hospital, monkeypatch, transfer
):
    trained = []
    train_link = handlers.train_link

    def watched(*arguments, **settings):
        state, log = train_link(*arguments, **settings)
        trained.append({name: tensor.clone() for name, tensor in state.items()})
        return state, log

    monkeypatch.setattr(handlers, "train_link", watched)
    config = RunConfig.from_flat({"chain.epochs": 1, "federation.threads": 1, "federation.transfer": transfer})
    architecture = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    task = LinkTask(run_id="r", hop="h", strand=0, lap=0, architecture=architecture, recipe=config.link_recipe())
    first, again = (ask(pack(task), hospital, "train.link") for _ in range(2))
    assert first == again
    (state,) = trained
    assert not equal(rounded(state), state)
    result, arrays = unpack(first, LinkResult)
    received = from_arrays(arrays["model"], skeleton(architecture).state_dict())
    assert equal(received, rounded(state, transfer))
    assert result.digest == digest(received)
