"""Units, signals and gradients of the layers."""
