"""Results as one self-contained HTML page: answers, curves with hover and zoom, tables, notices, and the documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape as _escape
from pathlib import Path
from typing import Any

from zoscope.analysis.explanations import explanation
from zoscope.errors import UsageError, require_package
from zoscope.files import reason, write_whole
from zoscope.registry import OPTIMIZERS, optimizer_name
from zoscope.report.pictures import Document, edge_of, name_of, picture_of
from zoscope.report.plotly import plot_of
from zoscope.report.words import (
    MISSING,
    OPERATOR_NAMES,
    count,
    duration,
    percent,
    quantity,
    step_range,
    step_size,
    step_size_at_most,
)
from zoscope.result import thinned
from zoscope.text import clean, clean_json

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table: its name, the heads of its columns, its rows; cells are plain text."""

    title: str
    head: Row
    rows: Sequence[Row]
    shares: int | None = None
    """Column whose percents are drawn as bars, too."""


@dataclass(frozen=True)
class Answer:
    """What a result says: one sentence, and the numbers behind it."""

    sentence: str
    tables: tuple[Table, ...] = ()


def write(documents: Sequence[Document], path: Path, *, command: str, option: str = "--html") -> None:
    """Write a page, whole or not at all.

    Args:
        documents: JSON documents of results.
        path: Where to.
        command: The command line that makes the page again.
        option: What asked for it, for messages.

    Raises:
        UsageError: If plotly is not installed, or the file cannot be written.
    """
    require_package("plotly.offline", option=option, extra="report")
    from plotly.offline import get_plotlyjs

    text = page(documents, command=command, library=get_plotlyjs())
    try:
        write_whole(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path} ({reason(error)}). Nothing was written there.") from None


def escape(text: object) -> str:
    """Text as HTML shows it: no markup, no control characters."""
    return _escape(clean(str(text)))


