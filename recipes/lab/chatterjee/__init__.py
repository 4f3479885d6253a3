"""Chatterjee 2022 in the laboratory."""
