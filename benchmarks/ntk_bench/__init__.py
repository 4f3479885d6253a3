"""The parts of `ntk.py`: the cases, the processes, the measurement and the page."""
