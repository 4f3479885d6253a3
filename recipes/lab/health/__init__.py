"""The laboratory of ``ConvergenceHealth``: how often its sentences are right."""
