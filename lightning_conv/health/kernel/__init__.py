"""What the kernel says of a run: forecasts, noise, regime and bounds."""
