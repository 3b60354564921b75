"""A run never pretends: what makes it incomplete, and what a resumed run does again."""

from __future__ import annotations

import pytest

from chainward_server.completeness import mending, shortfalls, unreached_work
from chainward_server.results import (
    AloneRecord,
    DataSummary,
    HeadRecord,
    LinkRecord,
    Results,
    SiteScores,
    SiteSummary,
    StudentRound,
)
from chainward_shared.config import RunConfig
from chainward_shared.evaluation.scores import Scores
from chainward_shared.hops import link_head_key

SITES = [f"site-{number}" for number in range(1, 7)]
SCORES = Scores(n=3, accuracy=0.5, balanced_accuracy=0.5, macro_auc=0.5, ece=0.1)


def link(site: str, status="done", step=None, **more) -> LinkRecord:
    step = SITES.index(site) if step is None else step
    costs = {"attempts": 1, "seconds": 1.0, "bytes_down": 0, "bytes_up": 0}
    return LinkRecord(strand=0, lap=0, step=step, site=site, predecessor=None, status=status, **costs, **more)


def round_of(number: int, sites, **more) -> StudentRound:
    return StudentRound(round=number, stage="distil", sites=list(sites), seconds=1.0, bytes_down=0, bytes_up=0, **more)


def results(links=None, alone=SITES, rounds=(SITES,), scored=SITES) -> Results:
    """Return the results of a run of six sites, all of which did everything unless told."""
    data = DataSummary(
        source="phantoms",
        synthetic=True,
        classes=["a", "b"],
        image_size=32,
        channels=1,
        sites=[SiteSummary(site=site, train=9, val=3, test=3) for site in SITES],
    )
    made = Results(run_id="20260131-101112-ab12", seed=0, data=data)
    made.links = [link(site) for site in SITES] if links is None else links
    made.alone = [AloneRecord(site=site, status="done", seconds=1.0) for site in alone]
    made.student_rounds = [round_of(number, sites) for number, sites in enumerate(rounds, 1)]
    made.final = {"chain": SiteScores(sites=dict.fromkeys(scored, SCORES), pooled=SCORES)}
    return made


def config(**settings) -> RunConfig:
    return RunConfig.from_flat({key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()})


def lost(*sites: str):
    return [link(site, "skipped", unreached=True) if site in sites else link(site) for site in SITES]


def skipped(*sites: str):
    return [link(site, "skipped") if site in sites else link(site) for site in SITES]


def test_a_run_in_which_all_succeeded_lacks_nothing():
    assert shortfalls(results(), config()) == []


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (results(links=skipped("site-3", "site-4")), "4 of 6 hops of the chain succeeded"),
        (results(links=skipped("site-3", "site-4")), "4 of 6 sites trained a link"),
        (results(alone=SITES[:1]), "1 of 6 hospitals trained alone"),
        (results(rounds=(SITES, SITES[:3])), "3 of 6 sites took part in student round 2"),
        (results(scored=SITES[:4]), "4 of 6 sites with test images scored the model of the chain"),
    ],
)
def test_less_than_the_stated_share_of_any_kind_of_work_makes_a_run_incomplete(made, words):
    found = "; ".join(shortfalls(made, config()))
    assert words in found and "federation.min-complete asks for 75%" in found
    assert shortfalls(made, config(federation__min_complete=0.1)) == []


@pytest.mark.parametrize("share", [0.8, 5 / 6])
def test_a_share_that_is_just_reached_is_enough(share):
    assert shortfalls(results(links=skipped("site-3")), config(federation__min_complete=share)) == []
    assert shortfalls(results(links=skipped("site-3")), config(federation__min_complete=0.84)) != []


def test_a_single_site_that_was_not_reached_makes_a_run_incomplete_whatever_the_share():
    found = shortfalls(results(links=lost("site-3")), config(federation__min_complete=0.0))
    assert found == ["not reached, and to be made up for: strand-0-lap-0-step-2"]


def test_a_hop_that_was_made_up_for_is_not_missing():
    made = results(links=[*lost("site-3"), link("site-3", step=6)])
    assert shortfalls(made, config(federation__min_complete=1.0)) == []
    assert mending(made, private=False).make_up == ()


def test_private_sites_are_not_missed_where_hospitals_train_alone():
    made = results(alone=SITES[2:])
    assert shortfalls(made, config(federation__min_complete=1.0), frozenset(SITES[:2])) == []


