"""Tools that several papers share: observations of a run, norms, activations, and bounds of smooth networks."""
