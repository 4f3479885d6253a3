"""Bounds of a kernel whose passes cast to a narrower type hold the eigenvalues of the network without the cast, uncertified."""

import copy

import pytest
import torch
from casting import FORWARD, HIDDEN, OUTSIDE, QUIET, BackwardCast, Layer, RMSNorm, network
from torch import nn
from torch.func import functional_call, jacrev

from lightning_conv import kernel_spectrum, layer_spectra, ntk_gram
from lightning_conv.kernels import NTKOperator
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.kernels.result import KernelGram


class Rounded(nn.Module):
    """The identity up to a cast, forward and backward."""

    def __init__(self, dtype, narrow=True):
        super().__init__()
        self.dtype, self.narrow = dtype, narrow

    def forward(self, x):
        return x.to(self.dtype).to(x) if self.narrow else x


class RoundedBackward(nn.Module):
    narrow = True

    def forward(self, x):
        return BackwardCast.apply(x) if self.narrow else x


LAYERS = {
    "RMSNorm": lambda: RMSNorm(8),
    "float32": lambda: Rounded(torch.float32),
    "float16": lambda: Rounded(torch.float16),
    "bfloat16": lambda: Rounded(torch.bfloat16),
    "backward": RoundedBackward,
}


def eigenvalues(model, inputs, names=None):
    """Eigenvalues of the trace kernel of the network without its cast: a double loop by autograd in float64."""
    twin = copy.deepcopy(model).double()
    for layer in twin.modules():
        if hasattr(layer, "narrow"):
            layer.narrow = False
    own = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    rows = jacrev(lambda parameters: functional_call(twin, parameters, (inputs.double(),)))(own)
    flat = torch.cat([each.flatten(2) for each in rows.values()], 2)
    return torch.linalg.eigvalsh(torch.einsum("icp,jcp->ij", flat, flat))


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("name", LAYERS)
def test_bounds_hold_the_eigenvalues_of_the_network_without_the_cast(name, engine, precision):
    model, inputs = network(LAYERS[name]()), torch.randn(6, 4)
    truth = eigenvalues(model, inputs)
    gram = ntk_gram(model, inputs, precision=precision, engine=engine)
    assert gram.narrow
    spectrum = kernel_spectrum(gram)
    for bounded, value in ((spectrum.lambda_min, truth[0]), (spectrum.lambda_max, truth[-1])):
        assert bounded.lower <= float(value) <= bounded.upper
        assert not bounded.certified
        assert gram.narrow in bounded.method


