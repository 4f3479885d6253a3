"""``ConvergenceCriteria``: the inequalities of the theorems, judged during a run; ``register_criteria`` adds a paper."""

from lightning_conv.callbacks.criteria import (
    papers,  # importing the papers registers them; nothing else here knows them
)
from lightning_conv.callbacks.criteria.callback import ConvergenceCriteria
from lightning_conv.callbacks.criteria.tracker import CriteriaTracker, register_criteria, registered_criteria

__all__ = ["ConvergenceCriteria", "CriteriaTracker", "papers", "register_criteria", "registered_criteria"]
