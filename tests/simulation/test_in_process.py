"""The method in one process runs the rules of a deployed run: what is tried again, refused, left out, and scored."""

from __future__ import annotations

import pytest
from in_process_run import equal, run_in_process

from chainward_server.method import run_method
from chainward_shared.config import RunConfig
from chainward_shared.errors import ChainwardError, ModelError, PolicyRefusal
from chainward_shared.models import skeleton
from chainward_simulations import in_process_sites
from chainward_simulations.in_process_sites import InProcessSites
from chainward_simulations.runner import in_process, open_sites


def records_of(flat):
    """Run `flat` in this process and return the links' records."""
    config = RunConfig.from_flat(flat)
    with in_process(config, open_sites(config)) as (run, _):
        run_method(run)
    return run.results.links


def failing(monkeypatch, site, errors):
    """Let the trainings of a site fail with `errors`, one after the other; return how often it was asked."""
    asked, train = [], in_process_sites.train_link

    def fail(data, *rest, **named):
        if data.site == site:
            asked.append(named["lap"])
            if len(asked) <= len(errors):
                raise errors[len(asked) - 1]
        return train(data, *rest, **named)

    monkeypatch.setattr(in_process_sites, "train_link", fail)
    return asked


@pytest.mark.slow
def test_a_model_is_scored_only_where_the_score_decides(chain_only, monkeypatch):
    asked, evaluate = [], InProcessSites.evaluate

    def count(self, work):
        asked.append({one.task.digest for one in work.values()})
        return evaluate(self, work)

    monkeypatch.setattr(InProcessSites, "evaluate", count)
    records_of(chain_only)
    assert asked == []
    records_of(chain_only | {"chain.order": "weakest-next"})
    assert len(asked) == 3, "of the four models of a lap, the last one decides nothing"
    assert all(len(digests) == 1 for digests in asked)


@pytest.mark.parametrize(
    "rules",
    [
        {"chain.order": "weakest-next", "chain.max-forgetting": 0.0, "chain.laps": 2},
        {"chain.strands": 2, "chain.max-forgetting": 0.01},
    ],
)
def test_scores_decide_as_they_do_in_a_deployed_run(chain_only, coordinated, rules):
    flat = chain_only | rules
    folder, results = coordinated(flat)
    assert [(link.key, link.site, link.status) for link in records_of(flat)] == [
        (link.key, link.site, link.status) for link in results.links
    ]
    assert "refused" in {link.status for link in results.links}, "the test needs a link that forgets"
    config = RunConfig.from_flat(flat)
    outcome = run_in_process(config, open_sites(config))
    assert equal(folder.load_model("chain", skeleton(outcome.architecture).state_dict()), outcome.chain)


@pytest.mark.slow
def test_a_site_that_fails_once_is_asked_again_and_trains_the_same_model(chain_only, monkeypatch):
    config = RunConfig.from_flat(chain_only)
    undisturbed = run_in_process(config, open_sites(config))
    asked = failing(monkeypatch, "birch", [ModelError("no luck")])
    assert equal(run_in_process(config, open_sites(config)).chain, undisturbed.chain)
    assert len(asked) == 2


def test_a_site_that_keeps_failing_is_left_out_and_the_reason_is_kept(chain_only, monkeypatch):
    failing(monkeypatch, "birch", [ModelError("the loss became nan")] * 9)
    links = records_of(chain_only)
    assert [link.status for link in links] == ["done", "refused", "done", "done"]
    assert "site 'birch' refused: the loss became nan" in links[1].reason
    assert links[2].predecessor == "ash"


def test_a_site_whose_policy_says_no_is_not_asked_again(chain_only, monkeypatch):
    asked = failing(monkeypatch, "birch", [PolicyRefusal("over the budget")] * 9)
    assert records_of(chain_only)[1].status == "refused"
    assert len(asked) == 1


def test_a_run_that_must_stop_at_a_failed_site_stops(chain_only, monkeypatch):
    failing(monkeypatch, "cedar", [ModelError("no luck")] * 9)
    with pytest.raises(ChainwardError, match="hop 3 of 4"):
        records_of(chain_only | {"chain.on-failure": "stop"})


def test_a_defect_is_not_taken_for_a_failure_of_a_site(chain_only, monkeypatch):
    failing(monkeypatch, "birch", [ZeroDivisionError("a defect")])
    with pytest.raises(ZeroDivisionError):
        records_of(chain_only)


@pytest.mark.slow
def test_a_run_says_after_each_hop_when_it_is_expected_to_end(chain_only, caplog):
    caplog.set_level("INFO", "chainward")
    records_of(chain_only)
    ends = [message.partition("; expected end ")[2] for message in caplog.messages if message.startswith("hop ")]
    assert len(ends) == 4 and "unknown" not in ends
    assert ends[-1].endswith("in 0 s"), "nothing is left to do"


def test_a_site_that_is_asked_the_same_again_gives_the_same_answer_without_training(chain_only):
    config = RunConfig.from_flat(chain_only)
    steps = []
    with in_process(config, open_sites(config), steps.append) as (run, sites):
        from chainward_server.chain import Strand, _link_work
        from chainward_server.schedule import Hop

        work = {"ash": _link_work(run, Hop(0, 0, 0, "ash"), Strand())}
        (first,), (second,) = list(sites.train_links(work)), list(sites.train_links(work))
    assert first is not second
    assert first[1] is second[1]
    assert steps == ["strand-0-lap-0-step-0 ash"]
