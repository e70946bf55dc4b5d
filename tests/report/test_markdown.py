import re

from zoscope import CheckReport
from zoscope.report.check import HEADER, markdown

SEPARATOR = re.compile(r"(?<!\\)\|")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in SEPARATOR.split(line)[1:-1]] for line in lines]


def test_the_table_has_a_row_per_check(report: CheckReport) -> None:
    header, _, *body = rows(markdown(report))
    assert tuple(header) == HEADER
    assert [row[0] for row in body] == [check.name for check in report.checks]
    assert body[0][2:] == ["0.02", "0.016", "[0.0155, 0.0165]", "1.25", "✅ pass", "0.012"]


def test_what_did_not_pass_is_explained_below(report: CheckReport) -> None:
    text = markdown(report)
    assert "- **fails (ci/zoscope.yaml:7)**: Message of fails." in text
    assert "- note (warns): A note." in text
    assert "Message of passes" not in text


def test_hostile_names_stay_in_their_cell(hostile: CheckReport) -> None:
    body = rows(markdown(hostile))[2:]
    assert len(body) == len(hostile.checks)
    assert {len(row) for row in body} == {len(HEADER)}
