"""``FrozenTrunk``: the trunk in phase 2, taken out of training, watched, and handed back as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.networks.perturbation import fingerprint, freeze


class FrozenTrunk:
    """Everything of a module but its head.

    Args:
        view: The run.
    """

    def __init__(self, view: GuardView) -> None:
        self._module, self._head, self._ranks = view.module, view.head, view.ranks
        self._thawed: list[nn.Parameter] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the trunk that are trained now, by name."""
        return {name: p for name, p in self._head.trunk_parameters(self._module).items() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Return all parameters and buffers of the module: what the ranks must agree on before they certify."""
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def copy(self) -> dict[str, Tensor]:
        """Return a copy of ``state`` for ``put_back``."""
        return {name: tensor.detach().clone() for name, tensor in self.state().items()}

    @torch.no_grad()
    def put_back(self, before: dict[str, Tensor]) -> None:
        """Restore all parameters and buffers.

        Args:
            before: What ``copy`` returned.
        """
        for name, tensor in self.state().items():
            tensor.copy_(before[name])

    def freeze(self) -> None:
        """Take the trunk out of training: it gets no gradients, no rank waits for them, and the whole module is in eval mode."""
        self._thawed = list(self.trainable.values())
        self._modes = [(module, module.training) for module in self._module.modules()]
        freeze(self._thawed)
        self._module.eval()
        if self._thawed:
            self._ranks.rewrap()

    def keep_still(self) -> None:
        """Go back to eval mode, should something have switched modes."""
        if any(module.training for module in self._module.modules()):
            self._module.eval()

    def release(self) -> None:
        """Hand the module back trainable and in the mode it was in. A second call does nothing."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        self._thawed, self._modes = [], []

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each parameter and each buffer of a layer, by name.

        Buffers of the LightningModule itself count samples and the like; those of its layers make the features.
        """
        tensors: dict[str, Tensor] = dict(self._head.trunk_parameters(self._module))
        tensors |= {name: buffer for name, buffer in self._module.named_buffers() if "." in name}
        return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}

    def moved_since(self, then: dict[str, str]) -> list[str]:
        """Return the names of the tensors that changed by at least one bit, on any rank.

        Args:
            then: Hashes that ``fingerprints`` returned earlier.
        """
        now = self.fingerprints()
        moved = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
        return sorted(set().union(*self._ranks.gather(lambda: moved)))
