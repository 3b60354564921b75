"""A local page: who may see it, who may press its buttons, and what a browser is told that it must not do."""

from __future__ import annotations

import http.client
import re
import socket
from urllib.parse import urlencode

import pytest

from chainward_shared.errors import ConfigError
from chainward_shared.local_page import LocalPage, Look, environment

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m{{7*7}}"


@pytest.fixture
def acted():
    return []


@pytest.fixture
def page(acted):
    with LocalPage("a title <b>", lambda form: Look(f"<p>now {form}</p>", ended=True), acted.append) as served:
        yield served


def ask(page, path="/", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in named)
    for name, value in named.items():
        connection.putheader(name, value)
    if body is not None and "Content-Length" not in named:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def press(page, fields, **headers):
    body = urlencode(fields).encode()
    usual = {"Content_Type": "application/x-www-form-urlencoded"}
    return ask(page, f"/{page.token}/act", "POST", body, **(usual | headers))


def test_the_page_is_there_for_whoever_has_its_whole_address(page):
    status, headers, text = ask(page, f"/{page.token}/")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert f"now {page.form}" in text and "a title &lt;b&gt;" in text
    status, headers, text = ask(page, f"/{page.token}/part")
    assert (status, headers["X-Ended"], text) == (200, "1", f"<p>now {page.form}</p>")
    assert page.address == f"http://127.0.0.1:{page.port}/{page.token}/"


@pytest.mark.parametrize("path", ["/", "/part", "/x/", "/{}x/", "/{}/../", "/{}/act", "/{}/%2e", "//[", "/%e9/", "*"])
def test_without_the_secret_there_is_nothing(page, path):
    half = page.token[:-1]
    for token in (half, page.token) if "act" in path or ".." in path or "%" in path else (half,):
        status, _, text = ask(page, path.format(token))
        assert status in (400, 404)
        assert page.token not in text and page.form not in text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{}", ""]
)
def test_a_request_that_names_another_host_is_not_answered(page, host):
    status, _, text = ask(page, f"/{page.token}/", Host=host.format(page.port))
    assert status == 421 and "now" not in text
    assert press(page, {"form": page.form}, Host=host.format(page.port))[0] == 421


def test_a_button_needs_the_forms_own_secret(page, acted):
    status, headers, _ = press(page, {"form": page.form, "decision": "approved"})
    assert (status, headers["Location"]) == (303, f"/{page.token}/")
    assert acted == [{"decision": "approved"}]
    for wrong in ("", "x", page.token, page.form[:-1]):
        assert press(page, {"form": wrong, "decision": "approved"})[0] == 403
    assert press(page, {"decision": "approved"})[0] == 403
    assert len(acted) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "none"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/json"},
        {"Content_Length": "999999999"},
        {"Content_Length": "-1"},
        {"Content_Length": "many"},
    ],
)
def test_a_form_from_elsewhere_or_of_another_kind_does_nothing(page, acted, headers):
    assert press(page, {"form": page.form}, **headers)[0] in (403, 413, 415)
    assert acted == []


def test_a_form_with_fields_without_end_does_nothing(page, acted):
    assert press(page, {f"a{number}": "1" for number in range(100)} | {"form": page.form})[0] == 400
    assert acted == []


def test_a_button_is_pressed_from_the_page_itself(page, acted):
    own = f"http://127.0.0.1:{page.port}"
    assert press(page, {"form": page.form}, Origin=own, Sec_Fetch_Site="same-origin")[0] == 303
    assert len(acted) == 1


def test_looking_does_nothing(page, acted):
    body = urlencode({"form": page.form})
    assert ask(page, f"/{page.token}/act?{body}")[0] == 404
    assert acted == []


def test_a_browser_loads_nothing_from_elsewhere_and_runs_only_the_pages_own_script(page):
    _, headers, text = ask(page, f"/{page.token}/")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    (nonce,) = re.fullmatch(r"'nonce-(.+)'", policy["script-src"]).groups()
    assert re.findall(r"<(?:script|style)[^>]*>", text) == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", text)
    assert " style=" not in text and " on" not in re.sub(r">[^<]*<", "><", text).replace(" on the", "")
    assert ask(page, f"/{page.token}/")[1]["Content-Security-Policy"] != headers["Content-Security-Policy"]
    for name in ("X-Content-Type-Options", "X-Frame-Options", "Cross-Origin-Resource-Policy"):
        assert name in headers and name in ask(page, "/")[1]


def test_values_in_a_template_are_escaped():
    made = environment("chainward_shared.local_page").from_string("<p>{{ value }}</p>").render(value=HOSTILE)
    assert "<script" not in made and "<img" not in made


def test_it_listens_on_loopback_only_and_says_when_a_port_is_taken(page):
    assert page._server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=rf"port {page.port} on 127.0.0.1"):
        LocalPage("x", lambda form: Look(""), port=page.port)


def test_a_client_that_says_nothing_keeps_nobody_from_the_page(page):
    silent = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(4)]
    assert ask(page, f"/{page.token}/")[0] == 200
    for one in silent:
        one.close()


def test_a_page_without_buttons_has_none():
    with LocalPage("x", lambda form: Look("")) as page:
        assert press(page, {"form": page.form})[0] == 404
