"""Kawaguchi & Sun 2021 in the laboratory."""
