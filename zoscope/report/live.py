"""A run while it goes on: on a terminal a sparkline, a gauge and the time left; elsewhere a line per measurement."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.text import Text

from zoscope.report.style import MISSING, count, duration, quantity, step_size
from zoscope.report.track import optimizer_name

if TYPE_CHECKING:
    from rich.console import Console

    from zoscope.analysis.tracking.loop import Run
    from zoscope.analysis.tracking.record import Record

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
        """See `zoscope.analysis.tracking.loop.Observer`."""
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
            f"term {quantity(record.threshold)} in [{quantity(record.lower)}, {quantity(record.upper)}]",
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
        """See `zoscope.analysis.tracking.loop.Observer`."""
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
            ratio = self._run.request.lr_at(step) / record.exact
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
