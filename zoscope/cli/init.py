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
WithTransformers = Annotated[
    bool,
    typer.Option(
        "--hf", help="A spec for a transformers model, with LoRA or without, and training_args.json for its Trainer."
    ),
]

CONFIG, ARGUMENTS = "zoscope.yaml", "training_args.json"


def command(path: SpecPath = Path("model.py"), hf: WithTransformers = False, ci: WithConfig = False) -> None:
    """Write a commented starter spec that runs as it is."""
    spec = path / "model.py" if path.is_dir() else path
    texts = {spec: _template("hf.py" if hf else "model.py", spec)}
    if ci and spec.is_file():
        del texts[spec]  # the config is what is missing
    for name in [ARGUMENTS] * hf + [CONFIG] * ci:
        texts[spec.parent / name] = _template(name, spec)
    _refuse(spec, texts)
    for file, text in texts.items():
        write_whole(file, text, option="PATH")
        say(f"Wrote {file}\n")
    following = [f"zoscope bounds {spec}"]
    if hf:
        following.append(f"zoscope plan {spec} --hf-args {spec.parent / ARGUMENTS}")
    if ci:
        following.append(f"zoscope check {spec.parent / CONFIG}")
    say(f"Next: {' and '.join(following)}\n")


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


def _template(name: str, spec: Path) -> str:
    """A file of the folder ``templates``, which calls the spec model.py, with its name in place of that."""
    text = (resources.files("zoscope.cli") / "templates" / name).read_text(encoding="utf-8")
    return text if name == "model.py" else text.replace("model.py", spec.name)
