"""SARIF 2.1.0, as code scanning reads it: a result for each check that warns, fails or errors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from zoscope.analysis.checking.results import CheckReport, CheckResult

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
RULES = (
    ("ZOS001", "UnstableStepSize", "The configured step size is above the stable range.", "error"),
    ("ZOS002", "NarrowMargin", "The configured step size is inside the safety margin of the stable range.", "warning"),
    ("ZOS003", "ThresholdDropped", "The stability threshold fell below its baseline.", "error"),
    ("ZOS004", "CheckError", "The check could not be done.", "error"),
)


def sarif(report: CheckReport) -> str:
    """The log as JSON text."""
    results = [_result(check) for check in report.checks if check.status != "pass"]
    driver = {"name": "zoscope", "version": report.version, "rules": [_rule(*rule) for rule in RULES]}
    invocation = {"executionSuccessful": all(check.status != "error" for check in report.checks)}
    run = {
        "tool": {"driver": driver},
        "invocations": [{**invocation, "exitCode": report.exit_code}],
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _rule(identifier: str, name: str, description: str, level: str) -> dict[str, Any]:
    return {
        "id": identifier,
        "name": name,
        "shortDescription": {"text": description},
        "defaultConfiguration": {"level": level},
    }


def _rule_of(check: CheckResult) -> int:
    """Index of the rule that a check breaks."""
    if check.status == "error":
        return 3
    if check.baseline is not None and check.baseline.failed:
        return 2
    return 0 if check.status == "fail" else 1


def _result(check: CheckResult) -> dict[str, Any]:
    index = _rule_of(check)
    result: dict[str, Any] = {
        "ruleId": RULES[index][0],
        "ruleIndex": index,
        "level": "warning" if check.status == "warn" else "error",
        "message": {"text": f"{check.name}: {check.message}"},
        # so that an alert is followed over commits by the name of its check, not by its line
        "partialFingerprints": {"checkName/v1": hashlib.sha256(check.name.encode(errors="replace")).hexdigest()},
        "properties": {"status": check.status, "optimizer": check.optimizer, "lr": check.lr},
    }
    location = _location(check)
    if location is not None:
        result["locations"] = [location]
    return result


def _location(check: CheckResult) -> dict[str, Any] | None:
    """The line of the configuration, or the first of the spec where there is no configuration."""
    file, line = check.file, check.line
    if file is None:
        found = re.match(r"(.+\.py)(?::|$)", check.spec)
        if found is None:
            return None
        file, line = found[1], None
    place = {"artifactLocation": {"uri": _uri(file)}, "region": {"startLine": line or 1}}
    return {"physicalLocation": place}


def _uri(file: str) -> str:
    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix(), errors="replace")
