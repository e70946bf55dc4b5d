"""What an index and other tools read of the package: metadata, licence, types, citation, hooks."""

import re
import tomllib
from pathlib import Path

import yaml

import zoscope

ROOT = Path(__file__).parents[1]
PACKAGE = Path(zoscope.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_licence_is_in_the_package_and_named() -> None:
    (file,) = PROJECT["license-files"]
    assert (ROOT / file).read_text(encoding="utf-8").startswith("MIT License\n")
    assert PROJECT["license"] == "MIT"
    assert (PACKAGE / "LICENSE").is_file()


def test_types_are_announced_where_they_are() -> None:
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (PACKAGE / "py.typed").is_file()


def test_the_readme_says_how_to_cite_this_version_and_the_paper() -> None:
    readme = (ROOT / PROJECT["readme"]).read_text(encoding="utf-8")
    (entry,) = re.findall(r"^@software\{zoscope,\n(.*?)^\}", readme, flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"(\w+) = \{", entry)) == {"title", "author", "version", "year"}
    assert f"version = {{{zoscope.__version__}}}" in entry
    assert PROJECT["urls"]["Paper"] in readme


def test_the_hook_is_that_of_the_example() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    example = yaml.safe_load((ROOT / "examples" / "ci" / "pre-commit-config.yaml").read_text(encoding="utf-8"))
    (local,) = example["repos"][0]["hooks"]
    shared = hook.keys() & local.keys()
    assert {"id", "name", "entry", "language", "files", "pass_filenames"} <= shared
    assert {key: hook[key] for key in shared} == {key: local[key] for key in shared}
