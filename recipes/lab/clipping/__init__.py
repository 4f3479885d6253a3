"""Tucat et al. 2025 (delta-GClip) in the laboratory."""
