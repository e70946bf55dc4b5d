"""The one table of options: what each is called, which values it takes, what it is for, and which commands have it.

The command line, the keys of configuration files, the keyword arguments of Python, the messages about wrong values and
the reference page ``examples/guide/options.md`` are made from it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

if TYPE_CHECKING:
    from zoscope.config.load import StepSizes

from zoscope.registry import DIRECTIONS, FAMILIES, NAMES, Differences, Directions, is_zeroth_order

MOST = 1_000_000_000
"""Most steps, and most of whatever else is counted."""


@dataclass(frozen=True)
class Words:
    """One of a few words."""

    names: tuple[str, ...]
    type = str


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds, both included."""

    low: int = 1
    high: int = MOST
    type = int

    def expected(self, value: float) -> str | None:
        """What is expected in place of a value that is out of range."""
        if self.low <= value <= self.high:
            return None
        return f"an integer {f'of at least {self.low}' if value < self.low else f'from {self.low} to {self.high}'}"


@dataclass(frozen=True)
class Real:
    """A finite number; ``low`` and ``high`` are included unless ``open_low`` / ``open_high``."""

    low: float = 0.0
    high: float = math.inf
    open_low: bool = True
    open_high: bool = False
    hint: str = "a finite number above 0"
    type = float

    def contains(self, value: float) -> bool:
        """Whether a number is in range."""
        above = value > self.low if self.open_low else value >= self.low
        return math.isfinite(value) and above and (value < self.high if self.open_high else value <= self.high)

    @property
    def range(self) -> str:
        """The interval in words."""
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"{low} and {f'below {self.high:g}' if self.open_high else f'at most {self.high:g}'}"

    def expected(self, value: float) -> str | None:
        """What is expected in place of a value that is out of range."""
        if self.contains(value):
            return None
        beyond = self.high <= value < math.inf and not self.open_high
        return f"a number {self.range}" if beyond else self.hint


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    type = bool


@dataclass(frozen=True)
class Text:
    """Text of one line; ``form`` names what it has to be, such as ``regex`` or ``size``."""

    form: str = ""
    pattern: str | None = None
    max_length: int = 1000
    type = str


@dataclass(frozen=True)
class Place:
    """A path; ``form`` says what has to be there: an ``existing`` file, or room for a ``picture`` or an ``output``."""

    form: str = ""
    type = Path


Single = Words | Whole | Real | Flag | Text | Place


@dataclass(frozen=True)
class Several:
    """An option that may be given again and again."""

    item: Single


Domain = Single | Several
_SAME: Any = object()


@dataclass(frozen=True)
class Use:
    """What an option is in one command, or in files, where that differs; what is left out is as everywhere.

    Args:
        help: What it is for.
        default: What applies where nothing is said.
        domain: Its values.
        metavar: What stands for a value on the help page.
        flags: Its names on the command line.
    """

    help: str = _SAME
    default: Any = _SAME
    domain: Domain = _SAME
    metavar: str | None = _SAME
    flags: tuple[str, ...] = _SAME


@dataclass(frozen=True)
class Option:
    """An option as one command has it."""

    name: str
    domain: Domain
    help: str
    default: Any = None
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    uses: Mapping[str, Use] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """Its name on the command line, as messages have it."""
        return self.flags[0].partition("/")[0]

    def of(self, *places: str) -> Option:
        """The same as a command has it, ``file`` being the configuration of checks; of several places the last wins."""
        said: dict[str, Any] = {}
        for place in places:
            said |= {name: value for name, value in vars(self.uses.get(place, Use())).items() if value is not _SAME}
        domain = said.pop("domain", self.domain)
        own = " | ".join(single(domain).names) if isinstance(single(domain), Words) else self.metavar
        return replace(self, **{"domain": domain, "metavar": own, "uses": {}, **said})


def single(domain: Domain) -> Any:
    """What one value of a domain is."""
    return domain.item if isinstance(domain, Several) else domain


