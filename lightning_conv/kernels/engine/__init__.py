"""Carry out the plan of a kernel: pass the samples through the network, and add up the Gram blocks."""
