"""The one table of options: what each is called, which values it takes, what it is for, and which commands have it.

The command line, the keys of configuration files and the messages about wrong values are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    def of(self, command: str) -> Option:
        """The same as a command has it; ``file`` stands for the configuration of checks."""
        use = self.uses.get(command, Use())
        domain = self.domain if use.domain is _SAME else use.domain
        own = " | ".join(single(domain).names) if isinstance(single(domain), Words) else self.metavar
        return Option(
            self.name,
            domain,
            self.help if use.help is _SAME else use.help,
            self.default if use.default is _SAME else use.default,
            own if use.metavar is _SAME else use.metavar,
            self.flags if use.flags is _SAME else use.flags,
        )


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


METHODS = ("auto", "dense", "deflated-slq")
PLAN_METHODS = ("auto", "rehearsal", "replicas")
MATRICES = ("hessian", "ggn")
CURVATURES = (*MATRICES, "forward")
DTYPES = ("auto", "float32", "float64", "bfloat16")
DIRECTIONS = ("gaussian", "sphere")
HVPS = ("auto", "double-backward", "batched", "forward-over-reverse", "linearize")
THRESHOLDS = ("exact", "descent", "horizon", "binding")
FAMILIES = ("gd", "gdm", "adam")
ZO_OPTIMIZERS = tuple(f"zo-{name}" for name in FAMILIES)
OPTIMIZERS = (*FAMILIES, *ZO_OPTIMIZERS)
FORMATS = ("text", "json", "junit", "github", "sarif", "markdown")
SCHEDULES = ("constant", "linear", "cosine")

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
        "optimizer", Several(Words(OPTIMIZERS)), "Optimizer; repeatable.",
        plan=Use("Optimizer.", "zo-gd", Words(ZO_OPTIMIZERS)),
        check=Use("Optimizer.", domain=Words(OPTIMIZERS)), track=Use("Optimizer.", "zo-gd", Words(OPTIMIZERS)),
        file=Use("Optimizer; the zo- ones estimate gradients from loss values.", domain=Words(OPTIMIZERS)),
    ),
    _option(
        "lr", LR, "Also judge this step size.", None, "LR",
        probe=Use("An absolute step size; repeatable.", domain=Several(LR)), check="Step size to check.",
        track=Use(
            "Step size: a number, or 0.001,20000:0.007 for 0.007 from step 20,000 on. Schedules: in --config.",
            domain=TEXT,
        ),
        file="Learning rate, or a schedule of which the peak is checked.",
    ),
    _option("beta", MOMENTUM, "Momentum of GDM.", 0.9, file="Momentum of gdm."),
    _option(
        "betas", Text("pair"), "Both coefficients of Adam.", (0.9, 0.999), "B1,B2", check="Adam's coefficients.",
        file="Decay rates of Adam.",
    ),
    _option("eps", Real(high=1.0), "ε of Adam.", 1e-8, file="Adam's epsilon."),
    _option(
        "preconditioner", Text("preconditioner", r"expected|state:.+"),
        "Adam's preconditioner: its expected value here, or from a saved optimizer state.", "expected",
        "expected|state:FILE", check="Adam's preconditioner.", file="Adam's preconditioner: expected, or state:FILE.",
    ),
    _option(
        "directions", Words(DIRECTIONS), "Law of the random directions.", "gaussian", check="Law of the directions.",
        track="Law of the directions.", file="Law of the perturbation directions.",
    ),
    _option(
        "queries", Whole(1, 1_000_000), "Two-point queries averaged per step.", 1, "Q",
        track="Queries averaged per step.", file="Directions averaged per step.",
    ),
    _option(
        "mu", Real(high=1e3), "Smoothing radius μ of the estimate.", 1e-3, check="Perturbation scale of the estimate.",
        track="Smoothing radius μ.", file="Perturbation scale of the two-point estimate.",
    ),
    _option(
        "batch_size", EXAMPLES,
        "Examples per training step, where that is fewer than the data: adds the thresholds with mini-batches.", None,
        "B", probe="Random batches of B examples (default: all examples).",
        plan="Examples per step, drawn at random (default: all).", check="Examples per step of training.",
        track="Examples per step, without replacement in each epoch (default: all).",
        file="Examples per step of training, where that is fewer than the data.",
    ),
    _option(
        "steps", Whole(), "Training steps planned: the horizon.", 1000, "N",
        probe=Use("Steps of a run; auto is what the growth takes.", "auto", Text("steps"), "auto|N"),
        plan="Steps of the run.",
        track=Use("Steps to train.", metavar=None),
    ),
    _option(
        "threshold", Words(THRESHOLDS),
        "The threshold to go by: infinite time, first step, planned steps, or the smaller of the last two.", "binding",
        probe="Which threshold is probed; 'binding' is the smaller one of horizon and descent.",
        check="Threshold of zo- optimizers.",
        file=Use(  # the default first
            "Which threshold a zo- optimizer is held against.", domain=Words((*THRESHOLDS[3:], *THRESHOLDS[:3]))
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
        plan=Use("Runs at every step size.", 4, Whole(2)),
    ),
    _option("edge", FLAG, "Bisect for the empirical edge.", False),
    _option("edge_rtol", FRACTION, "Width of its bracket.", 0.05),
    _option("linearized", FLAG, "Run on the quadratic model at the start.", False),
    _option("assume_threshold", Real(), "Test this threshold instead of the predicted one.", None, "LR"),
    _option(
        "plot", Place("picture"), "Loss and distance over steps, as a picture (needs matplotlib).", None, "FILE",
        spectrum="Eigenvalue density as a picture: .png, .svg or .pdf (needs matplotlib).",
        plan="Loss and risk over step sizes, and loss over steps, as a picture (needs matplotlib).",
        track="Also write the picture here; of several runs one over another. A run's own folder has it anyway.",
    ),
    # --- a plan
    _option(
        "schedule", TEXT,
        "Shape of the step size: constant, linear, cosine, or factors from a step on such as 1,2000:0.1.", "constant",
        "SHAPE",
    ),
    _option(
        "warmup", Real(high=1e9, open_low=False, hint="a number of steps, or a share of them below 1"),
        "Warm-up in steps, or as a share of them when below 1.", 0.0,
    ),
    _option("compare_schedules", FLAG, "Also answer for the other schedules.", False),
    _option(
        "weight_decay", Real(high=1e3, open_low=False, hint="a finite number of at least 0"), "Weight decay.", 0.0
    ),
    _option("max_cost", Real(high=1e15), "Most forward passes over all examples to spend.", None, "PASSES"),
    _option("verbose", FLAG, "Also show every step size tried.", False),
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
        "every", TEXT,
        "Steps between measurements; auto spends a fifth of all passes on them, adaptive measures more often "
        "while lr / threshold moves.",
        "auto", "auto|adaptive|K",
    ),
    _option(
        "forward_every", Whole(),
        "Also estimate trace and threshold from the steps' own loss values, with one more every K steps.", None, "K",
    ),
    _option("checkpoint_every", Whole(), "Steps between checkpoints, besides those at measurements.", None, "K"),
    _option(
        "run", TEXT,
        "Folder of the run (default: runs/SPEC-OPTIMIZER). Under torchrun say --output-dir: it claims --run.", None,
        "DIR",
    ),
    _option(
        "config", Place(), "YAML file with options of the run; the command line wins.", None, "FILE",
        check=Use(
            "zoscope.yaml, or a pyproject.toml with \\[tool.zoscope]. Left out: that of this folder, unless --spec.",
            metavar="CONFIG",
        ),
    ),
    _option("resume", Place(), "Go on with the run in this folder.", None, "DIR"),
    _option("overwrite", FLAG, "Replace the run that is in the folder.", False),
    _option(
        "sweep", Several(TEXT),
        "One run for every value of an option, such as beta=0,0.5,0.9 or set.width=16,32; values that hold commas "
        "are separated by ';'. Repeatable: every combination.",
        None, "KEY=V1,V2",
    ),
    _option("tensorboard", FLAG, "Also write TensorBoard scalars into the folder.", False),
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
    _option("only", Several(TEXT), "Only the check of this name; repeatable.", None, "NAME"),
    _option("hf_args", Place(), "TrainingArguments, JSON or YAML, that override the configuration.", None, "FILE"),
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
    _option("quiet", FLAG, "No progress and no warnings on stderr.", False),
)  # fmt: skip

OPTIONS: dict[str, Option] = {option.name: option for option in _TABLE}

_RULE = "optimizer beta betas eps preconditioner directions queries"
_MEASURE = "rtol max_hvps method curvature hvp device dtype seed micro_batch max_memory strict shard_basis"
_PROBLEM, _OUTPUT = "settings params checkpoint", "json output quiet"

COMMANDS: dict[str, dict[str, str]] = {
    "bounds": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Optimizer": f"{_RULE} steps threshold lr batch_size",
        "Measurement": f"{_MEASURE} estimate",
        "Output": _OUTPUT,
    },
    "probe": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Optimizer": f"{_RULE} steps",
        "Runs": "threshold ratios lr growth max_steps max_seconds replicas mu batch_size edge edge_rtol linearized "
        "assume_threshold plot",
        "Measurement": _MEASURE,
        "Output": _OUTPUT,
    },
    "plan": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Run": "optimizer steps batch_size schedule warmup weight_decay mu queries directions beta betas eps",
        "Search": "method replicas max_cost compare_schedules cache plot",
        "Measurement": "device dtype seed micro_batch max_memory",
        "Output": f"verbose {_OUTPUT}",
    },
    "check": {
        "Check": f"spec settings checkpoint params optimizer lr steps {_RULE.partition(' ')[2]} mu batch_size",
        "Policy": "threshold margin on_warn probe",
        "Measurement": "rtol max_hvps curvature method hvp device dtype seed micro_batch max_memory shard_basis strict",
        "Arguments": "config",
        "Options": "only hf_args",
        "Output": "format json output schema quiet",
        "Baseline and cache": "baseline max_drop update_baseline cache",
    },
    "track": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Training": "optimizer lr steps batch_size mu queries directions beta betas eps target_loss divergence "
        "max_seconds seed",
        "Measurement": "every rtol max_hvps method curvature hvp device dtype micro_batch max_memory shard_basis "
        "strict forward_every",
        "Run folder": "checkpoint_every run config resume overwrite sweep plot tensorboard compare",
        "Output": _OUTPUT,
    },
    "spectrum": {
        "Arguments": "spec",
        "Problem": _PROBLEM,
        "Spectrum": "top by_layer moments plot",
        "Measurement": _MEASURE,
        "Output": _OUTPUT,
    },
}
"""Options of every command, by panel of its help page and in the order of that page."""

ONLY_HERE = {
    "check": "config only hf_args format json output schema quiet baseline max_drop update_baseline cache",
    "track": "spec config resume overwrite sweep plot tensorboard compare json output quiet",
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
