"""A batch that the module skips (``on_train_batch_start`` gives -1) has a start and no end: the head is left without hooks all the same."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard
from lightning_conv.callbacks.guard.head.loss_check import LossCheck

SWITCH = 6


@pytest.mark.parametrize("rule", ["base", "certified"])
def test_skipped_batches_leave_no_hook_on_the_head(make_trainer, make_module, make_loader, monkeypatch, rule):
    kept, begun = [], []
    real = LossCheck.before

    def before(self, batch):
        real(self, batch)
        begun.append(self)
        kept.append((len(self._view.head.module._forward_hooks), len(self._seen)))

    monkeypatch.setattr(LossCheck, "before", before)
    module, guard = make_module(dropout=0.0), ExpressivityGuard(switch_at=SWITCH, step_rule=rule)
    skipped = []

    def on_train_batch_start(batch, batch_idx):
        if module.trainer.current_epoch >= 4:
            skipped.append(batch_idx)
            return -1
        return None

    module.on_train_batch_start = on_train_batch_start
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)
    module.validation_step = lambda batch, batch_idx: module(batch[0]).sum()
    data = make_loader()
    make_trainer([guard], max_epochs=9, num_sanity_val_steps=0).fit(module, data, DataLoader(data.dataset, 32))
    assert guard.phase == 2
    assert len(skipped) == 5
    assert max(hooks for hooks, _ in kept) <= 2  # one of the watch over every step, one of the comparison of losses
    assert max(seen for _, seen in kept) <= 1
    assert not module.classifier._forward_hooks
    assert begun[-1]._seen == []
