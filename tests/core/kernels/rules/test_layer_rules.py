"""Every layer rule against the double loop of autograd, over shapes that hypothesis draws."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_conv import LayerRule, ntk_gram, register_rule
from lightning_conv.kernels.reading import anatomy
from lightning_conv.kernels.reading.recording import Recorder
from lightning_conv.kernels.rules import registry

MODES = st.sampled_from(["trace", "full", "sum"])
relaxed = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Net(nn.Module):
    """The layer under test, squashed, summed up position by position with fixed weights, then mixed by a linear head.

    Args:
        layer: under test.
        before: applied to the inputs, so that the layer is not the first one.
    """

    def __init__(self, layer, before=None):
        super().__init__()
        self.before, self.layer = before or nn.Identity(), layer
        self.head = nn.Parameter(torch.randn(2))

    def forward(self, x):
        hidden = torch.tanh(self.layer(self.before(x))).flatten(1)
        waves = torch.sin(torch.arange(2 * hidden.shape[1], dtype=hidden.dtype).view(-1, 2))
        return (hidden @ waves) * self.head


def check(model, inputs, mode, naive_gram, *, rules=None):
    """The kernel, the layers' traces and their sum against autograd, and that the layer went by its rule."""
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    gram = ntk_gram(model, inputs, outputs=mode, per_layer=True)
    oracle = naive_gram(model, inputs, mode)
    scale = float(oracle.abs().max())
    assert float((gram.matrix - oracle).abs().max()) <= 1e-9 * scale
    total = sum(gram.layer_matrices.values())
    assert float((gram.matrix - total).abs().max()) <= 1e-12 * scale
    for layer, matrix in gram.layer_matrices.items():
        assert gram.layer_traces[layer] == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-12 * scale)
    for name, matrix in gram.layer_matrices.items():
        mine = [n for n, _ in model.named_parameters() if (n.rpartition(".")[0] or n) == name]
        assert float((matrix - naive_gram(only(model, mine), inputs, mode)).abs().max()) <= 1e-9 * scale
        only(model, [n for n, _ in model.named_parameters()])
    for name in rules or ():
        assert name in gram.structured, (name, gram.plan)


def only(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


@given(data=st.data(), dimensions=st.integers(1, 3), mode=MODES)
@relaxed
def test_convolutions(data, dimensions, mode, naive_gram):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=dimensions, max_size=dimensions))
    dilation = data.draw(st.lists(st.integers(1, 2), min_size=dimensions, max_size=dimensions))
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions](
        4,
        data.draw(st.sampled_from([4, 8])),
        kernel,
        groups=groups,
        dilation=dilation,
        stride=data.draw(st.lists(st.integers(1, 2), min_size=dimensions, max_size=dimensions)),
        padding=data.draw(st.lists(st.integers(0, 1), min_size=dimensions, max_size=dimensions)),
        padding_mode=data.draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
        bias=data.draw(st.booleans()),
    )
    sizes = [data.draw(st.integers(d * (k - 1) + 1, d * (k - 1) + 3)) for k, d in zip(kernel, dilation, strict=True)]
    inputs = torch.randn(data.draw(st.integers(1, 4)), 4, *[max(size, 2) for size in sizes])
    check(Net(layer), inputs, mode, naive_gram, rules=["layer.weight"])


@given(kernel=st.integers(1, 4), dilation=st.integers(1, 2), bias=st.booleans(), mode=MODES)
@relaxed
def test_convolutions_that_keep_the_size(kernel, dilation, bias, mode, naive_gram):
    layer = nn.Conv2d(2, 3, kernel, padding="same", dilation=dilation, bias=bias)
    check(Net(layer), torch.randn(3, 2, 4, 3), mode, naive_gram, rules=["layer.weight"])


