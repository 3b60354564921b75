"""What a local page looks like, and the parts that are put into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Look:
    """What a page shows at one moment. `html`: made by a template that escapes every value; `ended`: nothing more will come."""

    html: str
    ended: bool = False


@cache
def environment(package: str, *filters: Callable[..., object]) -> Environment:
    """Return a template environment that escapes, with the templates of `package` and those that all pages share."""
    loaders: list[BaseLoader] = [PackageLoader(package, "."), PackageLoader("chainward_shared.local_page", ".")]
    made = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({function.__name__: function for function in filters})
    return made


def whole_page(title: str, look: Look, nonce: str, *, seconds: float) -> str:
    """Return the page around what it shows; `nonce`: of its one script and its one style sheet."""
    return (
        environment("chainward_shared.local_page")
        .get_template("shell.html.jinja")
        .render(title=title, look=look, nonce=nonce, milliseconds=round(1000 * seconds))
    )
