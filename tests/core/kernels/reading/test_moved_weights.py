"""A layer whose gradient is zero at the weights of now, such as behind an adapter that is zero, keeps its rule."""

import pytest
import torch
from dense_kernels import assert_same
from kernels.cases import build, kernel
from torch import nn

from lightning_conv import ntk_gram, plan_ntk


def test_both_factors_of_a_low_rank_term_have_rules_while_one_of_them_is_zero():
    gram = ntk_gram(*build("low-rank term that is zero"))
    assert gram.general == ()
    assert {"lora_A", "lora_B"} <= {*gram.structured}


def test_a_plan_from_the_start_serves_when_the_term_has_grown():
    model, inputs = build("low-rank term that is zero")
    plan = plan_ntk(model, inputs)
    with torch.no_grad():
        model.lora_B.normal_()
    grown = ntk_gram(model, inputs, plan=plan)
    assert grown.general == ()
    assert_same(grown.matrix, ntk_gram(model, inputs, engine="jacobian").matrix)
    assert not torch.allclose(grown.matrix, kernel("low-rank term that is zero", "trace"))


def test_weights_of_the_network_stay_what_they_are():
    model, inputs = build("low-rank term that is zero")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    ntk_gram(model, inputs)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


class Merged(nn.Module):
    """Samples that are merged with positions behind a gain of zero, where the shape alone does not tell which is which."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.zeros(4))

    def forward(self, x):  # (n, T, 3)
        hidden = torch.tanh(self.layer(x.transpose(0, 1).reshape(-1, 3)))  # position * n + sample
        return self.head(self.gain * hidden).view(x.shape[1], len(x), 2).sum(0)


@pytest.mark.parametrize("samples", [3, 5])
def test_samples_are_found_where_they_are_although_the_gradient_is_zero(samples):
    torch.manual_seed(0)
    model, inputs = Merged().double(), torch.randn(samples, 3, 3, dtype=torch.float64)
    plan = plan_ntk(model, inputs)
    assert "layer.weight" not in plan.reading.general
    nn.init.normal_(model.gain)
    assert_same(ntk_gram(model, inputs, plan=plan).matrix, ntk_gram(model, inputs, engine="jacobian").matrix)


class Refuses(nn.Module):
    """A forward that does not go on with other weights."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        if self.second.weight.any():
            raise ValueError("must be zero")
        return self.second(self.first(x))


def test_a_forward_that_refuses_other_weights_is_read_as_before():
    model = Refuses().double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    gram = ntk_gram(model, inputs)
    assert {"first.weight", "first.bias"} <= {*gram.general}
    hidden = torch.cat([model.first(inputs), torch.ones(4, 1)], 1).detach()
    assert_same(gram.matrix, hidden @ hidden.T)
