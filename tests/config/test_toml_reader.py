from collections.abc import Callable

import pytest

from zoscope.config.keys import plain
from zoscope.config.load import CheckConfig
from zoscope.config.sources import ConfigError, InvalidError, Node, read_pyproject

Load = Callable[..., tuple[CheckConfig, ...]]

PYPROJECT = """\
[project]
name = "x"

[tool.zoscope]
problem = "model.py"

[tool.zoscope.defaults]
steps = 200
policy.margin = 0.5

[[tool.zoscope.checks]]
name = "one"
optimizer = {name = "zo-gd", lr = 1e-3}

[[tool.zoscope.checks]]
name = "two"
[tool.zoscope.checks.optimizer]
name = "zo-adam"
lr = 1e-4
"""


def test_the_table_has_the_meaning_of_the_yaml_file(load: Load) -> None:
    first, second = load(PYPROJECT, file="pyproject.toml")
    assert (first.name, first.optimizer.name, first.optimizer.lr) == ("one", "zo-gd", 1e-3)
    assert (second.steps, second.policy.margin, second.optimizer.rule) == (200, 0.5, "adam")


def test_lines_are_those_of_keys_and_headers(load: Load) -> None:
    first, second = load(PYPROJECT, file="pyproject.toml")
    assert first.where is not None
    assert second.where is not None
    assert (first.where.line, second.where.line) == (13, 19)


def test_a_misspelt_key_names_its_line(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"line 18: unknown key 'nam' in checks\[1\].optimizer. Did you mean 'name'"):
        load(PYPROJECT.replace('name = "zo-adam"', 'nam = "zo-adam"'), file="pyproject.toml")


def test_a_file_without_the_table_has_no_configuration() -> None:
    assert read_pyproject("[tool.other]\nx = 1\n") is None


def test_a_date_is_not_a_number(load: Load) -> None:
    with pytest.raises(ConfigError, match="steps must be a whole number, got a date"):
        load(PYPROJECT.replace("steps = 200", "steps = 2020-01-01"), file="pyproject.toml")


@pytest.mark.parametrize("value", ["", "[" * 5000, "9" * 5000])
def test_broken_toml_is_one_error(value: str) -> None:
    with pytest.raises(InvalidError, match="not valid TOML"):
        read_pyproject(f"[tool.zoscope]\na = {value}")


def test_values_are_located() -> None:
    tree = read_pyproject(PYPROJECT)
    assert isinstance(tree, Node)
    assert plain(tree)["defaults"] == {"steps": 200, "policy": {"margin": 0.5}}
