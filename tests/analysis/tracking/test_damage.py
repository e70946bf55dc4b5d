"""A run folder that something else has changed: the run goes on with what is whole, or says why not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import zoscope
from zoscope import TrackInterruptedError, UsageError
from zoscope.analysis.track import compare
from zoscope.report.style import to_text

from .problems import network
from .test_track import Interrupt

OPTIONS = {"lr": 0.01, "steps": 12, "every": 2, "max_hvps": 20}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after four measurements."""
    place: Path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(TrackInterruptedError):
        zoscope.track(network(), run=place, observers=[Interrupt(7)], **OPTIONS)
    return place


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def go_on(folder: Path) -> zoscope.TrackResult:
    return zoscope.track(network(), run=folder, resume=True, **OPTIONS)


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        go_on(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def steps_in(folder: Path) -> list[int]:
    data = (folder / "metrics.jsonl").read_bytes()
    assert b"\0" not in data
    assert data.endswith(b"\n")
    return [json.loads(line)["step"] for line in data.splitlines()]


@pytest.mark.parametrize("left", [0, 300, 0.6])
@pytest.mark.parametrize("tail", [b"", b"\0" * 400, b'{"step": 2, "lo', b"\xff\n"])
def test_metrics_without_their_end_are_cut_back_to_whole_lines(folder: Path, left: float, tail: bytes) -> None:
    file = folder / "metrics.jsonl"
    data = file.read_bytes()
    kept = data[: int(left * len(data)) if isinstance(left, float) else left]
    file.write_bytes(kept + tail)
    result = go_on(folder)
    whole = [2 * n for n in range(kept.count(b"\n"))]
    assert steps_in(folder) == [*whole, 8, 10, 12]
    assert [record.step for record in result.records] == steps_in(folder)
    assert any("measurements before step 7" in notice.message for notice in result.warnings)
    assert to_text(compare([folder]))


def test_metrics_that_are_gone_begin_anew(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    go_on(folder)
    assert steps_in(folder) == [8, 10, 12]


@pytest.mark.parametrize("line", [b"{}", b"nonsense", b"\0\0\0", b'{"step": "x", "loss": 1}', b"[" * 9999])
def test_a_line_that_was_changed_in_the_midst_is_refused(folder: Path, line: bytes) -> None:
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], line, *lines[2:], b""]))
    assert "line 2 is no measurement" in refused(folder)


def test_a_number_that_was_changed_is_refused(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    record = json.loads(file.read_bytes().splitlines()[1])
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b'"step": 3'))
    assert record["step"] == 2
    assert "not what the checkpoint knows" in refused(folder)


@pytest.mark.parametrize("place", [0.1, 0.6, 0.97])
def test_a_checkpoint_with_another_byte_is_refused(folder: Path, place: float) -> None:
    file = folder / "checkpoint.pt"
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 0x41
    file.write_bytes(data)
    before = (folder / "metrics.jsonl").read_bytes()
    assert "checkpoint.pt" in refused(folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("key", ["run", "model", "optimizer", "config", "run.step", "run.loss", "run.clock", "seal"])
@pytest.mark.parametrize("value", [None, float("nan"), {}])
def test_a_checkpoint_with_another_value_is_refused(folder: Path, key: str, value: object) -> None:
    file = folder / "checkpoint.pt"
    content = torch.load(file, weights_only=True)
    inner = content["run"] if "." in key else content
    inner[key.removeprefix("run.")] = value
    torch.save(content, file)
    if key == "seal" and value is None:  # as in runs of earlier versions
        go_on(folder)
    else:
        assert "checkpoint" in refused(folder)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, name: str) -> None:
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        if (folder / name).is_symlink() and name == "summary.json":
            with pytest.raises(UsageError, match=r"summary\.json"):
                compare([folder])
        else:
            assert name in refused(folder)
        if (folder / name).is_dir():
            (folder / name).rmdir()


EDITED = {
    "summary.json": ["[]", "3", "{}", '{"schema": 3}', '{"schema": "zoscope.track/1"}', "[" * 99999, "NaN", "\0", ""],
    "config.yaml": ["[" * 99999, "lr: {a: b}", "- 1", "\0", "optimizer: [1]", "lr: 1e999", "every: [1, 2]", "set: 3"],
    "metrics.jsonl": ['{"step": 1, "loss": 1e999}\n', '{"step": 99999999999999999999, "loss": 1}\n', "1\n", "null\n"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in EDITED.items() for text in texts])
def test_an_edited_file_is_one_paragraph_for_whoever_compares(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UsageError, match=name.replace(".", r"\.")) as caught:
        to_text(compare([folder]))
    assert "\n" not in str(caught.value)
