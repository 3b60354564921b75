"""Secure sums on a real SuperLink with TLS and node authentication, of five hospitals of which some die in the middle of one.

A hospital dies as it does when the power goes: SIGKILL to its SuperNode and all that this has started, at the very message of a
round. What the sums come to is compared with what hospitals on the same images send in the open, and all that reaches the
coordinator's process is looked through. `pytest -m deployment tests/deployment/test_drop_outs.py`, about a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flower_deployment import PATIENCE, Deployment, deployed, wait_until
from loopback_grid import LoopbackGrid
from PIL import Image
from safetensors.torch import load_file

from chainward_client.site_key import identity
from chainward_server.results import Results
from chainward_server.run_folder import RunFolder
from chainward_shared.privacy.signing import fingerprint, public_text
from chainward_shared.protocol import (
    Hello,
    MaskedSum,
    SiteCard,
    StatisticsResult,
    StatisticsTask,
    SumKeys,
    SumKeysTask,
    SumShares,
    SumSharesTask,
    SumTask,
    SumUnmasking,
    SumUnmaskTask,
    kind_of,
    unpack,
)
from chainward_shared.secure_sums import fixed_point, flat
from chainward_shared.summands import summand_template
from chainward_shared.weights import from_arrays

pytestmark = pytest.mark.deployment

SITES = ("ash", "birch", "cedar", "dogwood", "elm")
GONE = ("birch", "cedar")
"""As many as may drop out of five: more than half have to be there to the end."""
LEFT = ("ash", "dogwood", "elm")

SETTINGS = {
    "chain.backbone": "test_convnext",
    "chain.laps": 0,
    "chain.head": "statistics",
    "chain.class-balance": "none",
    "chain.compare-alone": False,
    "student.rounds": 0,
    "federation.precision": "fp32",
    "federation.threads": 1,
    "federation.transfer": "full",
}
WAITING = {
    "federation.secure-sums": "on",
    "federation.sites": ",".join(SITES),
    "federation.deadline": 60.0,
    "federation.hop-deadline": 60.0,
    "federation.patience": 10.0,
    "federation.min-complete": 0.6,
}
"""Three of five are enough for a run to be called finished, if the others' part isn't to be made up for."""

ALTERED = Path(__file__).parents[1] / "support" / "altered_processes"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a data file: five hospitals, three classes of 32 px blobs, 60 images each."""
    folder = tmp_path_factory.mktemp("hospitals")
    (folder / "images").mkdir()
    generator, rows = np.random.default_rng(0), ["image,label,patient,split,hospital"]
    for site in SITES:
        for split, count in (("train", 30), ("val", 15), ("test", 15)):
            for number in range(count):
                name, label = f"{site}-{split}-{number}", number % 3
                pixels = generator.normal(90, 25, (32, 32))
                row, column = generator.integers(4, 20, 2)
                size = (10, 6, 10)[label]
                pixels[row : row + size, column : column + size] += (60, 90, -60)[label]
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.png")
                rows.append(f"{name},{'abc'[label]},{name},{split},{site}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    columns = {"image": "image", "label": "label", "patient": "patient", "split": "split", "site": "hospital"}
    description = {"format": "csv", "manifest": "cases.csv", "images": "images", "classes": ["a", "b", "c"]}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(description | {"columns": columns, "image": {"size": 32, "channels": 1}}))
    return path


