import io
import re

from rich.console import Console

from zoscope import CheckReport


def shown(report: CheckReport, width: int = 100, *, verbose: bool = True) -> str:
    console = Console(width=width, no_color=True, force_terminal=False, file=io.StringIO())
    console.print(report.report(verbose=verbose))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_says_what_passes(report: CheckReport) -> None:
    text = shown(report)
    assert re.search(r"0\.016 .*\n +\[0\.0155, 0\.0165\]", text)
    assert "passes up to" in text
    assert "6 checks: 1 pass, 1 warn, 3 fail, 1 error in 1.5 s" in text


def test_what_did_not_pass_has_its_place_and_its_words(report: CheckReport) -> None:
    text = shown(report)
    assert "fails (ci/zoscope.yaml:7): Message of fails." in text
    assert "Message of passes" not in text
    assert 'File "model.py", line 3' in text


def test_names_are_text_and_not_markup(hostile: CheckReport) -> None:
    assert "[link](x)" in shown(hostile)


def test_the_table_fits_on_a_narrow_terminal(report: CheckReport) -> None:
    text = shown(report, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"0\.016 .*\n +\[0\.0155, 0\.0165\]", text)


def test_the_answer_has_a_line_for_each_check_and_the_worst_first(report: CheckReport) -> None:
    summary, *lines = shown(report, width=80, verbose=False).splitlines()
    assert summary == "6 checks: 1 pass, 1 warn, 3 fail, 1 error in 1.5 s"
    assert [line.split()[0] for line in lines if line[0] != " "] == ["error", "fail", "fail", "fail", "warn", "+1"]
    assert "lr 0.02 is 1.2 × threshold 0.016, ≤ 0.012 passes" in lines[1]
    assert max(map(len, lines)) <= 80


def test_many_checks_are_counted_in_the_last_line(report: CheckReport) -> None:
    many = CheckReport(report.checks * 5)
    lines = shown(many, width=80, verbose=False).splitlines()
    assert len(lines) == 12
    assert lines[0] == "30 checks: 5 pass, 5 warn, 15 fail, 5 error"
    assert lines[-1] == "+20 more: 10 fail, 5 warn, 5 pass"
