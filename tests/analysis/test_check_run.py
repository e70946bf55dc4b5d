"""``zoscope.check`` on small problems whose thresholds are known."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import zoscope
from zoscope import CheckReport, UsageError
from zoscope.analysis.check import Decision
from zoscope.theory.rules import update_rule
from zoscope.theory.spectrum import Spectrum
from zoscope.theory.stability import StabilityCondition, fo_threshold

EIGENVALUES = np.linspace(0.1, 3.0, 12)

SPEC = """\
import torch
import zoscope

torch.set_default_dtype(torch.float32)


def problem(scale: float = 1.0, nan: bool = False) -> zoscope.Problem:
    q, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    h = scale * q @ torch.diag(torch.linspace(0.1, 3.0, 12, dtype=torch.float64)) @ q.T
    x = torch.full((12,), float("nan") if nan else 1.0, dtype=torch.float64)
    return zoscope.Problem.from_function(lambda x: 0.5 * x @ h @ x, x)
"""


def exact(rule: str = "gd") -> float:
    return StabilityCondition(update_rule(rule)).threshold(Spectrum.of(EIGENVALUES))


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the spec and a configuration with these checks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(SPEC)

    def call(checks: list[dict[str, object]], **rest: object) -> Path:
        document = {"problem": "model.py", "checks": checks, **rest}
        document.setdefault("defaults", {"policy": {"threshold": "exact"}, "curvature": {"device": "cpu"}})
        file = tmp_path / "zoscope.yaml"
        file.write_text(json.dumps(document, indent=2))  # JSON is YAML
        return file

    return call


def entry(name: str, lr: float, *, optimizer: str = "zo-gd", **rest: object) -> dict[str, object]:
    return {"name": name, "optimizer": {"name": optimizer, "lr": lr}, **rest}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Optimizers of each call of ``bounds``."""
    import zoscope.analysis.bounds as module

    made: list[tuple[str, ...]] = []
    original = module.bounds

    def counted(problem: object, **options: object) -> object:
        made.append(options["optimizers"])  # type: ignore[arg-type]
        return original(problem, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "bounds", counted)
    return made


def statuses(report: CheckReport) -> list[str]:
    return [check.status for check in report.checks]


def test_step_sizes_are_held_against_the_exact_threshold(write: Write) -> None:
    eta = exact()
    config = write([entry("low", 0.7 * eta), entry("near", 0.9 * eta), entry("high", 1.1 * eta)])
    report = zoscope.check(config)
    assert statuses(report) == ["pass", "warn", "fail"]
    assert report.exit_code == 1
    threshold = report.checks[0].threshold
    assert threshold is not None
    assert threshold.value == pytest.approx(eta, rel=1e-6)


def test_a_first_order_optimizer_is_held_against_the_first_order_threshold(write: Write) -> None:
    limit = fo_threshold(float(EIGENVALUES.max()), rule=update_rule("gd"))
    report = zoscope.check(write([entry("a", 0.75 * limit, optimizer="gd"), entry("b", 1.01 * limit, optimizer="gd")]))
    assert statuses(report) == ["pass", "fail"]
    assert {check.threshold.name for check in report.checks if check.threshold} == {"fo"}


def test_checks_that_share_a_problem_share_one_measurement(write: Write, calls: list[tuple[str, ...]]) -> None:
    config = write(
        [entry("a", 0.01), entry("b", 0.01, optimizer="gdm"), entry("c", 1.0), entry("d", 0.1, set={"scale": 2})]
    )
    zoscope.check(config)
    assert calls == [("gd", "gdm"), ("gd",)]


def test_checks_of_other_lengths_and_constants_share_it_too(write: Write, calls: list[tuple[str, ...]]) -> None:
    constants = {"name": "zo-gdm", "lr": 0.001, "beta": 0.5}
    horizon = {"policy": {"threshold": "horizon"}}
    config = write(
        [
            entry("short", 0.01, steps=30, **horizon),
            entry("long", 0.01, steps=3000, **horizon),
            {"name": "momentum", "optimizer": constants, **horizon},
            {"name": "other momentum", "optimizer": {**constants, "beta": 0.8}, **horizon},
        ]
    )
    together = zoscope.check(config)
    assert calls == [("gd", "gdm"), ("gdm",)]
    for check in together.checks:
        (alone,) = zoscope.check(config, only=[check.name]).checks
        assert check.threshold is not None
        assert alone.threshold is not None
        assert check.threshold.value == pytest.approx(alone.threshold.value, rel=1e-9)
    values = [check.threshold.value for check in together.checks if check.threshold]
    assert values[0] > values[1]
    assert len(set(values)) == 4


def test_every_check_runs_and_the_worst_exit_code_counts(write: Write) -> None:
    config = write(
        [
            entry("missing", 0.1, spec="nowhere.py"),
            entry("nan", 0.1, set={"nan": True}),
            entry("unstable", 100.0),
            entry("fine", 1e-3),
        ]
    )
    report = zoscope.check(config)
    assert [check.exit_code for check in report.checks] == [2, 3, 1, 0]
    assert statuses(report) == ["error", "error", "fail", "pass"]
    assert report.exit_code == 2
    assert zoscope.check(config, only=["nan", "unstable"]).exit_code == 3
    assert zoscope.check(config, only=["fine", "unstable"]).exit_code == 1


