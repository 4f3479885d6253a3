"""The loggers of a run: its folder, what each kind of them takes, and how it is sent without ending a run."""
