"""The chain's own decisions in a whole run: its order by score, the guard against forgetting, and merged strands."""

from __future__ import annotations

import json

import pytest
import torch
from in_process_run import equal
from safetensors.torch import load_file

from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError
from chainward_shared.protocol import StudentTask, kind_of, unpack
from chainward_shared.weights import rounded


def model(folder: RunFolder, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder.model_path(name))


def stopped_after(hops: int):
    """Stop the run after so many links, as a crash would."""
    left = [hops]

    def interfere(message, answer):
        if kind_of(message.content) == "link-task":
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        return answer()

    return interfere


def test_the_next_site_is_the_weakest_of_those_not_yet_visited(chain_only, coordinated):
    _, results = coordinated(chain_only | {"chain.order": "weakest-next", "chain.laps": 2})
    for lap in (0, 1):
        remaining = ["ash", "birch", "cedar", "dogwood"]
        for link in (link for link in results.links if link.lap == lap):
            before = results.links[results.links.index(link) - 1] if link is not results.links[0] else None
            if before is not None:
                weakest = min(remaining, key=lambda s: before.metrics.validation_sites[s].balanced_accuracy)
                assert link.site == weakest
            remaining.remove(link.site)
        assert not remaining


def test_an_order_by_score_is_kept_when_the_run_is_resumed(chain_only, coordinated, loopback, tmp_path):
    settings = chain_only | {"chain.order": "weakest-next"}
    whole, _ = coordinated(settings)
    config = RunConfig.from_flat(settings | {"output.dir": str(tmp_path / "second")})
    folder = RunFolder.create(config)
    with pytest.raises(KeyboardInterrupt):
        from chainward_server.app import coordinate

        coordinate(loopback(2, stopped_after(2)), folder)
    resumed, _ = coordinated({"output.dir": str(tmp_path / "second"), "output.resume": folder.state.run_id})
    assert equal(model(whole, "chain"), model(resumed, "chain"))


def test_a_link_that_makes_the_model_forget_is_refused_on_figures_and_the_chain_goes_on_from_its_predecessor(
    chain_only, coordinated, finished_chain
):
    free, before = finished_chain.folder, finished_chain.results
    drops = [
        sum(
            one.metrics.validation_sites[site].balanced_accuracy - two.metrics.validation_sites[site].balanced_accuracy
            for site in [link.site for link in before.links[: i + 1]]
        )
        / (i + 1)
        for i, (one, two) in enumerate(zip(before.links, before.links[1:], strict=False))
    ]
    assert max(drops) > 0, "the test needs a chain in which a link forgets something"
    first = next(i for i, drop in enumerate(drops) if drop > 0) + 1
    guarded, after = coordinated(chain_only | {"chain.max-forgetting": max(0.0, drops[first - 1] - 1e-6)})
    refused = after.links[first]
    assert refused.status == "refused"
    assert refused.metrics is None
    assert "of the sites before it from" in refused.reason
    assert "chain.max-forgetting" in refused.reason
    assert f"strand-0-lap-0-step-{first}" not in guarded.state.models
    if first + 1 < len(after.links):
        assert after.links[first + 1].predecessor == before.links[first - 1].site
    assert equal(model(guarded, f"strand-0-lap-0-step-{first - 1}"), model(free, f"strand-0-lap-0-step-{first - 1}"))
    assert json.loads((guarded.path / "metrics.json").read_text())["links"][first]["status"] == "refused"


def test_strands_that_are_averaged_yield_the_mean_of_their_last_models(chain_only, coordinated):
    folder, _ = coordinated(chain_only | {"chain.strands": 2, "chain.merge": "average"})
    ends = [model(folder, f"strand-{strand}-lap-0-step-3") for strand in (0, 1)]
    for name, tensor in model(folder, "chain").items():
        mean = rounded({name: (ends[0][name] + ends[1][name]) / 2})[name]
        assert torch.equal(tensor, mean), "the mean, as it travels"


def test_the_students_of_an_ensemble_are_taught_by_every_strand(settings, coordinated, loopback):
    grid = loopback(2)
    settings |= {"chain.strands": 2, "chain.merge": "ensemble", "student.large-weight": 1.0, "chain.epochs": 1}
    few = {"federation.sites": "ash,birch", "student.rounds": 1, "chain.compare-alone": False}
    coordinated(settings | few, grid)
    tasks = [unpack(m.content, StudentTask) for m in grid.sent if kind_of(m.content) == StudentTask.KIND]
    large = [sorted(name for name in arrays if name.startswith("large")) for task, arrays in tasks]
    stages = [task.recipe.stage for task, _ in tasks]
    assert all(
        names == (["large_0", "large_1"] if stage == "distil" else [])
        for names, stage in zip(large, stages, strict=True)
    )
    assert "distil" in stages


def test_nothing_is_merged_where_every_link_failed(chain_only, coordinated, loopback):
    def broken(message, answer):
        return None if kind_of(message.content) == "link-task" else answer()

    with pytest.raises(ChainwardError, match="no link of the chain succeeded"):
        coordinated(
            chain_only | {"chain.strands": 2, "chain.merge": "average", "federation.hop-deadline": 0.2},
            loopback(2, broken),
        )
