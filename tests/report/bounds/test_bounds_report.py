import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from zoscope import BoundsResult, Notice
from zoscope.analysis.explanations import PROVISIONAL
from zoscope.report.bounds import advice, render
from zoscope.report.words import step_size_at_most

Make = Callable[..., BoundsResult]
WIDTHS = (80, 120, 200)


def shown(result: object, width: int, *, verbose: bool = True) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(render(result, verbose=verbose) if isinstance(result, BoundsResult) else result)
    return console.export_text(styles=False)


def advised(result: BoundsResult) -> Text:
    (text, *_) = advice(result).columns[1].cells
    return text


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("steps", [1, 1000, 50_000])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_no_line_is_wider_than_the_terminal(make_result: Make, width: int, steps: int, noise: float) -> None:
    text = shown(make_result(steps=steps, noise=noise, lr=0.02), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_the_same_numbers_are_shown_at_80_and_at_120_columns(make_result: Make, scale: float) -> None:
    result = make_result(lr=0.02 / scale, scale=scale)
    narrow, wide = (numbers(shown(result, width).partition("Curvature")[2]) for width in (80, 120))
    assert set(narrow) == set(wide)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_bound_is_shown(make_result: Make, width: int) -> None:
    result = make_result()
    text = shown(result, width)
    floats = [float(number.replace(",", "")) for number in numbers(text)]
    for row in result.optimizers.values():
        for value in (row.zo_lower, row.zo_upper, row.lower_tight, row.upper_tight, row.descent, row.recommended):
            assert any(number == pytest.approx(value, rel=0.05) for number in floats)  # two digits, where its error is
        for point in row.horizon.curve:
            assert f"{point.steps:,}" in text
            for end in (point.lower.value, point.upper.value):
                assert any(number == pytest.approx(end, rel=0.006) for number in floats)


def test_numbers_stay_in_one_piece_in_a_narrow_terminal(make_result: Make) -> None:
    result = make_result()
    text = shown(result, 60)
    assert "…" not in text
    narrow, wide = (shown(result, width).partition("Curvature")[2] for width in (60, 80))
    assert set(numbers(narrow)) == set(numbers(wide))


def test_a_wide_terminal_holds_one_table_of_bounds_and_80_columns_two(make_result: Make) -> None:
    for noise, wide in ((0.0, 120), (0.02, 150)):
        result = make_result(noise=noise)
        assert shown(result, wide).count("Step-size bounds") == 1
        assert shown(result, 80).count("Step-size bounds") == 2


def test_every_number_that_was_sampled_has_its_error(make_result: Make) -> None:
    sampled, exact = shown(make_result(), 80), shown(make_result(noise=0.0), 80)
    for text, errors in ((sampled, 5), (exact, 0)):
        bounds = text[text.index("Step-size bounds") : text.index("Stable for how many steps")]
        assert [line.count("±") for line in bounds.splitlines() if line.startswith(("GD ", "GDM ", "Adam "))] == [
            *([min(errors, 2)] * 3),
            *([max(errors - 2, 0)] * 3),
        ]


def test_square_brackets_are_not_taken_for_markup(make_result: Make) -> None:
    text = shown(make_result(), 120)
    assert "model.py:problem[0]" in text
    assert "indefinite [as most are]" in text


def test_warnings_come_last_and_can_be_left_to_another_stream(make_result: Make) -> None:
    result = make_result()
    text = shown(result, 120)
    assert text.index("Warnings") > text.index("Stable for how many steps")
    assert "indefinite" not in shown(render(result, verbose=True, warnings=False), 120)


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (1e-6, "does not blow up within"),
        (7e-3, "close to it, may blow up within 1,000 steps"),
        (0.02, "blows up after about"),
    ],
)
def test_a_verdict_says_what_a_step_size_does(make_result: Make, lr: float, words: str) -> None:
    assert words in shown(make_result(lr=lr, optimizers=("gd",)), 120)


def test_a_firm_step_size_is_one_green_number(make_result: Make) -> None:
    text = advised(make_result(steps=30, noise=0.0, optimizers=("gd",)))
    assert "use lr ≤ " in text.plain
    assert [str(span.style) for span in text.spans] == ["bold green"]


