"""A valid configuration, and a way to load a text as one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zoscope.config.load import CheckConfig, build_checks, load_document

VALID = """\
x-shared: &adam
  name: zo-adam
  lr: 1e-4
  betas: [0.9, 0.99]

problem: model.py

defaults:
  steps: 500
  estimator: {directions: gaussian, queries: 4, mu: 1e-3}
  curvature: {rtol: 0.05, max_hvps: 200, device: cpu, dtype: float64, seed: 3, kind: hessian}
  policy: {threshold: binding, margin: 0.8}

checks:
  - name: plain
    optimizer:
      name: zo-gd
      lr: 0.01
  - name: adam
    spec: other.py:make
    set: {width: 32, activation: gelu}
    checkpoint: weights.pt
    params: "layer\\\\.[01]"
    optimizer: *adam
    steps: 1e3
    policy: {threshold: exact, on_warn: fail}
  - name: scheduled
    optimizer:
      name: gdm
      beta: 0.5
      lr: {schedule: cosine, peak: 0.05, warmup: 100}
"""

Load = Callable[..., tuple[CheckConfig, ...]]


@pytest.fixture
def valid() -> str:
    return VALID


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a text as ``zoscope.yaml`` of the working folder."""
    monkeypatch.chdir(tmp_path)

    def call(text: str, *, file: str = "zoscope.yaml", **options: object) -> tuple[CheckConfig, ...]:
        path = tmp_path / file
        path.write_text(text, encoding="utf-8")
        return build_checks(load_document(path), **options)  # type: ignore[arg-type]

    return call
