"""The step of the optimizer against the curvature of the loss, and the course of the loss."""
