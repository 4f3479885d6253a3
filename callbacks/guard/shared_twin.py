"""``shared_twin``: a copy of the LightningModule that has the weights and buffers of the run themselves."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_conv.callbacks.run.twin import Twin


def shared_twin(trainer: pl.Trainer, module: pl.LightningModule) -> Twin:
    """Return a copy of the module, in eval mode, whose parameters and buffers are those of the run.

    So whatever the run does to its weights, the copy has; its attributes, metrics, hooks and modes are its own. It is to be called through
    ``StatelessModule`` alone, which puts other tensors in the place of these while a forward runs.

    Args:
        trainer: Trainer of the run.
        module: Module that it trains.
    """
    twin = Twin(trainer, module)
    twin.module.eval()
    originals = dict(module.named_modules(remove_duplicate=False))
    for name, copied in twin.module.named_modules(remove_duplicate=False):
        original = originals[name]
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(copied, kind)
            for key in tensors:
                tensors[key] = getattr(original, kind)[key]
    return twin
