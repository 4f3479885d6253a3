"""Linear regions of ReLU networks in the laboratory."""
