"""What a piece of code calls, draws and returns, observed while it runs: the network behind any training step."""
