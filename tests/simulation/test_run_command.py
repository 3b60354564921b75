"""`chainward run`: what it makes of its words before anything is started."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from chainward_shared.errors import ConfigError
from chainward_simulations import superlink
from chainward_simulations.cli import app
from chainward_simulations.flower import without_proxy
from chainward_simulations.run_command import app_and_settings

SIX_SITES = "simulations/six_sites"


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        ([SIX_SITES], {}),
        (["chain.laps=2", "data.label-skew=0"], {"chain.laps": 2, "data.label-skew": 0}),
        ([SIX_SITES, "chain.backbone=convnext_femto"], {"chain.backbone": "convnext_femto"}),
        (['chain.backbone="convnext_femto"'], {"chain.backbone": "convnext_femto"}),
        (["data.source=/data/my cases.yaml"], {"data.source": "/data/my cases.yaml"}),
        (["chain.compare-alone=false"], {"chain.compare-alone": False}),
        (["output.resume=/srv/a=b"], {"output.resume": "/srv/a=b"}),
        (["output.resume="], {"output.resume": ""}),
    ],
)
def test_words_are_an_app_and_settings_without_further_quotes(words, settings):
    assert app_and_settings(words)[1] == settings


def test_a_file_of_settings_is_read_and_later_words_go_before_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("chain.laps = 3\n[student]\nrounds = 1\n")
    assert app_and_settings([str(file), "chain.laps=2"])[1] == {"chain.laps": 2, "student.rounds": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chain.lap=2"], "chain.laps"),
        (["chain.laps=many"], "chain.laps"),
        (["chain.laps=0"], "chain.laps"),
        ([SIX_SITES, "laps"], "expected KEY=VALUE"),
        ([SIX_SITES, "=2"], "expected KEY=VALUE"),
        (["no/such/app", "chain.laps=2"], "no/such/app/pyproject.toml: can't be read"),
        (["server/app"], "`flwr run server/app NAME`"),
        (["nowhere.toml"], "nowhere.toml"),
        (["data.label-skew=0.5"], "data.label-skew"),
    ],
)
def test_what_is_no_setting_is_refused_before_anything_is_started(words, message):
    with pytest.raises(ConfigError) as refused:
        app_and_settings(words)
    assert message in str(refused.value)


def test_the_command_takes_what_is_printed_to_resume_a_run(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "chainward_simulations.run_command.run", lambda app, settings, say, ask: seen.append(settings) or 3
    )
    done = CliRunner().invoke(app, ["run", "--run-config", 'output.resume="20260131-101112-ab12" chain.retries=2'])
    assert (seen, done.exit_code) == ([{"output.resume": "20260131-101112-ab12", "chain.retries": 2}], 3)


@pytest.mark.parametrize("named", ["", "example.org", "127.0.0.1", " localhost , example.org"])
def test_this_machine_is_never_looked_for_behind_a_proxy(named):
    environment = without_proxy({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": named})
    hosts = environment["no_proxy"].split(",")
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert {"127.0.0.1", "localhost"} <= set(hosts) and len(hosts) == len(set(hosts))
    assert {name.strip() for name in named.split(",") if name.strip()} <= set(hosts)


def test_a_superlink_that_was_left_behind_is_something_that_was_left_behind(tmp_path, monkeypatch):
    home = tmp_path / "superlink"
    home.mkdir()
    monkeypatch.setattr(superlink, "abandoned", lambda: [superlink.SuperLink(home)])
    stopped = CliRunner().invoke(app, ["stop", "--dir", str(tmp_path / "runs")])
    assert "0 processes ended" in stopped.output
    assert "left anything behind" not in stopped.output
    assert not home.exists()
    monkeypatch.setattr(superlink, "abandoned", list)
    assert "left anything behind" in CliRunner().invoke(app, ["stop", "--dir", str(tmp_path / "runs")]).output
