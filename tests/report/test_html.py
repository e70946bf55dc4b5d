"""The HTML page: complete, closed in itself, and safe whatever the names in it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zoscope import CheckReport, UsageError
from zoscope.analysis.explanations import explanation
from zoscope.report import html
from zoscope.report.html import SCHEMAS, json_block, page, section, settings, write
from zoscope.report.pictures import picture_of
from zoscope.report.plotly import plot_of

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = """
    bounds bounds-saddle bounds-forward bounds-line bounds-batch bounds-gd-lr plan plan-batch probe probe-edge track
    track-diverged track-sweep track-sweep-failed check spectrum-slq spectrum-layers spectrum-moments
"""
VOID = {"meta", "br", "img", "link", "hr", "input"}
LIBRARY = "window.Plotly = {newPlot() {}, relayout() {}};"
HOSTILE = "</script><script>alert(1)</script>\x1b[31m\x00<!--\u2028\u202e\"'&amp;<b>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def golden(name: str) -> Any:
    """The last document of a golden file, with times in place of their signs."""
    text = (GOLDEN / f"{name}.json").read_text(encoding="utf-8").replace('"seconds": "#"', '"seconds": 1.5')
    return json.loads(text)["runs"][-1]["stdout"]


class Page(HTMLParser):
    """What a page holds; its tags have to be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.blocks: dict[str, str] = {}
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.current: str | None = None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.addresses += [value for name in ("src", "href", "data", "action", "poster") if (value := found.get(name))]
        self.current = found.get("id") if tag == "script" else None
        assert not [name for name in found if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.current = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.current:
                self.blocks[self.current] = self.blocks.get(self.current, "") + data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(*documents: Any) -> Page:
    return Page(page(documents, command="zoscope bounds model.py --html page.html", library=LIBRARY))


def scale(**changed: Any) -> Any:
    """A document of ``plan --only mu``."""
    ends = {"lower": None, "upper": {"value": 0.084, "stderr": 0.02, "quadrature": 0.0}}
    tried = {"tried": [1e-3, 1.0], "slope_errors": [0.005, 0.9], "loss_rises": [1e-6, 0.6]}
    return {"schema": "zoscope.mu/1", "best": 1e-3, "tolerance": 0.1, **ends, **tried, **changed}


def test_a_page_says_which_mu_to_use() -> None:
    found = made(scale())
    assert "right within 10 % with μ up to 0.084; use 0.001." in found.text
    assert not [key for key in found.blocks if key.startswith("plot-")]
    assert "with no μ." in made(scale(best=None, upper=None)).text
    assert "with μ from 1e-06 on, up to 0.084" in made(scale(lower={"value": 1e-6})).text
    assert "with every μ that was tried; use 0.001." in made(scale(upper=None)).text


@pytest.mark.parametrize("name", ["bounds", "plan"])
def test_a_page_about_step_sizes_says_which_mu_is_right(name: str) -> None:
    found = made(golden(name) | {"mu": 1e-3, "perturbation": scale()})
    assert "right within 10 % with μ up to 0.084; use 0.001." in found.text
    assert "μ tried" in found.text


@pytest.mark.parametrize("name", NAMES.split())
def test_a_page_has_the_answer_the_curves_the_notices_and_the_document(name: str) -> None:
    document = golden(name)
    found = made(document)
    assert json.loads(found.blocks["data-0"]) == document
    plots = [key for key in found.blocks if key.startswith("plot-")]
    charts = () if document["schema"] == "zoscope.moments/1" else picture_of(document).charts
    assert len(plots) == len(charts)
    for key, chart in zip(plots, charts, strict=True):
        assert json.loads(found.blocks[key]) == json.loads(json.dumps(plot_of(chart)))
    for notice in document.get("warnings", ()):
        assert notice["code"] in found.text
        assert " ".join(notice["message"].split()) in found.text
        assert explanation(notice["code"]).remedy in found.text
    assert "zoscope bounds model.py --html page.html" in found.text
    assert not [address for address in found.addresses if not address.startswith("#")]
    assert len(set(found.ids)) == len(found.ids)


def test_the_answer_is_said_first() -> None:
    text = made(golden("bounds")).text
    assert "For 1,000 steps use ZO-GD: lr ≤ " in text
    assert "Loss and risk" in page([golden("plan")], command="", library="")
    assert "7 checks: 3 pass, 1 warn, 1 fail, 2 error." in made(golden("check")).text
    assert "Confirmed: " in made(golden("probe")).text
    assert "Trace by layer" in made(golden("spectrum-layers")).text


def test_several_results_share_one_library() -> None:
    documents = [golden(name) for name in ("bounds", "plan", "check")]
    text = page(documents, command="zoscope report a b c --html d", library=LIBRARY)
    assert text.count(LIBRARY) == 1
    found = Page(text)
    assert found.addresses == ["#result-0", "#result-1", "#result-2"]
    assert [json.loads(found.blocks[f"data-{n}"]) for n in range(3)] == documents
    assert "3 results of zoscope" in found.text


def test_nothing_from_outside_may_be_fetched() -> None:
    text = page([golden("bounds")], command="", library=LIBRARY)
    assert "default-src 'none'" in text
    assert not re.findall(r"https?://", text)


def test_hostile_names_stay_text(hostile: CheckReport) -> None:
    documents = [
        golden("bounds") | {"spec": HOSTILE, "warnings": [{"code": HOSTILE, "message": HOSTILE}]},
        hostile.to_dict(),
        golden("track-sweep") | {"runs": [golden("track-sweep")["runs"][0] | {"label": HOSTILE}]},
    ]
    text = page(documents, command=HOSTILE, library=LIBRARY)
    found = Page(text)
    assert [json.loads(found.blocks[f"data-{n}"]) for n in range(3)] == documents
    assert "alert(1)" in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028\u202e]", text)
    assert text.count("<script") == len(found.blocks) + 2
    plots = [json.loads(block) for key, block in found.blocks.items() if key.startswith("plot-")]
    shown = [trace.get("name", "") for plot in plots for trace in plot["data"]]
    assert not [name for name in shown if "<" in name]


