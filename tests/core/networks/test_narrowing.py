"""Casts to a narrower type inside a float64 copy are found with their place, and nothing else is."""

import numpy as np
import pytest
import torch
from casting import FORWARD, HIDDEN, OUTSIDE, QUIET, BackwardCast, Layer, RMSNorm, hidden, network
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_conv import find_head, kernel_spectrum, last_hidden_features, ntk_gram
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.hidden_features import features_of, watched_features
from lightning_conv.networks.narrow_watch import NarrowWatch, narrowing_of
from lightning_conv.networks.narrowing import NarrowedError, Narrowing, coarsest
from lightning_conv.networks.undisturbed import undisturbed


def look(model, inputs, dtype=torch.float64):
    """Return the features, unwatched and watched, and what the watch saw."""
    module, head = StatelessModule(model, dtype=dtype), find_head(model, inputs)
    watched, narrowing = watched_features(module, head, inputs)
    return features_of(module, head, inputs), watched, narrowing


@pytest.mark.parametrize("name", FORWARD)
def test_a_cast_is_found_with_its_module_and_its_operator_and_no_bit_changes(name):
    plain, watched, narrowing = look(network(Layer(FORWARD[name])), torch.randn(5, 4))
    assert str(narrowing).startswith("'cast' ")
    assert "aten" in narrowing.operator
    assert torch.equal(plain, watched)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float", torch.float32), ("bfloat16", torch.bfloat16), ("type_as", torch.float16)]
)
def test_the_type_is_named_and_gives_the_unit_roundoff(name, dtype):
    _, _, narrowing = look(network(Layer(FORWARD[name])), torch.randn(5, 4))
    assert narrowing == Narrowing("'cast'", f"computes in {dtype}", "aten::_to_copy", dtype)
    assert narrowing.unit == torch.finfo(dtype).eps / 2


def test_the_norm_of_llama_is_found_inside_a_deeper_module():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), RMSNorm(8)), nn.Linear(8, 2))
    _, _, narrowing = look(model, torch.randn(5, 4))
    assert str(narrowing) == "'0.1' computes in torch.float32 (aten::_to_copy)"
    model[0][1].narrow = False
    assert look(model, torch.randn(5, 4))[2] is None


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("samples", [1, 5])
def test_numbers_from_outside_that_change_with_the_data_are_of_unknown_precision(name, samples):
    plain, watched, narrowing = look(network(Layer(OUTSIDE[name])), torch.randn(samples, 4))
    assert "outside of torch" in str(narrowing)
    assert narrowing.unit == 1.0
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("samples", [1, 5])
def test_what_threads_and_numpy_write_is_of_unknown_precision(name, samples):
    plain, watched, narrowing = look(network(Layer(HIDDEN[name])), torch.randn(samples, 4))
    assert "outside of torch" in str(narrowing)
    assert narrowing.unit == 1.0
    assert torch.equal(plain, watched)


def test_features_that_no_operator_reads_are_looked_at():
    """A list, rounded by NumPy, in memory that was only allocated, right before the head, and a forward that ends there."""

    def last(x):
        out = torch.empty(x.shape, dtype=x.dtype)
        out.numpy()[...] = np.asarray(x.tolist(), np.float32)
        return out

    model, inputs = nn.Sequential(nn.Linear(4, 8), Layer(last), nn.Linear(8, 2)), torch.randn(5, 4)
    module = StatelessModule(model, dtype=torch.float64)
    for stop in (False, True):
        narrowing = watched_features(module, find_head(model, inputs), inputs, stop=stop)[1]
        assert "outside of torch" in str(narrowing)


