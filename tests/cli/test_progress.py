"""Progress is for people at a terminal."""

import pytest

from zoscope.cli import output as progress


def test_nothing_is_shown_where_nobody_looks(capsys) -> None:
    with progress.measuring(max_hvps=10, rtol=0.02, quiet=False) as report:
        assert report is None
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_when_quiet(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not progress.visible(quiet=True)


def test_products_and_precision_are_shown_on_stderr(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.measuring(max_hvps=600, rtol=0.02, quiet=False) as report:
        assert report is not None
        report("hessian", 30, None)
        report("hessian", 40, 0.04)
        report("preconditioned hessian", 10, float("inf"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "HVPs" in captured.err


@pytest.mark.parametrize(
    ("num_hvps", "precision", "total"), [(50, None, 600), (50, 0.04, 200), (50, 0.2, 600), (50, 0.01, 50)]
)
def test_the_bar_is_as_long_as_the_precision_takes(num_hvps: int, precision: float | None, total: int) -> None:
    assert progress.products_needed(num_hvps, precision, max_hvps=600, rtol=0.02) == total
