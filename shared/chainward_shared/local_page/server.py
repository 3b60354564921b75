"""The server of a local page: the standard library's, on loopback, behind a secret in the address.

Whoever has the address sees the page, and may press its buttons: another user of this machine does not have it. A page of
another site that is open in the same browser can neither read this one nor press its buttons: its requests name another host
(DNS rebinding), another origin, or lack the form's own secret.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from chainward_shared.errors import ChainwardError, ConfigError
from chainward_shared.local_page.page import Look, whole_page
from chainward_shared.outside import visible

HOST = "127.0.0.1"
AT_ONCE = 16
"""Requests that are answered at the same time; the next ones wait in the system's queue, or are turned away."""
PATIENCE = 10.0
"""Seconds for which a request may take to arrive."""
MOST_FORM = 4_096
"""Bytes of a form that is sent."""
SECONDS = 2.0

Form = Mapping[str, str]

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(eq=False)
class _Refused(Exception):
    """A request that is not answered. `status`: HTTP's; `words`: one line."""

    status: int
    words: str


class LocalPage:
    """One page, and what its buttons do.

    Parameters
    ----------
    title : of the window
    look : returns what the page shows now; it is given the secret that its forms must send as `form`
    act : does what a form asks, `ChainwardError` where it can't; None: the page has no buttons
    port : on which to listen; 0, the default: any free one

    Raises
    ------
    ConfigError
        The port is taken.
    """

    def __init__(
        self,
        title: str,
        look: Callable[[str], Look],
        act: Callable[[Form], None] | None = None,
        *,
        port: int = 0,
        seconds: float = SECONDS,
    ) -> None:
        self.title, self.look, self.act, self.seconds = title, look, act, seconds
        self.token, self.form = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        page = self

        class Handler(_Handler):
            of = page

        try:
            self._server = _Server((HOST, port), Handler)
        except OSError as error:
            raise ConfigError(f"port {port} on {HOST}: {error.strerror}; name another with --port") from error

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    def start(self) -> None:
        """Answer, in a thread of its own, until `close`."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> LocalPage:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = AT_ONCE

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._free = threading.BoundedSemaphore(AT_ONCE)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(timeout=PATIENCE):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error; anything else was answered as one already."""


class _Handler(BaseHTTPRequestHandler):
    of: LocalPage
    timeout = PATIENCE
    server_version, sys_version = "chainward", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged: the address holds the secret."""

    def _answer(self, method: Callable[[], None]) -> None:
        try:
            method()
        except _Refused as refused:
            self._send(refused.status, f"{refused.words}\n", "text/plain; charset=utf-8")
        except ChainwardError as error:
            self._send(409, f"{visible(str(error))}\n", "text/plain; charset=utf-8")

    def _get(self) -> None:
        place = self._place()
        if place not in ("", "part"):
            raise _Refused(404, "there is nothing here")
        look = self.of.look(self.of.form)
        if place == "part":
            self._send(200, look.html, "text/html; charset=utf-8", {"X-Ended": str(int(look.ended))})
            return
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
            "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )
        page = whole_page(self.of.title, look, nonce, seconds=self.of.seconds)
        self._send(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def _post(self) -> None:
        if self._place() != "act" or self.of.act is None:
            raise _Refused(404, "there is nothing here")
        if self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise _Refused(403, "sent from another site")
        if self.headers.get("Origin") not in (None, *(f"http://{host}" for host in self._hosts())):
            raise _Refused(403, "sent from another origin")
        if self.headers.get_content_type() != "application/x-www-form-urlencoded":
            raise _Refused(415, "not a form")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST_FORM:
            raise _Refused(413, f"a form has at most {MOST_FORM} bytes, and says how many")
        text = self.rfile.read(length).decode("utf-8", "replace")
        try:
            form = {name: values[-1] for name, values in parse_qs(text, max_num_fields=20).items()}
        except ValueError:
            raise _Refused(400, "a form with more than a form has") from None
        if not secrets.compare_digest(form.pop("form", "").encode(), self.of.form.encode()):
            raise _Refused(403, "this form is not of this page; load it again")
        self.of.act(form)
        self._send(303, "", "text/plain; charset=utf-8", {"Location": f"/{self.of.token}/"})

    def _hosts(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.of.port}" for name in (HOST, "localhost"))

    def _place(self) -> str:
        """Return what of the page is asked for, without the secret.

        Raises
        ------
        _Refused
            The request names another host, or not the secret.
        """
        if self.headers.get_all("Host") not in [[host] for host in self._hosts()]:
            raise _Refused(421, "this page answers to its own address only")
        try:
            token, _, place = urlsplit(self.path).path.removeprefix("/").partition("/")
        except ValueError:
            raise _Refused(400, "not an address") from None
        if not secrets.compare_digest(token.encode(), self.of.token.encode()):
            raise _Refused(404, "there is nothing here; the command that serves this page printed its address")
        return place

    def _send(self, status: int, text: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        contents = text.encode()
        self.send_response(status)
        closed = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
        sent = {**closed, **_HEADERS, **(headers or {}), "Content-Type": kind, "Content-Length": str(len(contents))}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(contents)
