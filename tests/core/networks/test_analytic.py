"""Functions with kinks are found wherever they are called, and activations are replaced by smooth ones."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_conv.networks.analytic import find_kinks, make_analytic


def kinks(model, *shape):
    return [(kink.module, kink.what) for kink in find_kinks(model, torch.randn(2, *shape))]


SMOOTH = [
    nn.Softplus(beta=100, threshold=40),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.SiLU(),
    nn.Mish(),
    nn.LayerNorm(6),
    nn.Softmax(1),
]
KINKED = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(),
    nn.PReLU(),
    nn.ELU(),
    nn.SELU(),
    nn.CELU(),
    nn.ReLU6(),
    nn.Hardtanh(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Softshrink(),
    nn.Hardshrink(),
    nn.Threshold(0.1, 0.0),
]


@pytest.mark.parametrize("activation", SMOOTH, ids=repr)
def test_smooth_activations_have_none(activation):
    assert kinks(nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2)), 4) == []


@pytest.mark.parametrize("activation", KINKED, ids=repr)
def test_kinked_activations_are_named(activation):
    assert [name for name, _ in kinks(nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2)), 4)] == ["1"]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (torch.relu, "ReLU"),
        (torch.abs, "absolute value"),
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: x.max(1, keepdim=True).values, "maximum"),
        (lambda x: torch.maximum(x, -x), "maximum"),
        (lambda x: x.sort().values, "sorting"),
        (torch.round, "rounding"),
        (lambda x: F.max_pool1d(x[:, None], 2)[:, 0], "max pooling"),
        (lambda x: torch.where(x > 0, x, 0.1 * x), "comparison"),
    ],
)
def test_functions_inside_a_forward_are_seen(function, what):
    class Inner(nn.Module):
        def forward(self, x):
            return function(x)

    assert ("1", what) in kinks(nn.Sequential(nn.Linear(4, 6), Inner()), 4)


@pytest.mark.parametrize("enough", [1, 2, 3, 9])
def test_what_is_enough_is_the_beginning_of_all(enough):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Hardtanh(), nn.Linear(3, 1))
    everything = find_kinks(model, torch.ones(1, 2))
    assert find_kinks(model, torch.ones(1, 2), enough=enough) == everything


def test_unknown_functions_alone_are_never_enough():
    class Changing(nn.Module):
        """Reads a value, and has a kink where the weights are large alone."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            u = self.layer(x)
            return torch.relu(u) if float(self.layer.weight.detach()[0, 0]) > 0.5 else u

    torch.manual_seed(0)
    found = find_kinks(Changing(), torch.ones(1, 2), enough=1)
    assert not found[0].known
    assert found == find_kinks(Changing(), torch.ones(1, 2))


def test_integer_work_is_none_of_its_business():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, words):
            return self.table(words.clamp(max=4)).sum(1)

    assert find_kinks(Words(), torch.randint(0, 5, (2, 3))) == []


def test_transformers_with_gelu_are_analytic_and_with_relu_not():
    for activation, expected in (("gelu", []), ("relu", [("layers.0", "ReLU")])):
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
        assert kinks(nn.TransformerEncoder(layer, 1), 3, 8) == expected


def test_the_model_is_left_alone():
    model = torchvision.models.resnet18(num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = kinks(model, 3, 32, 32)
    assert ("maxpool", "max pooling") in found
    assert ("layer1.0.relu", "ReLU") in found
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_resnet_is_smooth_but_for_its_pooling():
    model = torchvision.models.resnet18(num_classes=3).eval()
    found = make_analytic(model, torch.randn(2, 3, 32, 32))
    assert len(found.swapped) == 9
    assert [(kink.module, kink.what) for kink in found.left] == [("maxpool", "max pooling")]
    assert any(isinstance(module, nn.ReLU) for module in model.modules())
    found.model.maxpool = nn.Identity()
    assert find_kinks(found.model, torch.randn(1, 3, 32, 32)) == []


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU6()], ids=repr)
@pytest.mark.parametrize("beta", [10.0, 100.0])
def test_smooth_twins_are_close(activation, beta):
    z = torch.linspace(-3, 9, 1001, dtype=torch.float64)
    found = make_analytic(nn.Sequential(activation), z[None], beta=beta)
    assert found.left == ()
    assert found.swapped == ("0",)
    assert float((found.model(z) - activation(z)).abs().max()) <= 1.0001 * math.log(2) / beta


