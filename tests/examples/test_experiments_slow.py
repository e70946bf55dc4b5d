"""The experiments show what ``examples/README.md`` says they do. Minutes each: left out unless asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from zoscope.cli.app import run

FOLDER = Path(__file__).parents[2] / "examples" / "experiments"
Records = list[dict[str, Any]]


def tracked(config: str, folder: Path, *options: str) -> dict[str, Records]:
    """Run a configuration as it stands and return what it measured, by the name of the run."""
    assert run(["track", "--config", str(FOLDER / config), "--run", str(folder), "--quiet", *options]) == 0
    return {
        file.parent.name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in sorted(folder.rglob("metrics.jsonl"))
    }


def inside(records: Records) -> list[bool]:
    """Whether the threshold term lies in ``[0.9 lower, 1.1 upper]``, from the first measurement at the edge on."""
    known = [record for record in records if record["upper"] is not None]
    since = next((n for n, r in enumerate(known) if r["threshold"] <= 1.1 * r["upper"]), len(known))
    return [0.9 * r["lower"] <= r["threshold"] <= 1.1 * r["upper"] for r in known[since:]]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zo-gd-mlp.yaml", "zo-gdm-mlp-0.5.yaml", "zo-gdm-mlp-0.9.yaml", "zo-adam-mlp.yaml"])
def test_the_threshold_term_lies_in_the_band_from_where_the_edge_is_reached(config: str, tmp_path: Path) -> None:
    runs = tracked(config, tmp_path / "run")
    shares = {name: inside(records) for name, records in runs.items()}
    assert len(shares) == (9 if "adam" in config else 3)
    assert all(len(share) >= 3 for share in shares.values()), shares
    pooled = [one for share in shares.values() for one in share]
    assert sum(pooled) >= 0.8 * len(pooled), shares


@pytest.mark.slow
def test_gd_holds_the_largest_eigenvalue_at_its_threshold_and_the_trace_far_above(tmp_path: Path) -> None:
    for records in tracked("gd-mlp.yaml", tmp_path / "run").values():
        last = records[-1]
        assert abs(last["lambda_max"] * last["lr"] / 2 - 1) < 0.15
        assert last["trace"] * last["lr"] / 2 > 10


@pytest.mark.slow
def test_zeroth_order_descent_finds_a_smaller_trace_than_gd_at_the_same_loss(tmp_path: Path) -> None:
    noisy = tracked("flatzero-logistic.yaml", tmp_path / "zo")
    smooth = tracked("flatzero-logistic.yaml", tmp_path / "gd", "--optimizer", "gd", "--steps", "40", "--every", "1")
    assert noisy.keys() == smooth.keys()
    for name, records in noisy.items():
        last = records[-len(records) // 4 :]
        loss, trace = (sorted(record[key] for record in last)[len(last) // 2] for key in ("loss", "trace"))
        there = next(record for record in smooth[name] if record["loss"] <= loss)
        assert trace < 0.7 * there["trace"], name


@pytest.mark.slow
def test_adam_comes_back_from_a_doubled_step_size(tmp_path: Path) -> None:
    for records in tracked("catapult.yaml", tmp_path / "run").values():
        at = {record["step"]: record for record in records}
        assert at[9500]["loss"] > 2 * at[9000]["loss"]
        assert at[9500]["trace"] < 0.7 * at[9000]["trace"]
        assert at[15000]["trace"] > 1.3 * at[9500]["trace"]
        assert at[15000]["loss"] < at[9500]["loss"] / 2
