import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from zoscope.config.keys import config_schema, plain, schema_text
from zoscope.config.load import build_checks, load_document
from zoscope.config.sources import read_yaml

VALIDATOR = jsonschema.Draft202012Validator(config_schema())


def as_data(text: str) -> Any:
    return plain(read_yaml(text))


def test_the_schema_is_itself_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))


def test_the_schema_accepts_what_the_validator_accepts(valid: str) -> None:
    VALIDATOR.validate(as_data(valid))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps: 500", "stpes: 500"),
        ("margin: 0.8", "margin: 1.5"),
        ("name: zo-gd", "name: zo_gd"),
        ("queries: 4", "queries: 2.5"),
        ("betas: [0.9, 0.99]", "betas: 0.9"),
        ("device: cpu", "device: gpu"),
        ("peak: 0.05, ", ""),
        ("- name: plain", "- nam: plain"),
        ("lr: 0.01", "lr: fast"),
    ],
)
def test_the_schema_refuses_what_the_validator_refuses(valid: str, old: str, new: str) -> None:
    assert not VALIDATOR.is_valid(as_data(valid.replace(old, new, 1)))


def test_the_starter_of_init_is_valid(tmp_path: Path) -> None:
    text = (files("zoscope.cli") / "templates" / "zoscope.yaml").read_text(encoding="utf-8")
    VALIDATOR.validate(as_data(text))
    file = tmp_path / "zoscope.yaml"
    file.write_text(text)
    (check,) = build_checks(load_document(file))
    assert check.optimizer.zeroth_order
