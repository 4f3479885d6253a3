"""Numerical linear algebra with error bounds: rounding constants, eigenvalues, spectra and stochastic estimates."""
