"""The kernel over a few parameters bounds lambda_min of the whole one, on networks of several kinds, against dense Jacobians."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_conv import kernel_spectrum, lambda_min_bound, ntk_gram
from lightning_conv.health.kernel.subset_parameters import LAST_BLOCK, require_subset, subset_parameters


class Attention(nn.Module):
    """A block of attention over tokens, with a head on their mean."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        h = self.embed(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(torch.tanh(self.wide(h)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 2))


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    with torch.no_grad():  # running statistics that are not (0, 1)
        for layer in (net[1], net[4]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return net


NETWORKS = {
    "mlp": (mlp, lambda: torch.randn(5, 6)),
    "conv": (convolutional, lambda: torch.randn(5, 2, 6, 6)),
    "attention": (Attention, lambda: torch.randint(0, 11, (5, 4))),
}


def dense(model, x, names=None, outputs="trace", s=None):
    """lambda_min of J J^T with J by one reverse pass for each output, in float64, in eval mode; with its rounding error."""
    model = copy.deepcopy(model).double().eval()
    x = x.double() if x.is_floating_point() else x
    own = dict(model.named_parameters())
    chosen = [own[name] for name in (names or own)]
    u = model(x)
    rows = []
    for each in u.flatten():
        found = torch.autograd.grad(each, chosen, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(chosen, found, strict=True)])
        )
    j = torch.stack(rows).detach().reshape(*u.shape, -1)
    if s is not None:
        j = torch.einsum("nc,ncp->np", s.double(), j)
        gram = j @ j.T
    elif outputs == "full":
        gram = j.flatten(0, 1) @ j.flatten(0, 1).T
    elif outputs == "sum":
        gram = j.sum(1) @ j.sum(1).T
    else:
        gram = torch.einsum("ncp,mcp->nm", j, j)
    values = torch.linalg.eigvalsh(gram)
    return float(values[0]), 1e-13 * float(values[-1])


@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
@pytest.mark.parametrize("parameters", [LAST_BLOCK, "0.*", ["*.bias", "*weight"]])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_is_below_the_dense_value_of_all_parameters(name, parameters, outputs):
    make, samples = NETWORKS[name]
    if name == "attention" and parameters == "0.*":
        parameters = ["attention.*", "norm.*"]
    for seed in range(2):
        torch.manual_seed(seed)
        model, x = make(), samples()
        found = lambda_min_bound(model, x, parameters=parameters, outputs=outputs)
        whole, error = dense(model, x, outputs=outputs)
        part, own_error = dense(model, x, found.parameters, outputs=outputs)
        assert found.probe.lower <= whole + error
        assert found.probe.lower == pytest.approx(max(part, 0.0), rel=1e-6, abs=own_error + error)
        assert found.probe.certified == (found.probe.lower > 0)
        assert found.samples == 5


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_block_of_these_networks_proves_something(name):
    torch.manual_seed(0)
    make, samples = NETWORKS[name]
    model, x = make(), samples()
    found = lambda_min_bound(model, x)
    assert found.probe.certified
    assert found.probe.lower > 0
    everything = {n for n, _ in model.named_parameters()}
    assert set(found.parameters) < everything


def test_the_bound_of_contracted_outputs_is_of_their_kernel():
    torch.manual_seed(0)
    model, x, s = mlp(), torch.randn(5, 6), torch.randn(5, 2)
    found = lambda_min_bound(model, x, cotangents=s)
    whole, error = dense(model, x, s=s)
    part, _ = dense(model, x, found.parameters, s=s)
    assert 0 < found.probe.lower <= whole + error
    assert found.probe.lower == pytest.approx(part, rel=1e-6)
    assert found.outputs == "cotangents"


def test_together_the_parameters_of_several_patterns_bound_more_than_the_sum():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(5, 6)
    each = [lambda_min_bound(model, x, parameters=pattern).probe.lower for pattern in ("2.*", "4.*")]
    both = lambda_min_bound(model, x, parameters=["2.*", "4.*"]).probe.lower
    assert min(each) > 0
    assert both >= sum(each)


def test_a_whole_kernel_that_lies_below_the_bound_is_of_another_network():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(5, 6)
    whole = kernel_spectrum(ntk_gram(model, x, precision="certified")).lambda_min
    found = lambda_min_bound(model, x, whole=whole)
    assert found.probe.lower <= whole.upper == found.probe.upper
    with torch.no_grad():
        model[4].weight.mul_(0.01)
        model[2].weight.mul_(0.01)
        other = kernel_spectrum(ntk_gram(model, x, precision="certified")).lambda_min
        model[4].weight.mul_(1e4)
        model[2].weight.mul_(1e2)
    with pytest.raises(ValueError, match="of another kernel"):
        lambda_min_bound(model, x, parameters="2.*", whole=other)


def test_what_is_singular_or_cast_proves_nothing():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(5, 6)
    singular = lambda_min_bound(model, torch.cat([x, x[:1]]))
    assert not singular.probe.certified
    assert singular.probe.lower == 0

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.to(torch.bfloat16).to(x.dtype))

    assert not lambda_min_bound(Cast(), x).probe.certified


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = convolutional().train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    lambda_min_bound(model, torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0)), batch_norm="frozen")
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(each.grad is None for each in model.parameters())


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them, and one that it never calls."""

    def __init__(self, width=40):
        super().__init__()
        self.last = nn.Linear(width, 2)
        self.unused = nn.Linear(50, 50)
        self.first = nn.Linear(6, width)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """The first weight is the last one, too, as in language models."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embed(x)))).mean(1)


def chosen(model, x, asked=LAST_BLOCK, **options):
    return subset_parameters(model, x, asked, **options)


