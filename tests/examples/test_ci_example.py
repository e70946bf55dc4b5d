"""``examples/ci``: the gate passes as it stands, and every command in it exists."""

import json
import re
from pathlib import Path

import pytest
import typer
import yaml

from zoscope.cli.app import build, run

CI = Path(__file__).parents[2] / "examples" / "ci"


def test_the_example_passes_and_three_times_its_step_size_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(CI / "zoscope.yaml"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert [check["status"] for check in document["checks"]] == ["pass"] * 4
    lr = document["checks"][0]["lr"]
    assert run(["check", str(CI / "zoscope.yaml"), "--only", "zo-gd", "--lr", str(3 * lr), "--json"]) == 1
    (check,) = json.loads(capfd.readouterr().out)["checks"]
    assert check["status"] == "fail"
    # One check by itself is measured less precisely than four together, and the number has two digits.
    assert check["largest_lr"] == pytest.approx(document["checks"][0]["largest_lr"], rel=0.1)
    assert f"The largest lr that passes is {check['largest_lr']:g}" in check["message"]


def commands(text: str) -> list[str]:
    """``zoscope check …`` with its continuation lines."""
    return re.findall(r"zoscope check[^\n#`]*(?:\n +--[^\n]*)*", text)


@pytest.mark.parametrize(
    "name",
    ["github-workflow.yml", "gitlab-ci.yml", "pre-commit-config.yaml", "README.md", "../../.pre-commit-hooks.yaml"],
)
def test_every_option_in_the_files_exists(name: str) -> None:
    group = typer.main.get_command(build())
    known = {option for parameter in group.commands["check"].params for option in parameter.opts}  # type: ignore[attr-defined]
    found = commands((CI / name).read_text(encoding="utf-8"))
    assert found
    for command in found:
        assert set(re.findall(r"(?<= )--[a-z-]+", command)) <= known, command


@pytest.mark.parametrize("name", ["github-workflow.yml", "gitlab-ci.yml", "pre-commit-config.yaml"])
def test_the_files_are_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((CI / name).read_text(encoding="utf-8")), dict)


def test_the_page_is_an_artifact_also_of_a_gate_that_fails() -> None:
    workflow = yaml.safe_load((CI / "github-workflow.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    (check,) = (step["run"] for step in job["steps"] if "zoscope check" in step.get("run", ""))
    (upload,) = (step for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    page = re.findall(r"--html (\S+)", check)
    assert page
    assert set(page) <= set(upload["with"]["path"].split())
    assert upload["if"].startswith("always()")
