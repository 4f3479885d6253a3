"""``Kept``: what of a monitor a checkpoint has."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_conv.callbacks.monitors.by_optimizer import ByOptimizer
from lightning_conv.callbacks.run.callbacks import load_from_group
from lightning_conv.machine.gemm import keep_product, product_name
from lightning_conv.networks.inputs import sample_count


class Kept(ByOptimizer):
    """Base of ``Beginning``: the state of a monitor, with those of the monitors for the other optimizers.

    It has the samples of the probe, the names of the parameters, what was chosen to be measured, and the last numbers.
    """

    @override
    def state_dict(self) -> dict[str, Any]:
        others = {each.optimizer: state for each in self._others if (state := each.state_dict())}
        return self._own_state() | ({"others": others} if others else {})

    def _own_state(self) -> dict[str, Any]:
        if self._kernel is None:
            return dict(self._restored)
        leads = self._leads
        named = {"optimizer": self.optimizer} if self.optimizer else {}
        return named | {
            # Of the callbacks that share a probe, one carries the samples.
            "inputs": self._kernel.inputs if leads else None,
            "targets": self._kernel.targets if leads else None,
            "read": sample_count(self._kernel.run_network.inputs),
            "parameters": list(self._kernel.parameters),
            "outputs": self._kernel.probe.outputs,
            "loss_changed": self._kernel.probe_loss.changed,
            "highest": str(self._kernel.highest),
            "precision": str(self._kernel.precision),
            "product": product_name(),
            "last_step": self._last_step,
            "metrics": dict(self._metrics),
        }

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        load_from_group(self, checkpoint)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.forget()
        self._restored, self._loaded = dict(state_dict), True
        self._stored = dict(state_dict.get("others", {}))
        self._last_step = state_dict.get("last_step")
        keep_product(state_dict.get("product", ""))
        self._metrics = dict(state_dict.get("metrics", {}))
