"""The options of ``zoscope track``: a table of what a configuration file may say, too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from zoscope.cli.options import CURVATURES, DIRECTIONS, DTYPES, HVPS, METHODS, OPTIMIZERS
from zoscope.errors import UsageError

TRAINING, MEASURING, FOLDER, PROBLEM = "Training", "Measurement", "Run folder", "Problem"


def _option(*names: str, panel: str, help: str, default: str | None = None, metavar: str | None = None) -> Any:
    """An option that is ``None`` unless it was given: the configuration file may say it, too."""
    if default is not None:  # Typer would put a text of ours in parentheses
        help += f" [dim]\\[default: {default}][/]"
    return Option(*names, help=help, rich_help_panel=panel, show_default=False, metavar=metavar)


@dataclass(frozen=True)
class RunOptions:
    """Every option of a run; ``None`` where it was not given. Names are those of the configuration file."""

    spec: Annotated[
        list[str] | None,
        Argument(
            metavar="SPEC",
            help="path/to/model.py, path/to/model.py:name or package.module:name; with --compare folders of runs.",
            show_default=False,
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        _option(
            "--set", panel=PROBLEM, help="Keyword argument for the spec's callable; repeatable.", metavar="KEY=VALUE"
        ),
    ] = None
    params: Annotated[
        str | None, _option("--params", panel=PROBLEM, help="Only parameters whose name matches.", metavar="REGEX")
    ] = None
    checkpoint: Annotated[
        str | None, _option("--checkpoint", panel=PROBLEM, help="Weights to start from.", metavar="FILE")
    ] = None
    optimizer: Annotated[
        str | None,
        _option("--optimizer", panel=TRAINING, help="Optimizer.", default="zo-gd", metavar=" | ".join(OPTIMIZERS)),
    ] = None
    lr: Annotated[
        str | None,
        _option(
            "--lr",
            panel=TRAINING,
            help="Step size: a number, or 0.001,20000:0.007 for 0.007 from step 20,000 on. Schedules: in --config.",
            metavar="LR",
        ),
    ] = None
    steps: Annotated[int | None, _option("--steps", panel=TRAINING, help="Steps to train.", default="1000")] = None
    batch_size: Annotated[
        int | None,
        _option(
            "--batch-size",
            panel=TRAINING,
            help="Examples per step, without replacement in each epoch (default: all).",
            metavar="B",
        ),
    ] = None
    mu: Annotated[float | None, _option("--mu", panel=TRAINING, help="Smoothing radius μ.", default="1e-3")] = None
    queries: Annotated[
        int | None, _option("--queries", panel=TRAINING, help="Queries averaged per step.", default="1", metavar="Q")
    ] = None
    directions: Annotated[
        str | None,
        _option(
            "--directions",
            panel=TRAINING,
            help="Law of the directions.",
            default="gaussian",
            metavar=" | ".join(DIRECTIONS),
        ),
    ] = None
    beta: Annotated[float | None, _option("--beta", panel=TRAINING, help="Momentum of GDM.", default="0.9")] = None
    betas: Annotated[
        str | None,
        _option("--betas", panel=TRAINING, help="Both coefficients of Adam.", default="0.9,0.999", metavar="B1,B2"),
    ] = None
    eps: Annotated[float | None, _option("--eps", panel=TRAINING, help="ε of Adam.", default="1e-8")] = None
    target_loss: Annotated[
        float | None, _option("--target-loss", panel=TRAINING, help="Stop at this loss.", metavar="LOSS")
    ] = None
    divergence: Annotated[
        float | None,
        _option("--divergence", panel=TRAINING, help="Stop at this multiple of the first loss.", default="1e6"),
    ] = None
    max_seconds: Annotated[
        float | None, _option("--max-seconds", panel=TRAINING, help="Stop after so long; --resume goes on.")
    ] = None
    seed: Annotated[
        int | None, _option("--seed", panel=TRAINING, help="Seed of every random number drawn.", default="0")
    ] = None
    every: Annotated[
        str | None,
        _option(
            "--every",
            panel=MEASURING,
            help="Steps between measurements; auto spends a fifth of all passes on them, adaptive measures more often "
            "while lr / threshold moves.",
            default="auto",
            metavar="auto|adaptive|K",
        ),
    ] = None
    rtol: Annotated[
        float | None,
        _option(
            "--rtol", panel=MEASURING, help="Relative 95 % half-width wanted of every measurement.", default="0.05"
        ),
    ] = None
    max_hvps: Annotated[
        int | None,
        _option("--max-hvps", panel=MEASURING, help="Most Hessian-vector products of a measurement.", default="150"),
    ] = None
    method: Annotated[
        str | None,
        _option(
            "--method",
            panel=MEASURING,
            help="Dense eigenvalues or quadrature.",
            default="auto",
            metavar=" | ".join(METHODS),
        ),
    ] = None
    curvature: Annotated[
        str | None,
        _option(
            "--curvature",
            panel=MEASURING,
            help="Hessian or Gauss-Newton matrix.",
            default="hessian",
            metavar=" | ".join(CURVATURES[:2]),
        ),
    ] = None
    hvp: Annotated[
        str | None,
        _option("--hvp", panel=MEASURING, help="How products are computed.", default="auto", metavar=" | ".join(HVPS)),
    ] = None
    device: Annotated[
        str | None,
        _option("--device", panel=MEASURING, help="Where to compute.", default="auto", metavar="auto|cpu|cuda[:i]"),
    ] = None
    dtype: Annotated[
        str | None,
        _option("--dtype", panel=MEASURING, help="Floating-point type.", default="auto", metavar=" | ".join(DTYPES)),
    ] = None
    micro_batch: Annotated[
        int | None, _option("--micro-batch", panel=MEASURING, help="Examples per pass.", metavar="N")
    ] = None
    max_memory: Annotated[
        str | None,
        _option(
            "--max-memory", panel=MEASURING, help="Most memory that this process may hold, as 2GB.", metavar="SIZE"
        ),
    ] = None
    forward_every: Annotated[
        int | None,
        _option(
            "--forward-every",
            panel=MEASURING,
            help="Also estimate trace and threshold from the steps' own loss values, with one more every K steps.",
            metavar="K",
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        _option(
            "--checkpoint-every",
            panel=FOLDER,
            help="Steps between checkpoints, besides those at measurements.",
            metavar="K",
        ),
    ] = None
    run: Annotated[
        str | None,
        _option(
            "--run",
            "--output-dir",
            panel=FOLDER,
            help="Folder of the run (default: runs/SPEC-OPTIMIZER). Under torchrun say --output-dir: it claims --run.",
            metavar="DIR",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was given, checked by the table that checks the configuration file."""
        from zoscope.config.track import read_track_option

        found: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None or entry.name in ("spec", "settings"):
                continue
            found[entry.name] = read_track_option(entry.name, _parsed(entry.name, value))
        if self.spec:
            found["spec"] = self._one_spec(self.spec)
        if "checkpoint" in found:
            found["checkpoint"] = str(Path.cwd() / found["checkpoint"])
        if self.settings:
            from zoscope.spec.which import parse_settings

            found["set"] = parse_settings(self.settings)
        return found

    @staticmethod
    def _one_spec(words: list[str]) -> str:
        from zoscope.config.build import absolute_spec
        from zoscope.config.track import read_track_option

        if len(words) > 1:
            raise UsageError(
                f"SPEC: got {len(words)} of them, {' and '.join(words[:2])}. Expected one; folders of runs are "
                "compared with --compare."
            )
        return absolute_spec(read_track_option("spec", words[0]), Path.cwd())


