"""Networks as functions: evaluation without side effects, BatchNorm modes, the head, wide layers and analyticity."""
