"""``Moment``: what is computed of a network at one moment, once for all callbacks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lightning_conv.callbacks.run.moment import Moment
from lightning_conv.health.layers.activity import unit_activity
from lightning_conv.health.layers.layer_signal import layer_signal
from lightning_conv.losses.gradient import SampleLoss

LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


class Counted(nn.Module):
    """A network that counts its forwards."""

    def __init__(self, *, normalised):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5) if normalised else nn.Identity(), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head, self.forwards = nn.Linear(5, 2), []

    def forward(self, x):
        self.forwards.append(len(x))
        return self.head(self.trunk(x))


@pytest.fixture
def inputs():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalised", [True, False])
def test_what_is_seen_of_a_moment_is_what_is_seen_of_the_network(inputs, normalised):
    network, loss_fn = Counted(normalised=normalised), nn.CrossEntropyLoss()
    moment = Moment(network, inputs, "frozen")
    loss = moment.sample_loss(LABELS, loss_fn)
    apart = partial(copy.deepcopy, network)
    expected = SampleLoss(apart(), inputs, LABELS, loss_fn, batch_norm="frozen")
    assert torch.equal(moment.outputs, expected.outputs())
    assert loss.value() == expected.value() == loss.of_outputs(moment.shaped_outputs)
    assert moment.seen_by(unit_activity) == unit_activity(apart(), inputs, batch_norm="frozen")
    assert moment.seen_by(layer_signal) == layer_signal(apart(), inputs, batch_norm="frozen")


def test_the_statistics_of_the_probe_are_found_in_one_forward_that_gives_the_outputs(inputs):
    network = Counted(normalised=True)
    moment = Moment(network, inputs, "frozen")
    loss = moment.sample_loss(LABELS, nn.CrossEntropyLoss())
    loss.of_outputs(moment.shaped_outputs)
    assert network.forwards == []  # they are put back, like every attribute that a forward changes
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    other = Moment(network, inputs, "frozen")
    other.sample_loss(LABELS, nn.CrossEntropyLoss()).of_outputs(other.shaped_outputs)
    assert len(calls) == 1
    other.seen_by(unit_activity)
    other.seen_by(layer_signal)
    assert len(calls) == 3


def test_without_batch_norm_no_forward_is_made_for_statistics(inputs):
    network, calls = Counted(normalised=False), []
    network.register_forward_hook(lambda *_: calls.append(1))
    Moment(network, inputs, "frozen").seen_by(unit_activity)
    assert len(calls) == 1
