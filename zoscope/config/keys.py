"""The table of configuration keys: the validator, the JSON Schema and the command line all read this one."""

from __future__ import annotations

from types import MappingProxyType

from zoscope.config.kinds import Arguments, Choice, Flag, Integer, Number, Pair, Regex, Size, Text
from zoscope.config.sections import Key, ListOf, OneOf, Section

OPTIMIZERS = ("gd", "gdm", "adam", "zo-gd", "zo-gdm", "zo-adam")
THRESHOLDS = ("binding", "exact", "descent", "horizon")
SCHEDULES = ("constant", "linear", "cosine")

_LR = Number(0.0, 1e9, open_low=True)
_UNIT = Number(0.0, 1.0, open_low=True, open_high=True)
_BETA = Number(0.0, 1.0, open_high=True)
_PRECONDITIONER = Text(pattern=r"expected|state:.+")
_SPEC_DOC = "path/to/model.py, path/to/model.py:name or package.module:name; paths are relative to this file."

SCHEDULE = Section(
    (
        Key("schedule", Choice(SCHEDULES), "Shape of the learning-rate schedule.", required=True),
        Key("peak", _LR, "Highest learning rate of the schedule; the one that is checked.", required=True),
        Key("warmup", Number(0.0, 1e9), "Warm-up: steps, or a fraction of the steps when below 1.", 0),
    )
)

OPTIMIZER = Section(
    (
        Key("name", Choice(OPTIMIZERS), "Optimizer; the zo- ones estimate gradients from loss values."),
        Key("lr", OneOf(_LR, SCHEDULE), "Learning rate, or a schedule of which the peak is checked."),
        Key("beta", _BETA, "Momentum of gdm.", 0.9),
        Key("betas", Pair(_BETA), "Decay rates of Adam.", [0.9, 0.999]),
        Key("eps", Number(0.0, 1.0, open_low=True), "Adam's epsilon.", 1e-8),
    )
)

ESTIMATOR = Section(
    (
        Key("directions", Choice(("gaussian", "sphere")), "Law of the perturbation directions.", "gaussian"),
        Key("queries", Integer(1, 1_000_000), "Directions averaged per step.", 1),
        Key("mu", Number(0.0, 1e3, open_low=True), "Perturbation scale of the two-point estimate.", 1e-3),
        Key("batch_size", Integer(1, 2**31), "Examples per step of training, where that is fewer than the data."),
    )
)

HVPS = ("auto", "double-backward", "batched", "forward-over-reverse", "linearize")

CURVATURE = Section(
    (
        Key(
            "rtol",
            Number(0.0, 1.0, open_low=True, open_high=True),
            "Relative 95 % half-width wanted for the threshold.",
            0.02,
        ),
        Key("max_hvps", Integer(1, 10_000_000), "Budget of Hessian-vector products.", 600),
        Key("kind", Choice(("hessian", "ggn", "forward")), "Curvature matrix, or loss values only.", "hessian"),
        Key("method", Choice(("auto", "dense", "deflated-slq")), "How the spectrum is measured.", "auto"),
        Key("hvp", Choice(HVPS), "How Hessian-vector products are computed.", "auto"),
        Key("device", Text(32, pattern=r"auto|cpu|cuda(:[0-9]+)?"), "auto, cpu, cuda or cuda:N.", "auto"),
        Key("dtype", Choice(("auto", "float32", "float64", "bfloat16")), "Floating-point type.", "auto"),
        Key("seed", Integer(0, 2**63 - 1), "Seed of the probe vectors.", 0),
        Key(
            "preconditioner",
            Text(pattern=r"expected|state:.+"),
            "Adam's preconditioner: expected, or state:FILE.",
            "expected",
        ),
        Key("micro_batch", Integer(1, 2**31), "Most examples in memory at once."),
        Key("max_memory", Size(), "Most bytes that the process may hold, or text such as 2GB."),
        Key("strict", Flag(), "Fail when the wanted precision is not reached.", False),
    )
)

POLICY = Section(
    (
        Key("threshold", Choice(THRESHOLDS), "Which threshold a zo- optimizer is held against.", "binding"),
        Key("margin", Number(0.0, 1.0, open_low=True), "Pass when lr <= margin x lower end of the 95 % interval.", 0.8),
        Key("on_warn", Choice(("pass", "fail")), "What an lr between the margin and the upper end does.", "pass"),
        Key("probe", Flag(), "Also run a short training probe at this lr.", False),
    )
)

_SHARED = (
    Key("spec", Text(), _SPEC_DOC),
    Key("set", Arguments(), "Keyword arguments for the callable that the spec names."),
    Key("checkpoint", Text(), "State dict to load: .pt or .safetensors, relative to this file."),
    Key("params", Regex(), "Regular expression that selects parameters by name."),
    Key("optimizer", OPTIMIZER, "The optimizer that training will use."),
    Key("steps", Integer(1, 1_000_000_000), "Training steps planned: the horizon.", 1000),
    Key("estimator", ESTIMATOR, "The zeroth-order gradient estimate."),
    Key("curvature", CURVATURE, "How the curvature is measured."),
    Key("policy", POLICY, "When the check passes."),
)

DEFAULTS = Section(_SHARED)
CHECK = Section((Key("name", Text(200), "Name of the check, unique in the file.", required=True), *_SHARED))

ROOT = Section(
    (
        Key("problem", Text(), f"Spec used where none is given: {_SPEC_DOC}"),
        Key("defaults", DEFAULTS, "Values that every check starts from."),
        Key("checks", ListOf(CHECK), "The checks; every one runs."),
    ),
    free_prefix="x-",
)

OPTIONS = MappingProxyType(
    {
        "spec": ("spec",),
        "settings": ("set",),
        "checkpoint": ("checkpoint",),
        "params": ("params",),
        "optimizer": ("optimizer", "name"),
        "steps": ("steps",),
        **{name: ("optimizer", name) for name in ("lr", "beta", "betas", "eps")},
        **{name: ("estimator", name) for name in ESTIMATOR.names},
        **{name: ("curvature", name) for name in CURVATURE.names if name != "kind"},
        "curvature": ("curvature", "kind"),
        **{name: ("policy", name) for name in POLICY.names},
    }
)
"""Options of the command line and of ``zoscope.check``, and the key that each one overrides."""
