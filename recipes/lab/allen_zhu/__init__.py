"""Allen-Zhu, Li & Song 2019 in the laboratory."""
