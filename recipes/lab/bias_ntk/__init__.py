"""Yang et al. 2023 in the laboratory."""
