"""The packages of the house, which may import which, and what each of their files imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "chainward_shared": REPOSITORY / "shared/chainward_shared",
    "chainward_client": REPOSITORY / "client/chainward_client",
    "chainward_server": REPOSITORY / "server/chainward_server",
    "chainward_simulations": REPOSITORY / "simulations/chainward_simulations",
}
MAY_IMPORT = {
    "chainward_shared": set(),
    "chainward_client": {"chainward_shared"},
    "chainward_server": {"chainward_shared"},
    "chainward_simulations": set(PACKAGES),
}


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imported(path: Path) -> list[str]:
    """Return what a file imports, see `imports`; each file is read once for all tests."""
    return list(imports(parsed(path)))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of each import, wherever in the file it stands, also by ``import_module("...")``.

    "?" stands for a name that is not written out, unless it starts with the module's own.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value).partition(".")[0]
            elif not ast.unparse(name).startswith(("f'{__name__}.", 'f"{__name__}.')):
                yield "?"
