"""Data that only the workers of the loader can read are measured on the first batch, and the run goes on as it would."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_conv.callbacks import ConvergenceCriteria, ConvergenceHealth, ExpressivityGuard, LambdaMin
from lightning_conv.callbacks.run.data.readable import why_unreadable

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class InWorkers(Dataset):
    """Asks where it is read."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        assert get_worker_info() is not None, "read in workers only"
        return X[index], Y[index]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(workers=1):
    order = torch.Generator().manual_seed(3)
    return DataLoader(InWorkers(), batch_size=16, shuffle=True, generator=order, num_workers=workers)


SAYS = r"not in the main process \(AssertionError: read in workers only\); the first batch is used in their place"


@pytest.mark.parametrize("make", [ConvergenceHealth, ConvergenceCriteria, LambdaMin])
def test_the_first_batch_is_measured_and_the_weights_are_those_of_a_run_by_itself(make_trainer, make):
    plain, watched = Net(), Net()
    torch.manual_seed(1)
    make_trainer([], max_epochs=2).fit(plain, loader())
    monitor = make(every_n_steps=1)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=SAYS):
        make_trainer([monitor], max_epochs=2).fit(watched, loader())
    assert "observed" in monitor.measured
    assert not monitor.failed
    for mine, its in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_kernel_is_that_of_the_first_batch(make_trainer):
    monitor, seen = LambdaMin(every_n_steps=1), []

    class Seen(Net):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=SAYS):
        make_trainer([monitor], max_steps=1).fit(Seen(), loader())
    first = next(each for each in seen if len(each) == 16)
    assert torch.equal(monitor.state_dict()["inputs"], first)


def test_the_guard_which_reads_all_samples_refuses_with_the_cause(make_trainer):
    with pytest.raises(MisconfigurationException, match=r"InWorkers cannot be read \(AssertionError: read in workers"):
        make_trainer([ExpressivityGuard()], max_epochs=1).fit(Net(), loader())


def test_the_cause_is_known_and_nothing_is_read_that_no_worker_reads():
    assert why_unreadable(InWorkers(), loader()) == "AssertionError: read in workers only"
    assert why_unreadable(InWorkers(), loader(workers=0)) == ""
    fine = DataLoader(list(zip(X, Y, strict=True)), batch_size=4, num_workers=1)
    assert why_unreadable(fine.dataset, fine) == ""
