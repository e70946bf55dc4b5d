"""What pictures show: axes, series, labels, scales and legends of matplotlib figures."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch

import zoscope
from zoscope import CheckReport, TrackResult, UsageError
from zoscope.analysis.track import Comparison, Entry
from zoscope.report.figures import MARKERS as SHAPES
from zoscope.report.figures import STYLE, draw, figure_of, tick_text
from zoscope.report.pictures import look_of, picture_of, step_sizes_of

GOLDEN = Path(__file__).parents[1] / "golden"


SHOWN = """
    bounds bounds-saddle bounds-forward bounds-line bounds-batch plan plan-batch probe-edge probe-batch track track-adam
    track-diverged track-sweep check spectrum-slq spectrum-saddle
"""
"""Results of the golden files, of every kind and shape."""


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["runs"][-1]["stdout"]


def figure(document: Any) -> Any:
    with mpl.rc_context(STYLE):
        return figure_of(picture_of(document))


def labels(axes: Any) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def curve(axes: Any, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def bars(axes: Any, label: str) -> list[tuple[float, float]]:
    """Marker places of points, by the name of the container that they are in."""
    for container in axes.containers:
        if container.get_label() == label:
            line = container.lines[0]
            return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    raise AssertionError(label)


# --- every picture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHOWN.split())
def test_every_axis_is_named_and_no_legend_covers_data(name: str) -> None:
    drawn = figure(golden(name))
    with mpl.rc_context(STYLE):
        drawn.draw_without_rendering()
    assert drawn.get_suptitle()
    assert drawn.axes
    for axes in drawn.axes:
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()
        assert axes.get_xlabel() or not axes.xaxis.get_tick_params(which="major")["labelbottom"]
        legend = axes.get_legend()
        if legend is None:
            continue
        box = legend.get_window_extent()
        assert box.x1 <= drawn.bbox.x1 + 1
        assert box.y0 >= -1
        for other in drawn.axes:
            assert not box.overlaps(other.get_window_extent())
            assert (
                other is axes or other.get_legend() is None or not box.overlaps(other.get_legend().get_window_extent())
            )


def test_looks_differ_in_black_and_white() -> None:
    looks = [look_of(number) for number in range(28)]
    for one, other in combinations(looks, 2):
        assert (one.dash, one.marker) != (other.dash, other.marker)
    assert {look.marker for look in looks} <= {*SHAPES}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.02, "0.02"), (1.0, "1"), (2000.0, "2000"), (1e4, "10⁴"), (2e-5, "2·10⁻⁵"), (1e-300, "10⁻³⁰⁰"), (0.0, "")],
)
def test_ticks_of_logarithmic_axes_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_result_makes_the_same_file(suffix: str, tmp_path: Path) -> None:
    places = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for place in places:
        draw(golden("bounds"), [place])
    first, second = (place.read_bytes() for place in places)
    assert first == second
    assert first.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_a_format_that_is_not_known_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--plot: cannot write .*plot\.xyz"):
        draw(golden("bounds"), [tmp_path / "plot.xyz"])


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    document = golden("bounds") | {"spec": "a_$b$.py\x1b[31m\n" + "x" * 300}
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(document, [tmp_path / "a.svg"])
    title = picture_of(document).title
    assert len(title) < 90
    assert "\x1b" not in title
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(golden("bounds") | {"spec": "a_$b$.py"}, [tmp_path / "b.svg"])
    assert "a_$b$.py" in (tmp_path / "b.svg").read_text(encoding="utf-8")


def test_of_other_documents_there_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"no picture of 'zoscope.moments/1'"):
        picture_of({"schema": "zoscope.moments/1"})


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_the_ruler_has_a_row_per_optimizer_with_its_step_sizes() -> None:
    document = golden("bounds-gd-lr")
    ruler, _ = figure(golden("bounds")).axes
    assert [tick.get_text() for tick in ruler.get_yticklabels()] == ["ZO-GD", "ZO-GDM", "ZO-Adam"]
    assert ruler.get_xscale() == "log"
    assert labels(ruler)[:3] == ["the loss falls", "close to the edge", "diverges; first order would be stable"]
    rows = [*golden("bounds")["optimizers"].values()]
    heights = [2.0, 1.0, 0.0]
    assert bars(ruler, "edge, 95 %") == [(r["zo"]["limit"]["value"], h) for r, h in zip(rows, heights, strict=True)]
    assert bars(ruler, "first-order bound") == [(row["fo"], h) for row, h in zip(rows, heights, strict=True)]
    best = bars(ruler, "lr to use, at most")
    assert best == [(row["zo"]["recommended"], h) for row, h in zip(rows, heights, strict=True)]
    (asked,) = (line for line in figure(document).axes[0].get_lines() if line.get_label() == "lr = 0.02")
    assert list(asked.get_xdata()) == [0.02, 0.02]


def test_the_zones_of_the_ruler_meet_at_the_step_sizes() -> None:
    row = golden("bounds")["optimizers"]["gd"]
    zones = figure(golden("bounds")).axes[0].collections
    ends = [(min(v[0] for v in z.get_paths()[0].vertices), max(v[0] for v in z.get_paths()[0].vertices)) for z in zones]
    best, edge = row["zo"]["recommended"], row["zo"]["limit"]["value"]
    assert (best, edge) in ends
    assert (edge, row["fo"]) in ends


def test_eta_over_n_has_a_curve_per_optimizer_and_the_paper_s_interval_at_infinity() -> None:
    document = golden("bounds-saddle")
    axes = figure(document).axes[1]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()][-1] == "∞"
    zo = document["optimizers"]["gd"]["zo"]
    steps, values = curve(axes, "ZO-GD, η*(N)")
    assert steps == [point["steps"] for point in zo["horizon"]["curve"]]
    assert values == [point["upper"] for point in zo["horizon"]["curve"]]
    ends = [segment for bar in axes.containers for part in bar.lines[2] for segment in part.get_segments()]
    heights = {(round(float(s[0][1]), 9), round(float(s[1][1]), 9)) for s in ends}
    assert (round(zo["lower"], 9), round(zo["upper"], 9)) in heights
    assert "planned: 1,000 steps" in labels(axes)


def test_without_a_spectrum_there_is_the_ruler_alone() -> None:
    (ruler,) = figure(golden("bounds-forward")).axes
    assert "first-order bound" not in labels(ruler)


def test_an_interval_without_an_upper_end_goes_to_the_end_of_the_axis() -> None:
    document = golden("bounds")
    document["optimizers"]["gd"]["zo"]["limit"]["ci95"] = [0.01, None]
    ruler = figure(document).axes[0]
    (bar,) = (c for c in ruler.containers if c.get_label() == "edge, 95 %")
    assert bar.lines[2][0].get_segments()[0][1][0] == pytest.approx(ruler.get_xlim()[1])


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_shows_loss_and_risk_over_step_sizes_and_loss_over_steps() -> None:
    document = golden("plan")
    losses, risks, paths = figure(document).axes
    assert losses.get_xscale() == risks.get_xscale() == "log"
    assert losses.get_shared_x_axes().joined(losses, risks)
    lrs, means = curve(losses, "final loss, mean of the runs that stay")
    assert lrs == [point["lr"] for point in document["curve"]]
    assert [m for m in means if not math.isnan(m)] == [
        p["loss_mean"] for p in document["curve"] if p["loss_mean"] is not None
    ]
    assert curve(risks, "risk: share of runs that diverge")[1] == [point["risk"] for point in document["curve"]]
    answer = document["answer"]["lr"]
    assert curve(losses, next(name for name in labels(losses) if name.startswith("the answer")))[0] == [answer, answer]
    assert paths.get_xlabel() == "step"
    assert labels(paths)[0].endswith("(the answer)")


def test_a_plan_without_an_answer_has_a_picture() -> None:
    document = golden("plan")
    document["answer"] |= {"lr": None, "risk": None, "expected_loss": None}
    document["edge"] = {"lr": None, "ci95": None}
    assert len(figure(document).axes) == 3


# --- probe ------------------------------------------------------------------------------------------------------------


def test_a_probe_shows_its_runs_and_what_was_predicted() -> None:
    document = golden("probe")
    losses, distances = figure(document).axes
    assert labels(losses) == [
        "0.8 × threshold, runs",
        "0.8 × threshold, predicted",
        "1.25 × threshold, runs",
        "1.25 × threshold, predicted",
        "loss at the start",
    ]
    first = document["runs"][0]
    steps, values = curve(losses, "0.8 × threshold, runs")
    assert steps == first["curves"]["steps"]
    assert values == [row[0] for row in first["curves"]["losses"]]
    assert curve(losses, "0.8 × threshold, predicted")[1] == first["curves"]["predicted"]
    assert len(distances.get_lines()) == 2 * first["replicas"]
    assert distances.get_yscale() == "log"


def test_a_search_for_the_edge_shows_the_share_that_diverged() -> None:
    document = golden("probe-edge")
    axes = figure(document).axes[-1]
    points = document["edge"]["points"]
    assert curve(axes, "runs that diverged")[1] == [p["diverged"] / p["replicas"] for p in points]
    assert any(label.startswith("edge of runs") for label in labels(axes))


def test_the_document_has_as_many_points_as_a_picture_needs() -> None:
    problem = zoscope.Problem.from_function(lambda x: (x * x).sum(), torch.ones(3))
    result = zoscope.probe(problem, steps=500, replicas=2, device="cpu", ratios=0.5)
    curves = result.to_dict()["runs"][0]["curves"]
    whole = result.runs[0].curves
    assert len(curves["steps"]) == len(curves["losses"]) == len(curves["predicted"]) <= 60 < len(whole.steps)
    assert (curves["steps"][0], curves["steps"][-1]) == (whole.steps[0], whole.steps[-1])
    assert curves["losses"][-1] == list(whole.losses[-1])


# --- track ------------------------------------------------------------------------------------------------------------


def run(optimizer: str = "zo-gd", lr: Any = "0.01,13:0.02", steps: int = 40, every: int = 10) -> TrackResult:
    curvatures = torch.tensor([5.0, 2.0, 1.0, 0.5])
    problem = zoscope.Problem.from_function(lambda x: 0.5 * (curvatures * x * x).sum(), torch.ones(4))
    return zoscope.track(problem, optimizer=optimizer, lr=lr, steps=steps, every=every, device="cpu")


TERMS = {
    "zo-gd": "2/η",
    "adam": "2(1+β₁)/((1−β₁)η)",
    "zo-gdm": "2(1−β)/η",
    "zo-adam": "2/η",
    "gd": "2/η",
    "gdm": "2(1+β)/η",
}


@pytest.mark.parametrize("optimizer", TERMS)
def test_every_optimizer_has_a_picture_with_its_term(optimizer: str) -> None:
    losses, sizes, curvature = figure(run(optimizer, steps=20).to_dict()).axes
    assert TERMS[optimizer] in labels(curvature)
    assert "loss of the steps" in labels(losses)
    assert "step size" in labels(sizes)


def test_a_change_of_the_step_size_is_drawn_where_it_happened() -> None:
    """Between two measurements, at the step itself, straight up; and so is what the step size allows."""
    document = run().to_dict()
    _, sizes, curvature = figure(document).axes
    assert curve(sizes, "step size") == ([0, 13, 40], [0.01, 0.02, 0.02])
    steps, terms = curve(curvature, "2/η")
    assert steps == [0, 13, 40]
    assert terms == pytest.approx([200, 100, 100])
    drawn = {line.get_label(): line.get_drawstyle() for line in (*sizes.get_lines(), *curvature.get_lines())}
    assert drawn["step size"] == drawn["2/η"] == "steps-post"
    assert step_sizes_of(document) == ([0, 13, 40], [0.01, 0.02, 0.02])


def test_the_loss_of_every_step_is_drawn() -> None:
    document = run().to_dict()
    losses = figure(document).axes[0]
    steps, values = curve(losses, "loss of the steps")
    assert steps == list(range(1, 41))
    assert all(float(place).is_integer() for place in losses.get_xticks())
    assert values == [point[1] for record in document["records"] for point in record["path"]]
    assert bars(losses, "loss of all examples") == [(r["step"], r["loss"]) for r in document["records"]]


def test_a_schedule_glides_and_a_step_size_that_sets_itself_is_drawn_from_its_steps() -> None:
    linear = zoscope.config.load.Schedule("linear", 0.02, 10)
    starts, values = step_sizes_of(run(lr=linear).to_dict())
    assert starts == [*range(40), 40]
    assert values[:11] == pytest.approx([0.002 * n for n in range(1, 11)] + [0.02])
    automatic = run(lr="auto", steps=60, every=20).to_dict()
    path = [point for record in automatic["records"] for point in record["path"]]
    starts, values = step_sizes_of(automatic)
    moved = [point for point in path if point[2]]  # others only looked
    assert values[:-1] == [point[2] for point in moved]
    assert starts[1:] == [*(point[0] for point in moved[:-1]), 60]
    assert "edge, as the run saw it" in labels(figure(automatic).axes[1])


def test_measurements_without_curvature_leave_a_gap() -> None:
    result = run()
    gone = replace(
        result.records[-1], loss=math.inf, **dict.fromkeys(("trace", "lower", "upper", "threshold", "exact", "ratio"))
    )
    _, _, curvature = figure(replace(result, records=(*result.records[:-1], gone)).to_dict()).axes
    assert curve(curvature, "lower term: trace")[0] == [0, 10, 20, 30]


def test_a_run_that_diverged_does_not_flatten_what_was_before() -> None:
    document = run("gd", lr=5.0, steps=300).to_dict()
    assert document["status"] == "diverged"
    losses = figure(document).axes[0]
    assert losses.get_ylim()[1] == pytest.approx(30 * document["records"][0]["loss"])


def test_optimizers_that_stall_show_their_floor() -> None:
    axes = figure(run("zo-normalized", lr=0.01, steps=20).to_dict()).axes
    assert labels(axes[-1]) == ["‖g‖", "floor, where it stalls"]


def test_runs_are_laid_over_one_another() -> None:
    entries = tuple(Entry(f"run {n}", run(lr=f"0.00{n},7:0.01", steps=20)) for n in range(1, 4))
    losses, ratios = figure(Comparison((*entries, Entry("failed", None, "no"))).to_dict()).axes
    assert labels(losses) == ["run 1", "run 2", "run 3"]
    assert 7 in ratios.get_lines()[1].get_xdata()
    assert ratios.get_lines()[1].get_drawstyle() == "steps-post"


# --- check ------------------------------------------------------------------------------------------------------------


def test_checks_show_their_step_sizes_against_their_thresholds(report: CheckReport) -> None:
    (axes,) = figure(report.to_dict()).axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [check.name for check in report.checks]
    assert labels(axes) == ["threshold, 95 %", "passes up to here", "lr: pass", "lr: warn", "lr: fail", "lr: error"]
    assert bars(axes, "lr: fail") == [(0.02, 3.0), (0.02, 1.0), (0.02, 0.0)]
    assert len(bars(axes, "threshold, 95 %")) == 5


def test_of_many_checks_the_worst_are_drawn(report: CheckReport) -> None:
    many = tuple(replace(report.checks[0], name=f"c{n}", lr=1e-4 * (n + 1)) for n in range(100))
    drawn = figure(CheckReport(many).to_dict())
    names = [tick.get_text() for tick in drawn.axes[0].get_yticklabels()]
    assert names == [f"c{n}" for n in range(40, 100)]
    assert "60 of 100 shown" in drawn.get_suptitle()


def test_hostile_names_are_drawn(hostile: CheckReport, tmp_path: Path) -> None:
    draw(hostile.to_dict(), [tmp_path / "a.png", tmp_path / "a.svg"])
    assert (tmp_path / "a.png").stat().st_size > 5000
