import json
from typing import Any

import jsonschema
import pytest

from zoscope import CheckReport
from zoscope.report.check import sarif


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object of SARIF 2.1.0 with the properties that zoscope writes; the standard allows no unknown ones."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT = {"type": "string"}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
MESSAGE = closed(["text"], text=TEXT)
RULE = closed(["id"], id=TEXT, name=TEXT, shortDescription=MESSAGE, defaultConfiguration=closed([], level=LEVEL))
LOCATION = closed(
    [],
    physicalLocation=closed(
        ["artifactLocation"],
        artifactLocation=closed([], uri={"type": "string", "format": "uri-reference"}),
        region=closed([], startLine={"type": "integer", "minimum": 1}),
    ),
)
RESULT = closed(
    ["message"],
    ruleId=TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=LEVEL,
    message=MESSAGE,
    locations={"type": "array", "items": LOCATION},
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
    properties={"type": "object"},
)
RUN = closed(
    ["tool"],
    tool=closed(["driver"], driver=closed(["name"], name=TEXT, version=TEXT, rules={"type": "array", "items": RULE})),
    invocations={
        "type": "array",
        "items": closed(["executionSuccessful"], executionSuccessful={"type": "boolean"}, exitCode={"type": "integer"}),
    },
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    results={"type": "array", "items": RESULT},
)
LOG = closed(
    ["version", "runs"], **{"$schema": TEXT, "version": {"enum": ["2.1.0"]}, "runs": {"type": "array", "items": RUN}}
)


@pytest.mark.parametrize("which", ["report", "hostile"])
def test_the_log_has_the_shape_of_the_standard(which: str, request: pytest.FixtureRequest) -> None:
    log = json.loads(sarif(request.getfixturevalue(which)))
    jsonschema.Draft202012Validator(LOG).validate(log)


def test_each_check_that_does_not_pass_is_a_result_at_its_line(report: CheckReport) -> None:
    (run,) = json.loads(sarif(report))["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert [result["ruleId"] for result in run["results"]] == ["ZOS002", "ZOS001", "ZOS004", "ZOS003", "ZOS001"]
    assert all(rules[result["ruleIndex"]] == result["ruleId"] for result in run["results"])
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert places[0] == {"artifactLocation": {"uri": "ci/zoscope.yaml"}, "region": {"startLine": 7}}
    assert places[-1] == {"artifactLocation": {"uri": "model.py"}, "region": {"startLine": 1}}


def test_an_alert_is_followed_by_the_name_of_its_check(report: CheckReport) -> None:
    results = json.loads(sarif(report))["runs"][0]["results"]
    prints = [result["partialFingerprints"]["checkName/v1"] for result in results]
    assert len(set(prints)) == len(prints)


def test_locations_are_uris(hostile: CheckReport) -> None:
    for result in json.loads(sarif(hostile))["runs"][0]["results"]:
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri.isascii()
        assert not set(uri) & set(' <>"|\\^`{}')
