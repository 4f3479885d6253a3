"""The trunk in phase 2: taken out of training, watched, and handed back as it was."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_conv.callbacks.run.ranks import Ranks
from lightning_conv.networks.head import Head
from lightning_conv.networks.perturbation import fingerprint, freeze


class FrozenTrunk:
    """Everything of a module but its head.

    Args:
        pl_module: of the run.
        head: its last linear layer.
        ranks: that hold a copy of it each.
    """

    def __init__(self, pl_module: pl.LightningModule, head: Head, ranks: Ranks) -> None:
        self._module, self._head, self._ranks = pl_module, head, ranks
        self._thawed: list[nn.Parameter] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trunk's parameters that are trained now."""
        return {name: p for name, p in self._head.trunk_parameters(self._module).items() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """All parameters and buffers of the module: what the ranks must agree on before they certify."""
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def copy(self) -> dict[str, Tensor]:
        """``state``, to be put back."""
        return {name: tensor.detach().clone() for name, tensor in self.state().items()}

    @torch.no_grad()
    def put_back(self, before: dict[str, Tensor]) -> None:
        """Everything as it was when ``copy`` was taken."""
        for name, tensor in self.state().items():
            tensor.copy_(before[name])

    def freeze(self) -> None:
        """No gradients for the trunk, none that other ranks wait for, and eval mode for the whole module."""
        self._thawed = list(self.trainable.values())
        self._modes = [(module, module.training) for module in self._module.modules()]
        freeze(self._thawed)
        self._module.eval()
        if self._thawed:
            self._ranks.rewrap()

    def keep_still(self) -> None:
        """Back to eval mode, should something have switched modes."""
        if any(module.training for module in self._module.modules()):
            self._module.eval()

    def release(self) -> None:
        """Hand the module back: trainable, and in the mode it was in. Does nothing a second time."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        self._thawed, self._modes = [], []

    def fingerprints(self) -> dict[str, str]:
        """One for each parameter and each buffer of a layer.

        Buffers of the LightningModule itself count samples and the like; those of its layers make the features.
        """
        tensors: dict[str, torch.Tensor] = dict(self._head.trunk_parameters(self._module))
        tensors |= {name: buffer for name, buffer in self._module.named_buffers() if "." in name}
        return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}

    def moved_since(self, then: dict[str, str]) -> list[str]:
        """Names of what is not bit for bit what it was when ``then`` was taken, on any rank."""
        now = self.fingerprints()
        moved = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
        return sorted(set().union(*self._ranks.gather(lambda: moved)))
