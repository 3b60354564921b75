"""Reports become vectors: hashed n-grams, blanked label words, and a local encoder."""

from __future__ import annotations

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chainward_client.card import site_card
from chainward_client.doctor.data import check_privileged
from chainward_client.privileged import encoder as module
from chainward_client.privileged.encoder import check_encoder, encoded, encoder_digest, mean_over_tokens
from chainward_client.privileged.vectors import hashed_ngrams, label_pattern, text_vectors
from chainward_shared.errors import DataError
from chainward_simulations.phantoms.cases import phantom_site

REPORTS = [
    "Consolidation in the right lower zone.",
    "No consolidation. Heart size normal.",
    "Nodules, left upper zone; effusion?",
    "Effusions on both sides, cardiomegalies ruled out",
]


# hashed n-grams


def test_a_reports_vector_depends_on_this_report_alone():
    together = hashed_ngrams(REPORTS, 256)
    for index, report in enumerate(REPORTS):
        assert np.array_equal(hashed_ngrams([report], 256)[0], together[index])


def test_rows_have_length_one_and_case_plays_no_role():
    vectors = hashed_ngrams([*REPORTS, REPORTS[0].upper()], 512)
    assert vectors.shape == (5, 512)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-6)
    assert np.array_equal(vectors[0], vectors[4])


def test_pairs_of_words_and_single_letters_count():
    no_effusion, effusion_no = hashed_ngrams(["no effusion", "effusion no"], 4096)
    assert not np.array_equal(no_effusion, effusion_no)
    left, right = hashed_ngrams(["effusion L", "effusion R"], 4096)
    assert not np.array_equal(left, right)


def test_a_word_said_three_times_counts_less_than_three_times():
    once, thrice = (hashed_ngrams([text], 65_536)[0] for text in ("fever", "fever fever fever"))
    assert once.max() == 1
    of_word, of_pair = 1 + np.log(3), 1 + np.log(2)
    assert sorted(thrice[thrice > 0]) == pytest.approx(sorted([of_pair, of_word] / np.hypot(of_word, of_pair)))


# blanking


def blanked(text: str, words: list[str]) -> str:
    pattern = label_pattern(words)
    return text if pattern is None else pattern.sub(" ", text)


def test_blanking_takes_label_words_and_nothing_else():
    words = ["consolidation", "nodule", "effusion", "cardiomegaly"]
    assert [blanked(report, words).split() for report in REPORTS] == [
        ["in", "the", "right", "lower", "zone."],
        ["No", ".", "Heart", "size", "normal."],
        [",", "left", "upper", "zone;", "?"],
        ["on", "both", "sides,", "ruled", "out"],
    ]


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("Abnormal, not NORMAL", "normal", "Abnormal, not"),
        ("nodular nodule nodules", "nodule", "nodular"),
        ("masses and mass", "mass", "and"),
        ("opacities, opacity, opacify", "opacity", ", , opacify"),
        ("pleural  effusion, pleural-effusion", "pleural_effusion", ","),
        ("pleural plaque", "pleural effusion", "pleural plaque"),
        ("stage_mel found", "mel", "stage_ found"),
        ("a.b (c+)", "c+", "a.b ( +)"),
        ("entzündung Entzündungen ENTZÜNDUNG", "Entzündung", "Entzündungen"),
        ("1 of 2, no 0", "0", "1 of 2, no 0"),
    ],
)
def test_words_are_found_whole_in_any_case_and_in_the_simple_plural(text, word, expected):
    assert blanked(text, [word]).split() == expected.split()


def test_the_longer_of_two_words_is_taken_first():
    assert blanked("acute myocardial infarction seen", ["infarction", "myocardial infarction"]).split() == [
        "acute",
        "seen",
    ]


def test_without_words_nothing_is_blanked():
    assert blanked(REPORTS[0], []) == REPORTS[0]


def test_missing_reports_and_those_without_a_word_left_are_not_available():
    texts = ["Nodule.", None, "  ", "?!", "Nodule in the apex"]
    vectors, available = text_vectors(texts, 128, blank=["nodule"])
    assert available.tolist() == [False, False, False, False, True]
    assert vectors.shape == (5, 128)
    assert not vectors[:4].any()
    assert np.array_equal(vectors[4], hashed_ngrams(["in the apex"], 128)[0])
    assert text_vectors(texts, 128)[1].tolist() == [True, False, False, False, True]


def test_a_site_without_a_single_report_has_vectors_of_zeros():
    vectors, available = text_vectors([None, None], 64)
    assert vectors.shape == (2, 64)
    assert not available.any()


# a local encoder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny BERT with random weights, saved as a hospital would find it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'chainward[text]'")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "heart", "lung", "clear", "normal", "opacity", "no", "."]
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_an_encoders_vector_is_the_scaled_mean_over_a_reports_own_tokens(encoder):
    import transformers

    texts = ["heart normal", "no opacity . lung clear .", "lung"]
    found = encoded(texts, encoder)
    assert found.shape == (3, 16)
    model = transformers.BertModel.from_pretrained(encoder).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(encoder)
    for text, vector in zip(texts, found, strict=True):  # one by one there is no padding to leave out
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(torch.from_numpy(vector), mean / mean.square().mean().sqrt(), atol=1e-5, rtol=1e-4)


