"""Use cases: each measures, applies the theory and returns a frozen dataclass."""
