"""``zoscope track`` from the command line to the folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import zoscope

SPEC = """
import torch, zoscope
H = torch.diag(torch.linspace(0.5, 1.5, 20, dtype=torch.float64))
def problem(scale=1.0):
    return zoscope.Problem.from_function(lambda x: 0.5 * scale * x @ H @ x, torch.ones(20, dtype=torch.float64))
"""


@pytest.fixture
def drawn_spec(tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(SPEC)
    return file


@pytest.fixture
def spec(drawn_spec: Path, without_pictures: None) -> Path:
    return drawn_spec


HERE = {**os.environ, "PYTHONPATH": str(Path(zoscope.__file__).parents[1])}
SHORT = ("--lr", "0.01", "--steps", "20", "--every", "10")


def test_a_run_prints_its_measurements_and_leaves_a_folder(zoscope_cli, drawn_spec, tmp_path) -> None:
    finished = zoscope_cli("track", drawn_spec, "--optimizer", "zo-gd", *SHORT, "-v")
    assert finished.code == 0, finished.err
    assert "in the band" in finished.out or "not reached" in finished.out
    assert "Finished: all 20 steps are done" in finished.out
    run = tmp_path / "runs" / "model-zo-gd"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert {"plot.png", "plot.svg"} <= {path.name for path in run.iterdir()}
    assert yaml.safe_load((run / "config.yaml").read_text())["spec"] == "../../model.py"
    assert sum(line.startswith("step ") for line in finished.err.splitlines()) == 3
    (run / "plot.svg").unlink()  # as if the program had ended before it was drawn
    assert "this run is over" in zoscope_cli("track", "--resume", run).err
    assert (run / "plot.svg").stat().st_size > 1000


def test_quiet_says_nothing_on_the_way(zoscope_cli, spec) -> None:
    assert zoscope_cli("track", spec, *SHORT, "-q", "--run", "r").err == ""


def test_json_is_one_document(zoscope_cli, spec) -> None:
    finished = zoscope_cli("track", spec, *SHORT, "--run", "r", "--json")
    document = json.loads(finished.out)
    assert document["schema"] == "zoscope.track/1"
    assert [record["step"] for record in document["records"]] == [0, 10, 20]
    assert document["status"] == "finished"


def test_the_command_line_wins_over_the_file(zoscope_cli, spec, tmp_path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "run.yaml").write_text(
        "spec: ../model.py\noptimizer: zo-gdm\nlr: 0.001\nsteps: 20\nevery: 10\nset: {scale: 2.0}\nrun: here\n"
    )
    finished = zoscope_cli("track", "--config", folder / "run.yaml", "--lr", "0.002", "--json")
    config = json.loads(finished.out)["config"]
    assert (config["optimizer"], config["lr"], config["set"]) == ("zo-gdm", 0.002, {"scale": 2.0})
    assert (tmp_path / "here" / "checkpoint.pt").exists()


def test_what_a_run_wrote_is_a_configuration(zoscope_cli, spec, tmp_path) -> None:
    zoscope_cli("track", spec, *SHORT, "--run", "a/first", "--set", "scale=2")
    again = zoscope_cli("track", "--config", tmp_path / "a" / "first" / "config.yaml", "--run", "second")
    assert again.code == 0, again.err
    assert (tmp_path / "a/first/metrics.jsonl").read_bytes() == (tmp_path / "second/metrics.jsonl").read_bytes()


def test_a_run_stopped_by_time_goes_on(zoscope_cli, spec, tmp_path) -> None:
    assert zoscope_cli("track", spec, *SHORT, "--run", "r", "--max-seconds", "1e-9").code == 0
    finished = zoscope_cli("track", "--resume", "r")
    assert finished.code == 0, finished.err
    zoscope_cli("track", spec, *SHORT, "--run", "whole")
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_diverged_run_is_shown_and_exits_3(zoscope_cli, spec) -> None:
    finished = zoscope_cli("track", spec, "--optimizer", "gd", "--lr", "5", "--steps", "300", "--run", "r")
    assert finished.code == 3
    assert "Diverged: the loss was" in finished.out


def test_a_sweep_is_a_folder_of_runs_and_a_table(zoscope_cli, spec, tmp_path) -> None:
    options = ("--optimizer", "zo-gdm", *SHORT, "--run", "s")
    finished = zoscope_cli("track", spec, *options, "--sweep", "beta=0,0.5", "--sweep", "set.scale=1,2", "-v")
    assert finished.code == 0, finished.err
    runs = sorted(path.parent.name for path in (tmp_path / "s").glob("*/metrics.jsonl"))
    assert runs == ["beta=0,scale=1", "beta=0,scale=2", "beta=0.5,scale=1", "beta=0.5,scale=2"]
    assert all(run in finished.out for run in runs)
    assert "They differ in set.scale, beta." in finished.out
    document = json.loads(zoscope_cli("track", "--compare", "s", "--json").out)
    assert [run["label"] for run in document["runs"]] == runs
    assert all(run["schema"] == "zoscope.track/1" for run in document["runs"])


def test_a_sweep_goes_on_where_it_was(zoscope_cli, spec, tmp_path) -> None:
    options = ("--optimizer", "zo-gdm", *SHORT, "--run", "s", "--sweep", "beta=0,0.5")
    zoscope_cli("track", spec, *options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "beta=0").iterdir()}
    for path in sorted((tmp_path / "s" / "beta=0.5").iterdir()):
        path.unlink()
    (tmp_path / "s" / "summary.json").unlink()
    assert "--resume s" in zoscope_cli("track", spec, *options).paragraph
    finished = zoscope_cli("track", "--resume", "s")
    assert finished.code == 0, finished.err
    assert (tmp_path / "s" / "beta=0.5" / "summary.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_one_run_of_a_sweep_that_fails_does_not_end_it(zoscope_cli, spec) -> None:
    finished = zoscope_cli("track", spec, *SHORT, "--run", "s", "--sweep", "set.scale=1,.inf")
    assert finished.code == 3
    assert "Failed" in finished.out
    assert "scale=inf" in finished.out


def test_runs_are_compared(zoscope_cli, spec) -> None:
    zoscope_cli("track", spec, *SHORT, "--run", "one")
    zoscope_cli("track", spec, *SHORT, "--run", "two", "--seed", "1")
    finished = zoscope_cli("track", "--compare", "one", "two", "-v")
    assert finished.code == 0, finished.err
    assert "They differ in seed." in finished.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("SPEC",), "--lr is missing"),
        (("SPEC", "--lr", "x"), "--lr: got 'x'"),
        (("SPEC", "--lr", "0.1", "--optimizer", "zo-gdn"), "Did you mean 'zo-gd'"),
        (("SPEC", "--lr", "0.1", "--optimizer", "zo-gdn", "--eps", "1e-8"), "Did you mean 'zo-gd'"),
        (("SPEC", "--lr", "0.1", "--every", "often"), "--every must be a number of steps, auto or adaptive"),
        (("SPEC", "--lr", "0.1", "--betas", "0.9"), "--betas must be a list of two values, got 1 of them"),
        (("SPEC", "SPEC", "--lr", "0.1"), "got 2 of them"),
        (("SPEC", "--lr", "0.1", "--sweep", "bet=1"), "Did you mean 'beta'"),
        (("SPEC", "--lr", "0.1", "--config", "none.yaml"), "there is no file none.yaml"),
        (("--resume", "none"), "is no run of zoscope track"),
        (("--compare",), "no folder was named"),
        (("--compare", "none"), "is no run of zoscope track"),
        (("--compare", "none", "--lr", "1"), "Leave all options of a run out"),
        (("SPEC", "--lr", "0.1", "--sweep", "lr=1,x"), "--sweep lr: got 'x'"),
        (("SPEC", "--lr", "0.1", "--plot", "x.bmp"), "--plot: x.bmp has no picture's name"),
        (("SPEC", "--lr", "0.1", "--optimizer", "gd", "--forward-every", "5"), "needs a zo- optimizer, got 'gd'"),
    ],
)
def test_mistakes_are_one_paragraph(zoscope_cli, spec, words, said) -> None:
    finished = zoscope_cli("track", *(spec if word == "SPEC" else word for word in words))
    assert finished.code == 2
    assert said in finished.paragraph


def test_going_on_takes_no_other_options(zoscope_cli, spec) -> None:
    zoscope_cli("track", spec, *SHORT, "--run", "r", "--max-seconds", "1e-9")
    finished = zoscope_cli("track", "--resume", "r", "--lr", "0.5")
    assert finished.code == 2
    assert "--lr was given" in finished.paragraph


def test_a_folder_with_a_run_is_refused(zoscope_cli, spec) -> None:
    zoscope_cli("track", spec, *SHORT, "--run", "r")
    finished = zoscope_cli("track", spec, *SHORT, "--run", "r")
    assert finished.code == 2
    assert "zoscope track --resume r" in finished.paragraph
    assert zoscope_cli("track", spec, *SHORT, "--run", "r", "--overwrite").code == 0


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_keeps_what_there_is_and_exits_130(spec, tmp_path, number) -> None:
    command = [
        sys.executable,
        "-m",
        "zoscope",
        "track",
        str(spec),
        "--lr",
        "0.001",
        "--steps",
        "100000000",
        "--run",
        "r",
    ]
    process = subprocess.Popen(
        command,
        env=HERE,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell ignores SIGINT for what it starts with &
    )
    while process.poll() is None and not (tmp_path / "r" / "checkpoint.pt").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "zoscope track --resume r" in err
    assert "interrupted after step" in out
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="needs limits of a process")
@pytest.mark.slow
def test_a_full_disk_is_one_paragraph_and_the_run_goes_on_later(spec, tmp_path) -> None:
    code = (
        "import resource, sys; from zoscope.cli.app import run; import zoscope.analysis.track\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))\n"
        f"sys.exit(run(['track', {str(spec)!r}, '--lr', '0.001', '--steps', '40', '--every', '2', '--run', 'r', '-q']))"
    )
    failed = subprocess.run(
        [sys.executable, "-c", code], env=HERE, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 3, failed.stderr
    assert failed.stderr.startswith("Error: ")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "metrics.jsonl cannot be written" in failed.stderr
    assert "zoscope track --resume r" in failed.stderr
    again = [sys.executable, "-m", "zoscope", "track", "--resume", "r", "-q"]
    assert subprocess.run(again, env=HERE, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 21
