"""Weights files: what is taken into a store, what is refused, and that a backbone gets them as timm itself would give them."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from chainward_client.cli import app as site_app
from chainward_server.cli import app as coordinator_app
from chainward_shared.errors import ChainwardError, ModelError, WeightsError
from chainward_shared.models import Architecture, resolve_architecture, skeleton
from chainward_shared.models.parts import classifier_names
from chainward_shared.pretrained import download as hub
from chainward_shared.pretrained.files import read_weights
from chainward_shared.pretrained.loading import start_state
from chainward_shared.pretrained.store import WeightsStore

BACKBONES = ["test_vit", "test_convnext", "test_efficientnet", "test_resnet"]


def weights_of(backbone, classes=1000, channels=3, seed=3):
    torch.manual_seed(seed)
    model = timm.create_model(backbone, num_classes=classes, in_chans=channels)
    with torch.no_grad():  # nothing at its initial value, running statistics included
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def store(tmp_path):
    return WeightsStore(tmp_path / "store")


def added(store, tmp_path, backbone, weights=None, **kwargs):
    file = tmp_path / f"{backbone}.safetensors"
    save_file(weights or weights_of(backbone), file)
    return store.add(file, backbone, **kwargs), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "classes", "channels", "image_size", "patch_size"),
    [
        *((backbone, *sizes) for backbone in BACKBONES for sizes in [(5, 3, 64, 0), (5, 1, 64, 0), (1000, 3, 160, 0)]),
        ("test_vit", 3, 3, 64, 8),
    ],
)
def test_a_backbone_starts_with_what_timm_itself_would_load(
    backbone, classes, channels, image_size, patch_size, store, tmp_path
):
    card, file = added(store, tmp_path, backbone)
    architecture = resolve_architecture(
        backbone, num_classes=classes, in_chans=channels, image_size=image_size, patch_size=patch_size, pretrained=True
    )
    mine = start_state(store.load(card), card, architecture)
    theirs = timm.create_model(
        backbone, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **architecture.timm_kwargs()
    ).state_dict()
    head = classifier_names(skeleton(architecture))
    assert set(theirs) - set(mine) == (set() if classes == 1000 else set(head))
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert {name: tensor.shape for name, tensor in skeleton(architecture).state_dict().items() if name in mine} == {
        name: tensor.shape for name, tensor in mine.items()
    }


def test_a_convnext_keeps_the_layer_scale_of_its_file(store, tmp_path):
    card, _ = added(store, tmp_path, "test_convnext")
    architecture = resolve_architecture("test_convnext", num_classes=2, in_chans=3, image_size=64, pretrained=True)
    state = start_state(store.load(card), card, architecture)
    gammas = [name for name in state if name.endswith("gamma")]
    file = store.load(card)
    assert gammas and all(torch.equal(state[name], file[name]) for name in gammas)


def test_what_the_file_brings_does_not_depend_on_chance(store, tmp_path):
    card, _ = added(store, tmp_path, "test_vit")
    architecture = resolve_architecture("test_vit", num_classes=4, in_chans=1, image_size=64, pretrained=True)
    torch.manual_seed(1)
    first = start_state(store.load(card), card, architecture)
    before = torch.rand(1)
    torch.manual_seed(1)
    assert all(
        torch.equal(first[name], tensor) for name, tensor in start_state(store.load(card), card, architecture).items()
    )
    assert torch.equal(torch.rand(1), before), "the global generator is left alone"


def test_weights_of_another_backbone_are_refused_at_the_start_too(store, tmp_path):
    card, _ = added(store, tmp_path, "test_vit")
    other = resolve_architecture("test_convnext", num_classes=2, in_chans=3, image_size=64, pretrained=True)
    with pytest.raises(WeightsError, match=r"of the backbone 'test_vit'.*set chain.backbone = 'test_vit'"):
        start_state(store.load(card), card, other)


def test_a_backbone_that_is_built_otherwise_than_the_pretrained_one_is_refused(store, tmp_path):
    card, _ = added(store, tmp_path, "test_vit")
    other = Architecture(
        name="test_vit", num_classes=2, in_chans=3, image_size=64, options={"img_size": 64, "depth": 2}
    )
    with pytest.raises(ModelError, match="only one of them has 'blocks"):
        start_state(store.load(card), card, other)


def without(name):
    return lambda w: {key: value for key, value in w.items() if key != name}


def changed(name, value):
    return lambda w: {**w, name: value(w[name]).contiguous()}


@pytest.mark.parametrize(
    ("backbone", "change", "words"),
    [
        ("test_vit", without("blocks.0.attn.qkv.weight"), "1 missing, first blocks.0.attn.qkv.weight"),
        ("test_vit", lambda w: {**w, "adapter.weight": torch.ones(2)}, "1 unexpected, first adapter.weight"),
        (
            "test_convnext",
            changed("stages.0.blocks.0.norm.weight", lambda t: t[:-1]),
            "first stages.0.blocks.0.norm.weight has",
        ),
        (
            "test_vit",
            changed("norm.weight", lambda t: t * math.nan),
            r"NaN or infinite in 'norm.weight' \(64 of 64 values\)",
        ),
        ("test_vit", changed("norm.bias", lambda t: t / 0), "NaN or infinite in 'norm.bias'"),
        ("test_vit", changed("norm.bias", lambda t: t.to(torch.int8)), r"'norm.bias' \(int8\); expected float32"),
        (
            "test_efficientnet",
            lambda w: weights_of("test_vit"),
            "the file is not of 'test_efficientnet': .* missing, first",
        ),
        ("test_vit", lambda w: weights_of("test_resnet"), "the file is not of 'test_vit': .* missing, first"),
        ("test_vit", lambda w: {"a": torch.ones(2)}, "the file is not of 'test_vit'"),
        ("test_vit", without("head.bias"), "1 missing, first head.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_first_tensors_that_show_it(
    backbone, change, words, store, tmp_path
):
    with pytest.raises(WeightsError, match=words) as error:
        added(store, tmp_path, backbone, change(weights_of(backbone)))
    assert len(str(error.value)) < 700
    assert not store.root.exists() or list(store.root.iterdir()) == []


def test_a_file_that_is_cut_off_is_refused_at_every_length(store, tmp_path):
    file = tmp_path / "whole.safetensors"
    save_file(weights_of("test_vit"), file)
    contents = file.read_bytes()
    for length in (0, 4, 8, 100, len(contents) // 2, len(contents) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(contents[:length])
        with pytest.raises(WeightsError, match=r"cut\.safetensors: not a whole safetensors file"):
            store.add(cut, "test_vit")


def test_half_precision_is_read_as_float32_and_said_on_the_card(store, tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights_of("test_vit").items()}
    card, _ = added(store, tmp_path, "test_vit", half)
    assert card.precision == "float16"
    architecture = resolve_architecture("test_vit", num_classes=2, in_chans=3, image_size=160, pretrained=True)
    state = start_state(store.load(card), card, architecture)
    assert state["norm.weight"].dtype == torch.float32 and torch.equal(
        state["norm.weight"], half["norm.weight"].float()
    )


@pytest.mark.parametrize("classes", [0, 7])
def test_a_file_with_another_head_or_none_is_taken_and_its_classes_counted(classes, store, tmp_path):
    card, _ = added(store, tmp_path, "test_convnext", weights_of("test_convnext", classes))
    assert card.num_classes == classes


def test_a_file_of_grey_images_is_taken_and_adapted_to_colour(store, tmp_path):
    card, _ = added(store, tmp_path, "test_resnet", weights_of("test_resnet", channels=1))
    assert card.input_size[0] == 1 and len(card.mean) == 1
    architecture = resolve_architecture("test_resnet", num_classes=2, in_chans=3, image_size=64, pretrained=True)
    state, file = start_state(store.load(card), card, architecture), store.load(card)
    first = timm.get_pretrained_cfg("test_resnet").first_conv + ".weight"
    assert torch.allclose(state[first].sum(dim=1, keepdim=True), file[first], rtol=1e-5)


@pytest.mark.parametrize("key", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
def test_a_file_of_pytorch_is_converted_once(key, suffix, store, tmp_path):
    weights = weights_of("test_vit")
    file = tmp_path / f"old{suffix}"
    torch.save(weights if key is None else {key: weights, "epoch": 3}, file)
    card = store.add(file, "test_vit")
    assert card.original_sha256 is not None and card.original_sha256 != card.sha256
    assert all(torch.equal(weights[name], tensor) for name, tensor in store.load(card).items())
    assert store.find(card.original_sha256[:10]) == card


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


@pytest.mark.parametrize("extra", [Payload(), argparse.Namespace(lr=1), print])
def test_a_pickle_that_needs_more_than_tensors_is_refused_and_runs_nothing(extra, store, tmp_path):
    file = tmp_path / "evil.pth"
    torch.save({"state_dict": weights_of("test_vit"), "args": extra}, file)
    with pytest.raises(WeightsError, match=r"needs more than tensors to be unpickled.*refused"):
        store.add(file, "test_vit")
    assert not Payload.ran


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "holds one list; expected tensors by name"),
        (torch.ones(2), "holds one Tensor"),
        ({"model": {"a": torch.ones(1), "epoch": 3}}, r"beside tensors there is 'epoch' \(int\)"),
        ({"model": {}}, "holds no tensors"),
    ],
)
def test_a_file_of_pytorch_with_other_things_in_it_is_refused(content, words, tmp_path):
    file = tmp_path / "odd.pth"
    torch.save(content, file)
    with pytest.raises(WeightsError, match=words):
        read_weights(file)


def test_a_file_of_pytorch_that_is_cut_off_is_refused(tmp_path):
    file = tmp_path / "whole.pth"
    torch.save(weights_of("test_vit"), file)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[:-3000])
    with pytest.raises(WeightsError, match=r"cut\.pth: not a whole file of PyTorch's"):
        read_weights(cut)


@pytest.mark.parametrize("name", ["weights.npz", "weights.ckpt", "weights.onnx", "weights.pkl", "weights"])
def test_other_formats_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"weights come as \.safetensors or, converted once, as"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("test_vitt", "has no model 'test_vitt' .did you mean"),
        ("test_vit.nothing", "has no weights 'nothing' of 'test_vit'; it has r160_in1k"),
        ("hf_hub:x/y", "has no model 'hf_hub:x/y'"),
    ],
)
def test_a_backbone_or_tag_that_timm_lacks_is_refused(backbone, words, store, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(weights_of("test_vit"), file)
    with pytest.raises(WeightsError, match=words):
        store.add(file, backbone)


def test_a_file_is_found_by_name_tag_and_digest_and_an_ambiguous_name_is_not(store, tmp_path):
    first, _ = added(store, tmp_path, "test_vit")
    assert store.find("test_vit") == store.find(first.sha256) == store.find(first.sha256[:8].upper()) == first
    second, _ = added(store, tmp_path, "test_vit", weights_of("test_vit", seed=4))
    with pytest.raises(WeightsError, match=r"'test_vit' may be .*: give the digest"):
        store.find("test_vit")
    assert store.find(second.sha256[:12]) == second
    for unknown in ("test_vi", first.sha256[:7], "0" * 64):
        with pytest.raises(WeightsError, match="has no "):
            store.find(unknown)


def test_a_store_that_can_not_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match=r"taken: can't be written \(.+\); free space or fix its rights"):
        added(WeightsStore(tmp_path / "taken"), tmp_path, "test_vit")


def test_adding_the_same_file_twice_leaves_one(store, tmp_path):
    first, file = added(store, tmp_path, "test_vit")
    again = store.add(file, "test_vit", licence="MIT")
    assert again.sha256 == first.sha256 and store.cards() == [again]


def test_a_file_that_was_changed_in_the_store_is_refused(store, tmp_path):
    card, _ = added(store, tmp_path, "test_vit")
    contents = bytearray(store.path(card.sha256).read_bytes())
    contents[-1] ^= 1
    store.path(card.sha256).write_bytes(contents)
    with pytest.raises(WeightsError, match="its SHA-256 is not that of its card"):
        store.load(card)


@pytest.mark.parametrize("damage", [b"{", b"{}", b'{"schema": 2}', b"\xff"])
def test_a_damaged_card_is_one_clear_line(damage, store, tmp_path):
    card, _ = added(store, tmp_path, "test_vit")
    (store.root / f"{card.sha256}.json").write_bytes(damage)
    with pytest.raises(WeightsError, match="not a weights card"):
        store.cards()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": (0.5, 0.5)}, "2 means and 3 deviations of 3 channels"),
        ({"std": (0.0,) * 3}, r"std\.0: input should be greater than or equal to 0\.0001, found 0\.0"),
    ],
)
def test_impossible_means_and_deviations_are_refused_and_leave_nothing(given, words, store, tmp_path):
    with pytest.raises(WeightsError, match=words):
        added(store, tmp_path, "test_vit", **given)
    assert not store.root.exists()


def test_the_card_says_what_timm_knows_of_a_tagged_file(store, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(weights_of("test_vit"), file)
    card = store.add(file, "test_vit.r160_in1k", source="a stick")
    known = timm.get_pretrained_cfg("test_vit.r160_in1k")
    assert (card.mean, card.std, card.input_size, card.licence) == (
        known.mean,
        known.std,
        known.input_size,
        known.license,
    )
    assert (card.name, card.source, card.interpolation) == ("test_vit.r160_in1k", "a stick", known.interpolation)
    assert store.add(file, "test_vit").licence == "unknown", "of a file without a tag timm can't know the licence"


def test_getting_weights_without_a_network_is_one_clear_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="not in the Hugging Face cache, and the hub can't be reached"):
        hub.fetched("timm:test_vit.r160_in1k")


@pytest.mark.parametrize(
    ("what", "words"), [("test_vit", "expected timm:NAME.TAG"), ("timm:nothing", "has no model 'nothing'")]
)
def test_only_weights_of_timm_can_be_fetched(what, words):
    with pytest.raises(WeightsError, match=words):
        hub.fetched(what)


def test_weights_are_fetched_from_the_hub_under_their_full_name(monkeypatch, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(weights_of("test_vit"), file)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(file))
    assert hub.fetched("timm:test_vit") == (file, "test_vit.r160_in1k", "huggingface.co/timm/test_vit.r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]


@pytest.fixture(params=["coordinator", "site"])
def command(request, tmp_path):
    """Run a `weights` command of either side."""
    if request.param == "coordinator":
        app, where = coordinator_app, ["--store", str(tmp_path / "store")]
    else:
        (tmp_path / "site.yaml").write_text("site: north\ndata: data.yaml\nstate: state\n")
        app, where = site_app, [str(tmp_path / "site.yaml")]

    def run(name, *arguments):
        return CliRunner().invoke(app, ["weights", name, *where, *arguments])

    return run


def test_both_sides_add_list_show_and_remove_weights(command, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(weights_of("test_vit"), file)
    assert "no weights in" in command("list").output
    done = command("add", str(file), "--backbone", "test_vit", "--licence", "MIT", "--mean", "0.1,0.2,0.3")
    assert done.exit_code == 0, done.output
    assert "licence        MIT" in done.output and "mean           0.1, 0.2, 0.3" in done.output
    (card,) = json.loads(command("list", "--json").output)
    assert json.loads(command("show", "test_vit", "--json").output) == card
    assert "test_vit" in command("list").output
    assert command("remove", card["sha256"]).exit_code == 0
    assert json.loads(command("list", "--json").output) == []


def test_numbers_that_are_none_are_refused_by_the_option(command, tmp_path):
    done = command("add", str(tmp_path / "w"), "--backbone", "test_vit", "--mean", "0.5;0.5")
    assert done.exit_code == 2 and "expected numbers with commas" in done.output


def test_a_refusal_is_an_error_that_the_commands_show_in_one_line(command, tmp_path):
    done = command("show", "nothing")
    assert isinstance(done.exception, ChainwardError) and "has no 'nothing'" in str(done.exception)
