"""The tables of a run, of several, and what is shown while one goes on."""

import io
import math

import pytest
import torch
from rich.console import Console
from rich.live import Live

import zoscope
from zoscope import Record
from zoscope.analysis.track import Comparison, Entry
from zoscope.analysis.track_results import band_of
from zoscope.report.track import Lines, LiveView, Spark, gauge, line, render, render_comparison
from zoscope.result import MOST_ROWS, thinned


def problem(scale=1.0):
    curvatures = scale * torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    return zoscope.Problem.from_function(
        lambda x: 0.5 * (curvatures * x * x).sum(), torch.ones(20, dtype=torch.float64)
    )


def run(**options):
    return zoscope.track(
        problem(), **{"lr": "0.001,150:0.002", "steps": 300, "every": 10, "spec": "model.py", **options}
    )


@pytest.fixture(scope="module")
def result():
    return run()


@pytest.fixture(scope="module")
def comparison(result):
    diverged = run(optimizer="gd", lr=5.0)
    return Comparison(
        (Entry("small", result), Entry("large", diverged), Entry("none", None, "the start is not finite"))
    )


def shown(renderable, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("optimizer", ["zo-gd", "zo-gdm", "zo-adam", "gd", "gdm", "adam"])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(optimizer, width):
    text = shown(render(run(optimizer=optimizer, lr=0.001, steps=30), verbose=True), width)
    assert all(len(row) <= width for row in text.splitlines())
    assert "…" not in text
    for heading in ("step", "loss", "trace", "term", "η/η*"):
        assert heading in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_fits_too(comparison, width):
    text = shown(render_comparison(comparison, verbose=True), width)
    assert all(len(row) <= width for row in text.splitlines())
    assert "diverged: the loss was" in text
    assert "the start is not finite" in text
    assert "They differ in optimizer, lr." in text


def test_at_most_twenty_rows_with_both_ends(result):
    rows = thinned(result.records)
    assert len(rows) == MOST_ROWS
    assert (rows[0], rows[-1]) == (result.records[0], result.records[-1])
    assert f"{MOST_ROWS} of 31" in shown(render(result, verbose=True), 100)


@pytest.mark.parametrize("optimizer", ["zo-gd", "adam", "zo-normalized"])
def test_the_answer_is_short_and_says_how_near_the_edge_was(optimizer):
    text = shown(render(run(optimizer=optimizer, lr=0.001, steps=30)), 80)
    assert len(text.splitlines()) <= 12
    assert "Finished: all 30 steps are done; loss " in text
    assert ("× the threshold η*, at step" in text) == (optimizer != "zo-normalized")


def test_of_many_runs_the_best_are_listed(result, comparison):
    many = Comparison(tuple(Entry(f"run {n}", result) for n in range(20)) + comparison.entries[1:])
    text = shown(render_comparison(many), 80)
    assert len(text.splitlines()) <= 12
    assert "+13 more" in text
    assert "Failed: none" in text


def at(step, threshold, lower=90.0, upper=110.0):
    return Record(step=step, loss=1.0, lower=lower, upper=upper, threshold=threshold)


def test_the_band_counts_from_where_it_was_reached():
    records = [at(0, 500.0), at(1, 200.0), at(2, 121.0), at(3, 100.0), at(4, 80.0), at(5, 300.0)]
    band = band_of(records)
    assert (band.inside, band.of, band.since) == (2, 4, 2)
    assert band_of(records[:2]).since is None
    assert band_of([]).share is None


def test_a_log_gets_one_line_for_each_measurement():
    console = Console(width=80, file=io.StringIO())
    run(steps=30, observers=[Lines(console, label="one")])
    rows = console.file.getvalue().splitlines()
    assert [row.split(" · ")[0] for row in rows] == [f"one: step {step}/30" for step in (0, 10, 20, 30)]


def test_a_point_without_curvature_has_a_line():
    assert line(Record(step=3, loss=math.inf, lr=0.1), steps=10) == "step 3/10 · loss ∞ · lr 0.100"


def test_a_terminal_shows_the_run():
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    with Live(console=console, auto_refresh=False) as live:
        result = run(observers=[LiveView(live, label="one")])
    text = console.file.getvalue()
    assert result.status == "finished"
    for part in ("one: ZO-GD", "step 300 of 300", "loss ", "η/η*", "measuring", "steps/s"):
        assert part in text


def test_a_sparkline_takes_a_fixed_amount_of_memory_and_falls_with_the_loss():
    spark = Spark(most=40)
    for step in range(10_000):
        spark.add(math.exp(-step / 1000))
    drawn = spark.drawn(20)
    assert len(spark._values) < 40
    assert 10 <= len(drawn) <= 20
    assert (drawn[0], drawn[-1]) == ("█", "▁")
    assert list(drawn) == sorted(drawn, reverse=True)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_sparkline_leaves_out_what_is_not_finite(loss):
    spark = Spark()
    for value in (1.0, loss, 0.5):
        spark.add(value)
    assert len(spark.drawn(20)) == 2
    assert Spark().drawn(20) == ""


@pytest.mark.parametrize(("ratio", "style"), [(0.1, "green"), (1.0, "yellow"), (1.2, "red"), (50.0, "red")])
def test_the_gauge_says_how_near_the_threshold_is(ratio, style):
    bar = gauge(ratio)
    assert bar.style == style
    assert len(bar.plain) == 40
    assert bar.plain.index("┃") == 27