def test_an_error_in_the_users_code_shows_their_line(write: Write, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def problem():\n    return 1 / 0\n")
    (check,) = zoscope.check(write([entry("a", 0.01, spec="broken.py")])).checks
    assert (check.status, check.exit_code) == ("error", 2)
    assert "broken.py" in check.details
    assert "1 / 0" in check.details


def test_a_bug_in_one_measurement_does_not_hide_the_others(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoscope.analysis.bounds as module

    original = module.bounds

    def failing(problem: object, **options: object) -> object:
        if options["optimizers"] == ("gdm",):
            raise RuntimeError("boom")
        return original(problem, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "bounds", failing)
    report = zoscope.check(write([entry("a", 1e-3, optimizer="zo-gdm", set={"scale": 2.0}), entry("b", 1e-3)]))
    assert [check.exit_code for check in report.checks] == [3, 0]
    assert "boom" in report.checks[0].message


def test_a_failure_of_one_optimizer_does_not_hide_the_others_that_share_its_measurement(write: Write) -> None:
    checks = [
        entry("sgd", 0.01),
        entry("adam", 0.01, optimizer="zo-adam", curvature={"preconditioner": "state:gone.pt"}),
    ]
    report = zoscope.check(write(checks))
    assert [check.exit_code for check in report.checks] == [0, 2]


def test_an_interrupt_is_not_an_error_of_a_check(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("zoscope.analysis.bounds.bounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zoscope.check(write([entry("a", 0.01)]))


def test_a_problem_in_hand_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    h = torch.diag(torch.tensor(EIGENVALUES))
    problem = zoscope.Problem.from_function(lambda x: 0.5 * x @ h @ x, torch.ones(12, dtype=torch.float64))
    report = zoscope.check(problem, optimizer="zo-gd", lr=1.1 * exact(), threshold="exact")
    assert statuses(report) == ["fail"]
    assert zoscope.check(problem, optimizer="zo-gd", lr=0.7 * exact(), threshold="exact").passed


def test_options_make_up_a_check_without_a_file(write: Write) -> None:
    write([])
    report = zoscope.check(spec="model.py", optimizer="zo-gdm", lr=1.1 * exact("gdm"), threshold="exact")
    assert statuses(report) == ["fail"]
    assert report.config is None


def test_a_mini_batch_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 1)
    data = (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 1))
    problem = zoscope.Problem.from_criterion(model, data, torch.nn.MSELoss(), batch_size=4)
    report = zoscope.check(problem, optimizer="zo-gd", lr=1e-3, batch_size=2)
    assert any("mini-batches of 2 of 8" in notice for notice in report.checks[0].notices)


@pytest.mark.parametrize("drop", [0.0, 1.0, -0.2])
def test_max_drop_is_a_fraction(write: Write, drop: float) -> None:
    with pytest.raises(UsageError, match="--max-drop"):
        zoscope.check(write([entry("a", 0.01)]), max_drop=drop)


def test_the_document_has_the_keys_of_the_contract_and_no_infinity(write: Write) -> None:
    report = zoscope.check(write([entry("a", 0.01), entry("flat", 1.0, set={"scale": 0.0})]))
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema"] == "zoscope.check/1"
    wanted = {"name", "spec", "optimizer", "lr", "threshold", "ratio", "status", "message"}
    assert all(wanted <= set(check) for check in document["checks"])
    assert document["status"] == "pass"
    assert document["checks"][1]["threshold"] is None


# --- probe ---------------------------------------------------------------------------------------------------------


def test_a_probe_agrees_with_a_stable_step_size(write: Write) -> None:
    (check,) = zoscope.check(write([entry("a", 0.5 * exact())]), probe=True, steps=300).checks
    assert check.status == "pass"
    assert check.probe is not None
    assert check.probe["verdict"] == "stable"
    assert "A probe of 300 steps" in check.message


def test_a_probe_that_diverges_fails_whatever_the_threshold_says(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoscope.analysis.check as module

    eta = exact()
    monkeypatch.setattr(module, "decide", lambda lr, threshold, **_: Decision("pass", "Trust me.", None))
    (check,) = zoscope.check(write([entry("a", 2.0 * eta)]), probe=True, steps=500).checks
    assert check.probe is not None
    assert (check.status, check.exit_code, check.probe["verdict"]) == ("fail", 1, "diverged")


def test_a_first_order_check_is_probed_with_gradients(write: Write) -> None:
    (check,) = zoscope.check(write([entry("a", 0.1, optimizer="gd")]), probe=True, steps=50).checks
    assert check.probe is not None
    assert check.probe["variant"] == "first-order"


def test_a_probe_is_cached_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write([entry("a", 0.3 * exact())])
    first = zoscope.check(config, probe=True, steps=100, cache=tmp_path / "cache")
    monkeypatch.setattr("zoscope.analysis.probe.probe", None)
    second = zoscope.check(config, probe=True, steps=100, cache=tmp_path / "cache")
    assert second.checks[0].probe == first.checks[0].probe


def test_what_cannot_be_hashed_is_measured_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    generator = torch.Generator()
    problem = zoscope.Problem.from_function(lambda x: (x * x).sum() + 0 * generator.initial_seed(), torch.ones(3))
    (check,) = zoscope.check(problem, optimizer="gd", lr=0.1, cache=tmp_path / "cache").checks
    assert check.status == "pass"
    assert any(notice.startswith("Not cached: a torch") for notice in check.notices)
    assert not list((tmp_path / "cache").glob("*.json"))


# --- cache --------------------------------------------------------------------------------------------------------


def test_an_unchanged_rerun_measures_nothing_and_is_quick(
    write: Write, tmp_path: Path, calls: list[tuple[str, ...]]
) -> None:
    config = write([entry("a", 0.01), entry("b", 0.01, optimizer="zo-adam")])
    first = zoscope.check(config, cache=tmp_path / "cache")
    started = time.process_time()
    second = zoscope.check(config, cache=tmp_path / "cache")
    assert time.process_time() - started < 2.0
    assert len(calls) == 1
    assert [check.threshold for check in second.checks] == [check.threshold for check in first.checks]
    assert all(check.cached for check in second.checks)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": SPEC.replace("0.5 * x", "0.5 * 1.01 * x")},
        {"spec": SPEC.replace("3.0", "3.5")},
        {"checks": {"set": {"scale": 0.5}}},
        {"checks": {"steps": 999}},
        {"checks": {"curvature": {"rtol": 0.3}}},
        {"helper": "y = 2"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_is_measured_again(
    write: Write, tmp_path: Path, calls: list[tuple[str, ...]], change: dict[str, object]
) -> None:
    (tmp_path / "helper.py").write_text("y = 1")
    (tmp_path / "model.py").write_text(f"import helper\n{SPEC}")
    zoscope.check(write([entry("a", 0.01)]), cache=tmp_path / "cache")
    if "spec" in change:
        (tmp_path / "model.py").write_text(f"import helper\n{change['spec']}")
    if "helper" in change:
        (tmp_path / "helper.py").write_text(str(change["helper"]))
    zoscope.check(write([entry("a", 0.01, **change.get("checks", {}))]), cache=tmp_path / "cache")  # type: ignore[arg-type]
    assert len(calls) == 2


def test_a_cache_serves_another_checkout(write: Write, tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    config = write([entry("a", 0.01)])
    zoscope.check(config, cache=tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir()
    for name in ("model.py", "zoscope.yaml"):
        (tmp_path / "elsewhere" / name).write_bytes((tmp_path / name).read_bytes())
    zoscope.check(tmp_path / "elsewhere" / "zoscope.yaml", cache=tmp_path / "cache")
    assert len(calls) == 1


def test_a_report_shows_itself_in_a_notebook(write: Write) -> None:
    assert "zo-gd" in zoscope.check(write([entry("a", 0.01)]))._repr_mimebundle_()["text/html"]


def test_another_step_size_is_no_other_measurement(write: Write, tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    zoscope.check(write([entry("a", 0.01)]), cache=tmp_path / "cache")
    report = zoscope.check(write([entry("renamed", 10.0)]), cache=tmp_path / "cache")
    assert len(calls) == 1
    assert statuses(report) == ["fail"]


def test_a_damaged_cache_is_measured_again(write: Write, tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    config = write([entry("a", 0.01)])
    zoscope.check(config, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.json")
    whole = file.read_text()
    digit = whole.index("0.") + 2
    for content in (
        "",
        whole[: len(whole) // 2],
        whole.replace('"num_examples": ', '"num_examples": 1'),
        whole[:digit] + str((int(whole[digit]) + 1) % 10) + whole[digit + 1 :],
        "[" * 99999,
        "[]",
        '{"format": 1, "entry": {}}',
        '{"format": 1, "entry": {"optimizers": 3}}',
        '{"format": 0}',
    ):
        file.write_text(content)
        assert statuses(zoscope.check(config, cache=tmp_path / "cache")) == ["pass"]
    assert len(calls) == 10


def test_an_entry_under_another_name_is_not_taken(write: Write, tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    zoscope.check(write([entry("a", 0.01)]), cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.json")
    entries = file.read_bytes()
    zoscope.check(write([entry("a", 0.01, curvature={"seed": 7})]), cache=tmp_path / "cache")
    (other,) = {*(tmp_path / "cache").glob("*.json")} - {file}
    other.write_bytes(entries)
    report = zoscope.check(write([entry("a", 0.01, curvature={"seed": 7})]), cache=tmp_path / "cache")
    assert len(calls) == 3
    assert statuses(report) == ["pass"]


def test_failures_are_not_cached(write: Write, tmp_path: Path) -> None:
    zoscope.check(write([entry("a", 0.01, set={"nan": True})]), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json"))


def test_a_cache_that_cannot_be_written_is_a_usage_error(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache"):
        zoscope.check(write([entry("a", 0.01)]), cache=tmp_path / "file" / "cache")
