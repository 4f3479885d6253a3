"""Oymak & Soltanolkotabi 2019 in the laboratory."""