def test_a_block_of_json_cannot_be_left() -> None:
    block = json_block({"a": HOSTILE}, name="x")
    assert block.count("<") == 2
    assert json.loads(re.sub("<.*?>", "", block)) == {"a": HOSTILE}


def test_settings_are_single_values() -> None:
    found = dict(settings(golden("plan")))
    assert (found["optimizer"], found["seed"], found["steps"]) == ("zo-gd", 0, 30)
    assert not [value for value in found.values() if isinstance(value, list | dict)]


def test_what_limits_nothing_and_what_is_not_known_is_said() -> None:
    assert "no step size" in made(golden("bounds-line")).text
    document = golden("plan")
    document["answer"] |= {"lr": None, "risk": None, "expected_loss": None}
    document["edge"] = {"lr": None, "ci95": None}
    assert "No step size lowers the loss." in made(document).text


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_document_that_is_not_whole_raises_what_the_command_catches(schema: str) -> None:
    from zoscope.cli.report import BROKEN

    with pytest.raises(BROKEN):
        section({"schema": schema}, 0)


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install 'zoscope\[report\]'"):
        write([golden("bounds")], tmp_path / "a.html", command="")


def test_a_page_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="needs plotly: pip install 'zoscope[report]'")
    with pytest.raises(UsageError, match="--html: cannot write"):
        write([golden("bounds")], tmp_path / "none" / "a.html", command="")


def test_a_page_takes_little_besides_its_library() -> None:
    documents = [golden(name) for name in NAMES.split()]
    assert len(page(documents, command="", library="").encode()) < 1_500_000


# --- in a browser -----------------------------------------------------------------------------------------------------


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser on PATH: one of {', '.join(BROWSERS)}")
    return found


@pytest.mark.browser
def test_a_browser_draws_every_curve_without_an_error(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="needs plotly: pip install 'zoscope[report]'")
    program = browser()
    documents = [golden(name) | ({"spec": HOSTILE} if name == "bounds" else {}) for name in NAMES.split()]
    path = tmp_path / "page.html"
    write(documents, path, command="zoscope report")
    command = [program, "--headless=new", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run"]
    command += ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    command += ["--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, "\n".join(said)
    dom = done.stdout
    charts = sum(len(picture_of(document).charts) for document in documents if document["schema"] != html.MOMENTS)
    assert dom.count('class="plot js-plotly-plot"') == charts
    assert len(re.findall(r'class="main-svg"', dom)) >= charts
    assert "alert(1)" in dom
    assert 'href="blob:' in dom
