"""Runs that get a signal in the midst of a measurement, or without one at the same moment; prints what is left of each as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import ConvergenceDiagnostics, KernelStability
from lightning_conv.callbacks.run.callbacks import callbacks_of

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have been told to ignore it

SENT = 5
"""Evaluation in a measurement at which the signal is sent."""


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        if not self.net.training:  # nothing but a measurement evaluates in eval mode
            EVALUATED.append(STEP[0])
            if EVALUATED.count(SENDS[0]) == SENT and SENDS[0] == STEP[0]:
                os.kill(os.getpid(), SENDS[1])
        return self.net(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Moment(pl.Callback):
    """Notes the step and, in a run without measurements, sends the signal."""

    def __init__(self, sends: bool) -> None:
        self.sends = sends

    def on_train_start(self, trainer, pl_module):
        self._at(trainer)

    def on_train_batch_end(self, trainer, *_):
        self._at(trainer)

    def _at(self, trainer) -> None:
        STEP[0] = trainer.global_step
        if self.sends and STEP[0] == SENDS[0]:
            os.kill(os.getpid(), SENDS[1])


EVALUATED: list[int] = []
STEP, SENDS = [0], [0, signal.SIGTERM]


def run(step: int, number: int, folder: Path | None) -> dict[str, object]:
    pl.seed_everything(0, verbose=False)
    EVALUATED.clear()
    STEP[0], SENDS[:] = 0, [step, number]
    module, data = Net(), TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
    monitors = [] if folder is None else [ConvergenceDiagnostics(every_n_steps=1, probe=8)]
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=folder or Path(os.devnull).parent,
                         callbacks=[Moment(folder is None), *monitors])  # fmt: skip
    ended = "completed"
    try:
        trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True))
    except BaseException as error:
        ended = f"{type(error).__name__} {getattr(error, 'code', '')}"
    numbers = [*module.state_dict().values(), *(p.grad for p in module.parameters() if p.grad is not None)]
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    left = {
        "ended": ended,
        "step": trainer.global_step,
        "numbers": hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in numbers)).hexdigest(),
        "generators": hashlib.sha256(repr(state).encode()).hexdigest(),
        "modes": [each.training for each in module.modules()],
        "hooks": sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()),
        "handler": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    if folder is not None:
        files = sorted(path.name for path in folder.iterdir())
        page = (folder / "convergence.md").read_text() if "convergence.md" in files else ""
        json.loads((folder / "convergence.json").read_text())
        (kept,) = callbacks_of(trainer, KernelStability)
        left["of measuring"] = {
            "evaluated": EVALUATED.count(step),
            "files": files,
            "page": page,
            "last": kept._last_step,
        }
    return left


if __name__ == "__main__":
    found = {}
    for name in ("SIGTERM", "SIGINT"):
        for step in (0, 3):
            folder = Path(sys.argv[1], f"{name}{step}")
            folder.mkdir()
            number = getattr(signal, name)
            with contextlib.redirect_stdout(sys.stderr):
                found[f"{name} {step}"] = [run(step, number, folder), run(step, number, None)]
    print(json.dumps(found))
