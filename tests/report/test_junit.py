from xml.etree import ElementTree as ET

import pytest

from zoscope import CheckReport
from zoscope.report.check import junit

junitparser = pytest.importorskip("junitparser")

# Attributes and children that the common JUnit schema (that of Jenkins) knows, for what is written here.
KNOWN = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "time", "skipped"}, {"testcase"}),
    "testcase": ({"name", "classname", "time"}, {"failure", "error", "system-out"}),
    "failure": ({"message", "type"}, set()),
    "error": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


def read_back(report: CheckReport) -> list[object]:
    return [case for suite in junitparser.JUnitXml.fromstring(junit(report).encode("utf-8")) for case in suite]


def test_a_parser_library_reads_it_back(report: CheckReport) -> None:
    cases = read_back(report)
    assert [case.name for case in cases] == [check.name for check in report.checks]
    kinds = [[type(result).__name__ for result in case.result] for case in cases]
    assert kinds == [[], [], ["Failure"], ["Error"], ["Failure"], ["Failure"]]
    assert cases[2].result[0].message == "Message of fails."
    assert "model.py" in cases[3].result[0].text


def test_the_totals_are_those_of_the_cases(report: CheckReport) -> None:
    xml = junitparser.JUnitXml.fromstring(junit(report).encode("utf-8"))
    assert (xml.tests, xml.failures, xml.errors) == (6, 3, 1)


def test_only_elements_of_the_common_schema_are_used(report: CheckReport) -> None:
    for element in ET.fromstring(junit(report)).iter():
        attributes, children = KNOWN[element.tag]
        assert set(element.attrib) <= attributes
        assert {child.tag for child in element} <= children


def test_hostile_names_are_read_back_up_to_what_xml_cannot_hold(
    hostile: CheckReport, hostile_names: tuple[str, ...]
) -> None:
    unholdable = {"\x00\x07\x1b[31m": "\\u0000\\u0007\\u001b[31m"}
    assert [case.name for case in read_back(hostile)] == [unholdable.get(name, name) for name in hostile_names]
