"""Products with Jacobians (J^T V and J W), and matrix products in a chosen precision with rounding bounds."""
