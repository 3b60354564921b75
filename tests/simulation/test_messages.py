"""`docs/messages.md` holds every message of its rooms, with what it means and what to do, as the code says it today."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from chainward_simulations.messages import Room, _messages_of, page, rooms

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROOMS = rooms(DOCS / "messages.yaml")


def by_title(room: Room) -> str:
    return room.title


@pytest.mark.parametrize("room", ROOMS, ids=by_title)
def test_every_message_is_explained(room: Room) -> None:
    unexplained = [message for message in room.messages() if not any(group.holds(message) for group in room.groups)]
    assert unexplained == []


@pytest.mark.parametrize("room", ROOMS, ids=by_title)
def test_every_explanation_has_a_message_and_says_what_to_do(room: Room) -> None:
    found = room.messages()
    for group in room.groups:
        assert len(group.means) > 30
        assert len(group.do) > 20
        for pattern in group.says:
            alone = type(group)(group.title, group.means, group.do, (pattern,))
            assert any(alone.holds(message) for message in found), (group.title, pattern)


def test_messages_are_found_where_they_are_raised() -> None:
    found = {message for room in ROOMS for message in room.messages()}
    assert "… holds a single array; expected an .npz with train_images, train_labels, ..." in found
    assert "truncated: … bytes of pixels, expected …" in found
    assert "There is no manifest …" in found
    assert "output.resume = …: no run.json in …" in found
    assert "patients: copies: … (remove the copies, or give them the same patient)" in found
    assert len(found) > 350


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise DataError(f'{path}: is no file')", ["…: is no file"]),
        ("raise RunFolderError('no run') from None", ["no run"]),
        ("raise PolicyRefusal(words)", []),
        ("yield f'chain.laps = {laps} contradicts it'", ["chain.laps = … contradicts it"]),
        ("problem('disk', f'{free} left', 'free space')", ["disk: … left (free space)"]),
        ("with written(path): pass", ["…: can't be written (…); free space or fix its rights"]),
        ("with written(path, StudyError, 'free space'): pass", ["…: can't be written (…); free space"]),
        ("with written(path, advice='fix its rights'): pass", ["…: can't be written (…); fix its rights"]),
        ("logger.warning('%s: %s', site, note)", []),
        ("raise KeyError('not a message to a person')", []),
    ],
)
def test_every_way_to_say_something_is_known(code: str, expected: list[str]) -> None:
    assert list(_messages_of(ast.parse(code))) == expected


def test_the_page_is_up_to_date() -> None:
    hint = "python -m chainward_simulations.messages > docs/messages.md"
    assert (DOCS / "messages.md").read_text(encoding="utf-8") == page(DOCS / "messages.yaml"), hint
