"""Quantities that several papers use: norms, patterns, descent paths, bounds of smooth networks on a ball."""
