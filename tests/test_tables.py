"""What a command prints as a table is whole: on a terminal of any width, in a pipe, and without UTF-8."""

from __future__ import annotations

import ast
import io
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.table import Column, Table
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner
from written_run import a_run

from chainward_client.approval.record import Approvals
from chainward_client.cli import app as site_command
from chainward_client.doctor.report import Diagnosis, ok, print_diagnosis, problem
from chainward_client.dry_run.console import print_dry_run
from chainward_client.dry_run.run import DryRun
from chainward_client.dry_run.sent import Sent, SentArray, SentField
from chainward_client.privacy_audit.membership import MembershipAttack
from chainward_server.approvals import run_plan
from chainward_server.run_folder import RunFolder
from chainward_server.run_process import RunProcess
from chainward_server.watch.display import picture
from chainward_server.watch.snapshot import look
from chainward_shared.config import RunConfig
from chainward_shared.console import PlainConsole, speak_plainly
from chainward_shared.models import resolve_architecture
from chainward_shared.pretrained.card import WeightsCard
from chainward_shared.privacy.console import print_audit
from chainward_shared.privacy.empirical import Attack, Empirical, Trial
from chainward_shared.privacy.findings import Audit
from chainward_simulations.attack import ALL_SITES, Attacked
from chainward_simulations.attack_command import _table as attack_table
from chainward_simulations.benchmark.figures import Table as Figures
from chainward_simulations.cli import app as command
from chainward_simulations.study.results import ArmResult, StudyResult
from chainward_simulations.study.statistics import Difference, Spread
from chainward_simulations.study.table import study_table

LONG = "/srv/hospital-of-the-holy-spirit/radiology/2026/a-folder-that-nobody-would-shorten/data.yaml"
NAME = "hospital-of-the-holy-spirit-and-of-saint-elizabeth"
NARROW = 80

Case = Callable[[PlainConsole, Path, pytest.MonkeyPatch], list[str]]


