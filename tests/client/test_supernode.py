"""The SuperNode as a process that ends when its connection loop has ended."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

FLOWER = """
import sys, threading, time
sys.argv += ["--isolation", "process"]
import flwr.supernode.cli

def loop():
    threading.Thread(target=lambda: time.sleep(600)).start()  # what keeps Flower's process alive
    print("connected")
    {ending}

flwr.supernode.cli.flower_supernode = loop
from chainward_client.supernode import main
main()
"""


def ended(ending):
    return subprocess.run(
        [sys.executable, "-c", FLOWER.format(ending=ending)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.slow
def test_a_lost_connection_ends_the_process_with_one_line():
    done = ended("raise TimeoutError('the handshake operation timed out')")
    assert done.returncode == 1
    assert done.stdout == "connected\n"
    assert done.stderr == (
        "chainward-supernode: the connection to the SuperLink is lost (the handshake operation timed out); start it again\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "code"), [("sys.exit(305)", 305 % 256), ("sys.exit(0)", 0), ("return", 0)])
def test_an_end_by_flower_keeps_its_exit_code(ending, code):
    assert ended(ending).returncode == code


@pytest.mark.slow
def test_it_takes_flowers_own_arguments():
    done = subprocess.run(["chainward-supernode", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--auth-supernode-private-key" in done.stdout


BESIDE = """
import signal, subprocess, sys, time
import flwr.supernode.cli
from chainward_client import supernode

started = []
real = subprocess.Popen
def popen(command):
    started.append(command)
    return real([sys.executable, "-c", "import time; time.sleep({lives}); raise SystemExit(9)"])
supernode.subprocess.Popen, supernode.GRACE = popen, 0.2

sys.platform = {platform!r}

def loop():
    signal.signal(signal.SIGTERM, lambda *_: ({ends} and (print("left", flush=True), sys.exit(0))))
    print(started, sys.argv[1:], flush=True)
    time.sleep({works})

flwr.supernode.cli.flower_supernode = loop
sys.argv = ["chainward-supernode", *{arguments!r}]
supernode.main()
"""


def beside(*arguments, lives=3, works=0, ends=True, platform="linux"):
    """What a SuperNode with `arguments` has started beside itself, and the arguments that Flower sees; the ended process."""
    program = BESIDE.format(arguments=arguments, lives=lives, works=works, ends=ends, platform=platform)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return done, done.stdout


@pytest.mark.slow
def test_the_superexec_is_told_where_the_supernode_listens():
    _, said = beside("--superlink", "x:9092", "--host", "127.0.0.1", "--port", "9194")
    assert "'chainward_client.superexec', '--runtime-api-address', '127.0.0.1:9194', '--parent-pid'" in said
    assert "'--insecure'" in said
    assert said.endswith("'9194', '--isolation', 'process']\n")


@pytest.mark.slow
def test_the_superexec_gets_the_authority_where_the_supernode_itself_serves_tls():
    _, said = beside("--ssl-certfile", "own.pem", "--ssl-ca-certfile", "ca.pem", "--host", "::1")
    assert "'--root-certificates', 'ca.pem'" in said
    assert "'[::1]:9094'" in said
    assert "--insecure" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--isolation", "process"], ["--isolation=subprocess"], ["--help"], ["--version"]]
)
def test_no_superexec_is_started_where_someone_else_starts_the_work_or_nothing_is_to_be_done(arguments):
    assert beside(*arguments)[1].startswith("[] ")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_on_other_systems_flower_starts_its_own(platform):
    assert beside("--superlink", "x:9092", platform=platform)[1] == "[] ['--superlink', 'x:9092']\n"


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["takes its leave", "hangs"])
def test_a_supernode_ends_with_the_process_that_starts_the_work(ends):
    done, said = beside(lives=0.5, works=50, ends=ends)
    assert done.returncode == 1
    assert said.endswith("left\n") == ends
    assert done.stderr == (
        "chainward-supernode: the process that starts the work has ended (exit code 9); start it again\n"
    )


def a_flower(monkeypatch, release, *gone):
    """Pretend that another Flower is installed, without the things `gone`."""
    from chainward_client import supernode

    monkeypatch.setattr(supernode, "version", lambda _: release)
    for module, name in gone:
        monkeypatch.delattr(importlib.import_module(module), name)
    return supernode


def test_processes_are_prepared_with_the_flower_that_is_installed():
    from chainward_client.supernode import prepared_problem

    assert prepared_problem() is None


@pytest.mark.parametrize("release", ["1.40.0", "1.43.0", "2.0.0", "1.4", "1.410.0"])
def test_with_a_flower_that_was_not_tried_flower_starts_the_work_and_the_log_says_so(monkeypatch, capsys, release):
    supernode = a_flower(monkeypatch, release)
    arguments = ["chainward-supernode", "--superlink", "x:9092"]
    supernode.start_superexec(arguments)
    assert arguments == ["chainward-supernode", "--superlink", "x:9092"]
    said = capsys.readouterr().err
    assert f"this is {release}; Flower starts the work itself" in said


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flwr.supercore.superexec.run_superexec", "get_executor"),
        ("flwr.supercore.superexec.executor", "SubprocessExecutor"),
        ("flwr.supernode.runtime.run_clientapp", "run_clientapp"),
    ],
)
def test_where_flowers_inside_has_changed_flower_starts_the_work(monkeypatch, capsys, module, name):
    supernode = a_flower(monkeypatch, "1.42.9", (module, name))
    arguments = ["chainward-supernode"]
    supernode.start_superexec(arguments)
    assert arguments == ["chainward-supernode"]
    assert "no place for prepared processes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("package", ["chainward_client.app", "chainward_server.app", "chainward_simulations.runner"])
def test_threads_wait_without_spinning_wherever_chainward_loads_pytorch(package):
    program = f"""
import os, sys
seen = []
class Look:
    def find_spec(self, name, *_):
        if name == "torch" and not seen:
            seen.append(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Look())
import {package}
print(seen)
"""
    bare = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=bare, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "['PASSIVE']\n"
