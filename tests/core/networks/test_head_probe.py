"""A head is what the network computes: W h + b at random weights, whatever the class of the layer says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_conv import find_head


class Cosine(nn.Linear):
    def forward(self, z):
        return F.linear(F.normalize(z), F.normalize(self.weight), self.bias)


class Equalised(nn.Linear):
    """The learning rate's scale in the forward: the outputs are linear in W, but they are not W h + b."""

    def forward(self, z):
        return F.linear(z, self.weight * self.in_features**-0.5, self.bias)


class ClampedWeights(nn.Linear):
    def forward(self, z):
        return F.linear(z, self.weight.clamp(-5, 5), self.bias)


class ClampedOutputs(nn.Linear):
    def forward(self, z):
        return super().forward(z).clamp(-20, 20)


class Masked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, z):
        return F.linear(z, self.weight * self.mask, self.bias)


class Scaled(nn.Linear):
    """A learned scale, 1 at the start."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return self.scale * super().forward(z)


class Standardised(nn.Linear):
    def forward(self, z):
        return F.linear(z, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Straight(nn.Linear):
    """A subclass that computes what an nn.Linear does."""

    def forward(self, z):
        return z @ self.weight.T + self.bias


class Feedback(nn.Module):
    """The features depend on the head's weights."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.trunk(x)) / self.head.weight.norm())


def network(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(6, 3))


def hooked(kind):
    model = network(nn.Linear)
    if kind == "output":
        model[2].register_forward_hook(lambda module, args, output: output + output**2)
    else:
        model[2].register_forward_hook(lambda module, args, output: output.clamp(max=50.0))
    return model


@pytest.mark.parametrize(
    "layer", [Cosine, Equalised, ClampedWeights, ClampedOutputs, Masked, Standardised], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("name", [None, "2"])
def test_a_layer_that_computes_something_else_is_refused_by_name(layer, name):
    with pytest.raises(ValueError, match=rf"'2' is a {layer.__name__} whose output is not W h \+ b"):
        find_head(network(layer), torch.randn(5, 4), name)


class Detached(nn.Linear):
    """Its values are W h + b, and no step moves W."""

    def forward(self, z):
        return F.linear(z, self.weight.detach(), self.bias)


class OtherWithGradients(nn.Linear):
    def forward(self, z):
        return super().forward(z).clamp(-0.1, 0.1) if torch.is_grad_enabled() else super().forward(z)


class Renormalised(nn.Linear):
    """It overwrites its weights by ones of a bounded norm, and computes with these."""

    def forward(self, z):
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.1))
        return super().forward(z)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Detached, "gradient by its weights is not that of W h"),
        (OtherWithGradients, "where gradients are recorded"),
        (Renormalised, "output is not W h"),
    ],
)
def test_gradients_and_overwritten_weights_are_seen(layer, said):
    with pytest.raises(ValueError, match=said):
        find_head(network(layer), 3 * torch.randn(5, 4))


@pytest.mark.parametrize("kind", ["output", "large output"])
def test_a_hook_that_changes_the_output_is_refused(kind):
    with pytest.raises(ValueError, match=r"is a Linear whose output is not W h \+ b"):
        find_head(hooked(kind), torch.randn(5, 4))


def test_a_hook_on_the_input_belongs_to_the_trunk():
    model = network(nn.Linear)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] ** 2,))
    assert find_head(model, torch.randn(5, 4)).last


def test_further_parameters_and_features_that_depend_on_the_weights_are_refused():
    with pytest.raises(ValueError, match=r"parameters beside weight and bias \(scale\)"):
        find_head(network(Scaled), torch.randn(5, 4))
    with pytest.raises(ValueError, match="input that depends on its own weights"):
        find_head(Feedback(), torch.randn(5, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 2000])
@pytest.mark.parametrize("layer", [nn.Linear, Straight])
def test_a_plain_layer_is_a_head_in_every_type_at_every_width_and_size(layer, dtype, width):
    torch.manual_seed(1)
    for size in (1e-3, 1.0, 10.0):
        model = nn.Sequential(nn.Linear(4, width), nn.Softplus(), layer(width, 7)).to(dtype)
        with torch.no_grad():
            model[2].weight.mul_(size)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert find_head(model, torch.randn(5, 4, dtype=dtype)).last
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_random_weights_leave_the_generator_alone():
    model, x = network(nn.Linear), torch.randn(5, 4)
    state = torch.random.get_rng_state()
    find_head(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