def test_a_long_report_is_cut_to_what_the_encoder_holds(encoder):
    long = "heart lung " * 40
    assert np.isfinite(encoded([long], encoder)).all()


def test_reports_are_blanked_before_an_encoder_reads_them(encoder):
    vectors, available = text_vectors(["heart normal", None, "heart"], 64, blank=["normal"], encoder=encoder)
    assert available.tolist() == [True, False, True]
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)


def test_padding_does_not_count_in_the_mean():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    assert mean_over_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        encoded(["heart"], folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_model_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'chainward[text]'")
    assert "has no config.json; expected a Hugging Face encoder" in refusal(tmp_path)


def test_pickled_weights_are_never_opened(encoder):
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(b"would run code")
    assert "has no weights in safetensors, other kinds are never opened" in refusal(encoder)


def test_code_in_the_folder_is_never_run(encoder, tmp_path):
    proof = tmp_path / "ran"
    config = json.loads((encoder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (encoder / "config.json").write_text(json.dumps(config))
    (encoder / "own.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    assert "can't be read" in refusal(encoder)
    assert not proof.exists()


def test_a_model_that_is_no_encoder_is_refused(encoder):
    config = json.loads((encoder / "config.json").read_text()) | {"model_type": "gpt2"}
    (encoder / "config.json").write_text(json.dumps(config))
    assert "holds a model of kind 'gpt2'" in refusal(encoder)


def test_damaged_weights_are_refused(encoder):
    (encoder / "model.safetensors").write_bytes(b"damaged")
    assert "can't be read" in refusal(encoder)


def test_a_folder_without_tokenizer_is_refused_by_its_files_alone(encoder):
    check_encoder(encoder)
    for name in module.TOKENIZERS:
        (encoder / name).unlink(missing_ok=True)
    assert "has no tokenizer (none of tokenizer.json" in refusal(encoder)
    with pytest.raises(DataError, match="has no tokenizer"):
        check_encoder(encoder)


@pytest.mark.parametrize("content", ["[]", "no JSON", "{"])
def test_a_configuration_that_is_none_is_refused(encoder, content):
    (encoder / "config.json").write_text(content)
    assert "expected a Hugging Face encoder" in refusal(encoder)


def test_a_file_in_the_place_of_the_folder_is_refused(encoder):
    assert "is no folder" in refusal(encoder / "config.json")


def test_weights_that_are_too_large_are_refused_before_they_are_read(encoder, monkeypatch):
    size = (encoder / "model.safetensors").stat().st_size
    monkeypatch.setattr(module, "LARGEST", size - 1)
    assert "of weights, at most" in refusal(encoder)


def test_a_configuration_that_asks_for_far_more_than_the_file_holds_is_refused_before_it_is_built(encoder):
    config = json.loads((encoder / "config.json").read_text()) | {"hidden_size": 32_768, "num_attention_heads": 64}
    (encoder / "config.json").write_text(json.dumps(config))
    assert "GB of weights, at most 2 GB" in refusal(encoder)


def test_weights_of_which_some_would_stay_random_are_refused(encoder):
    from safetensors.torch import load_file, save_file

    weights = load_file(encoder / "model.safetensors")
    lost = next(name for name in weights if "encoder.layer.1" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, encoder / "model.safetensors")
    assert "would stay random" in refusal(encoder)


def test_weights_without_the_pooler_are_enough(encoder):
    from safetensors.torch import load_file, save_file

    before = encoded(["heart normal"], encoder)
    weights = load_file(encoder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(encoded(["heart normal"], encoder), before)


def test_the_digest_is_of_all_that_decides_what_the_encoder_says_and_of_nothing_else(encoder, tmp_path):
    digest = encoder_digest(encoder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(encoder, copy)
    (copy / "README.md").write_text("of no account")
    assert encoder_digest(copy) == digest
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        path = copy / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert encoder_digest(copy) != digest, name
        path.write_bytes(content)
    assert encoder_digest(copy) == digest


def with_encoder(folder: Path):
    data = phantom_site(0, 5, image_size=32)
    return replace(data, privileged=replace(data.privileged, encoder=folder))


def test_the_sites_card_states_the_digest_and_never_the_folder(encoder):
    card = site_card(with_encoder(encoder), None, None)
    assert card.encoder == encoder_digest(encoder)
    assert str(encoder) not in card.model_dump_json()
    assert site_card(phantom_site(0, 5, image_size=32), None, None).encoder is None


def test_a_folder_that_cant_be_used_keeps_no_site_from_joining_and_the_doctor_says_what_is_wrong(encoder):
    (encoder / "config.json").unlink()
    card = site_card(with_encoder(encoder), None, None)
    assert card.encoder is None
    assert str(encoder) not in card.model_dump_json()
    (check,) = [check for check in check_privileged(with_encoder(encoder)) if check.name == "language encoder"]
    assert check.outcome == "problem" and "has no config.json" in check.found


def test_without_the_extra_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'chainward[text]'" in refusal(tmp_path)
