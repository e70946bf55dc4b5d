"""The folder of a run: whole at every moment, and enough to go on from."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import zoscope
from zoscope import RunFolderError, TrackInterruptedError, UsageError, files
from zoscope.analysis.track_folder import RunFolder

from .problems import network
from .test_track import Interrupt

OPTIONS = {"lr": "0.01,25:0.02", "steps": 40, "every": 10}
ALL = ["zo-gd", "zo-gdm", "zo-adam", "gd", "gdm", "adam"]


def metrics(place):
    return (place / "metrics.jsonl").read_bytes()


def interrupted(place, at, **options):
    with pytest.raises(TrackInterruptedError):
        zoscope.track(network(), run=place, observers=[Interrupt(at)], **options)


def test_a_run_leaves_what_the_contract_names(tmp_path):
    result = zoscope.track(network(), run=tmp_path / "run", **OPTIONS)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoint.pt",
        "summary.json",
    }
    lines = [json.loads(line) for line in metrics(tmp_path / "run").splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
    assert lines == [record.to_dict() for record in result.records]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == "0.01,25:0.02"


def test_the_checkpoint_is_a_state_dict_that_other_commands_take(tmp_path):
    result = zoscope.track(network(), run=tmp_path / "run", **OPTIONS)
    from zoscope.problem.checkpoint import load_checkpoint

    problem = network()
    load_checkpoint(problem.model, tmp_path / "run" / "checkpoint.pt")
    assert all(torch.equal(value, result.parameters[name]) for name, value in problem.model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["zo-gd", "zo-gdm", "zo-adam", "zo-normalized", "zo-signsgd"])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_step_size_that_sets_itself_goes_on_as_if_nothing_had_been(optimizer, batch_size, tmp_path):
    options = {**OPTIONS, "optimizer": optimizer, "batch_size": batch_size, "lr": "auto:linear"}
    whole = zoscope.track(network(), run=tmp_path / "whole", **options)
    interrupted(tmp_path / "parts", 17, **options)
    rest = zoscope.track(network(), run=tmp_path / "parts", resume=True, **options)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert all(torch.equal(value, whole.parameters[name]) for name, value in rest.parameters.items())
    path = [point for record in whole.records for point in record.path]
    assert [step for step, _, _ in path] == list(range(1, 41))
    assert whole.records[-1].auto["rollbacks"] == 0
    assert whole.records[0].lr == 0 < whole.records[2].lr


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("batch_size", [None, 5])
def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_been(optimizer, batch_size, tmp_path):
    options = {**OPTIONS, "optimizer": optimizer, "batch_size": batch_size, "lr": "0.001,25:0.002"}
    whole = zoscope.track(network(), run=tmp_path / "whole", **options)
    interrupted(tmp_path / "parts", 7, **options)
    interrupted(tmp_path / "parts", 20, resume=True, **options)
    rest = zoscope.track(network(), run=tmp_path / "parts", resume=True, **options)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert all(torch.equal(value, whole.parameters[name]) for name, value in rest.parameters.items())


def test_what_was_written_after_the_checkpoint_is_written_again(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    zoscope.track(network(), run=whole, **OPTIONS)
    interrupted(torn, 23, **OPTIONS)
    with open(torn / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 30, "loss": 0.')  # killed in the middle of a line
    zoscope.track(network(), run=torn, resume=True, **OPTIONS)
    assert metrics(torn) == metrics(whole)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    whole, early = tmp_path / "whole", tmp_path / "early"
    zoscope.track(network(), run=whole, **OPTIONS)
    interrupted(early, 3, **OPTIONS)
    (early / "checkpoint.pt").unlink()
    zoscope.track(network(), run=early, resume=True, **OPTIONS)
    assert metrics(early) == metrics(whole)


def test_time_that_was_over_can_be_given_again(tmp_path):
    options = {**OPTIONS, "steps": 400, "every": 100}
    result = zoscope.track(network(), run=tmp_path / "parts", max_seconds=1e-9, **options)
    assert result.status == "time"
    zoscope.track(network(), run=tmp_path / "parts", resume=True, **options)
    zoscope.track(network(), run=tmp_path / "whole", **options)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_checkpoints_between_measurements_change_nothing(tmp_path):
    written = []
    original = RunFolder.write_checkpoint

    def counted(self, content):
        written.append(content["run"]["step"])
        original(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_checkpoint", counted)
        zoscope.track(network(), run=tmp_path / "often", checkpoint_every=4, **OPTIONS)
    assert {4, 8, 10, 12} <= set(written)
    zoscope.track(network(), run=tmp_path / "seldom", **OPTIONS)
    assert metrics(tmp_path / "often") == metrics(tmp_path / "seldom")


def test_a_run_that_is_there_is_not_written_over(tmp_path):
    zoscope.track(network(), run=tmp_path, **OPTIONS)
    with pytest.raises(UsageError, match="--overwrite"):
        zoscope.track(network(), run=tmp_path, **OPTIONS)
    before = metrics(tmp_path)
    zoscope.track(network(), run=tmp_path, overwrite=True, **{**OPTIONS, "lr": 0.005})
    assert metrics(tmp_path) != before


def test_a_run_that_is_over_does_not_go_on(tmp_path):
    zoscope.track(network(), run=tmp_path, **OPTIONS)
    with pytest.raises(UsageError, match="this run is over"):
        zoscope.track(network(), run=tmp_path, resume=True, **OPTIONS)


def test_a_run_goes_on_with_its_own_options_only(tmp_path):
    interrupted(tmp_path, 5, **OPTIONS)
    with pytest.raises(UsageError, match=r"lr is 0\.5, and the run began with '0\.01,25:0\.02'"):
        zoscope.track(network(), run=tmp_path, resume=True, **{**OPTIONS, "lr": 0.5})


def test_options_edited_in_the_file_are_noticed(tmp_path):
    interrupted(tmp_path, 5, **OPTIONS)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("0.01,25:0.02", "0.03"))
    with pytest.raises(UsageError, match=r"lr is 0\.03 in config\.yaml, and was '0\.01,25:0\.02'"):
        zoscope.track(network(), run=tmp_path, resume=True, **{**OPTIONS, "lr": 0.03})


def test_other_data_are_noticed(tmp_path):
    interrupted(tmp_path, 5, **OPTIONS)
    changed = network()
    changed.batches[0][1].mul_(3.0)
    with pytest.raises(UsageError, match="the data or the loss function have changed"):
        zoscope.track(changed, run=tmp_path, resume=True, **OPTIONS)


def test_another_model_is_noticed(tmp_path):
    interrupted(tmp_path, 5, **OPTIONS)
    other = network()
    other.model[0] = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(UsageError, match="other parameters"):
        zoscope.track(other, run=tmp_path, resume=True, **OPTIONS)


def test_a_folder_without_a_run_cannot_go_on(tmp_path):
    with pytest.raises(UsageError, match="no run in this folder"):
        zoscope.track(network(), run=tmp_path / "nothing", resume=True, **OPTIONS)
    assert not (tmp_path / "nothing").exists()


def test_two_runs_in_one_folder_refuse_each_other(tmp_path):
    class Second:
        def begun(self, run):
            with pytest.raises(UsageError, match=r"another run is at work .*process \d+"):
                zoscope.track(network(), run=tmp_path, overwrite=True, **OPTIONS)

        def stepped(self, step, loss): ...
        def measuring(self, step): ...
        def measured(self, record): ...

    result = zoscope.track(network(), run=tmp_path, observers=[Second()], **OPTIONS)
    assert len(result.records) == 5


def test_a_folder_that_cannot_be_made_is_one_paragraph(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made or written") as caught:
        zoscope.track(network(), run=tmp_path / "file" / "run", **OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("file", ["metrics.jsonl", "checkpoint.pt"])
def test_a_disk_that_takes_no_more_leaves_the_last_state(reason, file, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    zoscope.track(network(), run=whole, **OPTIONS)
    real, calls = files.write_all, []

    def full(handle, data):
        if file in str(handle.name):
            calls.append(1)
            if len(calls) == 3:
                handle.write(bytes(data)[: len(data) // 2])
                raise OSError(reason, "as the system says")
        real(handle, data)

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(RunFolderError, match=file) as caught:
        zoscope.track(network(), run=parts, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert "--resume" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not [path.name for path in parts.iterdir() if path.name not in (".lock", *_names())]
    monkeypatch.setattr(files, "write_all", real)
    zoscope.track(network(), run=parts, resume=True, **OPTIONS)
    assert metrics(parts) == metrics(whole)


def _names():
    return ("config.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json")


def test_a_damaged_checkpoint_is_said(tmp_path):
    interrupted(tmp_path, 5, **OPTIONS)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint\.pt cannot be read"):
        zoscope.track(network(), run=tmp_path, resume=True, **OPTIONS)


def test_a_spec_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError):
        zoscope.track(network(), run=tmp_path / "run", batch_size=1000, **OPTIONS)
    assert not (tmp_path / "run").exists()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import problems, zoscope
zoscope.track(problems.network(), run={run!r}, resume={resume}, optimizer="zo-adam", lr=0.001, steps=60000, every=200,
              checkpoint_every=70, batch_size=5, max_hvps=20)
"""


