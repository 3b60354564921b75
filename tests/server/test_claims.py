"""What a site says is held against what it declared: a lie costs its answer, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from chainward_server.claims import check_card, check_counted, check_looks, check_training
from chainward_shared.errors import ProtocolError
from chainward_shared.evaluation.localisation import LocalisationSums, Moments
from chainward_shared.evaluation.scores import Scores
from chainward_shared.protocol import SiteCard, TrainingLog


def card(**changes: Any) -> SiteCard:
    given: dict[str, Any] = {
        "site": "oak",
        "classes": ["a", "b"],
        "image_size": 32,
        "channels": 1,
        "train": 50,
        "val": 5,
        "test": 6,
        "class_counts": {"train": [20, 30], "test": [3, 3]},
        "synthetic": False,
        "notes": [],
    }
    return SiteCard(**{**given, **changes})


def log(**changes: Any) -> TrainingLog:
    given = {"epochs": 2, "steps": 10, "images": 100, "loss": [1.0, 0.5], "seconds": 3.0, "precision": "fp32"}
    return TrainingLog(**{**given, **changes})


def looks(n: int, lift: float, left_out: int = 0) -> LocalisationSums:
    return LocalisationSums(n=n, left_out=left_out, lift=Moments(sum=n * lift, squares=n * lift**2))


def test_what_an_honest_site_says_is_taken():
    check_card(card())
    check_card(card(task="multilabel", class_counts={"train": [50, 50]}))
    check_training(log(), card(), 2, elapsed=10.0)
    check_counted({"val": Scores(n=5, accuracy=1, balanced_accuracy=1, macro_auc=1, ece=0)}, card())
    check_looks(looks(5, 3.0, left_out=1), card(), 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": 0}, "0 training cases"),
        ({"classes": []}, "of 0 classes"),
        ({"class_counts": {"train": [20]}}, "counts 1 classes"),
        ({"class_counts": {"train": [30, 30]}}, "counts 60 cases"),
        ({"class_counts": {"test": [7, 0]}}, "counts 7 cases"),
        ({"task": "multilabel", "class_counts": {"train": [51, 0]}}, "counts 51 cases"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(changes, said):
    with pytest.raises(ProtocolError, match=said):
        check_card(card(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, "3 epochs; 2 were asked for"),
        ({"seconds": 1000.0}, "1000 s; the run began 10 s ago"),
        ({"loss": [1.0, 1.0, 1.0]}, "3 values of 'loss' for 2 epochs"),
        ({"images": 101}, "101 images; at most 100"),
        ({"unlabelled": 51}, "51 images without labels; at most 50"),
        ({"steps": 101}, "101 steps; at most 100"),
    ],
)
def test_a_training_that_can_not_have_been_is_refused(changes, said):
    with pytest.raises(ProtocolError, match=said):
        check_training(log(**changes), card(), 2, elapsed=10.0)


def test_more_scored_images_than_there_are_are_refused():
    many = Scores(n=7, accuracy=1, balanced_accuracy=1, macro_auc=1, ece=0)
    with pytest.raises(ProtocolError, match="7 images of 'test'; at most 6"):
        check_counted({"test": many}, card())
    withheld = card(val=None, test=None, class_counts={})
    check_counted({"test": many}, withheld)
    with pytest.raises(ProtocolError, match="at most 1500"):
        check_counted({"test": many.model_copy(update={"n": 10**9})}, withheld)


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (looks(7, 1.0), "7 test images"),
        (looks(4, 1.0, left_out=3), "7 test images"),
        (looks(3, 1025.0), "at most 1024"),
        (LocalisationSums(n=3, lift=Moments(sum=3.0, squares=1e9)), "at most 1024"),
    ],
)
def test_attention_that_no_model_can_have_is_refused(sums, said):
    with pytest.raises(ProtocolError, match=said):
        check_looks(sums, card(), 32)
