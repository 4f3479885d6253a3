"""How each figure is drawn: one function per kind, for TensorBoard's cards and for the picture of a run alike."""