@pytest.mark.parametrize("name", ["RMSNorm", "float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
def test_a_kernel_that_is_singular_is_not_bounded_away_from_zero(name, double):
    """Only the head is trained, on features of rank at most d + 2 = 3 without the cast, so lambda_min of 8 samples is 0."""
    model = nn.Sequential(nn.Linear(1, 8), LAYERS[name](), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    inputs = torch.rand(8, 1)
    model, inputs = (model.double(), inputs.double()) if double else (model, inputs)
    assert abs(float(eigenvalues(model, inputs)[0])) < 1e-12
    for precision in ("exact", "certified"):
        found = kernel_spectrum(ntk_gram(model, inputs, precision=precision)).lambda_min
        assert found.lower == 0
        assert not found.certified


@pytest.mark.parametrize("name", FORWARD)
def test_a_cast_is_named_by_both_engines(name):
    for engine in ("auto", "jacobian"):
        gram = ntk_gram(network(Layer(FORWARD[name])), torch.randn(5, 4), precision="certified", engine=engine)
        assert gram.narrow.startswith("'cast' ")
        assert not kernel_spectrum(gram).lambda_min.certified


@pytest.mark.parametrize("name", [*OUTSIDE, *(name for name in HIDDEN if name != "one number")])
def test_numbers_from_outside_leave_no_bound(name):
    gram = ntk_gram(
        network(Layer((OUTSIDE | HIDDEN)[name])).double(), torch.randn(5, 4).double(), precision="certified"
    )
    assert "outside of torch" in gram.narrow
    found = kernel_spectrum(gram).lambda_min
    assert (found.lower, found.certified) == (0, False)


@pytest.mark.parametrize("name", QUIET)
def test_what_rounds_nothing_stays_certified_and_as_tight_as_it_was(name):
    model, inputs = network(Layer(QUIET[name])).double(), torch.randn(5, 4).double()
    if name == "constant from NumPy":
        inputs = inputs[:3]
    gram = ntk_gram(model, inputs, precision="certified")
    assert gram.narrow == ""
    assert gram.jacobian_error < 1e-13
    assert kernel_spectrum(gram).lambda_max.certified


def test_the_backward_pass_is_named_with_its_function():
    gram = ntk_gram(network(RoundedBackward()), torch.randn(5, 4), precision="certified")
    assert gram.narrow == "the backward pass, in BackwardCastBackward, computes in torch.float32 (aten::_to_copy)"


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_in_every_mode_of_batch_norm(mode):
    def model(layer):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), layer, nn.Linear(8, 2))

    inputs = torch.randn(6, 4)
    cast = ntk_gram(model(Rounded(torch.float32)), inputs, precision="certified", batch_norm=mode)
    plain = ntk_gram(model(nn.Identity()), inputs, precision="certified", batch_norm=mode)
    assert cast.narrow.startswith("'3' ")
    assert plain.narrow == ""
    assert kernel_spectrum(plain).lambda_min.certified
    assert not kernel_spectrum(cast).lambda_min.certified


def test_two_sets_of_samples_and_a_plan_that_is_used_again():
    model, first, second = network(RMSNorm(8)), torch.randn(6, 4), torch.randn(5, 4)
    whole = ntk_gram(model, first, precision="certified")
    assert ntk_gram(model, first, second, precision="certified").narrow == whole.narrow
    again = ntk_gram(model, first, precision="certified", plan=whole.plan)
    assert (again.narrow, again.jacobian_error) == (whole.narrow, whole.jacobian_error)
    exact = ntk_gram(model, first, precision="exact")
    again = ntk_gram(model, first, precision="exact", plan=exact.plan)
    assert (again.narrow, again.jacobian_error) == (exact.narrow, exact.jacobian_error)


def test_the_matrix_is_the_same_bit_for_bit(monkeypatch):
    from lightning_conv.kernels import gram as room

    model, inputs = network(nn.LayerNorm(8)), torch.randn(6, 4)
    watched = ntk_gram(model, inputs, precision="certified").matrix
    monkeypatch.setattr(
        room, "_watched", lambda task, seed, report, _: (room.compute_kernel(task, seed, report), 0.0, None)
    )
    assert torch.equal(ntk_gram(model, inputs, precision="certified").matrix, watched)


def test_the_place_survives_a_checkpoint_and_reaches_the_layers():
    gram = ntk_gram(network(RMSNorm(8)), torch.randn(5, 4), precision="certified", per_layer=True)
    assert KernelGram.from_facts(gram.matrix, gram.facts()).narrow == gram.narrow
    facts = {name: value for name, value in gram.facts().items() if name != "narrow"}
    assert KernelGram.from_facts(gram.matrix, facts).narrow == ""  # of an older version
    assert not any(spectrum.lambda_min.certified for spectrum in layer_spectra(gram).values())


def test_going_up_in_precision_ends_without_a_certificate():
    gram, spectrum = resolved_spectrum(network(Rounded(torch.bfloat16)), torch.randn(6, 4))
    assert gram.precision == "certified"
    assert not spectrum.lambda_min.certified
    assert not spectrum.lambda_min.resolved


@pytest.mark.parametrize(("dtype", "narrow"), [(None, torch.bfloat16), (torch.float64, torch.float32)])
def test_an_operator_allows_for_the_narrow_type_and_says_so(dtype, narrow):
    model, inputs = network(Rounded(narrow)), torch.randn(6, 4)
    operator = NTKOperator(model, inputs, outputs="trace", dtype=dtype)
    assert operator.narrowing.dtype == narrow
    found, truth = kernel_spectrum(operator), eigenvalues(model, inputs)
    assert found.lambda_max.lower <= float(truth[-1]) <= found.lambda_max.upper
    assert found.lambda_min.lower <= float(truth[0]) <= found.lambda_min.upper
    assert str(narrow) in found.lambda_max.reason
    assert NTKOperator(network(nn.Identity()), inputs, dtype=dtype).narrowing is None
