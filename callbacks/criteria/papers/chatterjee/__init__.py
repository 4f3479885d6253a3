"""Chatterjee 2022 in a run: what is proven before the first step, a search in balls around the start, and descent."""

from lightning_conv.callbacks.criteria.papers.chatterjee.tracker import ChatterjeeTracker

__all__ = ["ChatterjeeTracker"]
