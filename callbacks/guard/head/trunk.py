"""``FrozenTrunk``: freezes the trunk in phase 2, detects changes of it, and makes it trainable again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_conv.callbacks.guard.view import GuardView
from lightning_conv.networks.perturbation import fingerprint, freeze
from lightning_conv.networks.undisturbed import without_fused_attention


class FrozenTrunk:
    """The trunk of a module: all of it but the head.

    Args:
        view: Run, with its network split into trunk and head.
    """

    def __init__(self, view: GuardView) -> None:
        self._module, self._head, self._ranks = view.module, view.head, view.ranks
        self._thawed: list[nn.Parameter] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._fused = ExitStack()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the trunk that require a gradient at present, by name."""
        return {name: p for name, p in self._head.trunk_parameters(self._module).items() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """Return all parameters and buffers of the module by name; they must be equal on all ranks before the certificate."""
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def copy(self) -> dict[str, Tensor]:
        """Return a copy of ``state`` for ``put_back``."""
        return {name: tensor.detach().clone() for name, tensor in self.state().items()}

    @torch.no_grad()
    def put_back(self, before: dict[str, Tensor]) -> None:
        """Restore all parameters and buffers.

        Args:
            before: Copy that ``copy`` returned.
        """
        for name, tensor in self.state().items():
            tensor.copy_(before[name])

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Put the whole module into eval mode for a while."""
        modes = [(module, module.training) for module in self._module.modules()]
        self._module.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def freeze(self) -> None:
        """Freeze the trunk and put the whole module into eval mode, without torch's fused attention of that mode.

        Under DDP, rewrap it so that no rank waits for absent gradients.
        """
        self._thawed = list(self.trainable.values())
        self._modes = [(module, module.training) for module in self._module.modules()]
        freeze(self._thawed)
        self._module.eval()
        self._fused.enter_context(without_fused_attention())
        if self._thawed:
            self._ranks.rewrap()

    def keep_still(self) -> None:
        """Return the module to eval mode if something switched it, as Lightning does after a validation."""
        if any(module.training for module in self._module.modules()):
            self._module.eval()

    def release(self) -> None:
        """Restore ``requires_grad`` of the trunk and the train or eval mode of every submodule. A second call does nothing."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        for module, training in self._modes:
            module.training = training
        self._thawed, self._modes = [], []
        self._fused.close()

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each parameter and each buffer of a layer, by name.

        Buffers of the LightningModule itself are left out: they hold counters and the like, while those of its layers enter the features.
        """
        tensors: dict[str, Tensor] = dict(self._head.trunk_parameters(self._module))
        tensors |= {name: buffer for name, buffer in self._module.named_buffers() if "." in name}
        return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}

    def moved_since(self, then: dict[str, str]) -> list[str]:
        """Return the names of the tensors that changed by at least one bit, on any rank.

        Args:
            then: Hashes by name that ``fingerprints`` returned earlier.
        """
        now = self.fingerprints()
        moved = {name for name, known in then.items() if now.get(name) != known}
        return sorted(set().union(*self._ranks.gather(lambda: moved)))