def test_the_last_block_is_the_end_of_the_calls_as_far_as_it_is_needed():
    assert chosen(Backwards(), torch.randn(5, 6)) == ("last.weight", "last.bias")
    # 82 numbers are fewer than twice the 60 outputs
    assert chosen(Backwards(), torch.randn(30, 6)) == ("last.weight", "last.bias", "first.weight", "first.bias")
    assert chosen(mlp(), torch.randn(12, 6)) == ("4.weight", "4.bias")
    assert chosen(mlp(), torch.randn(13, 6)) == ("2.weight", "2.bias", "4.weight", "4.bias")
    assert chosen(mlp(), torch.randn(13, 6), one_row=True) == ("4.weight", "4.bias")
    # of however many samples: half of all 694 numbers are enough
    assert chosen(mlp(), torch.randn(10_000, 6)) == ("2.weight", "2.bias", "4.weight", "4.bias")
    assert chosen(Tied(), torch.randint(0, 11, (2, 3))) == ("embed.weight",)


def test_the_last_block_of_a_transformer_is_the_end_of_its_last_block_with_the_head():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(4, 16))  # of the root, which returns last of all
            self.blocks = nn.TransformerEncoder(layer, 3)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.blocks(x + self.position).mean(1))

    names = chosen(Transformer(), torch.randn(20, 4, 16))
    assert names[-2:] == ("head.weight", "head.bias")
    assert names[:-2]
    assert all(name.startswith("blocks.layers.2.") for name in names[:-2])


def test_frozen_parameters_are_no_part_of_a_block():
    model = mlp()
    model[4].requires_grad_(False)
    assert chosen(model, torch.randn(3, 6)) == ("2.weight", "2.bias")
    assert chosen(model, torch.randn(3, 6), among=["0.bias"]) == ("0.bias",)


def test_a_scripted_network_has_the_order_of_its_registration():
    scripted = torch.jit.trace(mlp(), torch.randn(3, 6))
    assert chosen(scripted, torch.randn(3, 6)) == ("4.weight", "4.bias")


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ("4.weigth", ValueError, "matches none of the 4 parameters that the kernel is over; the closest is '4.weight'"),
        (["4.*", "lora_*"], ValueError, "'lora_*' matches none"),
        ("0.*", ValueError, "only parameters that the kernel is not over, such as frozen ones"),
        ([], ValueError, "names nothing; need 'last block'"),
        ("", ValueError, "names nothing"),
        ([LAST_BLOCK, "4.*"], ValueError, "stands alone"),
        (3, TypeError, "got 3 (int)"),
        ([3], TypeError, "3 (int) is no pattern"),
        (b"4", TypeError, "bytes"),
    ],
)
def test_what_names_nothing_is_refused_with_the_closest_name(asked, error, says):
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(error) as raised:
        chosen(model, torch.randn(3, 6), asked)
    assert str(raised.value).startswith("parameters: ")
    assert says in str(raised.value)


def test_an_estimate_and_a_network_without_parameters_are_refused():
    with pytest.raises(ValueError, match="'projected' is an estimate"):
        lambda_min_bound(mlp(), torch.randn(3, 6), outputs="projected")
    with pytest.raises(ValueError, match="no trainable parameter"):
        lambda_min_bound(nn.Tanh(), torch.randn(3, 6))
    assert require_subset(("a", "b")) == ["a", "b"]
    assert math.isinf(lambda_min_bound(mlp(), torch.randn(3, 6)).probe.upper)


class Untouched(nn.Module):
    """A network that fails if it is evaluated."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        raise AssertionError("was evaluated")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"whole": 3.0}, TypeError, "whole: 3.0 (float); need lambda_min with its bounds, kernel_spectrum(ntk_gram("),
        ({"on_training_set": "no"}, TypeError, "on_training_set: 'no' (str); need True or False"),
        ({"model": None}, TypeError, "model: None; need a torch.nn.Module"),
        ({"inputs": None}, TypeError, "inputs: expected a tensor, a tuple or a mapping of tensors, got NoneType"),
        ({"outputs": "best"}, ValueError, "outputs: 'best' is not one of 'trace', 'full', 'sum'"),
        ({"outputs": "cotangents"}, ValueError, "outputs: 'cotangents' is no option; pass cotangents="),
        (
            {"outputs": "projected", "cotangents": torch.ones(3, 2)},
            ValueError,
            "outputs: 'projected' together with cot",
        ),
        (
            {"parameters": "Last block"},
            ValueError,
            "parameters: 'Last block'; did you mean 'last block', in small letters?",
        ),
    ],
)
def test_a_bad_argument_of_the_bound_is_named_before_the_network_is_evaluated(options, error, says):
    with pytest.raises(error) as raised:
        lambda_min_bound(**{"model": Untouched(), "inputs": torch.randn(3, 6), **options})
    assert str(raised.value).startswith(says)


def test_the_hints_of_the_bound_work_when_they_are_followed():
    torch.manual_seed(0)
    model, inputs = mlp().double(), torch.randn(3, 6, dtype=torch.float64)
    whole = kernel_spectrum(ntk_gram(model, inputs, precision="certified")).lambda_min
    assert lambda_min_bound(model, inputs, whole=whole).probe.upper < math.inf
    alone = lambda_min_bound(model, inputs, cotangents=torch.ones(3, 2, dtype=torch.float64))
    assert alone.outputs == "cotangents"


@pytest.mark.parametrize("asked", ["last_block", "lastblock", "last blok"])
def test_a_misspelt_last_block_is_told_its_name(asked):
    with pytest.raises(ValueError, match="'last block' stands for the last layers"):
        chosen(mlp(), torch.randn(3, 6), asked)