def killed_run(place: Path, *, resume: bool, after: float | None) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), run=str(place), resume=resume)
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_lines(place: Path, count: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        if (place / "metrics.jsonl").exists() and metrics(place).count(b"\n") >= count:
            return
        time.sleep(0.02)


def kill_when_measured(place: Path, *, resume: bool, lines: int) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), run=str(place), resume=resume)
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for_lines(place, lines, process)
    process.kill()
    process.wait()


def test_a_run_that_was_killed_is_the_run_that_was_not(tmp_path):
    place = tmp_path / "run"
    kill_when_measured(place, resume=False, lines=3)
    options = {"optimizer": "zo-adam", "lr": 0.001, "every": 200, "batch_size": 5, "max_hvps": 20, "steps": 60000}
    with pytest.raises(TrackInterruptedError):
        zoscope.track(network(), observers=[Interrupt(1000)], run=tmp_path / "whole", checkpoint_every=70, **options)
    with pytest.raises(TrackInterruptedError):
        zoscope.track(network(), observers=[Interrupt(1000)], run=place, checkpoint_every=70, resume=True, **options)
    assert metrics(place) == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_is_the_run_that_was_not(tmp_path):
    import random

    place, moments = tmp_path / "run", random.Random(0)
    killed_run(place, resume=False, after=8.0)
    for _ in range(9):
        killed_run(place, resume=(place / "config.yaml").exists(), after=6.0 + 4.0 * moments.random())
    options = {"optimizer": "zo-adam", "lr": 0.001, "every": 200, "batch_size": 5, "max_hvps": 20, "steps": 60000}
    last = json.loads(metrics(place).splitlines()[-1])["step"] if metrics(place) else 0
    for where, resume in ((place, True), (tmp_path / "whole", False)):
        with pytest.raises(TrackInterruptedError):
            zoscope.track(
                network(), observers=[Interrupt(last + 500)], run=where, checkpoint_every=70, resume=resume, **options
            )
    assert metrics(place) == metrics(tmp_path / "whole")