@dataclass
class InTheOpen:
    """What the same hospitals send where sums are not secure, and the head that follows from those of some."""

    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    heads: dict[tuple[str, ...], dict[str, torch.Tensor]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def in_the_open(data, tmp_path_factory, coordinated) -> InTheOpen:
    """Found in this process, without Flower."""
    found = InTheOpen()
    for sites in (SITES, LEFT):
        simulated = {"data.source": str(data), "federation.sites": ",".join(sites)}

        def noted(message, answer):
            reply = answer()
            if kind_of(reply.content) == StatisticsResult.KIND:
                result, arrays = unpack(reply.content, StatisticsResult)
                task, _ = unpack(message.content, StatisticsTask)
                state = from_arrays(arrays["sums"], summand_template(task, "single"))
                found.numbers[result.site] = fixed_point(flat(state), len(SITES))
            return reply

        runs = {"output.dir": str(tmp_path_factory.mktemp("in-the-open"))}
        folder, _ = coordinated(SETTINGS | simulated | runs, LoopbackGrid(1, noted))
        found.heads[sites] = head_of(folder)
    assert sorted(found.numbers) == sorted(SITES)
    return found


def head_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    head = {name: values for name, values in load_file(folder.model_path("chain")).items() if "head.fc" in name}
    assert head
    return head


@dataclass
class Consortium:
    """Five hospitals that know each other's keys and add up in secret, or not at all, and a coordinator whose post is copied."""

    deployment: Deployment
    post: Path

    def run(self, dying: dict[str, str]) -> tuple[RunFolder, list[Path]]:
        """Let a run end in which these hospitals die, each at a kind of message; return its folder, and the post it got."""
        for site in SITES:
            self.make_whole(site)
        for site, kind in dying.items():
            self.order(site).write_text(kind)
        runs, before = len(self.deployment.run_folders()), set(self.post.glob("*.json"))
        self.deployment.submit(SETTINGS | WAITING)
        folder = self.deployment.wait_for_run(count=runs + 1)
        for site in dying:
            assert not self.order(site).exists(), f"{site} never got that message"
            assert not self.deployment.sites[site].running
        return folder, sorted(set(self.post.glob("*.json")) - before)

    def order(self, site: str) -> Path:
        return self.deployment.site_dir(site) / "dies-at"

    def make_whole(self, site: str) -> None:
        """Start a hospital that does not run, again and again: the SuperLink lets it in once it has missed it."""
        service = self.deployment.sites[site]

        def connected() -> bool:
            if not service.running:
                service.stop()
                time.sleep(1)
                service.start()
            return "SuperNode ID:" in service.printed_since_start

        if not service.running:
            wait_until(connected, f"{site} is connected", PATIENCE, self.deployment.logs)

    def asked(self, site: str, run: str) -> list[tuple[str, str]]:
        """What the hospital's own journal says of a run: kinds of messages, and what they were answered with."""
        lines = (self.deployment.site_dir(site) / "state" / "journal.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [(entry["kind"], entry["outcome"]) for entry in entries if entry["run"] == run]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Consortium]:
    """The hospitals, up, at their default terms, but that they give sums in secret alone."""
    post = tmp_path_factory.mktemp("post")
    with deployed(tmp_path_factory.mktemp("secure") / "deployment", data) as deployment:
        path = os.pathsep.join([str(ALTERED), *filter(None, [os.environ.get("PYTHONPATH")])])
        deployment.superlink.environment = {"PYTHONPATH": path, "CHAINWARD_DRILL_POST": str(post)}
        deployment.start_superlink()
        for site in SITES:
            order = str(deployment.site_dir(site) / "dies-at")
            deployment.add_site(site).environment = {"PYTHONPATH": path, "CHAINWARD_DRILL_DIES_AT": order}
        keys = {s: fingerprint(public_text(identity(deployment.site_dir(s) / "state"))) for s in SITES}
        for site in SITES:
            site_yaml = deployment.site_dir(site) / "site.yaml"
            partners = {other: key for other, key in keys.items() if other != site}
            terms = {"secure_sums": {"partners": partners, "required": True}}
            site_yaml.write_text(yaml.safe_dump(yaml.safe_load(site_yaml.read_text()) | terms))
            deployment.start_site(site, online=False)
        for site in SITES:
            deployment.wait_online(site)
        yield Consortium(deployment, post)


def check_head(folder: RunFolder, results: Results, expected: dict[str, torch.Tensor], sites: tuple[str, ...]) -> None:
    """Look whether the sum was that of `sites`, and of nobody else."""
    (record,) = results.heads
    assert (record.secure, tuple(record.sites), record.images) == (True, sites, 30 * len(sites))
    found = head_of(folder)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def check_post(post: list[Path], in_the_open: InTheOpen) -> None:
    """Look whether what reached the coordinator holds the numbers of any single hospital."""
    masked = 0
    for file in post:
        envelope = json.loads(file.read_text())
        assert envelope["others"] == []
        arrays = dict(np.load(file.with_suffix(".npz")))
        if envelope["kind"] != MaskedSum.KIND:
            assert not arrays, envelope["kind"]
            continue
        sent = arrays["sum/int64"].view(np.uint64)
        site = json.loads(envelope["body"])["site"]
        if len(sent) != len(in_the_open.numbers[site]):
            continue  # of scores
        masked += 1
        for numbers in in_the_open.numbers.values():
            assert not np.any(sent == numbers)
        ones = np.unpackbits(sent.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 / (2 * (64 * len(sent)) ** 0.5), (
            "numbers of images are small, masked ones are random bits"
        )
    assert masked
    kinds = {json.loads(file.read_text())["kind"] for file in post}
    known = {Hello, SiteCard, SumKeys, SumShares, MaskedSum, SumUnmasking}
    assert kinds <= {one.KIND for one in known} | {"refusal"}


def test_hospitals_that_die_when_the_sum_is_unmasked_are_in_it(consortium, in_the_open):
    folder, post = consortium.run(dict.fromkeys(GONE, SumUnmaskTask.KIND))
    results = folder.load_results()
    check_head(folder, results, in_the_open.heads[SITES], SITES)
    check_post(post, in_the_open)
    assert not results.heads[0].failed
    assert folder.state.status == "finished", folder.state.reason
    assert tuple(results.final["chain"].together) == LEFT, "the scores, a sum of its own, go over those that are left"


@pytest.mark.parametrize("step", [SumKeysTask, SumSharesTask, SumTask], ids=lambda step: step.KIND)
def test_hospitals_that_die_before_they_have_sent_masked_numbers_are_not_in_the_sum(consortium, in_the_open, step):
    folder, post = consortium.run(dict.fromkeys(GONE, step.KIND))
    results = folder.load_results()
    check_head(folder, results, in_the_open.heads[LEFT], LEFT)
    check_post(post, in_the_open)
    assert sorted(results.heads[0].failed) == sorted(results.heads[0].unreached) == list(GONE)
    assert folder.state.status == "incomplete", "resuming the run may make up for them"
    assert "statistics" in folder.state.reason or "head" in folder.state.reason


def test_a_sum_of_too_few_is_refused_and_nobody_unmasks_it(consortium, in_the_open):
    folder, post = consortium.run(dict.fromkeys((*GONE, "dogwood"), SumTask.KIND))
    assert folder.state.status == "failed"
    assert "there was no secure sum" in folder.state.reason
    assert "chain" not in folder.state.models
    check_post(post, in_the_open)
    for site in ("ash", "elm"):
        kinds = [kind for kind, _ in consortium.asked(site, folder.state.run_id)]
        assert SumTask.KIND in kinds and SumUnmaskTask.KIND not in kinds


def test_after_a_sum_over_all_hospitals_refuse_one_without_a_single_one(consortium, in_the_open):
    folder, post = consortium.run({"birch": SumTask.KIND})
    assert folder.state.status == "failed"
    bodies = [json.loads(json.loads(file.read_text())["body"]) for file in post]
    assert any("the numbers of site 'birch' alone would follow" in body.get("reason", "") for body in bodies)
    unmasked = {body["site"] for body in bodies if "seeds" in body}
    assert unmasked <= {"cedar"}, "it died before it unmasked the sum over all, and one is too few"
    check_post(post, in_the_open)
