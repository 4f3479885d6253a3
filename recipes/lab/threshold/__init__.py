"""Ergen et al. 2023 (threshold networks) in the laboratory."""
