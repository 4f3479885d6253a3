"""Wide layers: inserted into every torchvision classifier, and recognised where the theorem applies."""

import mpmath
import pytest
import torch
import torchvision
from torch import nn

from lightning_conv import certify_expressivity, find_head, last_hidden_features
from lightning_conv.networks.head import Head
from lightning_conv.networks.separating import _FORMULAS
from lightning_conv.networks.wide_layer import find_wide_layer, wide_layer_width, widen_head

CLASSIFIERS = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5"]
LARGE = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "swin_t", "vgg11_bn", "vit_b_16"]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_any_torchvision_classifier_is_widened(name):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=4, **options).eval()
    wide = widen_head(model, 30)
    images = torch.randn(2, 3, 224, 224)
    head = find_head(wide, images)
    assert head.name.endswith(".head")
    assert (head.module.in_features, head.module.out_features) == (33, 4)
    layer = find_wide_layer(wide, head, images)
    assert not isinstance(layer, str), layer
    assert layer.name == head.name.removesuffix("head") + "wide"
    assert not any(isinstance(module, nn.Softplus) for module in model.modules())


def test_the_rest_of_the_network_is_the_same():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    wide = widen_head(model, 10, factor=2)
    assert wide[2].wide.weight.dtype == torch.float64
    assert wide[2].wide.out_features == 20
    assert wide[2].head.bias is None
    assert torch.equal(wide[0].weight, model[0].weight)
    assert isinstance(model[2], nn.Linear)


def test_a_linear_model_and_a_named_head():
    assert isinstance(widen_head(nn.Linear(4, 2), 6), nn.Sequential)
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "other": nn.Linear(4, 4)})
    assert isinstance(widen_head(model, 6, head="head")["head"], nn.Sequential)


def test_random_wide_features_have_full_rank():
    torch.manual_seed(0)
    wide = widen_head(nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3)).double(), 50)
    x = 3 * torch.randn(50, 8, dtype=torch.float64)
    assert certify_expressivity(last_hidden_features(wide, find_head(wide, x), x)).verdict == "certified"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n: 0"):
        widen_head(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="no linear layer"):
        widen_head(nn.Conv2d(1, 1, 1), 5)
    with pytest.raises(
        ValueError, match=r"ends in a convolution \('classifier.1'\?\), as SqueezeNet does, end it in pooling"
    ):
        widen_head(torchvision.models.squeezenet1_1(num_classes=4), 30)
    with pytest.raises(ValueError, match="head: 'fc'"):
        widen_head(nn.Linear(2, 2), 5, head="fc")
    with pytest.raises(ValueError, match="width_factor"):
        wide_layer_width(10, 0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.act, self.head = nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.wide(torch.tanh(self.wide(x)))))


class Tied(nn.Module):
    """An earlier layer has the wide layer's weight (or bias), through another module."""

    def __init__(self, what):
        super().__init__()
        self.first, self.wide, self.act, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2)
        setattr(self.first, what, getattr(self.wide, what))

    def forward(self, x):
        return self.head(self.act(self.wide(torch.tanh(self.first(x)))))


def frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), "not the result of an activation"),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.Softplus(), nn.Linear(6, 2)), "no bias"),
        (
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, 2)),
            "not the result of one linear layer",
        ),
        (
            nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.LayerNorm(6), nn.Linear(6, 2)),
            "not the result of an activation",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Softplus(), nn.Linear(6, 2)),
            "reparametrized",
        ),
        (Twice(), "several times"),
        (frozen(), "frozen"),
        (Tied("weight"), "'wide' shares a parameter with 'first'"),
        (Tied("bias"), "'wide' shares a parameter with 'first'"),
    ],
)
def test_what_the_theorem_does_not_cover_is_said(model, why):
    x = torch.randn(3, 4)
    assert why in find_wide_layer(model, find_head(model, x), x)


def test_dropout_between_activation_and_head_is_nothing_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    assert find_wide_layer(model, find_head(model, x), x).name == "0"