def test_one_activation_in_two_places_stays_one():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared)
    found = make_analytic(model, torch.ones(1, 3)).model
    assert isinstance(found[1], nn.Softplus)
    assert found[1] is found[3]


def test_an_activation_alone_and_the_mode():
    found = make_analytic(nn.ReLU().eval(), torch.ones(1, 3))
    assert isinstance(found.model, nn.Softplus)
    assert not found.model.training


def test_beta_must_be_positive():
    with pytest.raises(ValueError, match="beta: 0"):
        make_analytic(nn.ReLU(), torch.ones(1, 3), beta=0)


def test_without_inputs_modules_are_swapped_and_judged_by_their_exact_type():
    model = torchvision.models.resnet18(num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    blind, seen = make_analytic(model, beta=100), make_analytic(model, images, beta=100)
    assert blind.swapped == seen.swapped
    assert [kink for kink in blind.left if kink.known] == list(seen.left)
    assert {kink.what for kink in blind.left if not kink.known} == {
        "unknown module ResNet",
        "unknown module BasicBlock",
    }
    assert (blind.watched, seen.watched) == (False, True)
    assert torch.equal(blind.model(images), seen.model(images))


class Inner(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Cut(nn.Tanh):
    def forward(self, x):
        return x.clamp(-1, 1)


def with_forward(layer):
    layer.forward = torch.relu
    return layer


def with_hook(layer):
    layer.register_forward_hook(lambda module, args, output: output.relu())
    return layer


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Inner(), "unknown module Inner in 1"),
        (Cut(), "unknown module Cut in 1"),
        (with_forward(nn.Tanh()), "unknown module Tanh (its forward was replaced) in 1"),
        (with_hook(nn.Tanh()), "unknown module Tanh (it has forward hooks) in 1"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "(it is reparametrized) in 1"),
        (nn.Softsign(), "unknown module Softsign in 1"),
        (nn.LayerNorm(3, eps=0.0), "normalisation with eps = 0 in 1"),
        (nn.RNN(3, 3, nonlinearity="relu"), "ReLU in 1"),
        (nn.Embedding(3, 3, max_norm=1.0), "norm in 1"),
        (nn.EmbeddingBag(3, 3, mode="max"), "norm or maximum in 1"),
        (nn.TransformerEncoderLayer(4, 2), "ReLU or unknown activation in 1"),
        (nn.LocalResponseNorm(2, k=0.0), "a power of values that may be 0 in 1"),
        (nn.Softplus(1, 5.0), "softplus (beta=1) that turns linear at beta z = 5 in 1"),
    ],
)
def test_without_inputs_what_is_no_analytic_layer_by_its_exact_type_is_named(module, said):
    left = make_analytic(nn.Sequential(nn.Linear(3, 3), module)).left
    assert any(str(kink).endswith(said) for kink in left)


def test_without_inputs_softplus_is_judged_by_its_threshold_and_the_type_of_the_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.Softplus())
    assert make_analytic(model).left == ()
    assert [str(kink) for kink in make_analytic(model.double()).left] == [
        "softplus (beta=1) that turns linear at beta z = 20 in 1"
    ]


@pytest.mark.parametrize(
    "module",
    [
        *SMOOTH,
        nn.RMSNorm(6),
        nn.BatchNorm1d(6),
        nn.GRU(6, 6),
        nn.TransformerEncoderLayer(6, 2, 8, activation="gelu"),
        nn.MultiheadAttention(6, 2),
        nn.Sequential(nn.Dropout(), nn.Flatten()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_without_inputs_analytic_layers_are_recognised(module):
    assert make_analytic(nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2))).left == ()


@pytest.mark.parametrize(
    "activation", [a for a in KINKED if type(a) not in (nn.ReLU, nn.LeakyReLU, nn.ReLU6)], ids=repr
)
def test_kinked_modules_are_named_alike_with_and_without_inputs(activation):
    model = nn.Sequential(nn.Linear(4, 6), activation)
    assert make_analytic(model).left == make_analytic(model, torch.randn(1, 4)).left != ()
