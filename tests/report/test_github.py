import re

from zoscope import CheckReport
from zoscope.report.check import github

COMMAND = re.compile(r"^::(?P<level>\w+) (?P<properties>[^:]*)::(?P<message>.*)$")


def decoded(text: str, *, is_property: bool) -> str:
    """What the runner makes of an escaped value."""
    if is_property:
        text = text.replace("%3A", ":").replace("%2C", ",")
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    found = COMMAND.match(line)
    assert found, line
    pairs = [item.split("=", 1) for item in found["properties"].split(",")]
    properties = {name: decoded(value, is_property=True) for name, value in pairs}
    return found["level"], properties, decoded(found["message"], is_property=False)


def test_each_check_that_does_not_pass_is_annotated_at_its_line(report: CheckReport) -> None:
    commands = [parsed(line) for line in github(report).splitlines()]
    assert [command[0] for command in commands] == ["warning", "error", "error", "error", "error"]
    assert commands[0][1] == {"file": "ci/zoscope.yaml", "line": "7", "title": "zoscope: warns: warn"}
    assert "file" not in commands[-1][1]


def test_hostile_names_round_trip(hostile: CheckReport, hostile_names: tuple[str, ...]) -> None:
    commands = [parsed(line) for line in github(hostile).split("\n")[:-1]]
    assert [properties["title"] for _, properties, _ in commands] == [
        f"zoscope: {name}: fail" for name in hostile_names
    ]
    assert [properties["file"] for _, properties, _ in commands] == [f"{name}.yaml" for name in hostile_names]
    assert [message for _, _, message in commands] == [f"{name} in {name}" for name in hostile_names]


def test_a_report_that_passes_says_nothing() -> None:
    assert github(CheckReport(())) == ""