ACTIVATIONS = [
    nn.Softplus(),
    nn.Softplus(0.01, 40.0),
    nn.Softplus(100, 40.0),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0])
@pytest.mark.parametrize("sigma", ACTIVATIONS, ids=repr)
def test_every_activation_of_the_theorem_is_recognised(sigma, scale, dtype):
    model = nn.Sequential(nn.Linear(4, 6), sigma, nn.Linear(6, 2)).to(dtype)
    x = scale * torch.randn(50, 4, dtype=dtype)
    assert find_wide_layer(model, find_head(model, x), x).name == "0"


@pytest.mark.parametrize("sigma", ACTIVATIONS, ids=repr)
def test_the_closed_forms_are_those_of_the_activations(sigma):
    """At 50 digits, from the definitions, not from either program."""
    erf, tanh, exp, log = mpmath.erf, mpmath.tanh, mpmath.exp, mpmath.log
    with mpmath.workdps(50):
        definition = {
            nn.Softplus: lambda z: log(1 + exp(sigma.beta * z)) / sigma.beta,
            nn.Tanh: tanh,
            nn.Sigmoid: lambda z: 1 / (1 + exp(-z)),
            nn.SiLU: lambda z: z / (1 + exp(-z)),
            nn.Mish: lambda z: z * tanh(log(1 + exp(z))),
            nn.GELU: lambda z: (
                z * (1 + erf(z / mpmath.sqrt(2))) / 2
                if sigma.approximate == "none"
                else z * (1 + tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf(0.044715) * z**3))) / 2
            ),
        }[type(sigma)]
        points = torch.linspace(-12, 12, 101, dtype=torch.float64)
        values = _FORMULAS[type(sigma)](points, sigma)
        for z, value in zip(points.tolist(), values.tolist(), strict=True):
            exact = definition(mpmath.mpf(z))
            assert abs(value - exact) <= 16 * 2.0**-52 * (1 + abs(z) + abs(exact))


class Clamped(nn.Tanh):
    def forward(self, z):
        return z.clamp(-1, 1)


class Same(nn.Tanh):
    """Computes what its base does; the type does not say so."""


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), self.weight, self.bias)


def changed(module, change):
    change(module)
    return module


def relu_after(module):
    module.register_forward_hook(lambda module, args, output: output.relu())


def watched(module):
    module.register_forward_hook(lambda module, args, output: None)


def clamped_before(module):
    module.register_forward_pre_hook(lambda module, args: (args[0].clamp(-0.1, 0.1),))


def other_forward(module):
    module.forward = torch.abs


def masked_forward(module):
    weight = module.weight
    module.forward = lambda x: nn.functional.linear(x, weight * (weight > 0), module.bias)


@pytest.mark.parametrize(
    ("layer", "sigma", "why"),
    [
        (nn.Linear(4, 6), Clamped(), "'1' is a Clamped, a subclass of Tanh"),
        (nn.Linear(4, 6), Same(), "'1' is a Same, a subclass of Tanh"),
        (nn.Linear(4, 6), nn.Softplus(1, -1e9), "softplus (beta=1) that turns linear at beta z = -1e+09"),
        (nn.Linear(4, 6), nn.Softplus(1, 0.0), "softplus (beta=1) that turns linear at beta z = 0"),
        (nn.Linear(4, 6), nn.Softplus(1, 14.0), "softplus (beta=1) that turns linear at beta z = 14"),
        (nn.Linear(4, 6), nn.Softplus(-1.0, 20.0), "softplus with beta = -1"),
        (nn.Linear(4, 6), changed(nn.Tanh(), relu_after), "'1' may compute something else than a Tanh: it has forward hooks"),
        (nn.Linear(4, 6), changed(nn.Tanh(), watched), "'1' may compute something else than a Tanh: it has forward hooks"),
        (nn.Linear(4, 6), changed(nn.Tanh(), clamped_before), "the input of '1' is not the result of one linear"),
        (nn.Linear(4, 6), changed(nn.Tanh(), other_forward), "'1' may compute something else than a Tanh: its forward"),
        (Cosine(4, 6), nn.Tanh(), "'0' is a Cosine, a subclass of Linear"),
        (changed(nn.Linear(4, 6), relu_after), nn.Tanh(), "'0' may compute something else than a Linear: it has forward"),
        (changed(nn.Linear(4, 6), clamped_before), nn.Tanh(), "'0' may compute something else than a Linear"),
        (changed(nn.Linear(4, 6), masked_forward), nn.Tanh(), "'0' may compute something else than a Linear: its forward"),
    ],
)  # fmt: skip
def test_types_are_taken_exactly_and_nothing_may_stand_between(layer, sigma, why):
    model, x = nn.Sequential(layer, sigma, nn.Linear(6, 2)), torch.randn(5, 4)
    assert why in find_wide_layer(model, Head("2", model[2]), x)


