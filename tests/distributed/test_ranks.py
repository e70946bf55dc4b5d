"""Jobs of several processes: the same numbers as one process, and no hang when one of them goes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from zoscope.cli.app import run

from .jobs import HERE, SPEC, alone, by_hand, differences, torchrun, wait_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and the gloo backend")

COMMANDS = {
    "hessian": [
        "bounds",
        SPEC,
        "--method",
        "deflated-slq",
        "--max-hvps",
        "30",
        "--optimizer",
        "gd",
        "--optimizer",
        "adam",
    ],
    "dense": ["bounds", SPEC, "--method", "dense", "--optimizer", "gd"],
    "ggn": ["bounds", SPEC, "--curvature", "ggn", "--optimizer", "gd", "--max-hvps", "40"],
    "forward": ["bounds", SPEC, "--curvature", "forward", "--max-hvps", "60"],
    "float32": ["bounds", SPEC, "--set", "dtype=float32", "--max-hvps", "25", "--optimizer", "gd"],
    "one batch": ["bounds", SPEC, "--set", "batch_size=37", "--max-hvps", "40", "--optimizer", "gd"],
    "cut for derivatives": ["bounds", f"{SPEC}:wide", "--max-hvps", "25", "--optimizer", "gd"],
    "micro-batches": ["bounds", SPEC, "--micro-batch", "3", "--max-hvps", "25", "--optimizer", "gd"],
    "probe": ["probe", SPEC, "--replicas", "1", "--steps", "15", "--lr", "0.01", "--max-hvps", "25"],
    "mini-batches": ["bounds", SPEC, "--batch-size", "5", "--max-hvps", "25", "--optimizer", "gd"],
    "mini-batches probed": [
        "probe",
        SPEC,
        "--batch-size",
        "5",
        "--replicas",
        "2",
        "--steps",
        "6",
        "--max-hvps",
        "25",
        "--optimizer",
        "zo-adam",
    ],
    "linearized": ["probe", SPEC, "--linearized", "--replicas", "2", "--steps", "15", "--max-hvps", "40"],
}
SELDOM = {"ggn", "one batch", "cut for derivatives", "micro-batches", "mini-batches probed", "linearized"}
"""Left to the slow test, which has all of them."""
OFTEN = {name: args for name, args in COMMANDS.items() if name not in SELDOM}

# Enough work in a mini-batch for the ranks to share it, and a number of rows that they cannot share evenly.
TRACK = ["track", f"{SPEC}:wide", "--batch-size", "400", "--lr", "0.01", "--steps", "6", "--every", "3"]
TRACKED = {name: [*TRACK, "--optimizer", name, "--max-hvps", "20"] for name in ("zo-gdm", "adam")}
SHARDED = ["--shard-basis"]
MORE = {
    "spectrum": ["spectrum", SPEC, "--method", "deflated-slq", "--by-layer", "--max-hvps", "40"],
    "moments": ["spectrum", f"{SPEC}:images", "--moments", "--rtol", "0.05"],
}


def together_on(ranks: int, folder: Path, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """The documents of some commands, from one job."""
    plan = [[[*args, "--json"], str(folder / f"{name}.json")] for name, args in wanted.items()]
    (folder / "plan.json").write_text(json.dumps(plan))
    job = by_hand(ranks, [str(HERE / "many.py"), str(folder / "plan.json")])
    said = [process.communicate(timeout=300) for process in job]
    assert [process.returncode for process in job] == [0] * ranks, said
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in wanted}


def tracked_in(folder: Path) -> dict[str, list[str]]:
    return {name: [*args, "--run", str(folder / name)] for name, args in TRACKED.items()}


def measurements(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tolerance(name: str) -> float:
    # float32 adds up in another order, and the second differences of the descent threshold magnify that.
    return 2e-3 if name == "float32" else 1e-6


def unlike_one_process(found: dict[str, Any], commands: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """Where several ranks found something else than one process does, by command; a spread basis and runs included."""
    unlike = {}
    for name, args in commands.items():
        one = alone(args)
        for key in (name, f"{name}, sharded"):
            unlike[key] = differences(one, found[key], rtol=tolerance(name)) if key in found else []
    for name, args in TRACKED.items():
        assert run([*args, "--run", str(folder / f"{name}, one")]) == 0
        alone_measured = measurements(folder / f"{name}, one")
        assert [record["step"] for record in alone_measured] == [0, 3, 6]
        unlike[name] = differences(alone_measured, measurements(folder / name), rtol=1e-6)
    return {name: where for name, where in unlike.items() if where}


# One test, so that no other worker of pytest starts the ranks once more.
def test_three_ranks_find_what_one_process_finds(without_pictures: None, tmp_path: Path) -> None:
    wanted = {**OFTEN, "hessian, sharded": COMMANDS["hessian"] + SHARDED, **tracked_in(tmp_path)}
    assert not unlike_one_process(together_on(3, tmp_path, wanted), OFTEN, tmp_path)


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(without_pictures: None, tmp_path: Path) -> None:
    commands = COMMANDS | MORE
    sharded = {f"{name}, sharded": args + SHARDED for name, args in commands.items()}
    found = together_on(2, tmp_path, commands | sharded | tracked_in(tmp_path))
    assert not unlike_one_process(found, commands, tmp_path)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_at_once_with_one_message(tmp_path: Path, victim: int) -> None:
    ranks = 2 if victim == 0 else 3
    job = by_hand(ranks, ["-m", "zoscope", "bounds", f"{SPEC}:slow", "--set", f"pids={tmp_path}"])
    os.kill(int(wait_for(tmp_path / str(victim))), signal.SIGKILL)
    killed = time.monotonic()
    said = [process.communicate(timeout=60) for process in job]
    assert time.monotonic() - killed < 30
    assert [process.returncode for process in job] == [-9 if rank == victim else 3 for rank in range(ranks)]
    errors = "".join(err for _, err in said)
    assert errors.count("Error: ") == 1
    assert f"The process of rank {victim} has gone" in errors
    assert not "".join(out for out, _ in said)


def run_all(ranks: int, *args: str) -> tuple[list[int], str, str]:
    job = by_hand(ranks, ["-m", "zoscope", *args])
    said = [process.communicate(timeout=120) for process in job]
    return [process.returncode for process in job], "".join(o for o, _ in said), "".join(e for _, e in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "message"), [("broken_on_one", "no data on this machine"), ("drawn_anew", "other data on rank 1")]
)
def test_an_error_on_any_rank_is_told_once_and_ends_all(spec: str, message: str) -> None:
    codes, out, errors = run_all(2, "bounds", f"{SPEC}:{spec}")
    assert codes == [2, 2]
    assert not out
    assert sum(line.startswith("Error: ") for line in errors.splitlines()) == 1
    assert message in errors


@pytest.mark.parametrize(
    "where", ["curvature", *(pytest.param(w, marks=pytest.mark.slow) for w in ("everywhere", "one batch"))]
)
def test_a_loss_that_differs_by_rank_is_refused(where: str) -> None:
    codes, out, errors = run_all(2, "bounds", f"{SPEC}:other_loss", "--set", f"where={where}")
    assert codes == [2, 2]
    assert not out
    assert "another loss on rank 1" in errors


def test_no_option_is_claimed_by_torchrun_without_another_name_for_it() -> None:
    from torch.distributed.run import get_args_parser

    from zoscope.options import OPTIONS

    theirs = get_args_parser()._option_string_actions
    for option in OPTIONS.values():
        free = [flag for flag in option.flags if flag in theirs or not any(name.startswith(flag) for name in theirs)]
        assert free, option.flags
        parsed = get_args_parser().parse_args(["-m", "zoscope", "track", free[-1], "x"])
        assert parsed.training_script_args == ["track", free[-1], "x"]
    behind = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "--", "zoscope", "track", "--run", "x"])
    assert (behind.training_script, behind.training_script_args) == ("zoscope", ["track", "--run", "x"])


@pytest.mark.parametrize(
    "words", [["-m", "--", "zoscope", "--run"], pytest.param(["-m", "zoscope", "--output-dir"], marks=pytest.mark.slow)]
)
def test_torchrun_tracks_into_a_folder(words: list[str], tmp_path: Path) -> None:
    *start, option = words
    args = ["track", SPEC, "--lr", "0.001", "--steps", "4", "--every", "2", "--max-hvps", "20"]
    job = torchrun(2, [*start, *args, option, str(tmp_path / "run")])
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert len(measurements(tmp_path / "run")) == 3


def test_a_rank_whose_peers_never_come_says_so_and_ends() -> None:
    wait = "import zoscope.runtime.process_group as p, datetime; p.JOIN_BY_HAND = datetime.timedelta(seconds=3)"
    code = f"{wait}; p.PATIENCE = 1.0; from zoscope.cli import main; main(['bounds', {SPEC!r}])"
    job = by_hand(2, ["-c", code], only=0)
    out, errors = job[0].communicate(timeout=100)
    assert job[0].returncode == 2
    assert not out
    assert "Waiting for the other processes" in errors
    assert "did not find each other" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_torchrun_prints_one_document_and_a_killed_rank_fails_the_job(tmp_path: Path) -> None:
    job = torchrun(3, ["-m", "zoscope", *COMMANDS["hessian"], "--json"])
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    assert not differences(alone(COMMANDS["hessian"]), json.loads(out), rtol=1e-6)
    job = torchrun(2, ["-m", "zoscope", "bounds", f"{SPEC}:slow", "--set", f"pids={tmp_path}"])
    os.kill(int(wait_for(tmp_path / "1")), signal.SIGKILL)
    killed = time.monotonic()
    out, errors = job.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert job.returncode != 0
    assert not out
    assert "The process of rank 1 has gone" in errors


@pytest.mark.slow
def test_tracking_on_two_ranks_writes_the_folder_of_one_process(tmp_path: Path) -> None:
    args = ["track", SPEC, "--optimizer", "zo-gd", "--lr", "0.01", "--steps", "12", "--every", "6"]
    job = by_hand(2, ["-m", "zoscope", *args, "--run", str(tmp_path / "two")])
    said = [process.communicate(timeout=200) for process in job]
    assert [process.returncode for process in job] == [0, 0], said
    alone_args = [*args, "--run", str(tmp_path / "one")]
    assert run(alone_args) == 0
    assert len(measurements(tmp_path / "one")) == 3
    assert not differences(measurements(tmp_path / "one"), measurements(tmp_path / "two"), rtol=1e-6)


def test_one_process_refuses_to_spread_a_basis(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bounds", SPEC, "--shard-basis"]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_in_parts_on_all_ranks_is_measured_by_forward_passes(tmp_path: Path) -> None:
    spec, forward = f"{SPEC}:sharded", ["--curvature", "forward", "--optimizer", "gd", "--rtol", "0.3"]
    truth = alone(["bounds", spec, "--set", "apart=false", "--method", "dense", "--optimizer", "gd"])
    codes, out, errors = run_all(3, "bounds", spec, *forward, "--json")
    assert codes == [0, 0, 0], errors
    found = json.loads(out)
    assert found["problem"]["num_params"] == truth["problem"]["num_params"]
    assert found["problem"]["loss"] == pytest.approx(truth["problem"]["loss"], rel=1e-12)
    trace = found["curvature"]["hessian"]["trace"]
    assert abs(trace["value"] - truth["curvature"]["hessian"]["trace"]["value"]) < 4 * trace["stderr"]
    codes, _, errors = run_all(2, "bounds", spec)
    assert codes == [2, 2]
    assert "--curvature forward" in errors


@pytest.mark.slow
def test_an_interruption_ends_all_ranks_as_one_that_is_alone_ends(tmp_path: Path) -> None:
    job = by_hand(2, ["-m", "zoscope", "bounds", f"{SPEC}:slow", "--set", f"pids={tmp_path}"])
    wait_for(tmp_path / "1")
    for process in job:
        process.send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60) for process in job]
    assert [process.returncode for process in job] == [130, 130], said
    assert "".join(err for _, err in said).count("Interrupted.") == 1