def typed(app: Any, console: PlainConsole, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Print what a command prints on a terminal as wide as the console, or, where that is none, into a pipe."""
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setattr("sys.stdout", console.file)
        for where in ("chainward_server.cli", "chainward_client.cli", "chainward_client.approval.commands"):
            patch.setattr(f"{where}.console._width", None)  # that of a terminal as it was when this process began
        if console.is_terminal:
            patch.setenv("TTY_COMPATIBLE", "1")
            patch.setenv("COLUMNS", str(console.width))
        assert app(list(words), standalone_mode=False) in (None, 0, 1)


def runs(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    failed = a_run(folder)
    under_way = RunFolder.create(RunConfig.from_flat({"output.dir": str(folder), "data.source": LONG}))
    under_way.begin(RunProcess.current())
    typed(command, console, monkeypatch, "runs", "--dir", str(folder))
    return [failed.state.run_id, under_way.state.run_id, "failed", "running:", "0.600", "data.yaml"]


def settings(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    typed(command, console, monkeypatch, "config", f'chain.laps=2 data.source="{LONG}"')
    return ["chain.laps", "data.source", LONG, "'phantom'"]


def watched(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    run = a_run(folder)
    console.print(picture(look(run.path)))
    return [run.state.run_id, "ash", "skipped", "done", "0.600"]


def diagnosis(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    advice = "correct the path in site.yaml, or ask whoever keeps the data"
    checks = (ok("data file", LONG), problem("images", f"{LONG}: 12 of 4012 can't be read", advice))
    print_diagnosis(Diagnosis(NAME, checks), console)
    return [LONG, NAME, "4012", "problem", advice.split(" ")[-1]]


def rehearsal(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    array = "stages.3.downsample.1.convolution_of_the_last_stage_with_a_long_name.weight"
    sent = Sent(
        "link-task",
        "link-result",
        12_345_678,
        (SentArray("model", array, (640, 320, 2, 2), "float32", 3_276_800, "weights"),),
        (SentField("training.seconds", "12.5", 4, "how fast the machine is"), SentField("digest", "ab" * 32, 64, "-")),
    )
    print_dry_run(DryRun(NAME, False, (sent,), {"text": 4}, (), ()), console)
    return [array, "640x320x2x2", "3,276,800", "ab" * 32, "12,345,678"]


def spending(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    run = a_run(folder)
    typed(command, console, monkeypatch, "audit", str(run.path))
    return [run.state.run_id, "lifetime", "1e-05", "4"]


def trials(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    attack = Attack(claimed=3.97, measured=1.23, ceiling=7.11, confidence=0.95, canaries=2000, guesses=512, correct=301)
    words = "the noise of a step has a standard deviation of 0.98, expected 1.01"
    tried = Empirical("the policy", 1e-5, 1.1, 30, 7, (Trial("as installed", True, (words,), attack),))
    print_audit(Audit("site", NAME, (), (), empirical=tried), console)
    return ["3.97", "301", "512", "1.23", "7.11", "0.98,", NAME]


def weights(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    card = WeightsCard(
        backbone="vit_base_patch14_reg4_dinov2_with_a_name_of_many_words",
        tag="lvd142m_fine_tuned_on_radiographs",
        sha256="ab" * 32,
        bytes=9,
        licence="cc-by-nc-sa-4.0, for research in hospitals alone",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_size=(3, 518, 518),
        num_classes=1000,
        parameters=86_600_000,
        precision="float32",
    )
    (folder / f"{card.sha256}.json").write_text(card.model_dump_json(by_alias=True))
    typed(command, console, monkeypatch, "weights", "list", "--store", str(folder))
    return [card.name, card.sha256[:12], "86.6", "1000", "cc-by-nc-sa-4.0,"]


def asked(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    site_yaml = folder / "site.yaml"
    site_yaml.write_text(yaml.safe_dump({"site": "ash", "data": "data.yaml", "state": "state", "runs": "ask"}))
    config = RunConfig.from_flat({"federation.contact": "Dr Ash"})
    model = resolve_architecture("test_convnext", num_classes=2, in_chans=1, image_size=32)
    plan = run_plan(config, "20260101-101112-ab12", [model, model])
    approvals = Approvals(folder / "state")
    approvals.ask(plan, lambda: None)
    approvals.decide(plan.digest, "approved", "a.person.with.a.long.account.name@hospital.example.org")
    typed(site_command, console, monkeypatch, "runs", str(site_yaml))
    until = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%d}"
    return [plan.run_id, "approved", "a.person.with.a.long.account.name@hospital.example.org", until, plan.digest[:12]]


def arms(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    spread = {
        name: Spread(0.8125, 0.0125, 0.8, 0.9, 3) for name in ("balanced_accuracy", "macro_auc", "accuracy", "ece")
    }
    record = SimpleNamespace(images_per_model=123_456, steps=4321, seconds=754, parameters=3_370_000)
    difference = Difference({0: 0.1}, -0.0375, -0.1125, 0.0025)
    differences = {"balanced_accuracy": difference, "macro_auc": difference}
    arm = ArmResult(
        *("an-arm-of-my-own-with-a-long-name", "about", "chain", (record,), spread, spread, spread, spread, {}),  # type: ignore[arg-type]
        *(differences, differences, 12.3),  # type: ignore[arg-type]
    )
    console.print(study_table(StudyResult((arm,), "chain", (), alone="alone")))
    return ["an-arm-of-my-own-with-a-long-name", "0.812", "-0.037", "-0.113,", "+0.003]", "3.37", "12.6", "12.3"]


def attacks(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = MembershipAttack(
        members=1234, outsiders=987, auc=0.5125, low=0.5, high=0.525, found=(0.1, None), advantage=0.07
    )
    rows = [Attacked("student", NAME, "reference models", found), Attacked("chain", ALL_SITES, "loss", found)]
    console.print(attack_table(rows, (0.01, 0.001)))
    return [NAME, "1234", "987", "0.512", "0.525)", "10.0", "0.070", "student"]


def figures(console: PlainConsole, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    table = Figures("Peers", ("peer", "CPU s", "peak memory, GiB", "CPU, Flower = 1"), notes=["Median of all repeats."])
    table.rows.append((NAME, "158 (157 to 159)", "2.49 (2.48 to 2.49)", "1.14 (1.14 to 1.15)"))
    table.print(console)
    return [NAME, "158", "159)", "2.49)", "1.15)", "repeats."]


CASES: dict[Case, str] = {
    runs: "chainward_server/cli.py",
    settings: "chainward_server/cli.py",
    watched: "chainward_server/watch/display.py",
    diagnosis: "chainward_client/doctor/report.py",
    rehearsal: "chainward_client/dry_run/console.py",
    spending: "chainward_shared/privacy/console.py",
    trials: "chainward_shared/privacy/console.py",
    weights: "chainward_shared/pretrained/commands.py",
    asked: "chainward_client/approval/commands.py",
    arms: "chainward_simulations/study/table.py",
    attacks: "chainward_simulations/attack_command.py",
    figures: "chainward_simulations/benchmark/figures.py",
}
"""What prints each table, and the file in which the table is made."""

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def terminal(width: int, encoding: str = "utf-8") -> PlainConsole:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True, newline="")
    return PlainConsole(file=file, width=width, force_terminal=True, color_system=None)


def shown(console: PlainConsole) -> str:
    file: Any = console.file
    return file.buffer.getvalue().decode(file.encoding) if hasattr(file, "buffer") else file.getvalue()


def lost(text: str, output: str) -> bool:
    """Whether a piece of text is not in the output in one piece."""
    return re.search(rf"(?<![\w-]){re.escape(text)}", output) is None


@EACH
@pytest.mark.parametrize("width", [NARROW, 40])
def test_a_table_on_a_narrow_terminal_is_whole(case, width, tmp_path, monkeypatch):
    console = terminal(width)
    expected = case(console, tmp_path, monkeypatch)
    output = shown(console)
    assert [text for text in expected if lost(text, output)] == []
    assert "…" not in output
    framed = [line for line in output.splitlines() if set(line) & set("│┃━─")]
    assert [line for line in framed if len(line) > width] == [], "a frame that is wider than the terminal falls apart"


@EACH
def test_a_table_in_a_pipe_has_a_line_for_each_row_and_no_frame(case, tmp_path, monkeypatch):
    console = PlainConsole(file=io.StringIO())
    expected = case(console, tmp_path, monkeypatch)
    output = shown(console)
    assert [text for text in expected if lost(text, output)] == []
    assert not set(output) & set("…│┃━─┏┓")


@EACH
def test_a_table_on_a_terminal_without_utf_8_is_whole(case, tmp_path, monkeypatch):
    console = terminal(NARROW, "ascii")
    monkeypatch.setattr("sys.stdout", console.file)
    speak_plainly()
    expected = case(console, tmp_path, monkeypatch)
    output = shown(console)
    assert [text for text in expected if lost(text, output)] == []
    assert "?" not in output


def test_no_table_is_forgotten_here():
    made = set()
    for file in Path(__file__).parent.parent.glob("*/chainward_*/**/*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ImportFrom) and node.module == "rich.table" for node in ast.walk(tree)):
            made.add("/".join(file.parts[-len(file.parts) :]).partition("chainward_")[2])
    made = {f"chainward_{name}" for name in made} - {"chainward_shared/console.py", "chainward_shared/whole_tables.py"}
    assert made == set(CASES.values())


def test_no_other_console_prints_than_the_one_that_cuts_nothing():
    for file in Path(__file__).parent.parent.glob("*/chainward_*/**/*.py"):
        calls = re.findall(r"(?<![\w.])(?:Console|print_json|rich\.print)\(", file.read_text(encoding="utf-8"))
        assert not calls or file.name == "console.py", file


def a_table(draw: random.Random) -> tuple[Table, list[list[str]]]:
    def cell() -> str:
        words = [
            "".join(draw.choice("abc-_./é漢") for _ in range(draw.randint(1, 30))) for _ in range(draw.randint(0, 6))
        ]
        return " ".join(words)

    count = draw.randint(1, 7)
    columns = [
        Column(f"h{place}", justify=draw.choice(["left", "right"]), no_wrap=draw.random() < 0.2)
        for place in range(count)
    ]
    table = Table(*columns, box=None) if draw.random() < 0.3 else Table(*columns)
    rows = [[cell() for _ in range(count)] for _ in range(draw.randint(1, 4))]
    for row in rows:
        table.add_row(*(Text(one) if draw.random() < 0.5 else one for one in row))
    return table, rows


@pytest.mark.parametrize("width", [12, 40, 80, 200])
def test_no_word_of_any_table_is_broken_or_lost(width):
    draw = random.Random(width)
    for _ in range(60):
        table, rows = a_table(draw)
        console = terminal(width)
        console.print(table)
        assert sorted(shown(console).split()) != [], "it shows something"
        found = re.split(r"[\s│┃┏┓┗┛┡┩╇┳┻┼┬┴└┘├┤━─]+", shown(console))
        for word in [word for row in rows for one in row for word in one.split()]:
            assert word in found


def test_every_row_of_any_table_is_a_line_of_a_pipe_and_its_cells_are_two_spaces_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    draw = random.Random(0)
    for _ in range(60):
        table, rows = a_table(draw)
        console = PlainConsole(file=io.StringIO())
        console.print(table)
        _, *lines = shown(console).splitlines()
        assert [re.split(r" {2,}", line.strip()) for line in lines] == [[one or "-" for one in row] for row in rows]


@pytest.mark.parametrize("width", [34, 50])
def test_a_column_that_folds_goes_on_in_the_next_line_between_the_parts_of_a_name(width):
    table = Table("run", Column("data", overflow="fold"), "status", box=None)
    table.add_row("1", "a-folder-of-many-words/another_folder/data.yaml", "done")
    console = terminal(width)
    console.print(table)
    _, *lines = shown(console).splitlines()
    assert (
        "".join(line.strip().removeprefix("1 ").split("done")[0].strip() for line in lines)
        == "a-folder-of-many-words/another_folder/data.yaml"
    )
    assert all(len(line) <= width for line in lines)
    assert all(re.search(r"[/._-]\s*(done\s*)?$", line) for line in lines[:-1])


def helps() -> list[tuple[Any, list[str], Any]]:
    """Every command with its words."""

    def below(app: Any, words: list[str], group: Any) -> list[tuple[Any, list[str], Any]]:
        inner = [below(app, [*words, name], one) for name, one in getattr(group, "commands", {}).items()]
        return [(app, words, group), *(found for part in inner for found in part)]

    return [one for app in (command, site_command) for one in below(app, [], get_command(app))]


@pytest.mark.parametrize(
    ("app", "words", "known"), helps(), ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_the_help_of_a_command_is_whole_and_explains_every_argument(app, words, known, monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": str(NARROW), "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    output = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert "…" not in output
    for parameter in known.params:
        explained = parameter.help.split()[0]
        assert re.search(rf"^│ .*{re.escape(explained)}", output, re.MULTILINE), f"{parameter.name} is not explained"