@pytest.mark.parametrize("name", HIDDEN)
def test_features_whose_rank_is_that_of_hidden_rounding_are_not_certified(name):
    """Affine features of 3 inputs, each row scaled, have rank at most 4 + 1 with the column of ones, whatever the norm is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), Layer(HIDDEN[name]), nn.Linear(40, 1))
    inputs = torch.rand(30, 3)
    head = find_head(model, inputs)
    with pytest.raises(NarrowedError, match="outside of torch"):
        last_hidden_features(model, head, inputs, dtype=torch.float64)


def test_numbers_from_outside_that_change_with_the_weights_are_no_constants():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, dtype=torch.float64))

        def forward(self, x):
            return x * torch.tensor(self.weight.tolist())

    assert "outside of torch" in str(look(network(Rounded()), torch.randn(5, 4))[2])


@pytest.mark.parametrize("name", QUIET)
def test_what_rounds_nothing_is_no_cast(name):
    plain, watched, narrowing = look(network(Layer(QUIET[name])), torch.randn(5, 4))
    assert narrowing is None
    assert torch.equal(plain, watched)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(9, 4), nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, tokens):
        mask = (tokens > 0).float()
        mean = (self.inner(self.embedding(tokens))[0] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.head(mean)


class Rotary(nn.Module):
    """Positions as in LLaMA: a table in float32 that depends on no number of the network."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(0, 6, 2).float() / 6))

    def forward(self, x):
        h = self.first(x)[:, None].expand(-1, 5, -1)
        angles = torch.outer(torch.arange(5).float(), self.frequencies.float()).repeat(1, 2)
        return self.head((h * angles.cos().to(h) + h.roll(1, -1) * angles.sin().to(h)).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        h = self.first(x)[:, None].expand(-1, 3, -1)
        mask = torch.triu(torch.full((3, 3), float("-inf")), 1)
        return self.head(self.layer(self.attention(h, h, h, attn_mask=mask.to(h))[0]).mean(1))


PLAIN = {
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(3, 2)
    ),
    "norms": lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.SiLU(), nn.Linear(8, 2)),
    "parametrized": lambda: nn.Sequential(
        weight_norm(nn.Linear(4, 8)), spectral_norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 2)
    ),
    "attention": Attention,
    "positions": Rotary,
    "scripted": lambda: nn.Sequential(
        nn.Linear(4, 8), torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softplus())), nn.Linear(8, 2)
    ),
    "in bfloat16": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16(),
}


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_networks_are_silent(name):
    plain, watched, narrowing = look(PLAIN[name](), torch.randn(5, 4))
    assert narrowing is None
    assert torch.equal(plain, watched)


def test_tokens_and_their_mask_are_exact_in_any_type():
    assert look(Recurrent(), torch.randint(0, 9, (5, 6)))[2] is None


def test_integers_are_exact_until_they_are_divided():
    def divided(x):
        return x * ((x * 3).long() / 7).to(x)

    def halved(x):
        return x * ((x * 3).long() / 4).to(x)

    assert look(network(Layer(divided)), torch.randn(5, 4))[2].operator == "aten::div"
    assert look(network(Layer(halved)), torch.randn(5, 4))[2] is None


def test_operators_of_other_libraries_cannot_be_watched_and_are_named():
    plain, watched, narrowing = look(network(Layer(hidden)), torch.randn(5, 4))
    assert str(narrowing) == "'cast' does what cannot be watched (casting.hidden.default)"
    assert narrowing.unit == 1.0
    assert torch.equal(plain, watched)


def test_of_several_places_the_coarsest_is_named():
    model = nn.Sequential(
        nn.Linear(4, 8), RMSNorm(8), Layer(FORWARD["bfloat16"]), Layer(FORWARD["float"]), nn.Linear(8, 2)
    )
    assert str(look(model, torch.randn(5, 4))[2]) == "'2' computes in torch.bfloat16 (aten::_to_copy)"
    assert coarsest([None, None]) is None


def test_a_cast_that_depends_on_the_data_shows_where_it_happens():
    def sometimes(x):
        return x.float().to(x) if float(x.abs().sum()) > 1e3 else x

    assert look(network(Layer(sometimes)), torch.randn(5, 4))[2] is None
    assert look(network(Layer(sometimes)), 1e4 * torch.randn(5, 4))[2] is not None


