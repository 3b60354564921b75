"""What is said of odd privileged data: counted, with the figure, and without a word of any case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from chainward_client.data.columns import CategoryColumn, NumberColumn
from chainward_client.data.site_data import SiteData
from chainward_client.data.sources import local_site
from chainward_client.privileged.checks import with_privileged_notes
from chainward_shared.errors import DataError
from chainward_simulations.simulated_sites import simulated_site

NUMBER = {"kind": "number", "min": 0, "max": 100}
HEADER = "image,dx,patient,split,notes,code,level"


def write(folder: Path, rows: list[str], privileged: object = None, **columns: object) -> str:
    """Write a data file with one 8x8 image per row; each row gives dx, patient, split, notes, code and level."""
    lines = [HEADER, *(f"i{index},{row}" for index, row in enumerate(rows))]
    (folder / "cases.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for index in range(len(rows)):
        Image.new("L", (8, 8), index).save(folder / f"i{index}.png")
    roles = {"image": "image", "label": "dx", "patient": "patient", "split": "split"}
    block = {
        "format": "csv",
        "manifest": "cases.csv",
        "classes": ["healthy", "ill"],
        "columns": roles | columns,
        "image": {"size": 8, "channels": 1},
    }
    if privileged is not None:
        block["privileged"] = privileged
    (folder / "data.yaml").write_text(yaml.safe_dump(block), encoding="utf-8")
    return str(folder / "data.yaml")


def opened(path: str) -> SiteData:
    return with_privileged_notes(local_site(path, "north", b"key"))


def site(folder: Path, cells: list[str], privileged: object = None, **columns: object) -> SiteData:
    """Forty training cases, healthy and ill in turn, and one case each in val and test; `cells` as in `write`."""
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},train,{cell}" for n, cell in enumerate(cells)]
    rows += [f"ill,v{n},{split},,," for n, split in enumerate(["val", "test", "test"])]
    return opened(write(folder, rows, privileged, **columns))


def tabular(**columns: object) -> dict[str, object]:
    return {"tabular": columns}


# columns


def test_a_column_that_is_missing_everywhere_is_a_note(tmp_path):
    notes = site(tmp_path, ["x,,"] * 40, **tabular(level=NUMBER)).notes
    assert notes == ("privileged column 'level': missing in all 40 training cases",)


def test_a_constant_column_is_a_note(tmp_path):
    cells = ["x,,7"] * 30 + ["x,,"] * 10
    notes = site(tmp_path, cells, **tabular(level=NUMBER)).notes
    assert notes == ("privileged column 'level': the same value in all 30 training cases that have one",)


def test_a_category_that_encodes_the_label_is_a_note_with_the_figure(tmp_path):
    cells = [f"x,{'ab'[n % 2]}," for n in range(40)]
    code = {"kind": "category", "values": ["a", "b"]}
    notes = site(tmp_path, cells, **tabular(code=code)).notes
    assert notes == (
        "privileged column 'code' alone tells the class: balanced accuracy 1.00 on unseen patients (chance 0.50); "
        "if it encodes the label, name it in privileged.exclude",
    )


def test_a_number_that_nearly_encodes_the_label_is_one_too(tmp_path):
    levels = [10 + n % 7 if n % 2 else 60 + n % 11 for n in range(40)]
    levels[6] = 12
    (note,) = site(tmp_path, [f"x,,{level}" for level in levels], **tabular(level=NUMBER)).notes
    assert "'level' alone tells the class: balanced accuracy 0.9" in note


def test_a_column_that_hints_at_the_label_is_no_note(tmp_path):
    generator = np.random.default_rng(0)
    levels = [round(50 + 10 * (n % 2) + 10 * generator.normal()) for n in range(40)]
    assert site(tmp_path, [f"x,,{level}" for level in levels], **tabular(level=NUMBER)).notes == ()


def test_a_column_with_a_value_for_each_patient_is_no_note(tmp_path):
    """It tells the class of the cases that it was seen with, and of no other."""
    values = [f"c{n}" for n in range(40)]
    code = {"kind": "category", "values": values}
    assert site(tmp_path, [f"x,{value}," for value in values], **tabular(code=code)).notes == ()


def test_an_excluded_column_is_neither_read_nor_noted(tmp_path):
    cells = [f"x,{'ab'[n % 2]},{n}" for n in range(40)]
    columns = tabular(code={"kind": "category", "values": ["a", "b"]}, level=NUMBER)
    data = site(tmp_path, cells, {"exclude": ["code"]}, **columns)
    assert data.notes == ()
    assert data.privileged.columns == {"level": NumberColumn(kind="number", min=0, max=100)}


def test_with_several_findings_the_note_names_the_one_that_is_told(tmp_path):
    rows = [f"{('ill', '', 'healthy|ill', 'healthy')[n % 4]},p{n},train,x,{'ba'[n % 4 % 3 > 0]}," for n in range(60)]
    rows += [f"ill,v{n},{split},,," for n, split in enumerate(["val", "test", "test"])]
    # a where n % 4 is 1 or 2, and that has nothing to do with either; d tells the second
    rows = [row.replace(",b,", ",a,") if "ill" not in row.split(",")[0] else row.replace(",a,", ",b,") for row in rows]
    path = write(tmp_path, rows, **tabular(code={"kind": "category", "values": ["a", "b"]}))
    content = yaml.safe_load(Path(path).read_text()) | {"task": "multilabel"}
    Path(path).write_text(yaml.safe_dump(content))
    (note,) = opened(path).notes
    assert "'code' alone tells the finding 'ill': balanced accuracy 1.00" in note


def test_few_cases_are_not_judged(tmp_path):
    assert (
        site(
            tmp_path,
            [f"x,{'ab'[n % 2]}," for n in range(8)],
            **tabular(code={"kind": "category", "values": ["a", "b"]}),
        ).notes
        == ()
    )


# reports


def test_reports_that_state_the_class_are_a_note_with_the_share(tmp_path):
    cells = [f"{('healthy heart', 'seems ill')[n % 2] if n < 20 else f'text {n}'},," for n in range(40)]
    notes = site(tmp_path, cells, text="notes").notes
    assert notes == (
        "reports: 50% of 40 name the class of their own case; privileged.blank-label-words=true takes class names out",
    )


def test_reports_that_name_another_class_are_no_note(tmp_path):
    cells = [f"not {('ill', 'healthy')[n % 2]} {n},," for n in range(40)]
    assert site(tmp_path, cells, text="notes").notes == ()


def test_reports_that_are_mostly_numbers_are_a_note_with_the_share(tmp_path):
    cells = [f"{n if n < 38 else f'text {n}'},," for n in range(40)]
    notes = site(tmp_path, cells, text="notes").notes
    assert notes == ("reports: 95% of 40 are bare numbers; check columns.text",)


def test_a_text_column_of_numbers_only_is_refused_with_its_first_row(tmp_path):
    with pytest.raises(DataError, match=r"column 'notes' holds numbers only \(row 3, '1', ...\); expected text"):
        site(tmp_path, [",,", *(f"{n},," for n in range(1, 40))], text="notes")


def test_reports_that_are_all_the_same_or_all_missing_are_a_note(tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "none").mkdir()
    assert site(tmp_path / "same", ["as before,,"] * 40, text="notes").notes == (
        "reports: the same in all 40 training cases that have one",
    )
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},train,,," for n in range(40)]
    rows += ["ill,v,val,a text,,", "ill,t,test,,,", "ill,u,test,,,"]
    assert opened(write(tmp_path / "none", rows, text="notes")).notes == ("reports: missing in all 40 training cases",)


@pytest.mark.slow
def test_phantoms_of_every_hospital_are_fit_for_privileged_teachers():
    for index in range(6):
        notes = simulated_site("phantom", index, num_sites=6, label_skew=0, seed=0).notes
        assert not [note for note in notes if "privileged" in note or "reports" in note]


# masks


def test_empty_masks_are_counted_and_missing_ones_are_not(tmp_path):
    for name, value in (("full", 255), ("empty", 0)):
        Image.new("L", (8, 8), value).save(tmp_path / f"{name}.png")
    rows = [f"{('healthy', 'ill')[n % 2]},p{n},train,{('full', 'empty', '')[n % 3]},," for n in range(12)]
    rows += ["ill,v,val,full,,", "ill,t,test,empty,,", "ill,u,test,,,"]
    data = opened(write(tmp_path, rows, mask="notes"))
    assert data.notes == ("5 empty masks: left out of localisation scores",)


def test_a_mask_of_another_resolution_is_scaled_and_one_of_another_shape_refused(tmp_path):
    half = np.zeros((4, 4), dtype=np.uint8)
    half[:2] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    rows = [
        f"{('healthy', 'ill')[n % 2]},p{n},{split},half,," for n, split in enumerate(["train", "val", "test", "test"])
    ]
    masks = opened(write(tmp_path, rows, mask="notes")).splits["train"].privileged.masks
    assert masks is not None
    assert masks[0].tolist() == [[1] * 8] * 4 + [[0] * 8] * 4
    Image.new("L", (8, 4), 255).save(tmp_path / "half.png")
    with pytest.raises(DataError, match="4 masks of other proportions than the image; first: row 2, 'half': 8x4"):
        opened(write(tmp_path, rows, mask="notes"))


# the data file


def refusal(folder: Path, privileged: object, **columns: object) -> str:
    with pytest.raises(DataError) as caught:
        site(folder, ["x,a,1"] * 2, privileged, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_privileged_block_reaches_the_site(tmp_path):
    (tmp_path / "encoder").mkdir()
    block = {"label_words": ["sick", 7], "encoder": "encoder"}
    code = {"kind": "category", "values": ["a", "b"]}
    found = site(tmp_path, [f"x,{'ab'[n % 3 % 2]}," for n in range(40)], block, text="notes", **tabular(code=code))
    assert found.privileged.label_words == ("sick", "7")
    assert found.privileged.encoder == tmp_path / "encoder"
    assert found.privileged.columns == {"code": CategoryColumn(kind="category", values=("a", "b"))}


@pytest.mark.parametrize(
    ("privileged", "columns", "expected"),
    [
        (
            {"exclude": ["lvel"]},
            tabular(level=NUMBER),
            "'privileged.exclude' names 'lvel' (did you mean 'level'?); expected columns of 'columns.tabular' (level)",
        ),
        ({"exclude": ["level"]}, {}, "expected columns of 'columns.tabular' (none is declared)"),
        ({"label_words": ["ill"]}, {}, "'privileged.label_words' is given without 'columns.text'"),
        ({"encoder": "."}, {}, "'privileged.encoder' is given without 'columns.text'"),
        ({"encoder": "nowhere"}, {"text": "notes"}, "key 'privileged.encoder': there is no"),
        ({"encoder": "cases.csv"}, {"text": "notes"}, "cases.csv is a file; expected a folder"),
        ({"labelwords": []}, {}, "unknown key 'labelwords' (did you mean 'label_words'?)"),
        ({"label_words": "ill"}, {"text": "notes"}, "key 'privileged.label_words': found 'ill'"),
    ],
)
def test_a_wrong_privileged_block_is_refused(tmp_path, privileged, columns, expected):
    assert expected in refusal(tmp_path, privileged, **columns)


def test_an_empty_privileged_block_means_the_defaults(tmp_path):
    path = Path(write(tmp_path, ["ill,p,train,,,", "ill,q,test,,,"]))
    path.write_text(path.read_text() + "privileged:\n")
    assert opened(path).privileged.label_words == ()


def test_a_value_outside_its_declared_range_is_refused_with_its_row(tmp_path):
    with pytest.raises(
        DataError, match="'level': 1 value outside the declared range; first: row 3, 101; expected 0 to 100"
    ):
        site(tmp_path, ["x,,1", "x,,101", "x,,2"], **tabular(level=NUMBER))


# nothing of any case is in a note


def test_notes_hold_no_text_no_value_no_patient_and_no_file_name(tmp_path):
    """All notes at once, over cells that can't be mistaken for anything else."""
    Image.new("L", (8, 8), 0).save(tmp_path / "zmask.png")
    rows = [
        f"{('healthy', 'ill')[n % 2]},zpatient{n},train,zreport {('healthy', 'ill')[n % 2]} zword{n},zcode{n % 2},77.3125"
        for n in range(40)
    ]
    rows += [f"ill,zpatient{n},{split},zother,zcode0,77.3125" for n, split in enumerate(["val", "test"], start=40)]
    (tmp_path / "images").mkdir()
    path = Path(
        write(
            tmp_path,
            rows,
            text="notes",
            **tabular(code={"kind": "category", "values": ["zcode0", "zcode1"]}, level=NUMBER),
        )
    )
    lines = path.with_name("cases.csv").read_text().splitlines()
    path.with_name("cases.csv").write_text(
        "\n".join([f"{lines[0]},mask", *(f"{line},zmask" for line in lines[1:])]) + "\n"
    )
    content = yaml.safe_load(path.read_text())
    content["columns"]["mask"] = "mask"
    path.write_text(yaml.safe_dump(content))
    notes = opened(path).notes
    told = " ".join(notes)
    assert [
        kind for kind in ("empty mask", "reports", "'code' alone", "'level': the same value") if kind not in told
    ] == []
    for secret in ("zmask", "zpatient", "zreport", "zword", "zother", "zcode", "77", "3125"):
        assert secret not in told
