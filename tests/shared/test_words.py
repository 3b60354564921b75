"""Words for a person: lists, and what a refused value looks like in a message."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, Field, ValidationError

from chainward_shared.words import first_line, first_problem, listed, shown


class Inner(BaseModel, extra="forbid"):
    count: int = Field(le=10)


class Outer(BaseModel):
    inner: Inner


@pytest.mark.parametrize(
    ("words", "most", "expected"),
    [
        ([], 0, ""),
        (["a"], 0, "a"),
        (["a", "b"], 0, "a and b"),
        (["a", "b", "c"], 0, "a, b and c"),
        (["a", "b", "c"], 3, "a, b and c"),
        (["a", "b", "c"], 2, "a, b and 1 more"),
    ],
)
def test_words_are_listed_as_a_person_would_and_cut_where_they_are_many(words, most, expected):
    assert listed(words, most) == expected


def test_alternatives_are_listed_with_or():
    assert listed(["a", "b", "c"], last="or") == "a, b or c"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, "7"),
        (-1.5, "-1.5"),
        (10**30, "about 10**30"),
        (-(10**30), "about -10**30"),
        pytest.param(10**4999, "about 10**4999", id="more digits than Python prints"),
        ("a\x1b[31m\u202e", r"'a\x1b[31m\u202e'"),
        ("x" * 10**6, "'" + "x" * 59 + "..."),
    ],
)
def test_a_foreign_value_is_shown_short_and_without_control_characters(value, expected):
    assert shown(value) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"inner": {"count": 11}}, "inner.count: input should be less than or equal to 10, found 11"),
        ({"inner": {}}, "inner.count: field required"),
        ({"inner": {"count": 1, "more": "x"}}, "inner.more: extra inputs are not permitted, found 'x'"),
        (5, "input should be a valid dictionary or instance of Outer, found 5"),
    ],
)
def test_the_first_problem_says_where_what_and_what_was_found(content, expected):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(content)
    assert first_problem(caught.value) == expected


def test_an_error_without_words_is_named_by_its_kind():
    assert first_line(KeyError()) == "KeyError"
    assert first_problem(OSError("first\nsecond")) == "first"