@given(data=st.data(), dimensions=st.integers(1, 3), mode=MODES)
@relaxed
def test_transposed_convolutions(data, dimensions, mode, naive_gram):
    def each(low, high):
        return data.draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions))

    stride, dilation = each(1, 3), each(1, 2)
    extra = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    layer = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dimensions](
        4,
        4,
        each(2, 3),
        stride=stride,
        dilation=dilation,
        output_padding=extra,
        padding=each(0, 1),
        groups=data.draw(st.sampled_from([1, 2])),
        bias=data.draw(st.booleans()),
    )
    check(Net(layer), torch.randn(3, 4, *each(2, 3)), mode, naive_gram, rules=["layer.weight"])


@given(leading=st.lists(st.integers(1, 4), max_size=2), bias=st.booleans(), n=st.integers(1, 5), mode=MODES)
@relaxed
def test_linear_layers_with_any_leading_dimensions(leading, bias, n, mode, naive_gram):
    layer = nn.Linear(3, 4, bias=bias)
    check(Net(layer, nn.Linear(3, 3)), torch.randn(n, *leading, 3), mode, naive_gram, rules=["layer.weight"])


NORMS = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm 1d, sequence": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 2, 2, 2)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm without positions": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
    "instance norm, running statistics": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        (4, 3),
    ),
    "layer norm": (lambda: nn.LayerNorm(3), (4, 3)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((4, 3)), (2, 4, 3)),
    "layer norm without positions": (lambda: nn.LayerNorm(4), (4,)),
    "rms norm": (lambda: nn.RMSNorm(3), (4, 3)),
}


@pytest.mark.parametrize("kind", NORMS)
@given(n=st.integers(1, 5), mode=MODES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_normalisations(kind, n, mode, naive_gram):
    build, shape = NORMS[kind]
    layer = build()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_()
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    check(Net(layer), torch.randn(n, *shape), mode, naive_gram, rules=["layer.weight"])


@given(
    shape=st.lists(st.integers(1, 4), max_size=2),
    words=st.integers(2, 6),
    padding=st.sampled_from([None, 0, -1]),
    n=st.integers(1, 6),
    mode=MODES,
)
@relaxed
def test_embeddings(shape, words, padding, n, mode, naive_gram):
    layer = nn.Embedding(words, 3, padding_idx=padding)
    nn.init.normal_(layer.weight)  # a padding row that is not zero would show if its derivative were counted
    check(Net(layer), torch.randint(0, words, (n, *shape)), mode, naive_gram, rules=["layer.weight"])


class Lookup(nn.Module):
    """Words looked up by the function, which counts a negative ``padding_idx`` from the last row."""

    def __init__(self, padding):
        super().__init__()
        self.weight, self.padding = nn.Parameter(torch.randn(5, 3)), padding

    def forward(self, words):
        return F.embedding(words, self.weight, padding_idx=self.padding)


@pytest.mark.parametrize("padding", [None, 0, 4, -1, -2])
def test_padding_of_the_embedding_function(padding, naive_gram):
    words = torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1], [4, 1], [4, 3]])  # 3 and 4 are not among the first three
    for mode in ("trace", "full", "sum"):
        check(Net(Lookup(padding)), words, mode, naive_gram, rules=["layer.weight"])


class Bare(nn.Module):
    """Parameters used by hand, in the ways that vision transformers and gated networks use them."""

    def __init__(self, tokens, width):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.shift = nn.Parameter(torch.randn(width))
        self.gate = nn.Parameter(torch.randn(tokens + 1, 1))
        self.scale = nn.Parameter(torch.randn(()))
        self.minus = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return (self.gate * x.sin() + self.shift - self.minus) * self.scale


@given(tokens=st.integers(1, 3), width=st.integers(1, 3), n=st.integers(1, 5), mode=MODES)
@relaxed
def test_parameters_used_by_hand(tokens, width, n, mode, naive_gram):
    names = [f"layer.{name}" for name in ("token", "place", "shift", "gate", "scale", "minus")]
    check(Net(Bare(tokens, width)), torch.randn(n, tokens, width), mode, naive_gram, rules=names)


