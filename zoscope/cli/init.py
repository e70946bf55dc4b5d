"""``zoscope init``: a starter spec that runs as it is."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from zoscope.cli.output import say, write_whole
from zoscope.errors import UsageError

SpecPath = Annotated[Path, typer.Argument(help="The spec to write, or a folder to put model.py in.")]
WithConfig = Annotated[bool, typer.Option("--ci", help="Also write a zoscope.yaml for 'zoscope check' beside it.")]


def command(path: SpecPath = Path("model.py"), ci: WithConfig = False) -> None:
    """Write a commented starter spec that runs as it is."""
    spec = path / "model.py" if path.is_dir() else path
    config = spec.parent / "zoscope.yaml"
    texts = {spec: _template("model.py")}
    if ci:
        texts[config] = _template("zoscope.yaml").replace("model.py", spec.name)
        if spec.is_file():
            del texts[spec]  # the config is what is missing
    _refuse(spec, texts)
    for file, text in texts.items():
        write_whole(file, text, option="PATH")
        say(f"Wrote {file}\n")
    say(f"Next: zoscope bounds {spec}" + (f" and zoscope check {config}" if ci else "") + "\n")


def _refuse(spec: Path, texts: dict[Path, str]) -> None:
    if spec.suffix != ".py":
        raise UsageError(
            f"PATH: got {spec}. Expected the name of a Python file, such as model.py, or an existing folder."
        )
    if not spec.parent.is_dir():
        raise UsageError(f"PATH: there is no folder {spec.parent} to write {spec.name} in. Create it first.")
    for file in texts:
        if file.exists() or file.is_symlink():
            raise UsageError(f"PATH: {file} exists already and is not overwritten. Choose another name, or remove it.")


def _template(name: str) -> str:
    return (resources.files("zoscope.cli") / "templates" / name).read_text(encoding="utf-8")
