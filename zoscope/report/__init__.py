"""How results look: dataclasses in, rich renderables out; nothing is computed here."""
