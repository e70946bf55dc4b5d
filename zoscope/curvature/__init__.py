"""Curvature operators and what can be measured of them from products alone."""
