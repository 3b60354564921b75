"""What is generated from the configuration models: `docs/configuration.md`, and the defaults in an app's pyproject.toml."""

from __future__ import annotations

import tomli_w

from chainward_shared.config import RunConfig, options, table_descriptions

HEADER = """# Configuration of a run

Generated from the models in `shared/chainward_shared/config/` and `shared/chainward_shared/settings.py` by
`chainward config --markdown`; a test keeps it true.

Set keys with `flwr run simulations/six_sites --run-config 'chain.laps=2 chain.backbone="convnext_femto"'`, or put them
into a TOML file of your own and name it: `--run-config settings.toml`. A key that the app's `pyproject.toml` lacks is refused
by Flower itself, before Chainward runs, as "Invalid run configuration" and no more: `chainward config 'chain.lap=2'` checks
the same words without a run and names the key and the nearest known one.
"""


def configuration_markdown() -> str:
    """Return docs/configuration.md."""
    lines = [HEADER]
    tables = table_descriptions()
    current = None
    for option in options():
        table = option.key.rpartition(".")[0]
        if table != current:
            current = table
            lines.append(f"\n## `{table}`\n\n{tables[table]}\n" if table else "\n## Top level\n".lstrip("\n"))
            lines.append("| key | default | allowed | meaning |\n| --- | --- | --- | --- |")
        default = f'`"{option.default}"`' if isinstance(option.default, str) else f"`{str(option.default).lower()}`"
        lines.append(f"| `{option.key}` | {default} | {option.allowed} | {option.description} |")
    return "\n".join(lines) + "\n"


def flower_app_config() -> str:
    """Return the tables of ``[tool.flwr.app.config]`` with every key at its default, as TOML."""
    nested = {"tool": {"flwr": {"app": {"config": RunConfig().tables()}}}}
    return tomli_w.dumps(nested)
