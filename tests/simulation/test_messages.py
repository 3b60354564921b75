"""`docs/messages.md` holds every message about data, with what it means and what to do, as the code says it today."""

from __future__ import annotations

from pathlib import Path

from chainward_simulations.messages import groups, messages, page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_message_is_explained() -> None:
    known = groups(DOCS / "messages.yaml")
    unexplained = [message for message in messages() if not any(group.holds(message) for group in known)]
    assert unexplained == []


def test_every_explanation_has_a_message_and_says_what_to_do() -> None:
    found = messages()
    for group in groups(DOCS / "messages.yaml"):
        assert len(group.means) > 30
        assert len(group.do) > 20
        for pattern in group.says:
            alone = type(group)(group.title, group.means, group.do, (pattern,))
            assert any(alone.holds(message) for message in found), (group.title, pattern)


def test_messages_are_found_where_they_are_raised() -> None:
    found = messages()
    assert "… holds a single array; expected an .npz with train_images, train_labels, ..." in found
    assert "truncated: … bytes of pixels, expected …" in found
    assert "There is no manifest …" in found
    assert len(found) > 100


def test_the_page_is_up_to_date() -> None:
    hint = "python -m chainward_simulations.messages > docs/messages.md"
    assert (DOCS / "messages.md").read_text(encoding="utf-8") == page(DOCS / "messages.yaml"), hint
