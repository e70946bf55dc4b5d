"""From SPEC on the command line to a Problem: find it, load it, call it."""

from zoscope.spec.load import LoadedSpec, load_spec
from zoscope.spec.which import DEFAULT_NAME, parse_settings, resolve_spec, split_spec

__all__ = ["DEFAULT_NAME", "LoadedSpec", "load_spec", "parse_settings", "resolve_spec", "split_spec"]
