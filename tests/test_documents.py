"""The documents that explain the house name what is there, and nothing else."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from house import MAY_IMPORT, REPOSITORY, imported, sources

from chainward_server.cli import parse_settings
from chainward_shared.config import RunConfig

PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


def test_the_picture_of_the_architecture_shows_who_imports_whom_and_no_more():
    drawn = set(re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.MULTILINE))
    actual = {
        (package.removeprefix("chainward_"), name.removeprefix("chainward_"))
        for package in MAY_IMPORT
        for path in sources(package)
        for name in imported(path)
        if name in MAY_IMPORT and name != package
    }
    assert drawn == actual


def test_every_file_and_folder_that_the_architecture_names_is_there():
    named = set(re.findall(r"`((?:shared|client|server|simulations|tests)/[\w/.]+)`", PAGE))
    assert len(named) > 25
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def test_every_folder_of_the_packages_is_named_by_the_architecture():
    folders = {path.parent.relative_to(REPOSITORY).as_posix() for package in MAY_IMPORT for path in sources(package)}
    of_packages = {folder for folder in folders if folder.count("/") == 2 and "template" not in folder}
    assert [folder for folder in sorted(of_packages) if f"`{folder}`" not in PAGE] == []


def test_every_test_that_the_page_on_security_names_is_there():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (REPOSITORY / "docs/security.md").read_text(encoding="utf-8")))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
            broken.append(target)
    assert broken == []


def test_the_hooks_before_a_commit_are_the_checks_of_the_ci_and_download_nothing():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    run = (REPOSITORY / ".ci/run").read_text().splitlines()
    commands = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert commands == [line for line in run if line.startswith(("ruff", "mypy"))]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}


def test_the_hosted_checks_are_those_of_the_ci_and_nothing_else():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/checks.yaml").read_text())
    steps = workflow["jobs"]["checks"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert subprocess.run(["test", "-x", REPOSITORY / ".ci/run"], check=False).returncode == 0


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_the_example_settings_for_a_pretrained_start_are_settings_of_a_run():
    config = RunConfig.from_flat(parse_settings([str(REPOSITORY / "docs/examples/pretrained.toml")]))
    assert (config.chain.start_from, config.chain.head) == (config.chain.backbone, "statistics")
