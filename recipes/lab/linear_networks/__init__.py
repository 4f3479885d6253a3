"""Linear networks in the laboratory."""
