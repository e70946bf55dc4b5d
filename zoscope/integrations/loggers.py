"""Where numbers of a run go while it goes on: TensorBoard, Weights & Biases, MLflow.

`zoscope.track` and `zoscope.AutoLR` call each of their ``loggers`` as ``log(values, step)``, the values being a mapping
from names such as ``zoscope/trace`` to numbers; a function of one's own will do. Packages are imported on use.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from zoscope.errors import UsageError

__all__ = ["MLflow", "TensorBoard", "WandB", "logger"]


class TensorBoard:
    """Scalars of TensorBoard.

    A run that is resumed goes on in the same plots: what was written from its first step on is purged.

    Args:
        folder: Where TensorBoard looks for events.

    Raises:
        UsageError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        _imported("tensorboard", "zoscope[tensorboard]")
        self._new_writer = _imported("torch.utils.tensorboard", "zoscope[tensorboard]").SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Write them."""
        if self._writer is None:
            self._writer = self._new_writer(self._folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases.

    Args:
        run: A run that goes on; without one, one begins here and ends with `close`.
        **options: Of ``wandb.init``, such as ``project="mezo"``.

    Raises:
        UsageError: If wandb is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        wandb = _imported("wandb", "wandb")
        self._own = run is None
        self._run = wandb.init(**options) if run is None else run

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Write them."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run, if it was begun here."""
        if self._own:
            self._run.finish()


class MLflow:
    """Metrics of MLflow, in its active run; without one, one begins here and ends with `close`.

    Args:
        **options: Of ``mlflow.start_run``, such as ``run_name="first"``.

    Raises:
        UsageError: If mlflow is not installed.
    """

    def __init__(self, **options: Any) -> None:
        self._mlflow = _imported("mlflow", "mlflow")
        self._own = self._mlflow.active_run() is None
        if self._own:
            self._mlflow.start_run(**options)

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Write them."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run, if it was begun here."""
        if self._own:
            self._mlflow.end_run()


def logger(name: str, folder: Path) -> TensorBoard | WandB | MLflow:
    """The logger of a name of ``--logger`` for the run in a folder.

    Raises:
        UsageError: If its package is not installed.
    """
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    if name == "wandb":
        return WandB(project="zoscope", name=str(folder))
    return MLflow(run_name=str(folder))


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        name = module.rpartition(".")[2]
        raise UsageError(
            f"The logger {name} needs {name}, which is not installed. Install it with: pip install '{package}'"
        ) from None
