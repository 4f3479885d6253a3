"""Du et al. 2019 in the laboratory: limit kernels, depth, training, and the two-layer network."""
