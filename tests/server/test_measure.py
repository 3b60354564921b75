"""Size and speed of a model."""

from __future__ import annotations

import pytest

from chainward_server.measure import described, summarize_model
from chainward_shared.models import build_model, compact_architecture, count_parameters, resolve_architecture
from chainward_shared.weights import save_file


@pytest.mark.slow
def test_a_summary_tells_name_sizes_parameters_and_file(tmp_path):
    large = resolve_architecture("test_convnext", num_classes=3, in_chans=1, image_size=32)
    small = compact_architecture(large, width=0.5, depth=1.0)
    model = build_model(small, seed=0)
    save_file(dict(model.state_dict()), tmp_path / "student.safetensors", {})
    summary = summarize_model(small, dict(model.state_dict()), tmp_path / "student.safetensors")
    assert summary.parameters == count_parameters(model)
    assert summary.file_bytes == (tmp_path / "student.safetensors").stat().st_size
    assert summary.latency_ms > 0
    assert summary.architecture.startswith("test_convnext, dims ")
    assert described(large) == "test_convnext, 32 px"