def test_a_provisional_step_size_is_shown_with_two_digits_and_not_in_green(make_result: Make) -> None:
    result = make_result(optimizers=("gd",))
    row = replace(result.optimizers["gd"], doubts=("kinks",))
    row = replace(row, horizon=None)  # and with it the ends that make a range of it
    text = advised(replace(result, optimizers={"gd": row}))
    assert f"use lr ≤ {step_size_at_most(row.recommended, digits=2)} for now" in text.plain
    assert [str(span.style) for span in text.spans] == ["bold yellow"]


def test_behind_a_new_head_one_digit_is_shown_and_another_measurement_asked_for(make_result: Make) -> None:
    result = make_result(optimizers=("gd",))
    row = replace(result.optimizers["gd"], doubts=("little-curvature",), horizon=None)
    text = advised(replace(result, optimizers={"gd": row})).plain
    assert f"use lr ≤ {step_size_at_most(row.recommended, digits=1)} for now, and measure again after warm-up" in text


def test_ends_that_are_far_apart_are_printed_as_a_range(make_result: Make) -> None:
    result = make_result(steps=50_000, optimizers=("gd",))
    low, high = result.optimizers["gd"].recommended_range
    text = advised(result)
    low, high = (step_size_at_most(end, digits=2) for end in (low, high))
    assert f"begin with lr = {low}; up to {high} may do" in text.plain
    assert [str(span.style) for span in text.spans] == ["bold yellow"]


def test_a_provisional_notice_stands_beside_the_step_size_and_not_among_the_warnings(make_result: Make) -> None:
    result = make_result()
    text = shown(replace(result, warnings=(*result.warnings, Notice(PROVISIONAL, "Sure of nothing."))), 120)
    assert text.count("Sure of nothing.") == 1
    assert text.index("Sure of nothing.") < text.index("Warnings")


def test_a_verdict_mentions_a_rising_loss(make_result: Make) -> None:
    assert "the expected loss rises" in shown(make_result(lr=0.04, optimizers=("gd",)), 120)


def test_no_colour_is_written_where_none_is_wanted(make_result: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    Console(width=120, file=file, force_terminal=True).print(make_result())
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", file.getvalue())


def test_a_notebook_gets_html_and_text(make_result: Make) -> None:
    bundle = make_result()._repr_mimebundle_()
    assert bundle["text/html"].startswith("<pre")
    assert "use lr" in bundle["text/plain"]
    assert "result.report(verbose=True)" in bundle["text/plain"]


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lr", [None, 0.02])
@pytest.mark.parametrize("steps", [1, 1000, 50_000])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_the_answer_is_twelve_lines_at_most_and_keeps_to_its_width(
    make_result: Make, width: int, lr: float | None, steps: int, noise: float
) -> None:
    text = shown(make_result(lr=lr, steps=steps, noise=noise), width, verbose=False)
    lines = text.splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert all(any(line.startswith(f"{name} ") and "e-" in line for line in lines) for name in ("GD", "GDM", "Adam"))


def test_the_answer_has_the_bounds_that_the_details_have(make_result: Make) -> None:
    result = make_result(noise=0.0)
    text = shown(result, 120, verbose=False)
    floats = [float(number.replace(",", "")) for number in numbers(text)]
    for row in result.optimizers.values():
        use = row.recommended if row.recommended_range is None else row.recommended_range[0]
        for value in (row.fo, row.exact.value, row.zo_lower, row.zo_upper, use):
            assert any(number == pytest.approx(value, rel=0.06) for number in floats), value  # two digits in doubt
    assert "● use  ┃ edge  ◆ FO" in text


def test_a_step_size_asked_about_has_its_column(make_result: Make) -> None:
    text = shown(make_result(lr=0.02, noise=0.0), 80, verbose=False)
    assert "lr = 0.02" in text
    assert "× diverges" in text
    assert "▲ lr" in text


def test_a_step_size_that_is_not_known_is_not_called_unlimited(make_result: Make) -> None:
    result = replace(make_result(noise=0.0), warnings=(Notice("piecewise-constant", "It jumps."),))
    assert shown(result, 80, verbose=False).count("not known") == 3


def test_everything_begins_with_the_answer(make_result: Make) -> None:
    result = make_result()
    answer = shown(render(result, warnings=False), 80)
    assert shown(result, 80).startswith(answer)
    assert str(result.report(verbose=True)).startswith(str(result.report(warnings=False)))
