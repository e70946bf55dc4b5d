"""The configuration of a tracked run: one table for the file and for the command line."""

import dataclasses

import pytest

from zoscope import UsageError
from zoscope.analysis.track_results import CONFIG as TRACK_CONFIG
from zoscope.analysis.track_results import TrackRequest
from zoscope.config.load import Piecewise, Schedule
from zoscope.config.sources import ConfigError
from zoscope.config.training import TRACK, plain_config, read_axis, read_sweep, read_track_config, read_track_option
from zoscope.options import KEYWORDS, left_open


def read(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_track_config(file)


def test_every_option_is_a_key_an_argument_and_an_option():
    keys = set(TRACK.names)
    request = {entry.name for entry in dataclasses.fields(TrackRequest)} - {"preconditioner", "on_progress"}
    options = {*left_open("track")} - {"settings"} | {"spec", "problem", "set", "sweep"}
    python = set(KEYWORDS["track"][1].__annotations__)
    assert options == keys
    assert request == python
    assert python - {"resume", "overwrite"} | {"problem", "set", "checkpoint", "sweep"} == keys


def test_a_configuration_of_a_run_holds_what_makes_it_what_it_is():
    kept = {*TrackRequest.of(lr=1.0).config(), *TRACK_CONFIG.split()}
    anew = {"max_seconds", "max_memory", "shard_basis", "strict", "run", "params"}
    anew |= {"spec", "problem", "set", "checkpoint", "sweep"}
    assert kept | anew == set(TRACK.names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.001", Schedule("constant", 0.001)),
        ("1e-3", Schedule("constant", 0.001)),
        ("0.001,20:0.002", Piecewise((0, 20), (0.001, 0.002))),
        ("{0: 0.001, 20: 0.002}", Piecewise((0, 20), (0.001, 0.002))),
        ("{schedule: cosine, peak: 0.1, warmup: 10}", Schedule("cosine", 0.1, 10)),
    ],
)
def test_step_sizes(text, expected, tmp_path):
    assert read(tmp_path, f"lr: {text}")["lr"] == expected


def test_paths_are_relative_to_the_file(tmp_path):
    found = read(tmp_path, "spec: sub/model.py:other\ncheckpoint: weights.pt")
    assert found == {"spec": f"{tmp_path}/sub/model.py:other", "checkpoint": f"{tmp_path}/weights.pt"}


def test_a_spec_may_be_called_problem_as_in_the_file_of_checks(tmp_path):
    assert read(tmp_path, "problem: model.py") == {"spec": f"{tmp_path}/model.py"}
    with pytest.raises(UsageError, match="both spec and problem"):
        read(tmp_path, "problem: model.py\nspec: model.py")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 10\nstep: 20", r"run\.yaml, line 2: unknown key 'step'.*Did you mean 'steps'"),
        ("optimizer: sgd", "line 1: optimizer must be one of"),
        ("lr: {peak: 0.1}", "lacks 'schedule'"),
        ("lr: {0: 0.1, x: 0.2}", "has the key 'x'"),
        ("lr: {5: 0.1}", "the first at step 0"),
        ("lr: -1", "must be above 0"),
        ("lr: 0.1,5", "expected a number"),
        ("every: sometimes", "every must be a number of steps, auto or adaptive"),
        ("betas: [0.9]", "betas must be a list of two"),
        ("sweep: {beta: []}", "must be a list of values"),
        ("sweep: {sweep: [1]}", "cannot be varied"),
        ("sweep: {beta: [0, 1.5]}", r"sweep\.beta must be"),
        ("- 1", "a configuration is a mapping"),
    ],
)
def test_mistakes_have_a_line_and_a_remedy(text, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_track_config(tmp_path / "none.yaml")


def test_options_of_the_command_line_are_checked_by_the_same_table():
    assert read_track_option("lr", "0.001,20:0.002") == Piecewise((0, 20), (0.001, 0.002))
    with pytest.raises(UsageError, match="--max-hvps must be from 1"):
        read_track_option("max_hvps", 0)


def test_sweeps():
    assert read_sweep(["beta=0,0.5", "seed=1,2"]) == {"beta": [0, 0.5], "seed": [1, 2]}
    assert read_sweep(["lr=1e-3;0.001,20:0.002"]) == {"lr": ["1e-3", "0.001,20:0.002"]}
    assert read_sweep(["betas=0.9,0.99;0.5,0.99"]) == {"betas": [[0.9, 0.99], [0.5, 0.99]]}
    assert read_sweep(["set.width=16,32", "max-hvps=20,1e2"]) == {"set.width": [16, 32], "max_hvps": [20, 100.0]}


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["beta"], "expected an option and its values"),
        (["beta="], "expected an option and its values"),
        (["bet=0.1,0.2"], "'bet', which cannot be varied. Did you mean 'beta'"),
        (["beta=0.1,x"], "must be a number"),
        (["beta=0.1", "beta=0.2"], "given twice"),
        (["set.not a name=1"], "cannot be varied"),
    ],
)
def test_sweeps_that_make_no_sense(items, said):
    with pytest.raises(UsageError, match=said):
        read_sweep(items)


def test_an_axis_is_checked_and_named():
    values, labels = read_axis("lr", ["1e-3", "0.001,20:0.002"])
    assert values == [Schedule("constant", 1e-3), Piecewise((0, 20), (0.001, 0.002))]
    assert labels == ["1e-3", "0.001,20:0.002"]
    assert read_axis("set.data", ["a", None]) == (["a", None], ["a", "None"])


def test_values_go_back_into_a_file(tmp_path):
    import yaml

    text = "lr: {schedule: linear, peak: 0.1, warmup: 0.2}\nbetas: [0.8, 0.9]\nset: {a: [1, 2]}\nevery: auto"
    values = read(tmp_path, text)
    assert read(tmp_path, yaml.safe_dump(plain_config(values))) == values
