"""The JSON Schema of the configuration, generated from the table of keys; a copy ships as ``schema.json``."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from zoscope.config.keys import ROOT


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``zoscope.yaml`` and of ``[tool.zoscope]``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "zoscope configuration",
        "description": "Step-size checks for zeroth-order and first-order training.",
        **ROOT.schema(),
    }


def schema_text() -> str:
    """The schema as it ships, for editors: ``zoscope check --schema > zoscope.schema.json``."""
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> str:
    """The copy inside the package."""
    return files("zoscope.config").joinpath("schema.json").read_text(encoding="utf-8")