class Shared(nn.Module):
    """One convolution on two scales, one norm twice, one embedding as input table and as output layer."""

    def __init__(self):
        super().__init__()
        self.table, self.convolution, self.norm = nn.Embedding(5, 4), nn.Conv1d(4, 4, 2), nn.LayerNorm(4)

    def forward(self, words):
        x = self.norm(self.table(words)).transpose(1, 2)
        x = torch.tanh(self.convolution(x)).repeat_interleave(2, 2)
        x = self.norm(torch.tanh(self.convolution(x)).transpose(1, 2))
        return F.linear(x, self.table.weight).mean(1)


@given(n=st.integers(1, 5), length=st.integers(2, 5), mode=MODES)
@relaxed
def test_shared_parameters_keep_their_cross_terms(n, length, mode, naive_gram):
    check(Shared(), torch.randint(0, 5, (n, length)), mode, naive_gram, rules=["table.weight", "convolution.weight"])


class Merged(nn.Module):
    """Samples that share a dimension with frames, frame last or frame first, as in video and recurrent code."""

    def __init__(self, *, frames_first):
        super().__init__()
        self.frames_first = frames_first
        self.convolution, self.linear = nn.Conv1d(2, 3, 2), nn.Linear(3, 3)

    def forward(self, x):  # (n, frames, 2, length)
        n, frames = x.shape[:2]
        x = x.transpose(0, 1) if self.frames_first else x
        x = torch.tanh(self.convolution(x.flatten(0, 1))).mean(2)
        x = torch.tanh(self.linear(x))
        return (x.view(frames, n, 3).cumsum(0).transpose(0, 1) if self.frames_first else x.view(n, frames, 3)).flatten(
            1
        )


@given(n=st.integers(1, 5), frames=st.integers(1, 4), frames_first=st.booleans(), mode=MODES)
@relaxed
def test_samples_merged_with_another_dimension(n, frames, frames_first, mode, naive_gram):
    model = Merged(frames_first=frames_first)
    check(model, torch.randn(n, frames, 2, 3), mode, naive_gram, rules=["convolution.weight", "linear.weight"])


@given(n=st.integers(2, 5), length=st.integers(2, 4), batch_first=st.booleans(), mode=MODES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_goes_by_rules_altogether(n, length, batch_first, mode, naive_gram):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first)

        def forward(self, x):
            x = self.encoder(x if batch_first else x.transpose(0, 1))
            return (x if batch_first else x.transpose(0, 1)).flatten(1)[:, :3]

    model = Encoder()
    gram = ntk_gram(model.double(), torch.randn(n, length, 4).double())
    assert not gram.general, gram.plan
    check(model, torch.randn(n, length, 4), mode, naive_gram)