def test_a_cast_in_the_backward_pass_alone_is_found_with_its_function():
    model, inputs = network(Layer(BackwardCast.apply)), torch.randn(5, 4)
    with undisturbed(model):
        module = StatelessModule(model, dtype=torch.float64)
        leaves = {name: value.detach().requires_grad_() for name, value in module.parameters.items()}
        given = module.convert(inputs)
        watch = NarrowWatch(module, given, parameters=leaves)
        with watch.watching():
            outputs = module.outputs(leaves, given)
            assert watch.found == ()
            torch.autograd.grad(outputs.square().sum(), list(leaves.values()))
        assert str(narrowing_of(module, given, watch)) == (
            "the backward pass, in BackwardCastBackward, computes in torch.float32 (aten::_to_copy)"
        )


def test_the_random_numbers_of_the_run_stay_what_they_were():
    model, inputs = network(Layer(lambda x: (x.float() + torch.rand_like(x.float())).to(x))), torch.randn(5, 4)
    before = torch.get_rng_state()
    plain, watched, narrowing = look(model, inputs)
    assert narrowing is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(plain, watched)


def test_hooks_and_modes_are_gone_afterwards():
    model = network(Layer(FORWARD["float"]))
    look(model, torch.randn(5, 4))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_inputs_made_in_inference_mode_are_watched_too():
    with torch.inference_mode():
        inputs = torch.randn(5, 4) + 1
        assert look(network(Layer(FORWARD["float"])), inputs)[2] is not None


def test_float32_is_watched_for_what_is_narrower_than_float32():
    def found(layer):
        model, inputs = network(layer), torch.randn(5, 4)
        with undisturbed(model):
            module = StatelessModule(model)
            watch = NarrowWatch(module, inputs)
            with watch.watching():
                module.call({}, inputs)
            return watch.found

    assert [each.dtype for each in found(Layer(FORWARD["bfloat16"]))] == [torch.bfloat16]
    assert found(RMSNorm(8)) == ()


def test_float64_features_of_a_network_that_casts_are_refused_with_the_place():
    model, inputs = network(RMSNorm(8)), torch.randn(5, 4)
    head = find_head(model, inputs)
    with pytest.raises(NarrowedError, match=r"'cast' computes in torch\.float32 \(aten::_to_copy\).*remove the cast"):
        last_hidden_features(model, head, inputs, dtype=torch.float64)
    assert last_hidden_features(model, head, inputs).dtype == torch.float32
    model.cast.narrow = False
    assert last_hidden_features(model, head, inputs, dtype=torch.float64).dtype == torch.float64


class InPlace(nn.Module):
    """Writes in place in the usual ways: residuals, activations, slices, masks, scattering, buffers of results."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.relu = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = self.relu(self.norm(self.first(x)))
        h = h + self.second(h)
        h += 1
        h.mul_(0.5).clamp_(max=3)
        out = torch.empty_like(h)
        out[:, :4] = h[:, 4:]
        out[:, 4:].copy_(h[:, :4])
        out = out.masked_fill_(out > 2, 2.0)
        summed = torch.zeros_like(out).scatter_add_(1, torch.arange(8).flip(0).expand(len(x), 8), out)
        summed.index_add_(0, torch.arange(len(x)), out)
        return self.head(torch.tanh_(summed))


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_writes_in_place_by_operators_are_seen(mode, engine):
    torch.manual_seed(0)
    gram = ntk_gram(
        InPlace().double(), torch.randn(9, 4).double(), precision="certified", batch_norm=mode, engine=engine
    )
    assert gram.narrow == ""
    assert kernel_spectrum(gram).lambda_max.certified
    assert look(InPlace(), torch.randn(9, 4))[2] is None
