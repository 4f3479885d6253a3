"""Compute a planned kernel: pass the samples through the network and add up the Gram blocks."""
