"""The SuperNode as a process that ends when its connection loop has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

FLOWER = """
import sys, threading, time
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


def test_a_lost_connection_ends_the_process_with_one_line():
    done = ended("raise TimeoutError('the handshake operation timed out')")
    assert done.returncode == 1
    assert done.stdout == "connected\n"
    assert done.stderr == (
        "chainward-supernode: the connection to the SuperLink is lost (the handshake operation timed out); start it again\n"
    )


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(305)", 305 % 256), ("sys.exit(0)", 0), ("return", 0)])
def test_an_end_by_flower_keeps_its_exit_code(ending, code):
    assert ended(ending).returncode == code


def test_it_takes_flowers_own_arguments():
    done = subprocess.run(["chainward-supernode", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--auth-supernode-private-key" in done.stdout
