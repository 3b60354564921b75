"""No file and no function is longer than a reader holds in mind."""

from __future__ import annotations

import ast

import pytest
from house import PACKAGES, REPOSITORY, parsed, sources

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50
"""Without its docstring: parameters, units and errors are to be said at length."""


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has, from ``def`` on, without its docstring."""
    assert function.end_lineno is not None
    whole, first = function.end_lineno - function.lineno + 1, function.body[0]
    if ast.get_docstring(function) is None:
        return whole
    assert first.end_lineno is not None
    return whole - (first.end_lineno - first.lineno + 1)


def functions() -> dict[str, int]:
    """Return the lines of every function; of several that share a name in a file, of the longest."""
    found: dict[str, int] = {}
    for path in (path for package in PACKAGES for path in sources(package)):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(REPOSITORY)}:{node.name}"
                found[name] = max(found.get(name, 0), lines(node))
    return found


def too_long(found: dict[str, int], most: int) -> dict[str, int]:
    """Return what is longer than it may be."""
    return {name: count for name, count in found.items() if count > most}


def test_no_file_is_longer_than_400_lines():
    found = {
        str(path.relative_to(REPOSITORY)): len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in sources(package)
    }
    assert too_long(found, MOST_LINES_OF_A_FILE) == {}


def test_no_function_is_longer_than_50_lines_without_its_docstring():
    assert too_long(functions(), MOST_LINES_OF_A_FUNCTION) == {}


@pytest.mark.parametrize("field", ["temperature_decay", "attention_weight"])
def test_a_field_of_a_recipe_is_named_where_it_is_declared_and_where_it_is_used(field):
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for package in ("chainward_shared", "chainward_client", "chainward_server")
        for path in sources(package)
        if field in path.read_text(encoding="utf-8")
    }
    refused_beside_others = {"shared/chainward_shared/config/contradictions.py"}
    assert found - refused_beside_others == {
        "shared/chainward_shared/settings.py",
        "client/chainward_client/training/link.py",
    }


def test_what_is_longer_than_it_may_be_is_told():
    assert too_long({"a": 50, "b": 51}, 50) == {"b": 51}


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("def f():\n    return 1", 2),
        ('def f():\n    """One."""\n    return 1', 2),
        ('def f():\n    """One.\n\n    Two.\n    """\n    return 1', 2),
        ("async def f(\n    x,\n):\n    return 1", 4),
    ],
)
def test_the_lines_of_a_function_are_those_without_its_docstring(body, count):
    (function,) = ast.parse(body).body
    assert lines(function) == count
