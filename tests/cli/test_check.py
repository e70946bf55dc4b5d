"""``zoscope check`` from the command line."""

import json
import os
from pathlib import Path

import pytest

from zoscope import UsageError
from zoscope.cli.check import FORMATS, fraction
from zoscope.config.keys import schema_text

SPEC = """\
import torch
import zoscope


def problem(nan: bool = False) -> zoscope.Problem:
    h = torch.linspace(0.1, 3.0, 12, dtype=torch.float64)
    x = torch.full((12,), float("nan") if nan else 1e-3, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * (h * x * x).sum(), x)
"""

CONFIG = """\
problem: model.py
defaults:
  policy: {threshold: exact}
checks:
  - name: zo
    optimizer:
      name: zo-gd
      lr: 0.03
  - name: fo
    optimizer: {name: gd, lr: 0.3}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(SPEC)
    (tmp_path / "zoscope.yaml").write_text(CONFIG)
    return tmp_path


def test_the_file_of_the_folder_is_checked(zoscope_cli, project: Path) -> None:
    done = zoscope_cli("check")
    assert done.code == 0, done.err
    assert "2 checks: 2 pass" in done.out
    assert done.err == ""


def test_an_unstable_lr_exits_1_and_names_the_largest_that_passes(zoscope_cli, project: Path) -> None:
    done = zoscope_cli("check", "zoscope.yaml", "--only", "zo", "--lr", "0.3", "--json")
    assert done.code == 1
    (check,) = json.loads(done.out)["checks"]
    assert f"The largest lr that passes is {check['largest_lr']:g}" in check["message"]
    assert zoscope_cli("check", "--only", "zo", "--lr", check["largest_lr"]).code == 0


def test_a_typo_exits_2_with_line_and_suggestion(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").write_text(CONFIG.replace("lr: 0.03", "lrr: 0.03"))
    done = zoscope_cli("check")
    assert done.code == 2
    assert "zoscope.yaml, line 8: unknown key 'lrr'" in done.paragraph
    assert "Did you mean 'lr'?" in done.paragraph


def test_a_model_that_is_not_finite_exits_3(zoscope_cli, project: Path) -> None:
    done = zoscope_cli("check", "--set", "nan=true")
    assert done.code == 3
    assert "2 error" in done.out


def test_a_mixed_file_reports_all_and_exits_with_the_worst(zoscope_cli, project: Path) -> None:
    rows = ["  - {name: lost, spec: gone.py, optimizer: {name: gd, lr: 1}}"]
    rows += ["  - {name: nan, set: {nan: true}, optimizer: {name: gd, lr: 1}}"]
    rows += ["  - {name: high, optimizer: {name: gd, lr: 10}}"]
    (project / "zoscope.yaml").write_text(CONFIG + "\n".join(rows))
    done = zoscope_cli("check", "--json")
    assert done.code == 2
    document = json.loads(done.out)
    assert [check["exit_code"] for check in document["checks"]] == [0, 0, 2, 3, 1]
    assert document["exit_code"] == 2


def test_options_are_enough_without_a_file(zoscope_cli, project: Path) -> None:
    done = zoscope_cli("check", "--spec", "model.py", "--optimizer", "zo-adam", "--lr", "1e-9", "--json")
    assert done.code == 0, done.out
    assert [check["name"] for check in json.loads(done.out)["checks"]] == ["zo-adam"]


def test_without_anything_to_check_it_says_what_to_give(zoscope_cli) -> None:
    done = zoscope_cli("check")
    assert done.code == 2
    assert "--optimizer" in done.paragraph


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_goes_to_stdout_and_to_files(zoscope_cli, project: Path, format: str) -> None:
    done = zoscope_cli("check", "--format", format, "--output", f"{format}=out.txt", "--lr", "9")
    assert done.code == 1
    assert done.err == ""
    if format != "text":  # the width of a terminal is not that of a file
        assert (project / "out.txt").read_text() == done.out


def test_several_outputs_are_written_at_once(zoscope_cli, project: Path) -> None:
    outputs = [f"{name}=out.{name}" for name in FORMATS]
    done = zoscope_cli("check", *[part for output in outputs for part in ("--output", output)])
    assert done.code == 0
    assert all((project / f"out.{name}").is_file() for name in FORMATS)
    assert json.loads((project / "out.json").read_text())["status"] == "pass"


def test_an_output_without_a_format_has_that_of_stdout(zoscope_cli, project: Path) -> None:
    zoscope_cli("check", "--json", "--output", "report")
    assert json.loads((project / "report").read_text())["schema"] == "zoscope.check/1"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--output", "xml=out.xml"], "unknown value 'xml'"),
        (["--output", "json=gone/out.json"], "there is no folder gone"),
        (["--output", "json="], "Expected FORMAT=FILE"),
        (["--output", "json=a", "--output", "text=a"], "named twice"),
        (["--format", "yaml"], "unknown value 'yaml'"),
        (["--json", "--format", "text"], "contradict"),
        (["--max-drop", "150%"], "Expected a fraction"),
        (["--update-baseline"], "needs --baseline"),
        (["--baseline", "gone.json"], "--update-baseline"),
        (["--hf-args", "gone.json"], "--hf-args"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--margin", "2"], "--margin must be"),
        (["--only", "z"], "no check 'z'"),
        (["gone.yaml"], "there is no file gone.yaml"),
    ],
)
def test_a_wrong_option_is_one_paragraph_before_any_work(
    zoscope_cli, project: Path, words: list[str], error: str
) -> None:
    (project / "model.py").write_text("raise SystemExit('loaded')")
    done = zoscope_cli("check", *words)
    assert done.code == 2
    assert error in done.paragraph


def test_the_schema_is_printed_without_a_configuration(zoscope_cli) -> None:
    done = zoscope_cli("check", "--schema")
    assert (done.code, done.out) == (0, schema_text())


def test_a_broken_configuration_is_annotated_too(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").write_text(CONFIG.replace("lr: 0.03", "lrr: 0.03"))
    done = zoscope_cli("check", "--format", "github", "--output", "github=out.txt")
    assert done.code == 2
    assert done.out.startswith("::error file=zoscope.yaml,line=8,title=")
    assert (project / "out.txt").read_text() == done.out


def test_paths_for_github_are_those_of_the_repository(
    zoscope_cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project))
    (project / "sub").mkdir()
    for name in ("model.py", "zoscope.yaml"):
        (project / name).rename(project / "sub" / name)
    monkeypatch.chdir(project / "sub")
    done = zoscope_cli("check", "--format", "github", "--lr", "9", "--output", "sarif=out.sarif")
    assert done.out.startswith("::error file=sub/zoscope.yaml,line=8,")
    assert '"uri": "sub/zoscope.yaml"' in Path("out.sarif").read_text()


def test_a_file_without_checks_gives_the_problem_to_one_made_of_options(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").write_text("problem: model.py\n")
    assert zoscope_cli("check", "--optimizer", "gd", "--lr", "9").code == 1
    (project / "zoscope.yaml").unlink()
    assert zoscope_cli("check", "--optimizer", "gd", "--lr", "9").code == 1


def test_the_job_summary_is_appended_to(zoscope_cli, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = project / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    zoscope_cli("check")
    text = summary.read_text()
    assert text.startswith("before\n### zoscope check\n")
    assert "| zo | zo-gd |" in text


@pytest.mark.skipif(os.name == "nt", reason="a pipe with a name")
def test_a_job_summary_that_nobody_reads_is_no_wait(
    zoscope_cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(project / "pipe")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project / "pipe"))
    done = zoscope_cli("check")
    assert done.code == 2
    assert "GITHUB_STEP_SUMMARY: cannot append to" in done.paragraph


def test_a_baseline_is_written_and_compared_with(zoscope_cli, project: Path) -> None:
    assert zoscope_cli("check", "--baseline", "base.json", "--update-baseline").code == 0
    assert zoscope_cli("check", "--baseline", "base.json").code == 0
    (project / "model.py").write_text(SPEC.replace("3.0", "4.5"))
    done = zoscope_cli("check", "--baseline", "base.json", "--json")
    assert done.code == 1
    drops = [check["baseline"]["drop"] for check in json.loads(done.out)["checks"]]
    assert drops[1] == pytest.approx(1 / 3, abs=1e-3)
    assert zoscope_cli("check", "--baseline", "base.json", "--max-drop", "50%").code == 0


def test_a_file_that_is_no_baseline_is_not_overwritten(zoscope_cli, project: Path) -> None:
    done = zoscope_cli("check", "--baseline", "model.py", "--update-baseline")
    assert done.code == 2
    assert "model.py is not a document" in done.paragraph
    assert (project / "model.py").read_text() == SPEC


def test_training_arguments_are_read(zoscope_cli, project: Path) -> None:
    (project / "args.json").write_text(json.dumps({"learning_rate": 9.0, "q": 2, "trainer": "zo_sgd", "zo_eps": 1e-3}))
    done = zoscope_cli("check", "--spec", "model.py", "--hf-args", "args.json", "--json")
    assert done.code == 1
    (check,) = json.loads(done.out)["checks"]
    assert (check["lr"], check["optimizer"], check["settings"]["queries"]) == (9.0, "zo-gd", 2)


def test_pyproject_holds_the_configuration_too(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").unlink()
    (project / "pyproject.toml").write_text(
        '[tool.zoscope]\nproblem = "model.py"\n[[tool.zoscope.checks]]\nname = "a"\n'
        'optimizer = {name = "gd", lr = 9.0}\n'
    )
    done = zoscope_cli("check", "--json")
    assert done.code == 1
    (check,) = json.loads(done.out)["checks"]
    assert (check["file"], check["line"]) == ("pyproject.toml", 5)


@pytest.mark.parametrize(("text", "value"), [("20%", 0.2), ("0.2", 0.2), (" 5 %", 0.05)])
def test_a_fraction_may_be_a_percentage(text: str, value: float) -> None:
    assert fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "1", "20", "x", "nan", "-5%", "100%"])
def test_a_drop_outside_of_0_and_1_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        fraction(text)


def test_the_policy_plan_holds_lr_against_where_half_of_the_planned_runs_leave(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").write_text(CONFIG.replace("exact}", "plan, on_warn: fail}\n  steps: 100"))
    done = zoscope_cli("check", "--only", "zo", "--json")
    (check,) = json.loads(done.out)["checks"]
    assert (done.code, check["status"], check["threshold_name"]) == (0, "pass", "plan")
    assert check["ci95"][0] < check["threshold"] < check["ci95"][1]
    above = zoscope_cli("check", "--only", "zo", "--lr", 2 * check["threshold"], "--json")
    assert above.code == 1
    assert "half of the planned runs diverge" in json.loads(above.out)["checks"][0]["message"]


def test_the_policy_plan_is_for_zeroth_order_optimizers(zoscope_cli, project: Path) -> None:
    (project / "zoscope.yaml").write_text(CONFIG.replace("exact", "plan"))
    done = zoscope_cli("check", "--only", "fo")
    assert done.code == 2
    assert "policy.threshold plan is for zo- optimizers" in done.out + done.err
