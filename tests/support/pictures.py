"""A report's pictures, which are drawn for tests of them alone: drawing is a third of a small run's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from markupsafe import Markup

from chainward_server.report import plots

_EMPTY = Markup("<svg></svg>")
_PLACES = {
    (plots, "comparison_plot"): _EMPTY,
    (plots, "curve_plot"): _EMPTY,
    (plots, "reliability_plot"): _EMPTY,
    (plots, "decision_plots"): [_EMPTY],
}
_REAL = {(module, name): getattr(module, name) for module, name in _PLACES}


@contextmanager
def undrawn() -> Iterator[None]:
    """Make reports with an empty picture in place of each."""

    def empty(found: Any) -> Callable[..., Any]:
        return lambda *_: found

    with pytest.MonkeyPatch.context() as patch:
        for (module, name), found in _PLACES.items():
            patch.setattr(module, name, empty(found))
        yield


@contextmanager
def drawn() -> Iterator[None]:
    """Make reports with their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), draw in _REAL.items():
            patch.setattr(module, name, draw)
        yield
