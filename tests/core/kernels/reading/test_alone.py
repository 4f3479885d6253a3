"""Samples that are evaluated by themselves in one pass: their outputs, and which forwards cannot be transformed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.kernels.reading import coupling
from lightning_conv.kernels.reading.alone import outputs_alone
from lightning_conv.networks.evaluation import StatelessModule


class Words(nn.Module):
    """Attention over words, from a mapping of tensors."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, words, scale):
        return self.head(self.encoder(self.words(words)).mean(1) * scale[:, None])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) * (1 + torch.rand(2) * 1e-12)


class Looking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if bool((x > -5).all()) else self.layer(2 * x)


NETWORKS = {
    "convolutional": lambda: (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        torch.rand(9, 3, 6, 6),
    ),
    "attention": lambda: (Words(), {"words": torch.randint(0, 11, (9, 5)), "scale": torch.rand(9)}),
}
OTHERS = {
    "recurrent": lambda: (Recurrent(), torch.rand(9, 6, 4)),
    "random": lambda: (Random(), torch.rand(9, 4)),
    "looks at numbers": lambda: (Looking(), torch.rand(9, 4)),
}


def function(make):
    torch.manual_seed(0)
    model, inputs = make()
    return StatelessModule(model.eval(), dtype=torch.float64), inputs


@pytest.mark.parametrize("rows", [4, 9])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_output_is_that_of_a_batch_of_one(name, rows):
    module, inputs = function(NETWORKS[name])
    inputs = module.convert(inputs)
    seen = 0
    for cut, found in outputs_alone(module, inputs, rows, lambda each: each):
        for sample, row in zip(range(cut.start, cut.stop), found, strict=True):
            one = {k: v[sample : sample + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else None
            own = module.outputs({}, inputs[sample : sample + 1] if one is None else one)
            assert torch.allclose(row, own[0], rtol=1e-12, atol=1e-12)
            seen += 1
    assert seen == 9
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_transformed_fails_and_is_compared_in_other_batches(name, monkeypatch):
    module, inputs = function(OTHERS[name])
    with pytest.raises(Exception, match=r"."):
        list(outputs_alone(module, module.convert(inputs), 9, lambda each: each))
    said = []
    take = coupling._Judge.take
    monkeypatch.setattr(coupling._Judge, "take", lambda self, *a: (said.append(a[2]), take(self, *a)))
    ntk_gram(module.model, inputs)
    assert "with the order of the batch" in said


@pytest.mark.parametrize("name", NETWORKS)
def test_two_forwards_of_the_samples_are_enough(name, monkeypatch):
    module, inputs = function(NETWORKS[name])
    said = []
    take = coupling._Judge.take
    monkeypatch.setattr(coupling._Judge, "take", lambda self, *a: (said.append(a[2]), take(self, *a)))
    plan_ntk(module.model, inputs)
    assert said
    assert set(said) <= {"when the rest of the batch is added", "when its batch is a part of the samples"}


def test_a_sample_that_sees_others_in_a_pass_of_single_ones_as_well_is_refused():
    """What is kept from an earlier batch reaches a sample that is evaluated by itself, too."""

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(4, 2), None

        def forward(self, x):
            mean = x.mean(0) if self.seen is None or len(x) > 1 else self.seen
            self.seen = mean.detach()
            return self.layer(x) + mean[:2]

    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(Kept(), torch.rand(9, 4))
