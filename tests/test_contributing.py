"""The examples of CONTRIBUTING.md are one file each, and work as they stand there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = dict(
    re.findall(
        r"```python\n# (\S+\.py)\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Put an example's file beside those of its folder, and let the registry there look again; all is undone afterwards."""

    def add(place: str, package: str, find: str, registered: str):
        registry = importlib.import_module(package)
        module = f"{package}.{Path(place).stem}"
        (tmp_path / "added").mkdir()
        (tmp_path / "added" / Path(place).name).write_text(EXAMPLES[place], encoding="utf-8")
        getattr(registry, find)()  # what is there already, so that undoing leaves it there
        monkeypatch.setattr(registry, "__path__", [*registry.__path__, str(tmp_path / "added")])
        before = dict(getattr(registry, registered))
        getattr(registry, find).cache_clear()
        undo.append((registry, find, registered, before, module))
        return getattr(registry, find)()

    undo: list = []
    yield add
    for registry, find, registered, before, module in undo:
        getattr(registry, registered).clear()
        getattr(registry, registered).update(before)
        getattr(registry, find).cache_clear()
        sys.modules.pop(module, None)


def test_each_example_is_one_file_where_the_page_says():
    assert sorted(Path(place).parent for place in EXAMPLES) == sorted(
        map(
            Path,
            [
                "client/chainward_client/data/formats",
                "shared/chainward_shared/models/families",
                "simulations/chainward_simulations/study/further",
            ],
        )
    )
    for place in EXAMPLES:
        assert (REPOSITORY / place).parent.is_dir()
        assert not (REPOSITORY / place).exists()


@pytest.mark.slow
def test_a_baseline_is_added_by_one_file_and_trains_the_same_model_each_time(added):
    from chainward_shared.config import RunConfig
    from chainward_simulations.runner import open_sites
    from chainward_simulations.study.arms import Arm
    from chainward_simulations.study.configured_arms import ConfiguredArm
    from chainward_simulations.study.training import Bench, train_arm, train_chain

    baselines = added(
        "simulations/chainward_simulations/study/further/largest.py",
        "chainward_simulations.study.further",
        "further_baselines",
        "_REGISTERED",
    )
    assert {"union", "largest"} <= set(baselines)
    small = {"chain.backbone": "test_convnext", "chain.epochs": 1, "federation.num-sites": 2, "federation.threads": 1}
    config = RunConfig.from_flat(small)
    arm = ConfiguredArm(Arm("largest", "largest", baselines["largest"].about), config, 0)
    steps: list[str] = []
    bench = Bench(open_sites(config), train_chain, steps.append)
    first, second = (train_arm(arm, bench) for _ in range(2))  # as a study trains it
    assert all(torch.equal(first.models["largest"][name], value) for name, value in second.models["largest"].items())
    assert len(second.logs) == 1
    assert steps[0].startswith("largest ")


def test_a_data_format_is_added_by_one_file_and_says_what_is_wrong_in_one_line(added, tmp_path):
    from chainward_client.data.sources import local_site
    from chainward_shared.errors import DataError

    place = "client/chainward_client/data/formats/jsonl.py"
    formats = added(place, "chainward_client.data.formats", "data_formats", "_REGISTERED")
    assert list(formats) == ["csv", "dicom", "folders", "jsonl", "npz"]
    rows = [
        {"file": f"{split}-{label}.png", "label": label, "split": split}
        for split in ("train", "val", "test")
        for label in "ab"
    ]
    for row in rows:
        Image.fromarray(np.full((8, 8), 100 if row["label"] == "a" else 200, np.uint8)).save(tmp_path / row["file"])
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    block = {
        "format": "jsonl",
        "manifest": "cases.jsonl",
        "images": ".",
        "classes": ["a", "b"],
        "columns": {"image": "file", "label": "label", "split": "split"},
        "image": {"size": 8, "channels": 1},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(block))
    data = local_site(tmp_path / "data.yaml", "oak", b"k" * 32)
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [2, 2, 2]
    (tmp_path / "cases.jsonl").write_text("file,label\n")
    with pytest.raises(DataError, match="not a JSON object on each line") as raised:
        local_site(tmp_path / "data.yaml", "oak", b"k" * 32)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_family_of_backbones_is_added_by_one_file_and_selects_the_same_channels_everywhere(added):
    from chainward_shared.models import build_model, compact_architecture, resolve_architecture, select_weights

    place = "shared/chainward_shared/models/families/starnet.py"
    assert "starnet" in added(place, "chainward_shared.models.families", "_families", "_REGISTERED")
    large = resolve_architecture("starnet_s1", num_classes=3, in_chans=1, image_size=64)
    small = compact_architecture(large, width=0.5, depth=0.5)
    state = build_model(large, seed=0).state_dict()
    itself = select_weights(state, large, large)
    assert all(torch.equal(itself[name], weights) for name, weights in state.items())
    # each number is that of its channel: along the first axis, or along the second where the next layer reads it
    marked = {
        name: torch.arange(float(weights.shape[0])).reshape(-1, *[1] * (weights.ndim - 1)).expand_as(weights).clone()
        for name, weights in state.items()
        if weights.ndim
    }
    readers = {f"stages.{i + 1}.0.conv.weight": f"stages.{i}.1.dwconv2.conv.bias" for i in range(3)}
    readers |= {f"stages.{i}.1.g.conv.weight": f"stages.{i}.1.f1.conv.bias" for i in range(4)}
    readers |= {"head.weight": "norm.running_mean"}
    for reader in readers:
        along = torch.arange(float(state[reader].shape[1])).reshape(1, -1, *[1] * (state[reader].ndim - 2))
        marked[reader] = along.expand_as(state[reader]).clone()
    taken = select_weights(state | marked, large, small)
    build_model(small, seed=1).load_state_dict(taken)
    for reader, written in readers.items():
        assert torch.equal(
            taken[reader][0].flatten(1)[:, 0] if taken[reader].ndim > 2 else taken[reader][0], taken[written]
        )
