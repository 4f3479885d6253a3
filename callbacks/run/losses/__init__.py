"""The loss of the training step: observed, given or unknown."""
