"""What `ntk.py` is made of: the cases, the processes, the measurement, and the page."""
