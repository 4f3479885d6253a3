"""Products with Jacobians and matrices: J^T V, J W, and sums in a chosen precision with rounding bounds."""