@pytest.mark.parametrize(
    ("largest", "dtype", "fine"),
    [(19.0, torch.float64, True), (21.0, torch.float64, False), (21.0, torch.float32, True)],
)
def test_the_threshold_of_softplus_is_held_against_the_inputs_seen(largest, dtype, fine):
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(), nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    x = torch.tensor([[-1.0], [largest]], dtype=dtype)
    found = find_wide_layer(model, Head("2", model[2]), x)
    assert fine == (not isinstance(found, str))
    assert fine or "where beta z = 21 was seen, so it is not real-analytic; pass Softplus(beta, threshold=40)" in found


@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        (nn.Tanh, lambda self, z: z.clamp(-1, 1)),
        (nn.Tanh, lambda self, z: torch.tanh(z) * 1.001),
        (nn.Sigmoid, lambda self, z: nn.functional.hardsigmoid(z)),
        (nn.SiLU, lambda self, z: nn.functional.hardswish(z)),
        (nn.Softplus, lambda self, z: nn.functional.relu(z)),
        (nn.Softplus, lambda self, z: torch.where(z.abs() < 4, nn.functional.softplus(z), z)),
    ],
)
def test_a_class_of_the_right_name_with_another_function_is_refused(kind, forward, monkeypatch):
    """The last one differs only where no sample is."""
    monkeypatch.setattr(kind, "forward", forward)
    model, x = nn.Sequential(nn.Linear(4, 6), kind(), nn.Linear(6, 2)), torch.rand(5, 4)
    assert find_wide_layer(model, Head("2", model[2]), x) == f"'1' does not compute what a {kind.__name__} does"


def test_a_linear_layer_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias).round(decimals=3)
    )
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.rand(5, 4)
    assert find_wide_layer(model, Head("2", model[2]), x) == "'0' does not compute what a Linear does"


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [lambda h: h.clamp(max=1e3), lambda h: h.clamp_(max=1e3), lambda h: h.relu()])
def test_what_changes_no_sample_seen_but_others_is_refused(function):
    x = torch.rand(5, 4)
    after = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), Call(function), nn.Linear(6, 2))
    before = nn.Sequential(nn.Linear(4, 6), Call(function), nn.Softplus(), nn.Linear(6, 2))
    with torch.no_grad():
        before[0].bias.fill_(10.0)
    for model in (after, before):
        assert "something else is computed" in find_wide_layer(model, Head("3", model[3]), x) or (
            "not the result of one linear layer" in find_wide_layer(model, Head("3", model[3]), x)
        )


@pytest.mark.parametrize(
    "function", [lambda h: h, lambda h: h.flatten(1), lambda h: h.view(len(h), -1), lambda h: h.to(h)]
)
def test_what_computes_nothing_may_stand_between(function):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), Call(function), nn.Linear(6, 2)), torch.rand(5, 4)
    assert find_wide_layer(model, Head("3", model[3]), x).name == "0"
