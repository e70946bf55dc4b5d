import io
import re

from rich.console import Console

from zoscope import CheckReport


def shown(report: CheckReport, width: int = 100) -> str:
    console = Console(width=width, no_color=True, force_terminal=False, file=io.StringIO())
    console.print(report)
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
