"""The runs of ``benchmarks/overhead.py``, how one is timed, and its page."""
