"""Findings: sentences about a run, each with its number, its limit and what to do."""