def _parsed(name: str, value: Any) -> Any:
    """Text of the command line as a configuration file would hold it."""
    if name == "every" and value.isdecimal():
        return int(value)
    if name == "max_memory" and value.isdecimal():
        return int(value)
    if name == "betas":
        return [_number(part) for part in value.split(",")]
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class FolderOptions:
    """Where the options come from and what happens to a run that is there."""

    config: Annotated[
        Path | None,
        _option(
            "--config", panel=FOLDER, help="YAML file with options of the run; the command line wins.", metavar="FILE"
        ),
    ] = None
    resume: Annotated[
        Path | None,
        _option("--resume", panel=FOLDER, help="Go on with the run in this folder.", metavar="DIR"),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the run that is in the folder.", rich_help_panel=FOLDER)
    ] = False
    sweep: Annotated[
        list[str] | None,
        _option(
            "--sweep",
            panel=FOLDER,
            help="One run for every value of an option, such as beta=0,0.5,0.9 or set.width=16,32; values that hold "
            "commas are separated by ';'. Repeatable: every combination.",
            metavar="KEY=V1,V2",
        ),
    ] = None
    plot: Annotated[
        Path | None,
        _option(
            "--plot",
            panel=FOLDER,
            help="Also write the picture here; of several runs one over another. A run's own folder has it anyway.",
            metavar="FILE",
        ),
    ] = None
    tensorboard: Annotated[
        bool,
        Option("--tensorboard", help="Also write TensorBoard scalars into the folder.", rich_help_panel=FOLDER),
    ] = False
    compare: Annotated[
        bool,
        Option("--compare", help="Compare the runs in the folders given instead of SPEC.", rich_help_panel=FOLDER),
    ] = False
