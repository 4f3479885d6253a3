"""``SharedTwin``: a copy of the LightningModule that has the weights and buffers of the run themselves."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_conv.callbacks.run.twin import Twin

PLAIN = (bool, int, float, complex, str, bytes, type(None))
OWN = ("training", "_parameters", "_buffers", "_modules")  # of each of the two


class SharedTwin:
    """A copy of the module, in eval mode, whose parameters and buffers are those of the run.

    So whatever the run does to its weights, the copy has; its metrics, hooks and modes are its own, and what it logs goes nowhere. It is to
    be called through ``StatelessModule`` alone, which puts other tensors in the place of these while a forward runs.

    Args:
        trainer: Trainer of the run.
        module: Module that it trains.

    Attributes:
        module: The copy.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._original = module
        self.module = Twin(trainer, module).module
        self.module.eval()
        self.refresh()

    def refresh(self) -> None:
        """Take over what the run has set since: tensors, and attributes that are plain values, such as a temperature."""
        originals = dict(self._original.named_modules(remove_duplicate=False))
        for name, copied in self.module.named_modules(remove_duplicate=False):
            if (original := originals.get(name)) is None:
                continue
            for kind in ("_parameters", "_buffers"):
                tensors = getattr(copied, kind)
                for key in tensors.keys() & getattr(original, kind).keys():
                    tensors[key] = getattr(original, kind)[key]
            held = vars(copied)
            held.update(
                {
                    key: copy.deepcopy(value)
                    for key, value in vars(original).items()
                    if key not in OWN and key in held and _is_plain(value) and _is_plain(held[key])
                }
            )


def _is_plain(value: Any) -> bool:
    """Return whether a value holds no more than numbers, words and tensors without a graph."""
    if isinstance(value, Tensor):
        return value.grad_fn is None
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return isinstance(value, PLAIN)
