"""One module per paper: what it measures in a run, how it is judged, what is logged and kept."""