def shown(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if isinstance(value, float) and not 0.01 <= abs(value) < 1e5:
        digits, exponent = f"{value:.0e}".split("e")
        return f"{digits}e{int(exponent)}"
    return str(value)


def bytes_of(text: str) -> int | None:
    """Bytes, from a number with a unit or without: 500MB, 2 GiB, 1.5g, 4096; ``None`` for what is no size."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([kmgt])?(i)?b?)", text.replace(" ", "").lower())
    if found is None or (found[3] and not found[2]):
        return None
    power = " kmgt".index(found[2] or " ")
    size = float(found[1]) * (1024 if found[3] else 1000) ** power
    return int(size) if 1 <= size <= 2**63 else None


Method = Literal["auto", "dense", "deflated-slq"]
Matrix = Literal["hessian", "ggn"]
CurvatureKind = Literal["hessian", "ggn", "forward"]
Dtype = Literal["auto", "float32", "float64", "bfloat16"]
Hvp = Literal["auto", "double-backward", "batched", "forward-over-reverse", "linearize"]
PlanMethod = Literal["auto", "rehearsal", "replicas"]
Threshold = Literal["exact", "descent", "horizon", "binding"]
CheckThreshold = Literal["exact", "descent", "horizon", "binding", "plan"]

METHODS, PLAN_METHODS, MATRICES, CURVATURES, DTYPES, HVPS, THRESHOLDS = (
    get_args(words) for words in (Method, PlanMethod, Matrix, CurvatureKind, Dtype, Hvp, Threshold)
)
FORMATS = ("text", "json", "junit", "github", "sarif", "markdown")
SCHEDULES = ("constant", "linear", "cosine")
ZO_NAMES = tuple(name for name in NAMES if is_zeroth_order(name))

LR = Real(high=1e9)
FRACTION = Real(
    high=1.0,
    open_high=True,
    hint="a relative precision strictly between 0 and 1, such as 0.02 for 2 %; an exact answer needs --method dense",
)
MOMENTUM = Real(high=1.0, open_low=False, open_high=True, hint="a number in [0, 1), such as 0.9")
EXAMPLES = Whole(1, 2**31)
TEXT, FLAG = Text(), Flag()
DEVICE = Text("device", r"auto|cpu|cuda(:[0-9]+)?", 32)
SPECS = "path/to/model.py, path/to/model.py:name or package.module:name"


def _option(
    name: str, domain: Domain, help: str, default: Any = None, metavar: str | None = None, /, **uses: Use | str
) -> Option:
    flags = {
        "settings": ("--set",),
        "run": ("--run", "--output-dir"),
        "quiet": ("--quiet", "-q"),
        "verbose": ("--verbose", "-v"),
    }
    read = {command: use if isinstance(use, Use) else Use(use) for command, use in uses.items()}
    return Option(name, domain, help, default, metavar, flags.get(name, (f"--{name.replace('_', '-')}",)), read)


_TABLE = (
    # --- the problem
    _option(
        "spec", TEXT,
        f"{SPECS} (default name: problem). Left out: 'problem' of ./zoscope.yaml or of the table tool.zoscope in "
        "./pyproject.toml, else ./model.py.",
        None, "SPEC", check="Check this spec, without a file.",
        track=Use(f"{SPECS}; with --compare folders of runs.", domain=Several(TEXT)),
        python=Use("Name of the problem in the result; its own by default.", domain=TEXT),
        file=f"{SPECS}; paths are relative to this file.",
    ),
    _option(
        "settings", Several(TEXT), "Keyword argument for the spec's callable, a YAML scalar; repeatable.", None,
        "KEY=VALUE", check="Argument for the spec's callable; repeatable.",
        track="Keyword argument for the spec's callable; repeatable.",
        file="Keyword arguments for the callable that the spec names.",
    ),
    _option(
        "params", Text("regex"), "Only parameters whose name matches.", None, "REGEX",
        file="Regular expression that selects parameters by name.",
    ),
    _option(
        "checkpoint", Place("existing"), "Weights to load first: a state_dict, .pt or .safetensors.", None, "FILE",
        check="Weights to load first.", track=Use("Weights to start from.", domain=TEXT),
        file=Use("State dict to load: .pt or .safetensors, relative to this file.", domain=TEXT),
    ),
    # --- the optimizer and what feeds it
    _option(
        "optimizer", Several(Words(NAMES)), "Optimizer; repeatable.",
        plan=Use("Optimizer.", "zo-gd", Words(ZO_NAMES)),
        check=Use("Optimizer.", domain=Words(NAMES)), track=Use("Optimizer.", "zo-gd", Words(NAMES)),
        probe_python=Use("Optimizer.", "zo-gd", Words(NAMES)),
        bounds_python=Use(domain=Several(Words(tuple(dict.fromkeys((*FAMILIES, *NAMES)))))),
        file=Use("Optimizer; the zo- ones estimate gradients from loss values.", domain=Words(NAMES)),
    ),
    _option(
        "lr", LR, "Also judge this step size.", None, "LR",
        probe=Use("An absolute step size; repeatable.", domain=Several(LR)), check="Step size to check.",
        track=Use(
            "Step size: a number, auto (it sets itself; auto:linear, auto:cosine), or 0.001,20000:0.007.",
            domain=Text("step sizes"),
        ),
        file="Learning rate, or a schedule of which the peak is checked.",
    ),
    _option("beta", MOMENTUM, "Momentum of GDM.", 0.9, file="Momentum of gdm."),
    _option(
        "betas", Text("pair"), "Both coefficients of Adam.", (0.9, 0.999), "B1,B2", check="Adam's coefficients.",
        file="Decay rates of Adam.",
    ),
    _option("dampening", MOMENTUM, "Dampening τ of GDM.", 0.0, file="Dampening of gdm."),
    _option(
        "weight_decay", Real(high=1e9, open_low=False, hint="a finite number of at least 0"),
        "Weight decay w of GD and GDM.", 0.0, file="Weight decay of gd and gdm.",
    ),
    _option(
        "eps", Real(high=1.0), "ε of Adam.", 1e-8, file="Adam's epsilon.",
        python=Use(domain=Real(high=1.0, open_low=False, hint="a finite number of at least 0")),  # as torch has it
    ),
    _option(
        "preconditioner", Text("preconditioner", r"expected|state:.+"),
        "Adam's preconditioner: its expected value here, or from a saved optimizer state.", "expected",
        "expected|state:FILE", check="Adam's preconditioner.", file="Adam's preconditioner: expected, or state:FILE.",
    ),
    _option(
        "directions", Words(tuple(DIRECTIONS)), "Law of the random directions; rademacher has entries ±1.", "gaussian",
        check="Law of the directions.", track="Law of the directions.", file="Law of the perturbation directions.",
    ),
    _option(
        "differences", Words(get_args(Differences)),
        "Loss differences: f(θ+μu) − f(θ−μu), or f(θ+μu) − f(θ).", "central",
    ),
    _option(
        "queries", Whole(1, 1_000_000), "Two-point queries averaged per step.", 1, "Q",
        track="Queries averaged per step.", file="Directions averaged per step.",
    ),
    _option(
        "mu", Real(high=1e3), "Smoothing radius μ of the estimate.", 1e-3, check="Perturbation scale of the estimate.",
        bounds=Use("Also judge this smoothing radius μ, MeZO's ε.", None),
        track="Smoothing radius μ.", file="Perturbation scale of the two-point estimate.",
    ),
    _option(
        "batch_size", EXAMPLES,
        "Examples per training step, where that is fewer than the data: adds the thresholds with mini-batches.", None,
        "B", probe="Random batches of B examples (default: all examples).",
        plan="Examples per step, drawn at random (default: all).", check="Examples per step of training.",
        track="Examples per step, without replacement in each epoch (default: all).",
        StabilityMonitor_python="Examples per step of the loop, whose noise lowers the threshold (default: all).",
        file="Examples per step of training, where that is fewer than the data.",
    ),
    _option(
        "steps", Whole(), "Training steps planned: the horizon.", 1000, "N",
        probe=Use("Steps of a run; auto is what the growth takes.", "auto", Text("steps"), "auto|N"),
        plan="Steps of the run.",
        track=Use("Steps to train.", metavar=None),
        probe_python=Use("Steps of a run; by default what the growth takes.", None, Whole()),
        StabilityMonitor_python=Use("Planned length of the training, for η* of the steps that remain.", None),
    ),
    _option(
        "threshold", Words(THRESHOLDS),
        "The threshold to go by: infinite time, first step, planned steps, or the smaller of the last two.", "binding",
        probe="Which threshold is probed; 'binding' is the smaller one of horizon and descent.",
        check=Use("Threshold of zo- optimizers; plan looks ahead over the steps.", domain=Words((*THRESHOLDS, "plan"))),
        file=Use(  # the default first
            "Which threshold a zo- optimizer is held against; plan: where half of the runs leave, by zoscope.plan.",
            domain=Words((*THRESHOLDS[3:], *THRESHOLDS[:3], "plan")),
        ),
    ),
    # --- a measurement
    _option(
        "rtol", FRACTION, "Relative 95 % half-width wanted for the thresholds.", 0.02,
        spectrum="95 % half-width wanted for the trace, relative to Σ|λ|.", check="Relative 95 % half-width wanted.",
        track=Use("Relative 95 % half-width wanted of every measurement.", 0.05),
        file="Relative 95 % half-width wanted for the threshold.",
    ),
    _option(
        "max_hvps", Whole(1, 10_000_000), "Most Hessian-vector products to spend per operator.", 600,
        check="Most Hessian-vector products per operator.",
        track=Use("Most Hessian-vector products of a measurement.", 150), file="Budget of Hessian-vector products.",
    ),
    _option(
        "method", Words(METHODS), "Dense eigenvalues or stochastic quadrature.", "auto", check="How it is measured.",
        plan=Use(
            "Rehearse runs with few gradients, or make real ones, which take none; auto is the cheaper one.",
            domain=Words(PLAN_METHODS),
        ),
        track="Dense eigenvalues or quadrature.", file="How the spectrum is measured.",
    ),
    _option(
        "curvature", Words(CURVATURES),
        "Hessian, Gauss-Newton matrix, or, for bounds alone, forward passes only (no second derivatives).", "hessian",
        spectrum=Use("Hessian or Gauss-Newton matrix.", domain=Words(MATRICES)), check="Which matrix.",
        track=Use("Hessian or Gauss-Newton matrix.", domain=Words(MATRICES)),
        file="Curvature matrix, or loss values only.",
    ),
    _option(
        "hvp", Words(HVPS), "How Hessian-vector products are computed.", "auto", check="How products are computed.",
        track="How products are computed.",
    ),
    _option("device", DEVICE, "Where to compute.", "auto", "auto|cpu|cuda[:i]", file="auto, cpu, cuda or cuda:N."),
    _option(
        "dtype", Words(DTYPES), "Floating-point type of the copy that is measured.", "auto",
        **dict.fromkeys(("check", "track", "file"), "Floating-point type."),
    ),
    _option(
        "seed", Whole(0, 2**63 - 1), "Seed of every random number drawn.", 0,
        **dict.fromkeys(("check", "file"), "Seed of the probe vectors."),
    ),
    _option(
        "micro_batch", EXAMPLES, "Examples per forward and backward pass (default: the batches as they are).", None,
        "N", check="Examples per forward pass.", track="Examples per pass.", file="Most examples in memory at once.",
    ),
    _option(
        "max_memory", Text("size"),
        "Most memory that this process may hold, such as 2GB: cuts the batches, keeps fewer vectors.", None, "SIZE",
        **dict.fromkeys(("check", "track"), "Most memory that this process may hold, as 2GB."),
        file="Most bytes that the process may hold, or text such as 2GB.",
    ),
    _option(
        "strict", FLAG, "Exit 3 when the precision of --rtol was not reached.", False,
        check=Use("Error when --rtol is not reached.", flags=("--strict/--no-strict",)),
        track="Exit 3 when a measurement did not reach the precision of --rtol.",
        file="Fail when the wanted precision is not reached.",
    ),
    _option(
        "shard_basis", FLAG,
        "With torchrun: spread the Lanczos vectors over the processes, which saves memory on the first.", False,
        **dict.fromkeys(("check", "track", "file"), "With torchrun: spread the Lanczos vectors over the processes."),
    ),
    _option("estimate", FLAG, "Only say what each kind of curvature would cost, from one timed micro-batch.", False),
    # --- the runs of a probe
    _option("ratios", Text("numbers"), "Step sizes as multiples of the threshold (default 0.8,1.25).", None, "R1,R2,…"),
    _option(
        "growth", Real(low=1.0, hint="a number above 1, such as 1000"),
        "Factor by which the mean square should grow above the threshold.", 1e3,
    ),
    _option("max_steps", Whole(), "Most steps of a run.", 20_000),
    _option(
        "max_seconds", Real(high=1e12), "Time for all runs.", 600.0,
        track=Use("Stop after so long; --resume goes on.", None),
    ),
    _option(
        "replicas", Whole(), "Independent direction streams.", 8,
        plan=Use(
            "Runs at every step size; half as many where they are rehearsed, up to three times as many real ones where "
            "their edges scatter.", 8, Whole(2),
        ),
    ),
    _option("edge", FLAG, "Bisect for the empirical edge.", False),
    _option("edge_rtol", FRACTION, "Width of its bracket.", 0.05),
    _option("linearized", FLAG, "Run on the quadratic model at the start.", False),
    _option("assume_threshold", Real(), "Test this threshold instead of the predicted one.", None, "LR"),
    _option(
        "plot", Place("picture"), "Runs and their prediction over steps, as a picture: .png, .svg or .pdf.", None,
        "FILE", bounds="Ruler of step sizes, and η* over the number of steps, as a picture: .png, .svg or .pdf.",
        spectrum="Eigenvalue density as a picture: .png, .svg or .pdf.",
        plan="Loss and risk over step sizes, and loss over steps, as a picture: .png, .svg or .pdf.",
        check="Step sizes and their thresholds as a picture: .png, .svg or .pdf.",
        track="Also write the picture here; of several runs one over another. A run's own folder has it anyway.",
    ),
    _option(
        "html", Place("page"), "One page for a browser: the answer, curves with hover and zoom, tables (needs plotly).",
        None, "FILE", report="The page to write (needs plotly).",
    ),
    # --- a report
    _option(
        "results", Several(Place()), "JSON documents that zoscope wrote (--json), or folders of tracked runs.",
        None, "RESULT",
    ),
    # --- a plan
    _option(
        "schedule", TEXT,
        "Shape of the step size: constant, linear, cosine, or factors from a step on such as 1,2000:0.1.", "constant",
        "SHAPE",
    ),
    _option(
        "warmup", Real(high=1e9, open_low=False, hint="a number of steps, or a share of them below 1"),
        "Warm-up in steps, or as a share of them when below 1 (default: none).",
    ),
    _option("compare_schedules", FLAG, "Also answer for the other schedules.", False),
    _option("max_cost", Real(high=1e15), "Most forward passes over all examples to spend.", None, "PASSES"),
    # --- a spectrum
    _option("top", Whole(), "Largest and smallest eigenvalues to list.", 10, "K"),
    _option("by_layer", FLAG, "Split the trace by layer, at no further cost.", False),
    _option(
        "moments", FLAG,
        "Trace, ‖·‖_F² and λ_max alone, at a fraction of the products; --rtol is relative to the trace.", False,
    ),
    # --- a tracked run
    _option("target_loss", Real(-1e300, 1e300, open_low=False), "Stop at this loss.", None, "LOSS"),
    _option("divergence", Real(1.0, 1e300), "Stop at this multiple of the first loss.", 1e6),
    _option(
        "every", Text("interval"),
        "Steps between measurements; auto spends a fifth of all passes on them, adaptive measures more often "
        "while lr / threshold moves.",
        "auto", "auto|adaptive|K",
        StabilityMonitor_python=Use("Steps between measurements, the first of which is made at step 0.", 1000, Whole()),
    ),
    _option(
        "forward_every", Whole(),
        "Also estimate trace and threshold from the steps' own loss values, with one more every K steps.", None, "K",
    ),
    _option("checkpoint_every", Whole(), "Steps between checkpoints, besides those at measurements.", None, "K"),
    _option(
        "run", TEXT,
        "Folder of the run (default: runs/SPEC-OPTIMIZER). Under torchrun say --output-dir: it claims --run.", None,
        "DIR", python=Use("Folder of the run; nothing is written without one.", domain=Place()),
    ),
    _option(
        "config", Place(), "YAML file with options of the run; the command line wins.", None, "FILE",
        check=Use(
            "zoscope.yaml, or a pyproject.toml with \\[tool.zoscope]. Left out: that of this folder, unless --spec.",
            metavar="CONFIG",
        ),
    ),
    _option(
        "resume", Place(), "Go on with the run in this folder.", None, "DIR",
        python=Use("Go on with the run in the folder; the rest is as if it had not stopped.", False, FLAG),
    ),
    _option("overwrite", FLAG, "Replace the run that is in the folder.", False),
    _option(
        "sweep", Several(TEXT),
        "One run for every value of an option, such as beta=0,0.5,0.9 or set.width=16,32; values that hold commas "
        "are separated by ';'. Repeatable: every combination.",
        None, "KEY=V1,V2",
    ),
    _option("tensorboard", FLAG, "The same as --logger tensorboard.", False),
    _option(
        "logger", Several(TEXT),
        "Also log the run to tensorboard (its files are in the folder), wandb or mlflow; repeatable.", None, "NAME",
    ),
    _option("compare", FLAG, "Compare the runs in the folders given instead of SPEC.", False),
    # --- checks
    _option(
        "margin", Real(high=1.0), "Pass when lr <= margin × lower end of the 95 % interval (0.8).", 0.8,
        file="Pass when lr <= margin x lower end of the 95 % interval.",
    ),
    _option(
        "on_warn", Words(("pass", "fail")), "What an lr in between does.", "pass",
        file="What an lr between the margin and the upper end does.",
    ),
    _option(
        "probe", FLAG, "Add a short training probe.", False, check=Use(flags=("--probe/--no-probe",)),
        file="Also run a short training probe at this lr.",
    ),
    _option(
        "only", Several(TEXT), "Only the check of this name; repeatable.", None, "NAME",
        plan=Use("Only this part of the answer: mu, at which μ (MeZO's ε) slopes are right.", domain=Words(("mu",))),
    ),
    _option(
        "hf_args", Place(), "TrainingArguments, JSON or YAML, that override the configuration.", None, "FILE",
        plan="TrainingArguments, JSON or YAML: the run to plan. What is said here overrides them.",
    ),
    _option("format", Words(FORMATS), "Format of stdout."),
    _option("schema", FLAG, "Print the JSON Schema of the configuration and exit.", False),
    _option("baseline", Place(), "Earlier thresholds to compare with.", None, "FILE"),
    _option("max_drop", TEXT, "Largest fall of a threshold allowed.", "20%"),
    _option("update_baseline", FLAG, "Write --baseline instead.", False),
    _option(
        "cache", Place(), "Keep measurements here.", None, "DIR",
        plan="Keep runs here: a plan that was stopped goes on, and one that was made is there at once.",
    ),
    # --- the result
    _option("json", FLAG, "One JSON document on stdout and nothing else.", False, check="The same as --format json."),
    _option(
        "output", Place("output"),
        "Write the result to FILE too, whole or not at all; JSON with --json or a .json name, else text.", None, "FILE",
        check=Use("Write this format to FILE too; repeatable.", domain=Several(TEXT), metavar="FORMAT=FILE"),
    ),
    _option("verbose", FLAG, "Show everything: detailed tables, and notices in full.", False),
    _option("quiet", FLAG, "No progress and no warnings on stderr.", False),
)  # fmt: skip

OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}

_RULE = "optimizer beta dampening weight_decay betas eps preconditioner directions differences queries"
_MEASURE = "rtol max_hvps method curvature hvp device dtype seed micro_batch max_memory strict shard_basis"
_PROBLEM, _OUTPUT = "settings params checkpoint", "verbose json output plot html quiet"

COMMANDS: dict[str, dict[str, str]] = {
    "bounds": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Optimizer": f"{_RULE} steps threshold lr mu batch_size",
        "Measurement": f"{_MEASURE} estimate",
        "Output": _OUTPUT,
    },
    "probe": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Optimizer": f"{_RULE} steps",
        "Runs": "threshold ratios lr growth max_steps max_seconds replicas mu batch_size edge edge_rtol linearized "
        "assume_threshold",
        "Measurement": _MEASURE,
        "Output": _OUTPUT,
    },
    "plan": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Run": "optimizer steps batch_size schedule warmup mu directions differences queries beta dampening "
        "weight_decay betas eps",
        "Search": "hf_args only method replicas max_cost compare_schedules cache",
        "Measurement": "device dtype seed micro_batch max_memory",
        "Output": _OUTPUT,
    },
    "check": {
        "Check": f"spec settings checkpoint params optimizer lr steps {_RULE.partition(' ')[2]} mu batch_size",
        "Policy": "threshold margin on_warn probe",
        "Measurement": "rtol max_hvps curvature method hvp device dtype seed micro_batch max_memory shard_basis strict",
        "Arguments": "config",
        "Options": "only hf_args",
        "Output": "verbose format json output plot html schema quiet",
        "Baseline and cache": "baseline max_drop update_baseline cache",
    },
    "track": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Training": "optimizer lr steps batch_size mu queries directions differences beta dampening weight_decay "
        "betas eps target_loss divergence max_seconds seed",
        "Measurement": "every rtol max_hvps method curvature hvp device dtype micro_batch max_memory shard_basis "
        "strict forward_every",
        "Run folder": "checkpoint_every run config resume overwrite sweep logger tensorboard compare",
        "Output": _OUTPUT,
    },
    "spectrum": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Spectrum": "top by_layer moments",
        "Measurement": _MEASURE,
        "Output": _OUTPUT,
    },
    "report": {"Arguments": "results", "Output": "html quiet"},
}
"""Options of every command, by panel of its help page and in the order of that page."""

ONLY_HERE = {
    "check": "config only hf_args verbose format json output plot html schema quiet baseline max_drop update_baseline "
    "cache",
    "track": "spec config resume overwrite sweep plot html logger tensorboard compare verbose json output quiet",
}
"""Options of the commands that read a file which it cannot hold; the others have no default on the command line."""


def options_of(command: str) -> Iterator[tuple[str, Option]]:
    """Panel and option, as the command has it, in the order of its help page."""
    for panel, names in COMMANDS[command].items():
        yield from ((panel, OPTIONS[name].of(command)) for name in names.split())


def left_open(command: str) -> tuple[str, ...]:
    """Names of the options that a file may say, too: ``None`` where the command line does not."""
    if command not in ONLY_HERE:
        return ()
    return tuple(option.name for _, option in options_of(command) if option.name not in ONLY_HERE[command].split())


# --- keyword arguments of Python --------------------------------------------------------------------------------------


class MeasureOptions(TypedDict, total=False):
    """How every function measures, and where."""

    rtol: float
    max_hvps: int
    hvp: Hvp
    device: str
    dtype: Dtype
    seed: int
    micro_batch: int | None
    max_memory: int | str | None
    strict: bool
    shard_basis: bool


class ProblemOptions(MeasureOptions, total=False):
    """What is measured."""

    params: str | None
    spec: str | None


class RuleOptions(TypedDict, total=False):
    """Constants of an optimizer, and of what it is fed with."""

    beta: float
    betas: tuple[float, float]
    eps: float
    directions: Directions
    differences: Differences
    queries: int
    dampening: float
    weight_decay: float


class BoundsOptions(ProblemOptions, RuleOptions, total=False):
    """Keyword arguments of ``zoscope.bounds``."""

    optimizers: str | Sequence[str] | None
    method: Method
    curvature: CurvatureKind
    preconditioner: str
    steps: int
    threshold: Threshold
    lr: float | None
    mu: float | None
    batch_size: int | None


class ProbeOptions(ProblemOptions, RuleOptions, total=False):
    """Keyword arguments of ``zoscope.probe``."""

    optimizer: str
    method: Method
    curvature: CurvatureKind
    preconditioner: str
    steps: int | None
    threshold: Threshold
    ratios: float | Sequence[float] | None
    lr: float | Sequence[float] | None
    growth: float
    max_steps: int
    max_seconds: float
    replicas: int
    mu: float
    batch_size: int | None
    edge: bool
    edge_rtol: float
    linearized: bool
    assume_threshold: float | None


class PlanOptions(RuleOptions, total=False):
    """Keyword arguments of ``zoscope.plan``."""

    params: str | None
    spec: str | None
    optimizer: str
    steps: int
    batch_size: int | None
    schedule: str
    warmup: float | None
    mu: float
    method: PlanMethod
    replicas: int
    max_cost: float | None
    compare_schedules: bool
    cache: str | PathLike[str] | None
    device: str
    dtype: Dtype
    seed: int
    micro_batch: int | None
    max_memory: int | str | None


class MomentsOptions(ProblemOptions, total=False):
    """Keyword arguments of ``zoscope.moments``."""

    curvature: Matrix


class SpectrumOptions(MomentsOptions, total=False):
    """Keyword arguments of ``zoscope.spectrum``."""

    method: Method
    top: int
    by_layer: bool


class MonitorOptions(MeasureOptions, RuleOptions, total=False):
    """Keyword arguments of ``zoscope.StabilityMonitor``."""

    every: int
    steps: int | None
    method: Method
    curvature: Matrix
    mu: float
    batch_size: int | None


class _Training(TypedDict):
    lr: float | str | StepSizes


class TrackOptions(_Training, ProblemOptions, RuleOptions, total=False):
    """Keyword arguments of ``zoscope.track``; a step size there has to be."""

    optimizer: str
    steps: int
    every: int | Literal["auto", "adaptive"]
    mu: float
    batch_size: int | None
    method: Method
    curvature: Matrix
    target_loss: float | None
    divergence: float
    max_seconds: float | None
    checkpoint_every: int | None
    forward_every: int | None
    run: str | PathLike[str] | None
    resume: bool
    overwrite: bool


class CheckOptions(MeasureOptions, RuleOptions, total=False):
    """Keyword arguments of ``zoscope.check`` that override its configuration."""

    spec: str | None
    settings: Mapping[str, Any]
    checkpoint: str | PathLike[str] | None
    params: str | None
    optimizer: str
    lr: float | None
    steps: int
    mu: float
    batch_size: int | None
    method: Method
    curvature: CurvatureKind
    preconditioner: str
    threshold: CheckThreshold
    margin: float
    on_warn: Literal["pass", "fail"]
    probe: bool


KEYWORDS: dict[str, tuple[str, Any]] = {
    "bounds": ("bounds", BoundsOptions),
    "plan": ("plan", PlanOptions),
    "probe": ("probe", ProbeOptions),
    "check": ("check", CheckOptions),
    "track": ("track", TrackOptions),
    "spectrum": ("spectrum", SpectrumOptions),
    "moments": ("spectrum", MomentsOptions),
    "StabilityMonitor": ("track", MonitorOptions),
}
"""Public functions: the command whose options they share, and which of them they take."""

RENAMED = {"optimizers": "optimizer"}
"""Keyword arguments that are not called like their option."""


def argument(function: str, name: str) -> Option:
    """An option as a function of Python has it."""
    return OPTIONS[RENAMED.get(name, name)].of(KEYWORDS[function][0], "python", f"{function}_python")


def refuse_unknown(function: str, names: Iterable[str]) -> None:
    """Refuse keyword arguments that a function does not take.

    Raises:
        TypeError: With the nearest one that it takes.
    """
    known = KEYWORDS[function][1].__annotations__
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f". Did you mean {near[0]!r}?" if near else f": it takes {', '.join(known)}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def keywords(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a function by name: what was given, checked, and the defaults of the others.

    Raises:
        TypeError: For a keyword argument that it does not take, or one that it needs and was not given.
        ValueError: For a value that is out of range.
    """
    refuse_unknown(function, given)
    accepted = KEYWORDS[function][1]
    for name in accepted.__required_keys__ - given.keys():
        raise TypeError(f"{function}() needs the keyword argument {name!r}")
    return {
        name: checked_argument(function, name, given[name]) if name in given else argument(function, name).default
        for name in accepted.__annotations__
    }


def checked_argument(function: str, name: str, value: Any) -> Any:
    """A value of Python for an option of a function.

    Raises:
        ValueError: With what is expected in its place.
    """
    option = argument(function, name)
    if value is None and option.default is None:
        return None
    wanted = expected(option.domain, value)
    if wanted is not None:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    form = getattr(option.domain, "form", "")
    if form == "size" and isinstance(value, str):
        return bytes_of(value)
    return tuple(value) if form == "pair" else value


def expected(domain: Domain, value: Any) -> str | None:
    """What is expected in place of a value of Python; ``None`` for one that a domain has."""
    if isinstance(domain, Several):
        items = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        return next((wanted for item in items if (wanted := expected(domain.item, item)) is not None), None)
    if isinstance(domain, Words):
        found = str(value).removeprefix("torch.")  # a dtype of torch
        return None if found in domain.names else f"one of {', '.join(domain.names)}"
    if isinstance(domain, Flag):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(domain, Whole):
        counts = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return domain.expected(int(value) if counts else domain.low - 1)
    if isinstance(domain, Real):
        counts = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return domain.expected(float(value) if counts else math.nan)
    return _expected_of_text(domain, value)


def _expected_of_text(domain: Text | Place, value: Any) -> str | None:
    form = domain.form
    if form == "pair":
        pair = tuple(value) if isinstance(value, Iterable) else ()
        fits = len(pair) == 2 and all(expected(MOMENTUM, item) is None for item in pair)
        return None if fits else "two numbers in [0, 1), such as (0.9, 0.999)"
    if form == "size":
        fits = bytes_of(value) is not None if isinstance(value, str) else expected(Whole(high=2**63), value) is None
        return None if fits else "a size in bytes, or text with a unit, such as '2GB'"
    if form == "numbers":
        return expected(Several(Real()), value)
    if form == "interval":
        fits = value in ("auto", "adaptive") if isinstance(value, str) else expected(Whole(), value) is None
        return None if fits else "a number of steps, 'auto' or 'adaptive'"
    if form == "step sizes":
        number = isinstance(value, numbers.Real)  # of others, whoever reads them says what is wrong
        return expected(LR, value) if number else None
    if domain.type is Path:
        return None if isinstance(value, str | PathLike) else "a path"
    if form == "preconditioner" and value == "state:":
        return "'expected' or 'state:FILE'"
    pattern = getattr(domain, "pattern", None)
    if pattern and not re.fullmatch(pattern, str(value)):
        return SAID[form]
    return None if pattern or isinstance(value, str) else "text"


SAID = {"device": "auto, cpu, cuda or cuda:i, such as cuda:0", "preconditioner": "'expected' or 'state:FILE'"}
"""What a text that has to match a pattern is, in words."""
