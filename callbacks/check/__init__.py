"""A dry run: what the callbacks would measure in a run, found out by their own machinery on a copy, before anything is trained."""
