"""Which settings a run that is resumed may have otherwise than it had before, and how to write one."""

from __future__ import annotations

import json
import re
from typing import Any

from chainward_shared.config import ConfigScalar, RunConfig, options
from chainward_shared.errors import ConfigError


def as_setting(key: str, value: ConfigScalar) -> str:
    """Return a setting as Flower's ``--run-config`` reads it: as TOML, and no text may hold a quotation mark inside."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}=" + re.sub(r"\\(.)", lambda escape: "\\u0022" if escape[1] == '"' else escape[0], text)


FREE_ON_RESUME = re.compile(
    r"output\..*|federation\.(hop-deadline|deadline|patience|approval-patience|check-every|min-complete)|chain\.(retries|on-failure|on-failure-at)|student\.quorum"
)
"""Keys that may differ between a run and its continuation: they don't decide what is trained."""


RETIRED = {"chain.accept": "all", "chain.release": "last", "chain.cycle": "link"}
"""Keys that runs of earlier builds have, each with the value that says what all runs do now."""


def without_retired(tables: dict[str, Any]) -> list[str]:
    """Take keys and values that are gone out of a stored configuration; return those that said something else than all runs do
    now."""
    other = []
    chain = tables.get("chain")
    if isinstance(chain, dict) and chain.get("refit") == "laps":
        chain["refit"] = "end"
        other.append("chain.refit = 'laps'")
    for key, usual in RETIRED.items():
        table, _, name = key.partition(".")
        of = tables.get(table)
        value = of.pop(name, usual) if isinstance(of, dict) else usual
        if value != usual:
            other.append(f"{key} = {value!r}")
    return other


def reconciled(stored: RunConfig, given: RunConfig) -> RunConfig:
    """Return the stored configuration with the free keys of the given one."""
    old, new = stored.to_flat(), given.to_flat()
    defaults = {option.key: option.default for option in options()}
    problems = [
        f"{key} = {new[key]!r}, but the run was started with {old[key]!r}"
        for key in old
        if new[key] != old[key] and new[key] != defaults[key] and not FREE_ON_RESUME.fullmatch(key)
    ]
    if problems:
        raise ConfigError(
            f"a resumed run keeps its configuration: {' | '.join(problems)}; leave the key out, or start anew"
        )
    return RunConfig.from_flat({**old, **{key: new[key] for key in old if FREE_ON_RESUME.fullmatch(key)}})
