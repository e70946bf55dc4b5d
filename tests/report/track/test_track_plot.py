"""The picture of a run."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoscope
from zoscope import TrackResult, UsageError
from zoscope.analysis.track import Comparison, Entry
from zoscope.report.track import draw, draw_comparison


def run(optimizer: str = "zo-gd", lr: str = "0.01,20:0.02", steps: int = 40) -> TrackResult:
    curvatures = torch.tensor([5.0, 2.0, 1.0, 0.5])
    problem = zoscope.Problem.from_function(lambda x: 0.5 * (curvatures * x * x).sum(), torch.ones(4))
    return zoscope.track(problem, optimizer=optimizer, lr=lr, steps=steps, every=10, device="cpu")


@pytest.mark.parametrize(
    "optimizer",
    ["zo-gd", "adam", *(pytest.param(n, marks=pytest.mark.slow) for n in ("zo-gdm", "zo-adam", "gd", "gdm"))],
)
def test_every_optimizer_has_a_picture_with_its_term(optimizer: str, tmp_path: Path) -> None:
    result = run(optimizer)
    draw(result, [tmp_path / "plot.png", tmp_path / "plot.svg"])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_the_same_run_makes_the_same_file(tmp_path: Path) -> None:
    result = run()
    draw(result, [tmp_path / "a.svg"])
    draw(result, [tmp_path / "b.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_measurements_without_curvature_leave_a_gap(tmp_path: Path) -> None:
    result = run()
    gone = replace(
        result.records[-1], loss=math.inf, **dict.fromkeys(("trace", "lower", "upper", "threshold", "exact", "ratio"))
    )
    draw(replace(result, records=(*result.records[:-1], gone)), [tmp_path / "plot.png"])
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_runs_are_laid_over_one_another(tmp_path: Path) -> None:
    entries = tuple(Entry(f"run {n}", run(lr=f"0.0{n}")) for n in range(1, 9))
    draw_comparison(Comparison((*entries, Entry("failed", None, "no"))), [tmp_path / "all.png"])
    assert (tmp_path / "all.png").stat().st_size > 0


def test_a_format_that_is_not_known_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--plot: cannot write .*plot\.xyz"):
        draw(run(), [tmp_path / "plot.xyz"])
