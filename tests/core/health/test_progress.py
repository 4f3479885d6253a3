"""A training loss that has not fallen is named; none of the runs that train is."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_conv.health.findings.of_losses import finding_of_progress
from lightning_conv.health.step.progress import FEWEST, WINDOW, progress_of

OPTIMIZERS = {
    "SGD": lambda weights, rate: torch.optim.SGD(weights, rate, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
USUAL = {"SGD": (0.01, 0.1), "Adam": (3e-4, 3e-3), "AdamW": (3e-4, 3e-3)}


def train(optimizer, rate, *, seed=0, batch=32, steps=200, noise=False):
    """Return the finding about a perceptron on the digits."""
    torch.manual_seed(seed)
    x, y = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    x, y = x.float() / 16, torch.randint(0, 10, (len(y),)) if noise else y
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    made = OPTIMIZERS[optimizer](net.parameters(), rate)
    losses = []
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,))
        loss = F.cross_entropy(net(x[rows]), y[rows])
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(float(loss.detach()))
    return finding_of_progress(progress_of(losses[:WINDOW], losses[-WINDOW:], steps))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_runs_that_train_are_not_named_and_those_that_do_not_are(optimizer, batch):
    for seed in range(3):
        for rate in USUAL[optimizer]:
            assert train(optimizer, rate, seed=seed, batch=batch) is None, (rate, seed)
        found = train(optimizer, 1e-9, seed=seed, batch=batch)
        assert found.level == "notice"
        assert "has not fallen: it was 2.3" in found.sentence
    assert train(optimizer, 1e-5 if optimizer == "SGD" else 1e-6, batch=batch, noise=True).level == "notice"


def test_too_few_losses_and_such_that_are_not_finite_say_nothing():
    losses = [1.0] * WINDOW
    assert progress_of(losses[1:], losses, FEWEST) is None
    assert progress_of(losses, losses, FEWEST - 1) is None
    assert progress_of(losses, [*losses[1:], math.nan], FEWEST) is None
    assert finding_of_progress(progress_of(losses, losses, FEWEST)).value == 1.0
    assert finding_of_progress(progress_of(losses, [0.98] * WINDOW, FEWEST)) is None


def test_a_small_first_loss_is_no_start():
    """A first batch that is easy by chance does not hide that the loss has fallen."""
    first = [0.1, *[2.0] * (WINDOW - 1)]
    assert finding_of_progress(progress_of(first, [0.5] * WINDOW, 100)) is None
