"""Kawaguchi & Sun 2021 (2104.05785): the expressivity condition, and the second phase (training of the last layer)."""
