"""The page of a run: one HTML file with what was found, the charts and the criteria, which needs no network."""
