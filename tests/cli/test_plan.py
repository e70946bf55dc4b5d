import json

import pytest

import zoscope

SPEC = """
import torch, zoscope

def problem(slope=True):
    matrix = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)
    f = lambda x: 0.5 * (matrix * x * x).sum()
    return zoscope.Problem.from_function(f if slope else lambda x: float(f(x)), torch.ones(30, dtype=torch.float64))
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(SPEC)
    return path


def test_one_answer_in_twelve_lines_or_one_document(zoscope_cli, spec):
    done = zoscope_cli("plan", spec, "--steps", "40", "--quiet")
    assert done.code == 0
    assert len(done.out.splitlines()) <= 12
    document = json.loads(zoscope_cli("plan", spec, "--steps", "40", "--json", "--quiet").out)
    assert document["schema"] == "zoscope.plan/1"
    assert document["method"] == "replicas"
    answer, edge = document["answer"], document["edge"]
    assert answer["lr"] < edge["lr"]
    assert answer["expected_loss"] < answer["loss_start"]
    assert answer["risk"] <= 0.05
    assert document["safe"]["risk"] == 0.01
    assert {"lr", "risk", "loss_mean", "loss_lo", "loss_hi"} <= document["curve"][0].keys()
    assert len(document["paths"][0]["steps"]) == len(document["paths"][0]["loss"])


def test_a_loss_without_gradients_is_planned_from_real_runs(zoscope_cli, spec):
    done = zoscope_cli("plan", spec, "--set", "slope=false", "--steps", "30", "--json")
    document = json.loads(done.out)
    assert document["method"] == "replicas"
    assert "no-gradient" in [warning["code"] for warning in document["warnings"]]
    refused = zoscope_cli("plan", spec, "--set", "slope=false", "--method", "rehearsal")
    assert refused.code == 2
    assert "--method" in refused.paragraph


def test_a_plan_that_was_made_is_there_at_once(zoscope_cli, spec, tmp_path):
    words = ("plan", spec, "--steps", "30", "--cache", tmp_path / "kept", "--json", "--quiet")
    first, second = (json.loads(zoscope_cli(*words).out) for _ in range(2))
    assert first["answer"] == second["answer"]
    assert first["curve"] == second["curve"]
    assert second["cost"] == first["cost"]


def test_a_budget_ends_the_search_with_what_is_known(zoscope_cli, spec):
    done = zoscope_cli("plan", spec, "--steps", "40", "--max-cost", "700", "--json")
    document = json.loads(done.out)
    assert "max-cost" in [warning["code"] for warning in document["warnings"]]


def test_an_interruption_leaves_what_is_known(zoscope_cli, spec, monkeypatch):
    plan = zoscope.plan

    def interrupted_after_three(problem, **options):
        tried = set()

        def on_progress(what, done, total):
            tried.add(what)
            if len(tried) > 3:
                raise KeyboardInterrupt

        return plan(problem, **options | {"on_progress": on_progress})

    monkeypatch.setattr(zoscope, "plan", interrupted_after_three)
    done = zoscope_cli("plan", spec, "--steps", "40", "--json")
    assert done.code == 130
    document = json.loads(done.out)
    assert document["interrupted"]
    assert len(document["curve"]) == 3
    assert document["perturbation"] is None
    shown = zoscope_cli("plan", spec, "--steps", "40").out
    assert "interrupted: this is what was known by then" in shown
    assert "not known yet" in shown


def test_an_interruption_before_the_first_runs_is_said_alone(zoscope_cli, spec, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("zoscope.analysis.plan.first_guess", interrupt)
    done = zoscope_cli("plan", spec, "--steps", "40", "--json")
    assert (done.code, done.out) == (130, "")


def test_schedules_are_compared(zoscope_cli, spec):
    done = zoscope_cli("plan", spec, "--steps", "30", "--compare-schedules", "--json", "--quiet")
    rows = json.loads(done.out)["schedules"]
    assert {row["schedule"] for row in rows} == {"constant", "linear", "cosine"}
    losses = [row["expected_loss"] for row in rows]
    assert losses == sorted(losses)


def test_a_picture_is_written(zoscope_cli, spec, tmp_path):
    done = zoscope_cli("plan", spec, "--steps", "30", "--plot", tmp_path / "plan.svg", "--quiet")
    assert done.code == 0
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--optimizer", "gd"], "--optimizer"),
        (["--steps", "0"], "--steps"),
        (["--schedule", "square"], "--schedule"),
        (["--schedule", "1,20:0.1", "--warmup", "0.1"], "--warmup"),
        (["--replicas", "1"], "--replicas"),
        (["--max-cost", "0"], "--max-cost"),
        (["--method", "dense"], "--method"),
    ],
)
def test_a_bad_value_is_one_paragraph_and_exit_2(zoscope_cli, spec, options, named):
    done = zoscope_cli("plan", spec, *options)
    assert done.code == 2
    assert named in done.paragraph


SATURATING = """
import torch, zoscope

weights = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
problem = zoscope.Problem.from_function(
    lambda x: (torch.tanh(x - 1) ** 2 * weights).sum() / 20, torch.full((20,), 0.3, dtype=torch.float64)
)
"""


def test_a_loss_that_saturates_has_an_edge_too(zoscope_cli, tmp_path):
    (tmp_path / "flat.py").write_text(SATURATING)
    done = zoscope_cli("plan", tmp_path / "flat.py", "--steps", "40", "--replicas", "4", "--json", "--quiet")
    document = json.loads(done.out)
    assert "saturates" in [warning["code"] for warning in document["warnings"]]
    assert document["answer"]["lr"] < document["edge"]["lr"]


def test_training_arguments_are_planned_and_options_override_them(zoscope_cli, spec, tmp_path):
    arguments = {
        "trainer": "zo_sgd",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "max_steps": 40,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "zo_eps": 1e-4,
        "weight_decay": 0.01,
    }
    path = tmp_path / "args.json"
    path.write_text(json.dumps(arguments))
    done = zoscope_cli("plan", spec, "--hf-args", path, "--steps", "30", "--json")
    question = json.loads(done.out)["question"]
    assert (question["optimizer"], question["steps"], question["mu"]) == ("zo-gd", 30, 1e-4)
    assert (question["schedule"], question["warmup"], question["weight_decay"]) == ("cosine", 0.1, 0.01)
    assert "gradient_accumulation_steps × 2 examples = 8" in done.err
    assert "--batch-size 8" in done.err  # the problem has one example
    path.write_text(json.dumps(arguments | {"trainer": "regular"}))
    refused = zoscope_cli("plan", spec, "--hf-args", path)
    assert refused.code == 2
    assert "--hf-args" in refused.err


def test_only_the_range_of_mu_is_measured(zoscope_cli, spec):
    document = json.loads(zoscope_cli("plan", spec, "--only", "mu", "--json", "--quiet").out)
    assert document["schema"] == "zoscope.mu/1"
    assert document["dtype"] == "float64"
    shown = zoscope_cli("plan", spec, "--only", "mu", "--batch-size", "4", "--quiet")
    assert shown.code == 0
    assert "use μ" in shown.out
    refused = zoscope_cli("plan", spec, "--only", "mu", "--plot", "mu.png")
    assert refused.code == 2
    assert "--plot" in refused.paragraph
    refused = zoscope_cli("plan", spec, "--only", "lr")
    assert refused.code == 2
    assert "mu" in refused.paragraph
