"""Headless Chromium, driven over its own protocol: opens a page, reads it, presses its buttons, takes its picture."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESK, TELEPHONE = (1280, 900), (390, 844)


class Browser:
    """One tab of a browser of its own.

    Attributes
    ----------
    complaints : what the console says: scripts that fail, and what the page's own policy keeps out
    requested : address of everything that was loaded
    """

    def __init__(self, profile: Path) -> None:
        if PROGRAM is None:
            pytest.skip("Chromium is not installed")
        client = pytest.importorskip("websockets.sync.client")
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
        self._process = subprocess.Popen(
            [PROGRAM, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = profile / "DevToolsActivePort"
        wait_for(lambda: told.is_file() and len(told.read_text().splitlines()) == 2, 60)
        port = told.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(one for one in json.load(answer) if one["type"] == "page")
        self._socket = client.connect(tab["webSocketDebuggerUrl"], max_size=None)
        self._number = 0
        self.complaints: list[str] = []
        self.requested: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something and return its answer; note what it says meanwhile."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def open(self, address: str, size: tuple[int, int] = DESK) -> None:
        """Open a page as a screen of this size shows it, and wait until it is there."""
        width, height = size
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Page.navigate", url=address)
        wait_for(lambda: self.run("document.readyState") == "complete" and self.run("location.href") == address, 30)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    @property
    def text(self) -> str:
        """What a person reads."""
        return " ".join(str(self.run("document.body.innerText")).split())

    @property
    def overflows(self) -> bool:
        """Whether one has to scroll sideways."""
        return bool(self.run("document.documentElement.scrollWidth > window.innerWidth"))

    def click(self, selector: str) -> None:
        """Press what a selector finds, as a mouse does: at its middle, where something else may lie over it."""
        place = self.run(
            f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView({{block: 'center'}}); "
            "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for what in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=what, x=place[0], y=place[1], button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Write the whole page as PNG."""
        taken = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds, and fail where it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds:g} s"
        time.sleep(0.1)
