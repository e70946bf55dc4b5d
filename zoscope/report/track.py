"""The report of ``zoscope.track``: tables of one run and of several, lines and a live view on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from zoscope.config.load import AUTOMATIC
from zoscope.registry import optimizer_name, term_of
from zoscope.report.answer import as_report, one_line
from zoscope.report.style import grid, heading, number_table
from zoscope.report.words import MISSING, count, duration, quantity, step_size
from zoscope.result import thinned

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from zoscope.analysis.track import Comparison
    from zoscope.analysis.track_loop import Run
    from zoscope.analysis.track_results import Record, TrackResult

SHOWN = (
    "spec",
    "set",
    "optimizer",
    "lr",
    "beta",
    "betas",
    "mu",
    "queries",
    "directions",
    "batch_size",
    "seed",
    "steps",
)
"""Options that are named where they differ between runs."""


LABEL, NUMBERS = 28, 62
"""Longest label, and the width of everything beside it."""


MOST_RUNS = 8
"""Runs that the answer lists, those with the lowest loss."""


def comparison_answer(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """A row per run, and what failed."""
    lost = [entry.label for entry in comparison.failed]
    yield comparison_table(comparison, width=width, most=MOST_RUNS)
    if lost:
        yield Text(f"Failed: {', '.join(lost)}")


def comparison_details(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """The whole table, what the columns are, what failed."""
    yield heading("Runs", "each at its last measurement")
    if len(comparison.results) > MOST_RUNS:
        yield comparison_table(comparison, width=width)
    same = differing(comparison)
    if same and len(comparison.results) > 1:
        yield Text(f"They differ in {', '.join(same)}.", style="dim")
    ended = [(label, f"{r.status}: {r.reason}") for label, r in comparison.results if r.status != "finished"]
    if ended:
        yield heading("Not finished")
        yield grid(ended)
    if comparison.failed:
        yield heading("Failed")
        yield grid((entry.label, entry.error or "") for entry in comparison.failed)


render_comparison = as_report(comparison_answer, comparison_details)


def differing(comparison: Comparison) -> list[str]:
    """Options in which the runs differ."""
    configs = [result.config for _, result in comparison.results]
    found = [key for key in SHOWN if len({repr(config.get(key)) for config in configs}) > 1]
    settings = [config.get("set") or {} for config in configs]
    names = dict.fromkeys(name for setting in settings for name in setting)
    named = [f"set.{name}" for name in names if len({repr(setting.get(name)) for setting in settings}) > 1]
    return [word for key in found for word in (named if key == "set" else [key])]


def comparison_table(comparison: Comparison, *, width: int, most: int | None = None) -> Table:
    """One row per run; where there is little room, labels are cut rather than numbers.

    Args:
        comparison: The runs.
        width: Columns.
        most: Rows, if there are more runs; then those with the lowest loss.
    """
    runs = list(comparison.results)
    if most is not None and len(runs) > most:
        runs = sorted(runs, key=lambda run: _last_loss(run[1]))[:most]
    columns = number_table("run", "steps", "loss", "η", "trace", "λ_max", "term", "η/η*", "in band")
    for label, result in runs:
        columns.add_row(_short(label, min(LABEL, max(width - NUMBERS, LABEL // 2))), *_cells(result))
    if len(runs) < len(comparison.results):
        columns.add_row(f"+{len(comparison.results) - len(runs)} more")
    return columns


def _last_loss(result: TrackResult) -> float:
    loss = result.records[-1].loss if result.records else None
    return math.inf if loss is None or math.isnan(loss) else loss


def _cells(result: TrackResult) -> list[str | Text]:
    # After a divergence nothing is left to measure: the last curvature that was.
    measured = [record for record in result.records if record.trace is not None]
    last = measured[-1] if measured else None
    numbers: list[str | Text] = [MISSING] * 5
    if last is not None:
        values = (last.trace, last.lambda_max, last.threshold)
        numbers = [step_size(last.lr), *(quantity(value, digits=3) for value in values), quantity(last.ratio, digits=2)]
    loss = result.records[-1].loss if result.records else None
    band = result.band
    steps = Text(count(result.steps_done), style=STATUS_STYLES.get(result.status, "yellow"))
    return [steps, quantity(loss, digits=3), *numbers, f"{band.inside} of {band.of}" if band.of else MISSING]


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else f"…{label[1 - most :]}"


BARS = "▁▂▃▄▅▆▇█"
REFRESH = 0.2
WIDTH = 60


class Lines:
    """One line per measurement, for a log.

    Args:
        console: Where to.
        label: Name of the run among others.
    """

    def __init__(self, console: Console, *, label: str = "") -> None:
        self._console = console
        self._label = f"{label}: " if label else ""
        self._steps = 0

    def begun(self, run: Run) -> None:
        """See `zoscope.analysis.track_loop.Observer`."""
        self._steps = run.request.steps

    def stepped(self, step: int, loss: float) -> None:
        """Nothing: a step is not worth a line."""

    def measuring(self, step: int) -> None:
        """Nothing: the line comes with the result."""

    def measured(self, record: Record) -> None:
        """The line."""
        self._console.print(Text(self._label + line(record, steps=self._steps)), soft_wrap=True, highlight=False)


def line(record: Record, *, steps: int) -> str:
    """A measurement in one line."""
    parts = [f"step {count(record.step)}/{count(steps)}", f"loss {quantity(record.loss)}", f"lr {step_size(record.lr)}"]
    if record.trace is not None:
        parts += [
            f"trace {quantity(record.trace)}",
            f"λ_max {quantity(record.lambda_max)}",
            f"lr/η* {quantity(record.ratio, digits=2)}",
        ]
    return " · ".join(parts)


class LiveView:
    """What a terminal shows, redrawn a few times a second.

    Args:
        live: The display; whoever made it starts and stops it.
        label: Name of the run among others.
    """

    def __init__(self, live: Live, *, label: str = "") -> None:
        self._live = live
        self._label = f"{label}: " if label else ""
        self._spark = Spark()
        self._title, self._steps, self._step = "", 1, 0
        self._record: Record | None = None
        self._run: Run | None = None
        self._loss = math.nan
        self._pace = Pace()
        self._measures = False
        self._drawn = 0.0

    def begun(self, run: Run) -> None:
        """See `zoscope.analysis.track_loop.Observer`."""
        self._title = self._label + optimizer_name(run.request.optimizer)
        self._steps, self._step = run.request.steps, run.step
        self._run = run
        self._record = run.records[-1] if run.records else None
        self._pace.begin(run.step)
        self._draw()

    def stepped(self, step: int, loss: float) -> None:
        """Count, and redraw when it is time."""
        self._step, self._loss, self._measures = step, loss, False
        self._spark.add(loss)
        if step & 15 == 0 and time.perf_counter() - self._drawn > REFRESH:
            self._draw()

    def measuring(self, step: int) -> None:
        """Say so: it may take a while."""
        self._measures = True
        self._draw()

    def measured(self, record: Record) -> None:
        """Show what was found."""
        self._record, self._measures = record, False
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        self._live.update(Group(*self._lines()), refresh=True)

    def _lines(self) -> list[Text]:
        step, steps = self._step, self._steps
        rate = self._pace.at(step, now=self._drawn)
        left = duration((steps - step) / rate) if rate > 0 else MISSING
        doing = "measuring" if self._measures else f"{quantity(rate, digits=3)} steps/s, {left} left"
        lines = [
            Text(
                f"{self._title}  step {count(step)} of {count(steps)} ({100 * step / steps:.0f} %)  {doing}",
                style="bold",
            ),
            Text(f"loss   {self._spark.drawn(WIDTH)}  {quantity(self._loss, digits=3)}"),
        ]
        record = self._record
        if self._run is not None and record is not None and record.exact:
            ratio = self._run.lr / record.exact
            lines += [
                Text("η/η*   ") + gauge(ratio) + Text(f"  {quantity(ratio, digits=2)}"),
                Text(line(record, steps=steps), style="dim"),
            ]
        return lines


class Pace:
    """Steps per second, measuring included."""

    def __init__(self) -> None:
        self._first, self._began = 0, time.perf_counter()

    def begin(self, step: int) -> None:
        """Count from here."""
        self._first, self._began = step, time.perf_counter()

    def at(self, step: int, *, now: float) -> float:
        """Steps per second so far."""
        return (step - self._first) / (now - self._began) if now > self._began else 0.0


class Spark:
    """The losses of all steps in a fixed amount of memory: neighbours are averaged when there are too many.

    Args:
        most: Most averages kept.
    """

    def __init__(self, most: int = 2 * WIDTH) -> None:
        self._most = most
        self._values: list[float] = []
        self._each = 1
        self._total, self._count = 0.0, 0

    def add(self, loss: float) -> None:
        """One more."""
        self._total += loss
        self._count += 1
        if self._count == self._each:
            self._values.append(self._total / self._count)
            self._total, self._count = 0.0, 0
        if len(self._values) >= self._most:
            pairs = zip(self._values[::2], self._values[1::2], strict=False)
            self._values = [0.5 * (first + second) for first, second in pairs]
            self._each *= 2

    def drawn(self, width: int) -> str:
        """Bars on a logarithmic scale where all losses are positive."""
        values = [value for value in self._values if math.isfinite(value)]
        if not values:
            return ""
        if min(values) > 0:
            values = [math.log(value) for value in values]
        size = max(1, math.ceil(len(values) / width))
        means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
        low, high = min(means), max(means)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(BARS[round((value - low) * scale)] for value in means)


def gauge(ratio: float, *, width: int = 40, most: float = 1.5) -> Text:
    """A bar from 0 to 1.5 times the threshold, with a mark at the threshold."""
    filled = min(round(width * ratio / most), width)
    mark = round(width / most)
    cells = ["━" if index < filled else "·" for index in range(width)]
    cells[mark] = "┃"
    style = "green" if ratio < 0.8 else "yellow" if ratio < 1.1 else "red"
    return Text("".join(cells), style=style)


MOST_STEP_SIZES = 4
STATUS_STYLES = {"finished": "bold green", "target": "bold green", "diverged": "bold red"}


SHOWN_ROWS = 4
"""Measurements in the answer."""


def answer(result: TrackResult, width: int) -> Iterator[RenderableType]:
    """How it ended, a few measurements, and where the run is."""
    facts = [f"{_name(result)}, lr {step_sizes_named(result.config['lr'])}", count(result.num_params, "parameter")]
    yield one_line([*facts, count(result.num_examples, "example"), duration(result.seconds)], width=width)
    word = "Stopped" if result.status == "time" else result.status.capitalize()
    status = Text(word, style=STATUS_STYLES.get(result.status, "bold yellow"))
    yield Text.assemble(status, f": {result.reason}; {_losses(result)}")
    yield from _closest(result)
    if result.records:
        yield table(result, thinned(result.records, SHOWN_ROWS), short=True)
    if result.folder is not None:
        yield Text(f"folder {result.folder}")


def details(result: TrackResult, width: int) -> Iterator[RenderableType]:
    """Everything, top to bottom."""
    yield Text("")
    yield header(result)
    if result.records:
        shown = thinned(result.records)
        remark = "‖g‖ stalls at the floor" if _stalls(result) else f"the term is {term_of(result.optimizer)}"
        if len(shown) < len(result.records):
            remark = f"{len(shown)} of {count(len(result.records))}; {remark}"
        yield heading("Measurements", remark)
        yield table(result, shown)
    yield Text()
    yield grid(facts(result))


render = as_report(answer, details)


def _name(result: TrackResult) -> str:
    return f"{result.spec or 'problem'}: {optimizer_name(result.optimizer)}"


def _losses(result: TrackResult) -> str:
    first, last = (result.records[0].loss, result.records[-1].loss) if result.records else (None, None)
    return f"loss {quantity(first, digits=3)} → {quantity(last, digits=3)}"


def _closest(result: TrackResult) -> Iterator[Text]:
    """How near to the threshold the step size came."""
    known = [record for record in result.records if record.ratio is not None]
    if known:
        highest = max(known, key=lambda record: record.ratio or 0.0)
        ratio, step = quantity(highest.ratio, digits=2), count(highest.step)
        noisier = bool(result.config.get("batch_size")) and highest.exact_batches is None
        which = "η* of all examples" if noisier and result.optimizer.startswith("zo-") else "η*"
        yield Text(f"lr was at most {ratio} × the threshold {which}, at step {step}")


def header(result: TrackResult) -> Text:
    """What was trained, and what it took."""
    name = Text(_name(result), style="bold")
    facts = [
        f"{count(result.num_params)} parameters",
        count(result.num_examples, "example"),
        f"lr {step_sizes_named(result.config['lr'])}",
        f"{result.device} {result.dtype}",
        f"{count(result.num_hvps)} HVPs",
        duration(result.seconds),
    ]
    return name + Text("\n" + " · ".join(facts), style="default")


def step_sizes_named(lr: float | str | Mapping[str, Any]) -> str:
    """Step sizes of a configuration in a few words."""
    if lr in AUTOMATIC:
        return str(lr)
    if isinstance(lr, Mapping):
        return f"{lr['schedule']}, peak {lr['peak']:g}"
    parts = str(lr).split(",")
    if len(parts) <= MOST_STEP_SIZES:
        return ",".join(parts)
    return f"{parts[0]},…,{parts[-1]} ({len(parts)} values)"


def table(result: TrackResult, records: Sequence[Record], *, short: bool = False) -> Table:
    """One row per measurement; for the answer without the band."""
    band = () if short else ("lower", "term", "upper")
    about = ("‖g‖", "floor") if _stalls(result) else (*band, "η*", "η/η*")
    columns = number_table("step", "loss", "η", "trace", "λ_max", *about)
    for record in records:
        columns.add_row(
            count(record.step),
            quantity(record.loss, digits=3),
            step_size(record.lr),
            quantity(record.trace, digits=3),
            quantity(record.lambda_max, digits=3),
            *(_against_floor(record) if _stalls(result) else _against_band(record)[3 if short else 0 :]),
        )
    return columns


def _stalls(result: TrackResult) -> bool:
    """Whether the optimizer has a floor in place of a threshold."""
    return any(record.floor is not None for record in result.records)


def _against_floor(record: Record) -> tuple[str, str]:
    return quantity(record.grad_norm, digits=3), quantity(record.floor, digits=3)


def _against_band(record: Record) -> tuple[str | Text, ...]:
    return (
        quantity(record.lower, digits=3),
        _term(record),
        quantity(record.upper, digits=3),
        step_size(record.lr / record.ratio if record.ratio else record.exact),  # with mini-batches theirs
        quantity(record.ratio, digits=2),
    )


def _term(record: Record) -> Text:
    style = {True: "green", False: "", None: "dim"}[record.in_band]
    return Text(quantity(record.threshold, digits=3), style=style)


def _products(result: TrackResult) -> str:
    spent = [record.num_hvps for record in result.records if record.num_hvps]
    if len(spent) < 2:
        return ""
    return f" ({count(sum(spent) / len(spent))} each)"


def _band(result: TrackResult) -> str:
    term, band = term_of(result.optimizer), result.band
    if band.since is None:
        return f"not reached: {term} stays above 1.1 upper"
    return (
        f"{term} within [0.9 lower, 1.1 upper] at {band.inside} of {count(band.of, 'measurement')} since step "
        f"{count(band.since)}, where the curvature reached it"
    )


def facts(result: TrackResult) -> Iterator[tuple[str, str | Text]]:
    """How it ended and what it cost."""
    yield (
        "run",
        Text(result.status, style=STATUS_STYLES.get(result.status, "bold yellow"))
        + Text(f": {result.reason}", style="default"),
    )
    if not _stalls(result):
        yield "band", _band(result)
    share = f"{100 * result.measuring_seconds / result.seconds:.0f} %" if result.seconds > 0 else MISSING
    per = _products(result)
    yield "measuring", f"every {count(result.every)} steps, {count(result.num_hvps)} HVPs{per}, {share} of the time"
    last = result.records[-1].auto if result.records else None
    if last is not None:
        yield (
            "step size",
            f"set itself; brought back {count(last['rollbacks'], 'time')}, now held by: {last['limit']}",
        )
    if result.folder is not None:
        yield "folder", str(result.folder)
