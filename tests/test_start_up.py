"""What a command loads before it answers: PyTorch alone costs two seconds and 500 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chainward_client.approval.record import Approvals
from chainward_server.approvals import run_plan
from chainward_shared.config import RunConfig
from chainward_shared.models import resolve_architecture
from chainward_shared.pretrained.card import WeightsCard

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
yaml.write_text("site: alder\\ndata: data.yaml\\nstate: state\\nruns: ask\\n", encoding="utf-8")
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
    (site, "runs", str(yaml)),
    (site, "watch", str(yaml)),
    (site, "weights", "list", str(yaml)),
    (coordinator, "weights", "list", "--store", str(folder / "state" / "weights")),
):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    assert words[0] not in ("runs", "weights") or "listed-here" in result.output or run in result.output, result.output
    loaded[f"{'chainward-site' if app is site else 'chainward'} {words[0]}"] = sorted(heavy & set(sys.modules))
print(json.dumps(loaded))
"""


def something_to_list(state: Path) -> None:
    """A run that has asked a hospital, and a file of weights."""
    model = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32)
    Approvals(state).ask(run_plan(RunConfig(), "listed-here", [model, model]), lambda: None)
    card = WeightsCard(
        backbone="listed-here",
        sha256="0" * 64,
        bytes=1,
        mean=(0.5,),
        std=(0.5,),
        input_size=(1, 32, 32),
        num_classes=2,
        parameters=1,
        precision="float32",
    )
    (state / "weights").mkdir()
    (state / "weights" / f"{card.sha256}.json").write_text(card.model_dump_json(by_alias=True))


@pytest.mark.slow
def test_commands_that_train_nothing_answer_without_pytorch_flower_or_matplotlib(tmp_path):
    something_to_list(tmp_path / "state")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *HEAVY], capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1])

    assert len(loaded) == 13
    assert not {command: heavy for command, heavy in loaded.items() if heavy}