def test_hops_that_nothing_followed_are_done_again_in_their_own_place():
    todo = mending(results(links=lost("site-3", "site-4", "site-5", "site-6")), private=False)
    assert todo.make_up == ()
    assert {f"strand-0-lap-0-step-{step}" for step in (2, 3, 4, 5)} < todo.again
    assert "student-round-1" in todo.again  # it came out of another chain


def test_a_hop_that_others_followed_is_made_up_for_at_the_end():
    todo = mending(results(links=lost("site-3")), private=False)
    assert todo.make_up == ("strand-0-lap-0-step-2",)
    assert todo.again == {"student-round-1"}


def test_what_a_site_answered_badly_is_not_done_again():
    assert mending(results(links=skipped("site-3", "site-6")), private=False).again == frozenset()


def test_a_hospital_alone_that_was_not_reached_is_trained_again_and_nothing_else():
    made = results()
    made.alone[2].unreached = True
    assert mending(made, private=False).again == {"alone-site-3"}


def test_all_rounds_are_repeated_where_one_did_not_reach_a_site():
    made = results(rounds=(SITES, SITES[:5]))
    made.student_rounds[1].unreached = ["site-6"]
    assert mending(made, private=False).again == {"student-round-1", "student-round-2"}


def test_nothing_that_was_paid_for_with_privacy_is_trained_anew():
    made = results(links=lost("site-6"))
    assert mending(made, private=True).again == frozenset()
    made.student_rounds = []
    assert mending(made, private=True).again == {"strand-0-lap-0-step-5"}


def head(key: str, sites=SITES, unreached=()) -> HeadRecord:
    counts = {"images": 9, "validation": 3, "seconds": 1.0, "bytes_down": 0, "bytes_up": 0}
    return HeadRecord(key=key, sites=list(sites), unreached=list(unreached), **counts)


def test_a_statistics_round_with_too_few_sites_makes_a_run_incomplete():
    found = results()
    found.heads = [head("head-start"), head("head", SITES[:4])]
    assert any("4 of 6 sites took part in statistics round 'head'" in what for what in shortfalls(found, config()))
    found.heads = [head("head-start"), head("head", SITES[:5])]
    assert shortfalls(found, config()) == []


def test_the_last_head_is_computed_anew_where_a_site_was_not_reached_for_it_or_the_chain_changes():
    found = results()
    found.heads = [head("head-start", SITES[:5], SITES[5:]), head("head", SITES[:5], SITES[5:])]
    again = mending(found, private=False).again
    assert {"head", "student-round-1"} <= again
    assert "head-start" not in again, "links have begun at it"
    assert any("head" in what for what in shortfalls(found, config()))
    found.heads = [head("head")]
    assert "head" not in mending(found, private=False).again
    found.links = lost(SITES[5])
    assert "head" in mending(found, private=False).again


def test_a_head_that_nothing_was_trained_from_is_computed_anew_where_a_site_was_not_reached_for_it():
    found = results(links=[], rounds=[])
    found.heads = [head("head-start", SITES[:5], SITES[5:])]
    assert mending(found, private=False).again == {"head-start"}
    found.links = [link(SITES[0], "skipped")]
    assert mending(found, private=False).again == {"head-start"}, "a link that left nothing was not trained from it"
    found.links = [link(SITES[0])]
    assert "head-start" not in mending(found, private=False).again


def test_the_head_after_the_last_link_is_computed_anew_and_none_that_a_link_followed():
    found = results(links=[link(SITES[0]), link(SITES[1])])
    keys = [link_head_key(one.key) for one in found.links]
    found.heads = [head("head-start"), *(head(key, SITES[:5], SITES[5:]) for key in keys)]
    again = mending(found, private=False).again
    assert keys[1] in again and keys[0] not in again
    assert "student-round-1" in again, "it came out of a chain that changes"


def test_the_students_head_is_computed_anew_where_a_site_was_not_reached_for_it_or_a_round():
    found = results()
    found.heads = [head("head-student", SITES[:5], SITES[5:])]
    assert "head-student" in unreached_work(found)
    assert mending(found, private=False).again == {"head-student"}
    found.heads = [head("head-student")]
    assert "head-student" not in mending(found, private=False).again
    found.student_rounds[0].unreached = [SITES[5]]
    assert "head-student" in mending(found, private=False).again