def json_block(value: Any, *, name: str) -> str:
    """A JSON document inside of a page; nothing in it ends the block or acts on a reader."""
    text = clean_json(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{name}">{safe}</script>'


def page(documents: Sequence[Document], *, command: str, library: str) -> str:
    """The page as text.

    Args:
        documents: JSON documents of results.
        command: The command line that makes the page again.
        library: Source of plotly.js.
    """
    sections = [section(document, number) for number, document in enumerate(documents)]
    names = [_heading(document) for document in documents]
    links = "".join(f'<li><a href="#result-{n}">{escape(name)}</a></li>' for n, name in enumerate(names))
    contents = f"<nav><ol>{links}</ol></nav>" if len(documents) > 1 else ""
    title = escape(names[0] if len(names) == 1 else f"{count(len(names), 'result')} of zoscope")
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<header><h1>{title}</h1>{contents}</header>\n"
        f"<main>\n{body}\n</main>\n"
        f"<footer><h2>The same page again</h2><pre><code>{escape(command)}</code></pre></footer>\n"
        f"<script>{_in_script(library)}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _in_script(source: str) -> str:
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Nothing is fetched, whatever is in the page."""

CSS = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:62rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.25rem}h3{font-size:1rem;margin-bottom:.3rem}
section{border-top:1px solid #ccc;margin-top:1.5rem}
.answer{font-size:1.15rem;border-left:4px solid #0072B2;padding:.4rem .8rem;background:#f2f7fb}
.about{color:#555}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin-top:.6rem;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .8rem .2rem 0;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th:first-child,td:first-child,.words td{text-align:left}
caption{text-align:left;font-weight:600;padding:.4rem 0}
td .bar{display:inline-block;height:.6rem;background:#56B4E9;margin-right:.4rem}
pre{background:#f4f4f4;padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
dt{font-weight:600}dd{margin:0 0 .6rem 0}
figure{margin:1rem 0}
.plot{min-height:12rem}
@media print{body{max-width:none;padding:0;font-size:11pt}figure,table,.answer{break-inside:avoid}
h2,h3,dt,caption,.answer{break-after:avoid}.modebar,.save{display:none!important}}
"""

SCRIPT = """
"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const plots = [...document.querySelectorAll(".plot")];
const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
const options = {responsive: true, displaylogo: false, modeBarButtons: buttons};
for (const place of plots) {
  const {data, layout} = read(place.dataset.plot);
  Plotly.newPlot(place, data, layout, options);
}
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(part => { part.open = true; });
  plots.forEach(place => Plotly.relayout(place, {width: 700}));
});
addEventListener("afterprint", () => plots.forEach(place => Plotly.relayout(place, {width: null, autosize: true})));
for (const link of document.querySelectorAll(".save")) {
  const text = document.getElementById(link.dataset.result).textContent;
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
}
"""


def _heading(document: Document) -> str:
    kind = _KINDS[document["schema"]].name
    named = document.get("config" if kind == "check" else "spec")
    return f"zoscope {kind}: {name_of(named)}" if isinstance(named, str) else f"zoscope {kind}"


def section(document: Document, number: int) -> str:
    """One result of a page.

    Raises:
        KeyError: And `TypeError`, `ValueError` and the like for a document that is not whole.
    """
    kind = _KINDS[document["schema"]]
    answer = kind.answer(document)
    parts = [
        f'<section id="result-{number}">',
        f"<h2>{escape(_heading(document))}</h2>",
        f'<p class="about">{escape(about(document))}</p>',
        f'<p class="answer">{escape(answer.sentence)}</p>',
        *_plots(document, number),
        *(_table(table) for table in answer.tables),
        _notices(document),
        _settings(document),
        f'<p><a class="save" download="result-{number}.json" data-result="data-{number}">Save as JSON</a></p>',
        json_block(document, name=f"data-{number}"),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def about(document: Document) -> str:
    """Where it was measured, in one line."""
    problem = document.get("problem") or {}
    facts = [f"{count(problem['num_params'])} parameters"] if "num_params" in problem else []
    facts += [count(problem["num_examples"], "example")] if "num_examples" in problem else []
    facts += [f"loss {quantity(problem['loss'])}"] if "loss" in problem else []
    facts += [f"{document['device']} {document['dtype']}"] if document.get("device") else []
    facts += [duration(document["seconds"])] if isinstance(document.get("seconds"), int | float) else []
    facts += [f"zoscope {document['zoscope']}"] if document.get("zoscope") else []
    return " · ".join(facts)


def _plots(document: Document, number: int) -> Iterator[str]:
    if document["schema"] in (MOMENTS, PERTURBATION):
        return
    for n, chart in enumerate(picture_of(document).charts):
        place, title = f"plot-{number}-{n}", escape(chart.title or _heading(document))
        yield (
            f'<figure><div class="plot" data-plot="{place}" role="img" aria-label="{title}"></div>'
            "<noscript>The curves need JavaScript; their numbers are in the tables and in the JSON document.</noscript>"
            f"</figure>\n{json_block(plot_of(chart), name=place)}"
        )


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "\n".join(
        f"<tr>{''.join(_cell(cell, bar=n == table.shares) for n, cell in enumerate(row))}</tr>" for row in table.rows
    )
    kind = "" if any(table.head) else ' class="words"'
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'<div class="scroll"><table{kind}>{caption}{body}</table></div>'


def _cell(text: str, *, bar: bool) -> str:
    share = text.removesuffix(" %")
    width = min(max(float(share), 0.0), 100.0) if bar and share != text else 0.0
    drawn = f'<span class="bar" style="width:{width / 20:.2f}rem"></span>' if width else ""
    return f"<td>{drawn}{escape(text)}</td>"


def _notices(document: Document) -> str:
    """What to know before trusting a number."""
    found = [(notice["code"], notice["message"]) for notice in document.get("warnings", ())]
    if document["schema"] == "zoscope.check/1":
        names: dict[str, list[str]] = {}
        for check in document["checks"]:
            for message in check["notices"]:
                names.setdefault(message, []).append(check["name"])
        found = [(", ".join(those), message) for message, those in names.items()]
    if not found:
        return ""
    rows = "".join(_notice(code, message) for code, message in dict.fromkeys(found))
    return f"<h3>Notices</h3>\n<dl>{rows}</dl>"


def _notice(code: str, message: str) -> str:
    """What a notice says, and below it why it matters and what to do."""
    known = explanation(code)
    more = " ".join(filter(None, (known.matters, known.remedy)))
    why = f'<dd class="about">{escape(more)}</dd>' if more else ""
    return f"<dt>{escape(code)}</dt><dd>{escape(message)}</dd>{why}"


def _settings(document: Document) -> str:
    """Everything that the result was measured with, as far as its document says."""
    rows = [(key, clean(str(value))) for key, value in settings(document)]
    return f"<details><summary>Settings</summary>{_table(Table('', ('', ''), rows))}</details>"


NESTED = ("question", "config", "estimator")


def settings(document: Document) -> Iterator[tuple[str, Any]]:
    """Single values of a document, and those of the parts that hold options."""
    for key, value in document.items():
        if key in NESTED and isinstance(value, Mapping):
            yield from ((name, inner) for name, inner in value.items() if inner is not None)
        elif isinstance(value, str | int | float | bool):
            yield key, value


# --- answers ----------------------------------------------------------------------------------------------------------


def _family(name: str) -> str:
    return optimizer_name(f"zo-{name}") if name in OPTIMIZERS else name


def _use(zo: Document) -> str | None:
    """The step size to use, as in the terminal, with its doubt in words."""
    if zo["recommended"] is None:
        return None
    span = zo.get("recommended_range")
    told = f"from {step_size_at_most(span[0])}" if span else f"≤ {step_size_at_most(zo['recommended'])}"
    return f"{told} (provisional)" if span or zo["provisional"] else told


def _bounds(document: Document) -> Answer:
    steps, rows, sentences = count(document["steps"]), [], []
    verdicts = []
    for name, row in document["optimizers"].items():
        zo = row["zo"]
        planned = (zo.get("minibatch") or {}).get("horizon") or zo["horizon"]
        use = _use(zo)
        rows.append(
            (
                _family(name),
                step_size(row["fo"]),
                MISSING if planned is None else step_range(planned["lower"], planned["upper"]),
                step_size(_value(zo["descent"])),
                step_range(zo["lower"], zo["upper"]),
                step_size(zo["exact"]),
                MISSING if use is None else use,
            )
        )
        sentences.append(f"{_family(name)}: no step size" if use is None else f"{_family(name)}: lr {use}")
        if row.get("verdict"):
            verdict = row["verdict"]
            ratio = quantity(verdict["ratio"], digits=3)
            verdicts.append((_family(name), step_size(verdict["lr"]), ratio, verdict["outlook"]))
    head = ("", "first order", f"stable for {steps} steps", "descent", "paper's interval", "exact, for ever", "use")
    curvature = [
        (
            OPERATOR_NAMES.get(name, name),
            quantity(found["trace"]["value"]),
            quantity(_value(found["lambda_max"])),
            quantity(found["effective_rank"], digits=3),
            str(found["method"]),
        )
        for name, found in document["curvature"].items()
    ]
    tables = (
        Table("Step sizes", head, rows),
        Table("The step size asked about", ("", "lr", "× the threshold", "outlook"), verdicts),
        Table("Curvature", ("", "trace", "λ_max", "effective rank", "method"), curvature),
    )
    return _with_mu(Answer(f"For {steps} steps use {'; '.join(sentences)}.", tables), document)


def _value(number: Any) -> float | None:
    """A number, or that of an estimate."""
    value: float | None = number["value"] if isinstance(number, Mapping) else number
    return value


def _plan(document: Document) -> Answer:
    answer, edge, safe, cost = (document[key] for key in ("answer", "edge", "safe", "cost"))
    sentence = "No step size lowers the loss."
    if answer["lr"] is not None:
        loss = f"loss {quantity(answer['loss_start'])} → {quantity(answer['expected_loss'], digits=3)} expected"
        sentence = f"Use lr {step_size_at_most(answer['lr'])}: {loss}; {percent(answer['risk'])} of runs diverge."
    interval = "" if edge["ci95"] is None else f" (95 %: {step_range(*edge['ci95'])})"
    passes, run = (count(cost[name], rough=True) for name in ("forward_passes", "run"))
    facts = [
        ("half of the runs diverge at", f"{step_size(edge['lr'])}{interval}"),
        (f"{percent(safe['risk'])} of the runs diverge at", step_size(safe["lr"])),
        ("looked ahead by", f"{document['method']}, {count(document['replicas'], 'run')} at most per step size"),
        ("cost", f"{passes} forward passes; one run takes {run}"),
    ]
    schedules = [
        (
            row["schedule"],
            step_size(row["lr"]),
            quantity(row["expected_loss"], digits=3),
            percent(row["risk"]),
            step_size(row["edge"]),
        )
        for row in document["schedules"]
    ]
    tried = [
        (
            step_size(point["lr"]),
            quantity(point["loss_mean"]),
            f"{quantity(point['loss_lo'])} – {quantity(point['loss_hi'])}" if point["loss_lo"] is not None else MISSING,
            f"{point['left']} of {point['runs']}",
            percent(point["risk"]),
        )
        for point in document["curve"]
    ]
    tables = (
        Table("Behind the answer", ("", ""), facts),
        Table("Schedules", ("", "peak step size", "expected loss", "risk", "half diverge at"), schedules),
        Table("Step sizes tried", ("step size", "final loss", "range", "diverged", "risk"), tried),
    )
    return _with_mu(Answer(sentence, tables), document)


def _probe(document: Document) -> Answer:
    threshold, edge = document["threshold"], document["edge"]
    rows = [
        (
            f"{run['ratio']:.3g} × ({run['variant']})",
            step_size(run["lr"]),
            count(run["steps_done"]),
            f"{run['diverged']} of {run['replicas']}",
            quantity(run["loss_end"]),
            run["verdict"],
            {True: "yes", False: "no", None: "does not count"}[run["as_predicted"]],
        )
        for run in document["runs"]
    ]
    head = ("threshold ×", "lr", "steps", "diverged", "final loss", "verdict", "as predicted")
    found = []
    if edge is not None:
        found = [("runs", step_size(edge["value"], digits=4)), ("predicted", step_size(edge["predicted"], digits=4))]
    outcome = document["outcome"].capitalize()
    sentence = (
        f"{outcome}: {document['reason']}. The threshold is {step_size(threshold['value'])} ({threshold['name']})."
    )
    return Answer(sentence, (Table("Runs", head, rows), Table("Where half of the runs diverge", ("", "lr"), found)))


def _check(document: Document) -> Answer:
    rows = [
        (
            check["name"],
            check["optimizer"],
            step_size(check["lr"]),
            MISSING if check["threshold"] is None else step_size(check["threshold"]),
            MISSING if check["ci95"] is None else step_range(*check["ci95"]),
            quantity(check["ratio"], digits=3),
            check["status"],
            step_size(check["largest_lr"]),
        )
        for check in document["checks"]
    ]
    said = [(check["name"], check["message"]) for check in document["checks"]]
    statuses = [check["status"] for check in document["checks"]]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    head = ("check", "optimizer", "lr", "threshold", "95 %", "ratio", "status", "passes up to")
    return Answer(
        f"{count(len(rows), 'check')}: {counts}.", (Table("Checks", head, rows), Table("In words", ("", ""), said))
    )


def _track(document: Document) -> Answer:
    records = document["records"]
    head, rows = TRACKED, [_record(record) for record in thinned(records)]
    start = records[0]["loss"] if records else None
    sentence = (
        f"{document['status'].capitalize()}: {document['reason']}. "
        f"Loss {quantity(start)} → {quantity(document['loss'])} in {count(document['steps'])} steps of "
        f"{optimizer_name(document['optimizer'])}."
    )
    return Answer(sentence, (Table("Measurements", head, rows),))


TRACKED = ("step", "loss", "lr", "trace", "λ_max", "edge η*", "lr/η*")


def _record(record: Document) -> Row:
    return (
        count(record["step"]),
        quantity(record["loss"]),
        step_size(record.get("lr")),
        quantity(record.get("trace"), digits=3),
        quantity(record.get("lambda_max"), digits=3),
        step_size(edge_of(record)),
        quantity(record.get("ratio"), digits=2),
    )


def _comparison(document: Document) -> Answer:
    rows = []
    for run in document["runs"]:
        records = [record for record in run.get("records") or () if record.get("trace") is not None]
        last = _record(records[-1])[1:] if records else (MISSING,) * 6
        rows.append((str(run["label"]), str(run.get("status") or "failed"), *last))
    head = ("run", "status", *TRACKED[1:])
    return Answer(f"{count(len(rows), 'run')}, each at its last measurement.", (Table("Runs", head, rows),))


def _spectrum(document: Document) -> Answer:
    ((operator, found),) = document["curvature"].items()
    ends = [
        (str(n + 1), *(_eigenvalue(part[n]) if n < len(part) else "" for part in (document["top"], document["bottom"])))
        for n in range(max(len(document["top"]), len(document["bottom"])))
    ]
    decades = [
        (
            f"{quantity(part['lower'], digits=1)} to {quantity(part['upper'], digits=1)}",
            count(max(part["count"]["value"], 0.0)),
            quantity(part["sum"]["value"], digits=3),
        )
        for part in reversed(document["decades"])
    ]
    layers = [
        (
            layer["name"],
            count(layer["num_params"]),
            quantity(layer["trace"]["value"], digits=3),
            MISSING if layer["share"] is None else f"{100 * layer['share']:.1f} %",
        )
        for layer in document["layers"] or ()
    ]
    sentence = (
        f"{OPERATOR_NAMES.get(operator, operator)}: trace {quantity(found['trace']['value'])}, λ_max "
        f"{quantity(found['lambda_max']['value'])}, λ_min {quantity(found['lambda_min']['value'])}; about "
        f"{quantity(found['effective_rank'], digits=3)} directions carry the curvature."
    )
    return Answer(
        sentence,
        (
            Table("Ends of the spectrum", ("", "largest", "smallest"), ends),
            Table("Where the eigenvalues are", ("λ", "how many", "their sum"), decades),
            Table("Trace by layer", ("layer", "parameters", "trace", "share"), layers, shares=3),
        ),
    )


def _eigenvalue(found: Document) -> str:
    return quantity(found["value"]) + ("" if found["converged"] else " (not converged)")


def _moments(document: Document) -> Answer:
    ((_, found),) = document["curvature"].items()
    numbers = ", ".join(
        f"{name} {quantity(found[key]['value'])}"
        for name, key in (("trace", "trace"), ("‖·‖_F²", "frobenius_sq"), ("λ_max", "lambda_max"))
    )
    return Answer(f"{numbers}.")


def _perturbation(document: Document) -> Answer:
    tolerance = percent(document["tolerance"])
    best = document["best"]
    low, high = (None if document[end] is None else f"{document[end]['value']:.2g}" for end in ("lower", "upper"))
    ends = ", ".join(filter(None, (low and f"from {low} on", high and f"up to {high}")))
    which = f"μ {ends}" if ends else "every μ that was tried"
    sentence = (
        f"Slopes along random directions are right within {tolerance} with {which}; use {best:.2g}."
        if best
        else (f"Slopes along random directions are right within {tolerance} with no μ.")
    )
    rows = [
        (f"{mu:.2g}", quantity(error, digits=2), quantity(rise, digits=2))
        for mu, error, rise in zip(document["tried"], document["slope_errors"], document["loss_rises"], strict=True)
    ]
    return Answer(sentence, (Table("μ tried", ("μ", "slopes off by, relative", "loss higher by, relative"), rows),))


def _with_mu(answer: Answer, document: Document) -> Answer:
    """What the document says of μ below the rest, where it says something."""
    if document.get("perturbation") is None:
        return answer
    found = _perturbation(document["perturbation"])
    return Answer(f"{answer.sentence} {found.sentence}", (*answer.tables, *found.tables))


@dataclass(frozen=True)
class Kind:
    """What a page needs to know of a kind of document."""

    name: str
    answer: Callable[[Document], Answer]


MOMENTS, PERTURBATION = "zoscope.moments/1", "zoscope.mu/1"
"""Documents without a picture."""

_KINDS = {
    "zoscope.bounds/1": Kind("bounds", _bounds),
    "zoscope.plan/1": Kind("plan", _plan),
    "zoscope.probe/1": Kind("probe", _probe),
    "zoscope.check/1": Kind("check", _check),
    "zoscope.track/1": Kind("track", _track),
    "zoscope.track-comparison/1": Kind("track", _comparison),
    "zoscope.spectrum/1": Kind("spectrum", _spectrum),
    MOMENTS: Kind("spectrum", _moments),
    PERTURBATION: Kind("plan", _perturbation),
}

SCHEMAS = tuple(_KINDS)
"""Documents of which a page can be made."""
