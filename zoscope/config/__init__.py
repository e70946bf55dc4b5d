"""``zoscope.yaml`` and ``[tool.zoscope]``: read with line numbers, validated by one table of keys, never executed."""
