"""What every report begins with: notices by rank, and the ruler."""

import io

import pytest
from rich.console import Console

from zoscope import Notice
from zoscope.report.answer import MARKS, notice_lines, ruler

USUAL = [Notice(code, f"About {code}.") for code in ("few-modes", "indefinite-hessian", "commutator")]


def lines(notices: list[Notice], *, width: int = 80, room: int = 5) -> list[str]:
    return [line.plain for line in notice_lines(notices, width=width, room=room)]


def test_nothing_is_said_where_there_is_nothing_to_say() -> None:
    assert lines([]) == []


def test_of_what_is_good_to_know_one_has_a_line() -> None:
    first, last = lines(USUAL)
    assert first.startswith("Note indefinite-hessian: ")
    assert last == "+2 more: few-modes, commutator (-v; zoscope explain CODE)"


def test_what_is_serious_comes_first() -> None:
    found = lines([*USUAL, Notice("precision", "x"), Notice("kinks", "x"), Notice("provisional", "x")])
    assert [line.split(":")[0] for line in found[:2]] == ["Warning provisional", "Warning kinks"]
    assert found[2].startswith("+4 more: precision, indefinite-hessian")


@pytest.mark.parametrize("room", [-3, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_they_keep_to_their_room_but_for_one_line(room: int, count: int) -> None:
    found = lines(USUAL[:count], room=room)
    assert 1 <= len(found) <= max(room, 1)
    text = " ".join(found)
    assert all(notice.code in text for notice in USUAL[:count])


@pytest.mark.parametrize("width", [20, 40, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    many = [*USUAL, Notice("preconditioner-collapsed", "x"), Notice("full-batch-threshold", "x")]
    assert all(len(line) <= width for line in lines(many, width=width))


def test_a_notice_that_varies_says_its_own_message() -> None:
    assert lines([Notice("checkpoint", "Names were matched.")])[0] == "Warning checkpoint: Names were matched."
    assert lines([Notice("from-elsewhere", "New words.")])[0].endswith("from-elsewhere: New words.")


def test_codes_are_links_only_where_there_is_a_page() -> None:
    for guide, linked in (("https://example.org/notices.md", True), (None, False)):
        console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
        for line in notice_lines(USUAL, width=80, room=3, guide=guide):
            console.print(line)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("https://example.org/notices.md#few-modes" in text) == linked


# --- the ruler --------------------------------------------------------------------------------------------------------


def test_marks_stand_in_the_order_of_their_step_sizes() -> None:
    text = ruler({"use": 1e-3, "edge": 1.4e-3, "lr": 1e-2, "FO": 0.1}, width=80).plain  # type: ignore[union-attr]
    axis = text[: text.index("falls")]
    assert [sign for sign in axis if sign in MARKS.values()] == [MARKS[name] for name in ("use", "edge", "lr", "FO")]
    assert len(text) <= 80


def test_the_axis_is_logarithmic() -> None:
    marks = {"use": 1e-4, "edge": 1e-2, "FO": 1.0}
    text = ruler(marks, width=120).plain  # type: ignore[union-attr]
    use, edge, fo = (text.index(MARKS[name]) for name in marks)
    assert abs((edge - use) - (fo - edge)) <= 1


def test_what_falls_and_what_diverges_differ_in_shape() -> None:
    text = ruler({"use": 1e-3, "edge": 1e-2}, width=80).plain  # type: ignore[union-attr]
    before, after = text[: text.index(MARKS["use"])], text[text.index(MARKS["edge"]) : text.index("  ━ falls")]
    assert "━" in before
    assert "╌" not in before
    assert "╌" in after
    assert "━" not in after


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 300])
def test_a_ruler_is_one_line_of_the_terminal(width: int) -> None:
    text = ruler({"use": 1e-3, "edge": 1e-3, "lr": 1e-3, "FO": 1e-3}, width=width).plain  # type: ignore[union-attr]
    assert "\n" not in text
    assert len(text) <= max(width, 30)


def test_without_an_edge_there_is_none() -> None:
    assert ruler({"use": 1e-3, "edge": None}, width=80) is None
    assert ruler({"use": 1e-3, "edge": float("inf")}, width=80) is None
