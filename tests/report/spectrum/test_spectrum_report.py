import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zoscope import Estimate, Notice, SpectrumResult, UsageError
from zoscope.analysis.spectrum import LayerTrace
from zoscope.curvature.slq import Curvature, Eigenvalue
from zoscope.report.figures import draw
from zoscope.report.spectrum import render
from zoscope.report.style import to_text
from zoscope.result import ProblemInfo
from zoscope.theory.density import density
from zoscope.theory.spectrum import SampledSpectrum, Spectrum

NEGATIVE = np.array([-0.5, -0.02, 0.001, 0.01, 0.05, 0.3, 2.0, 30.0])
POSITIVE = np.abs(NEGATIVE)


def result_of(values: np.ndarray, *, exact: bool = False) -> SpectrumResult:
    bulk = Spectrum.of(values[:-2])
    error = Spectrum([0.01, 0.02], [1.0, -1.0])
    spectrum = SampledSpectrum.exact(values) if exact else SampledSpectrum(Spectrum.of(values), bulk, 5, 6, ((error,),))
    ritz = tuple(Eigenvalue(float(value), 0.001, abs(value) > 0.1) for value in np.sort(values))
    curvature = Curvature(
        trace=Estimate(float(values.sum()), 0.0 if exact else 0.3),
        frobenius_sq=Estimate(float((values**2).sum())),
        lambda_max=ritz[-1],
        lambda_min=ritz[0],
        trace_positive=Estimate(32.0),
        negative_mass=0.5,
        effective_rank=1.2,
        method="dense" if exact else "deflated-slq",
        num_hvps=40,
        seconds=0.5,
        spectrum=spectrum,
        ritz=ritz if exact else ritz[-2:],
    )
    return SpectrumResult(
        spec="net.py",
        device="cpu",
        dtype="float32",
        seed=0,
        rtol=0.02,
        problem=ProblemInfo(8, 10, 0.5, 0.1),
        operator="hessian",
        curvature=curvature,
        top=ritz[::-1][:3],
        bottom=ritz[:2],
        density=density(spectrum, scale=0.01),
        layers=(LayerTrace("0.[attn]", 6, Estimate(1.0, 0.1), 0.03), LayerTrace("1", 2, Estimate(31.0), 0.97)),
        num_hvps=41,
        seconds=1.0,
        warnings=(Notice("precision", "Not precise."),),
    )


def shown(result: SpectrumResult, *, width: int = 120, verbose: bool = True) -> str:
    return to_text(render(result, verbose=verbose), width=width)


def test_the_answer_is_twelve_lines_at_most() -> None:
    text = shown(result_of(NEGATIVE), width=80, verbose=False)
    assert len(text.splitlines()) <= 12
    for part in ("net.py", "30.00", "-0.500", "trace", "effective rank", "1 97 %", "precision"):
        assert part in text


def test_the_report_has_every_part_and_says_what_has_not_converged() -> None:
    text = shown(result_of(NEGATIVE))
    for part in ("net.py", "8 parameters", "41 HVPs", "Hessian H", "negative mass", "largest", "smallest"):
        assert part in text
    assert "-0.0200 ± 5.0 % *" in text
    assert "* not converged" in text
    assert "2 are known one by one; resolved down to |λ| ≈ 0.01" in text
    assert "Not precise." in text


def test_a_dense_result_claims_no_resolution() -> None:
    text = shown(result_of(NEGATIVE, exact=True))
    assert "every eigenvalue is known" in text
    assert "listed once" not in text


def test_layers_keep_brackets_in_their_names_and_end_with_the_whole() -> None:
    lines = shown(result_of(NEGATIVE)).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("0.[attn]"))
    assert "3.0 %" in lines[first]
    assert any(line.startswith("all ") for line in lines[first:])
    assert "Trace by layer" not in shown(replace(result_of(NEGATIVE), layers=None))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_report_keeps_to_its_width(width: int) -> None:
    assert max(map(len, shown(result_of(NEGATIVE), width=width).splitlines())) <= width


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("values", [NEGATIVE, POSITIVE, -POSITIVE, np.zeros(8), np.full(8, 2.5)])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn_for_every_kind_of_spectrum(tmp_path: Path, values, suffix: str, exact: bool) -> None:
    path = tmp_path / f"spectrum.{suffix}"
    draw(result_of(values, exact=exact).to_dict(), [path])
    assert path.stat().st_size > 5000


def svg_of(result: SpectrumResult, path: Path) -> str:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(result.to_dict(), [path])
    return path.read_text()


def test_the_negative_part_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    assert ">negative<" in svg_of(result_of(NEGATIVE), tmp_path / "a.svg")
    assert ">negative<" not in svg_of(result_of(POSITIVE), tmp_path / "b.svg")


def test_names_of_specs_are_text_and_not_mathematics(tmp_path: Path) -> None:
    assert "a_$b$.py" in svg_of(replace(result_of(NEGATIVE), spec="a_$b$.py"), tmp_path / "a.svg")


def test_a_picture_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--plot: cannot write"):
        draw(result_of(NEGATIVE).to_dict(), [tmp_path / "none" / "a.png"])


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'zoscope\[plot\]'"):
        draw(result_of(NEGATIVE).to_dict(), [tmp_path / "a.png"])
