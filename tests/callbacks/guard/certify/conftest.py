"""``fit``: a guarded run of six epochs."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from lightning_conv.callbacks import ExpressivityGuard
from tests.callbacks.guard.certify.nets import SWITCH, table


@pytest.fixture
def fit(make_trainer):
    def go(module, *others, data=None, guard=None, shuffle=False, ckpt=None, batch=8, **options):
        guard = guard or ExpressivityGuard(switch_at=SWITCH)
        trainer = make_trainer([guard, *others], **{"max_epochs": 6} | options)
        trainer.fit(module, DataLoader(data or table(), batch, shuffle=shuffle), ckpt_path=ckpt)
        return guard

    return go
