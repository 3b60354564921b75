"""What a command loads before it answers: PyTorch alone costs two seconds and 500 MB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "timm", "flwr", "ray", "matplotlib", "sklearn", "scipy", "pandas"}

PROGRAM = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from chainward_client.cli import app as site
from chainward_server.run_folder import RunFolder
from chainward_shared.config import RunConfig
from chainward_simulations.cli import app as coordinator

heavy, folder = set(sys.argv[2:]), Path(sys.argv[1])
runs, yaml = folder / "runs", folder / "site.yaml"
run = RunFolder.create(RunConfig.from_flat({"output.dir": str(runs)})).run_id
yaml.write_text("site: alder\\ndata: data.yaml\\nstate: state\\n", encoding="utf-8")
loaded = {}
for app, *words in (
    (coordinator, "--help"),
    (coordinator, "run", "--help"),
    (coordinator, "runs", "--dir", str(runs)),
    (coordinator, "watch", run, "--dir", str(runs), "--timeout", "0.1", "--interval", "0.1"),
    (coordinator, "config", "--toml"),
    (coordinator, "stop", "--dir", str(runs)),
    (site, "--help"),
    (site, "keys", str(yaml)),
    (site, "audit", str(yaml)),
):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    loaded[f"{'chainward-site' if app is site else 'chainward'} {words[0]}"] = sorted(heavy & set(sys.modules))
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_commands_that_train_nothing_answer_without_pytorch_flower_or_matplotlib(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *HEAVY], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1])

    assert len(loaded) == 9
    assert not {command: heavy for command, heavy in loaded.items() if heavy}
