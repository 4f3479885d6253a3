"""Numerical linear algebra with error bounds: eigenvalues, spectra and stochastic estimates."""
