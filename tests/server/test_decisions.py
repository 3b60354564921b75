"""Rules that decide on figures."""

from __future__ import annotations

import pytest

from chainward_server.decisions import Forgetting, best_strand, forgetting, weakest_site
from chainward_shared.evaluation.scores import Scores


def scores(value: float | None) -> Scores:
    return Scores(n=10, accuracy=0.9, balanced_accuracy=value, macro_auc=0.9, ece=0.1)


def table(**values: float | None) -> dict[str, Scores]:
    return {site: scores(value) for site, value in values.items()}


def test_the_next_site_is_the_one_where_the_predecessor_is_weakest():
    assert weakest_site(["ash", "birch", "cedar"], table(ash=0.7, birch=0.4, cedar=0.5)) == "birch"


def test_sites_that_were_visited_are_not_chosen_again():
    assert weakest_site(["ash", "cedar"], table(ash=0.7, birch=0.4, cedar=0.5)) == "cedar"


def test_before_the_first_link_and_among_equals_the_given_order_holds():
    assert weakest_site(["birch", "ash"], {}) == "birch"
    assert weakest_site(["birch", "ash"], table(ash=0.5, birch=0.5)) == "birch"


def test_a_site_without_a_score_comes_last():
    assert weakest_site(["ash", "birch"], table(ash=None, birch=0.99)) == "birch"
    assert weakest_site(["ash", "birch"], table(birch=1.0)) == "birch"


def test_forgetting_is_the_mean_loss_over_the_sites_before_the_link():
    before, after = table(ash=0.8, birch=0.6, cedar=0.1), table(ash=0.5, birch=0.7, cedar=0.9)
    found = forgetting(["ash", "birch"], before, after)
    assert found == Forgetting(pytest.approx(0.7), pytest.approx(0.6))
    assert found is not None
    assert found.lost == pytest.approx(0.1)


def test_a_site_that_was_visited_in_two_laps_counts_once():
    once = forgetting(["ash", "birch"], table(ash=0.8, birch=0.6), table(ash=0.2, birch=0.6))
    assert forgetting(["ash", "birch", "ash"], table(ash=0.8, birch=0.6), table(ash=0.2, birch=0.6)) == once


def test_the_first_link_has_nothing_to_forget():
    assert forgetting([], {}, table(ash=0.1)) is None
    assert forgetting(["ash"], table(ash=None), table(ash=0.1)) is None


def test_the_best_strand_has_the_highest_validation_and_the_first_of_equal_ones_wins():
    assert best_strand({0: scores(0.5), 1: scores(0.7), 2: scores(0.6)}) == 1
    assert best_strand({1: scores(0.7), 0: scores(0.7)}) == 0
    assert best_strand({0: scores(None), 1: scores(0.0)}) == 1
