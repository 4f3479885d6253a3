"""Nitanda & Suzuki 2021 in the laboratory."""