class Recurrent(nn.Module):
    """A recurrent layer on (n, T, 3), read at the last step and in the mean, so that every step and direction counts."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(3, 4, **options)
        self.head = nn.LazyLinear(2)
        self(torch.randn(2, 2, 3))

    def forward(self, x):
        first = self.layer.batch_first
        found = self.layer(x if first else x.transpose(0, 1))[0]
        found = found if first else found.transpose(0, 1)
        return self.head(torch.cat([found[:, -1], found.mean(1)], 1))


RECURRENT = [nn.LSTM, nn.GRU, nn.RNN, functools.partial(nn.RNN, nonlinearity="relu")]


@given(
    kind=st.sampled_from(RECURRENT),
    layers=st.integers(1, 2),
    length=st.integers(1, 4),
    n=st.integers(1, 4),
    options=st.fixed_dictionaries(
        {"bias": st.booleans(), "bidirectional": st.booleans(), "batch_first": st.booleans()}
    ),
    mode=MODES,
)
@relaxed
def test_recurrent_layers(kind, layers, length, n, options, mode, naive_gram):
    model = Recurrent(kind, num_layers=layers, **options)
    rules = [name for name, _ in model.named_parameters()]
    check(model, torch.randn(n, length, 3), mode, naive_gram, rules=rules if length > 1 and n > 1 else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_projected_lstm(bias, bidirectional, naive_gram):
    model = Recurrent(nn.LSTM, proj_size=2, bias=bias, bidirectional=bidirectional, num_layers=2)
    check(model, torch.randn(3, 4, 3), "full", naive_gram, rules=["layer.weight_hr_l0", "layer.weight_hr_l1"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
)
def test_unrolled_layers_return_what_torch_returns(kind, options):
    layer = kind(3, 4, **options).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    expected, expected_state = layer(x)
    with Recorder({name: parameter for name, parameter in layer.named_parameters()}) as recorder:
        found, found_state = layer(x)
    assert recorder.calls
    assert not recorder.elsewhere
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found_state, expected_state, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells_called_in_a_loop(kind, bias, naive_gram):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = kind(3, 4, bias=bias), nn.Linear(4, 2)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    check(Loop(), torch.randn(4, 3, 3), "full", naive_gram, rules=["cell.weight_ih", "cell.weight_hh"])


def test_packed_sequences_take_the_general_way(naive_gram):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            lengths = torch.full((len(x),), x.shape[1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(self.lstm(packed)[1][0][-1])

    model, x = Packed().double(), torch.randn(4, 3, 3, dtype=torch.float64)
    assert set(ntk_gram(model, x).general) == {f"lstm.{name}" for name, _ in model.lstm.named_parameters()}
    check(model, x, "full", naive_gram)


# --- rules of one's own ---------------------------------------------------------------------------------------------


def wave(x, frequency):
    """sin(frequency x): a layer that torch knows nothing of."""
    return torch.sin(frequency * x)


WAVE = torch.overrides.wrap_torch_function(lambda x, frequency: (x, frequency))(wave)


class WaveRule(LayerRule):
    signature = "x frequency"
    parameters = ("frequency",)

    def sampled(self, arguments, output):
        return {"x": arguments["x"]}

    def rows(self, arguments, slot, gradients):
        x = arguments["x"]
        return gradients * (x * torch.cos(arguments["frequency"] * x))[:, None]


class WrongRule(WaveRule):
    def rows(self, arguments, slot, gradients):
        return 1.01 * super().rows(arguments, slot, gradients)


class BrokenRule(WaveRule):
    def rows(self, arguments, slot, gradients):
        raise ValueError("no idea")


class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        self.frequency, self.head = nn.Parameter(torch.rand(4) + 0.5), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(WAVE(x, self.frequency))


@pytest.fixture
def rules():
    kept = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(kept)


def test_a_rule_of_ones_own_is_used(rules, naive_gram):
    model, inputs = Waves().double(), torch.randn(5, 4).double()
    assert ntk_gram(model, inputs).general == ("frequency",)
    register_rule(WAVE, WaveRule())
    for mode in ("trace", "full", "sum"):
        check(model, inputs, mode, naive_gram, rules=["frequency"])


@pytest.mark.parametrize(("rule", "why"), [(WrongRule, "does not give autograd's gradient"), (BrokenRule, "no idea")])
@pytest.mark.parametrize("large", [False, True], ids=["three samples", "one sample"])
def test_a_wrong_rule_is_never_believed(rules, rule, why, large, naive_gram, monkeypatch):
    if large:
        monkeypatch.setattr(anatomy, "LARGE", 0)
    register_rule(WAVE, rule())
    model, inputs = Waves().double(), torch.randn(5, 4).double()
    gram = ntk_gram(model, inputs)
    assert gram.general == ("frequency",)
    assert why in str(gram.plan)
    assert float((gram.matrix - naive_gram(model, inputs, "trace")).abs().max()) <= 1e-9 * gram.trace


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match="rule: got the class WaveRule; pass an instance"):
        register_rule(WAVE, WaveRule)
    with pytest.raises(TypeError, match="rule: got 3; pass a LayerRule"):
        register_rule(WAVE, 3)
