"""Facts about a run, each decided once: probe, schedule, loss, sampling, steps and logging."""
