"""Pretrained weights in a deployed consortium: sent to each hospital once, in the first run, and never again."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

SITES = ("ash", "birch")


@pytest.mark.deployment
def test_the_weights_are_sent_to_each_hospital_in_the_first_run_and_in_no_later_one(deployment, tiny, tmp_path):
    torch.manual_seed(3)
    file = tmp_path / "weights.safetensors"
    save_file({name: t.clone() for name, t in timm.create_model("test_vit").state_dict().items()}, file)
    deployment.start_superlink()
    for site in SITES:
        deployment.add_site(site)
        deployment.start_site(site, online=False)
    for site in SITES:
        deployment.wait_online(site)
    store = deployment.folder / "reviewed" / "test_vit.safetensors"
    store.parent.mkdir()
    file.rename(store)
    settings = tiny | {
        "chain.backbone": "test_vit",
        "chain.start-from": str(store),
        "chain.trainable": "head",
        "student.rounds": 0,
        "federation.sites": ",".join(SITES),
    }
    sent = []
    for count in (1, 2):
        deployment.submit(settings)
        folder = deployment.wait_for_run(count=count)
        assert folder.state.status == "finished", folder.state.reason
        results = folder.load_results()
        sent.append(results.start.bytes_sent)
        whole, base = (load_file(folder.model_path(name)) for name in ("chain", "base"))
        assert all(link.bytes_up < sum(t.nbytes for t in whole.values()) / 20 for link in results.links)
        assert all(torch.equal(whole[name], tensor) for name, tensor in base.items())
    assert set(sent[0]) == set(SITES) and all(size > 100_000 for size in sent[0].values())
    assert all(size == 0 for size in sent[1].values()), "both hospitals have kept the weights"
    for site in SITES:
        assert list((deployment.site_dir(site) / "state" / "bases").iterdir()), "in the hospital's own state folder"
