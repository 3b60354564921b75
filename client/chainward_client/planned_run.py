"""The run that a coordinator means to start, as a site looks at it before it starts: `--plan` of the site's tools."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainward_shared.config import ConfigScalar, RunConfig
from chainward_shared.errors import ConfigError

_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")
_FORMS = "expected a TOML file, or KEY=VALUE pairs as of `flwr run --run-config`"


def read_plan(text: str) -> RunConfig:
    """Return the run configuration that `text` is, or names.

    Parameters
    ----------
    text : path of a TOML file (a Flower app's ``pyproject.toml``, the ``config.toml`` of a run folder, or a file for
        ``flwr run --run-config``), or pairs such as ``"privacy.mode='dp-sgd' privacy.epsilon=4"``

    Raises
    ------
    ConfigError
        It can't be read, or a key is unknown or out of range.
    """
    path = Path(text).expanduser()
    if text.endswith(".toml"):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--plan {path}: can't be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"--plan {path}: not a TOML file ({' '.join(str(error).split())})") from error
        app = content.get("tool", {})
        for key in ("flwr", "app"):
            app = app.get(key, {}) if isinstance(app, dict) else {}
        if isinstance(app, dict) and "config" in app:
            content = app["config"]
    else:
        content = _pairs(text)
    return RunConfig.from_flat(dict(_flat(content)))


def _pairs(text: str) -> dict[str, Any]:
    found = _PAIR.findall(text)
    rest = _PAIR.sub("", text).split()
    if not found or rest:
        raise ConfigError(f"--plan: found {(rest or [text])[0]!r}; {_FORMS}")
    content: dict[str, Any] = {}
    for key, value in found:
        try:
            content[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise ConfigError(
                f"--plan: {key} = {value}: not a number, true, false, or text in quotes; {_FORMS}"
            ) from None
    return content


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, ConfigScalar]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            raise ConfigError(f"--plan: {prefix}{key} = {value!r}: expected a number, true, false or text")
