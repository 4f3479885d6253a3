"""What is real-analytic in the weights is on a list: nothing else passes in silence, and an independent oracle agrees."""

import math
import threading

import numpy as np
import pytest
import torch
from networks.analytic_functions import ANALYTIC, NOT_ANALYTIC
from torch import nn

from lightning_conv.networks.analytic import find_kinks, make_analytic


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(1, 1)
        self.f = function if isinstance(function, nn.Module) else Apply(function)

    def forward(self, x):
        return self.b(self.f(self.a(x)).reshape(len(x), -1).sum(1, keepdim=True))


def misfit(model, x, points=65):
    """Distance of the outputs on a line in weight space from their Chebyshev interpolation, relative to their size.

    The interpolation of an analytic function converges geometrically, that of one with a kink like 1 / points.
    """
    weights = dict(model.named_parameters())
    along = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def at(t):
        moved = {name: weight + t * along[name] for name, weight in weights.items()}
        with torch.no_grad():
            return torch.func.functional_call(model, moved, (x,)).flatten().numpy()

    nodes = 0.3 * np.cos(np.pi * (np.arange(points) + 0.5) / points)
    fit = np.polynomial.chebyshev.chebfit(nodes / 0.3, np.stack([at(t) for t in nodes]), points - 1)
    between = np.linspace(-0.3, 0.3, 101)
    values = np.stack([at(t) for t in between])
    return float(np.abs(np.polynomial.chebyshev.chebval(between / 0.3, fit).T - values).max() / np.abs(values).max())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_tables_are_large():
    assert len(NOT_ANALYTIC) >= 150
    assert len(ANALYTIC) >= 100


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic_functions_are_recognised(name):
    assert find_kinks(Between(ANALYTIC[name]), torch.randn(6, 4)) == []


@pytest.mark.parametrize("name", ANALYTIC)
def test_what_is_called_analytic_is_smooth_along_a_line_in_weight_space(name, float64):
    model = Between(ANALYTIC[name]).double().eval()
    assert misfit(model, torch.randn(3, 4)) < 1e-9


@pytest.mark.parametrize("name", NOT_ANALYTIC)
def test_nothing_else_passes_in_silence(name):
    model, x = Between(NOT_ANALYTIC[name]), torch.randn(6, 4)
    found = find_kinks(model, x)
    assert found
    if "script" not in name:  # which cannot be copied
        assert make_analytic(model, x).left == tuple(found)


@pytest.mark.slow
def test_the_oracle_sees_kinks(float64):
    """Else its agreement would say nothing. It cannot see what happens off its line, such as a pole or a branch."""
    seen = 0
    names = list(NOT_ANALYTIC)[: list(NOT_ANALYTIC).index("softplus, threshold 0")]
    for name in names:
        model = Between(NOT_ANALYTIC[name]).double().eval()
        seen += misfit(model, 2 * torch.randn(3, 4)) > 1e-7
    assert seen >= 0.75 * len(names)


@pytest.mark.parametrize(
    ("name", "said", "known"),
    [
        ("relu", "ReLU in f", True),
        ("scatter_reduce amax", "maximum or minimum in f", True),
        ("int", "rounding to int32 in f", True),
        ("sqrt of a square", "a square root of values not known to be positive at every weight in f", False),
        ("branch on a float", "a value read by Python (aten::_local_scalar_dense) in f", False),
        ("numpy", "a value read by Python (Tensor.numpy) in f", False),
        ("dropout", "random numbers (aten::bernoulli) in f", False),
        ("softplus, threshold 0", "softplus (beta=1) that turns linear at beta z = 0 in f", True),
        ("erfinv", "unknown operator aten::erfinv in f", False),
        ("custom operator", "unknown operator lightning_conv_tests::folded in f", False),
        ("written by pointer", "memory that no operator of torch wrote (read by aten::mul) in f", False),
        ("branch on the bytes", "a value read by Python (Tensor.untyped_storage) in f", False),
        ("written by pointer", "a value read by Python (Tensor.data_ptr) in f", False),
        ("branch of torch.cond", "unknown operator cond in f", False),
    ],
)
def test_what_was_found_is_named(name, said, known):
    found = find_kinks(Between(NOT_ANALYTIC[name]), torch.randn(6, 4))
    assert [kink.known for kink in found if str(kink).startswith(said)] == [known]


@pytest.mark.parametrize(
    ("beta", "threshold", "dtype", "largest", "analytic"),
    [
        (1.0, 20.0, torch.float32, 5.0, True),
        (1.0, 20.0, torch.float32, 30.0, True),  # both branches round to one number
        (1.0, 20.0, torch.float64, 19.0, True),
        (1.0, 20.0, torch.float64, 21.0, False),
        (10.0, 20.0, torch.float64, 2.1, False),
        (1.0, 37.0, torch.float64, 100.0, True),
        (1.0, 14.0, torch.float32, 1.0, False),
        (1.0, 14.0, torch.float64, -1.0, False),
    ],
)
def test_softplus_is_its_formula_by_threshold_type_and_samples(beta, threshold, dtype, largest, analytic):
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(beta, threshold)).to(dtype)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    assert (find_kinks(model, torch.tensor([[-1.0], [largest]])) == []) == analytic


@pytest.mark.parametrize(("threshold", "dtype"), [(15.0, np.float32), (37.0, np.float64)])
def test_both_branches_of_softplus_round_to_one_number_from_the_stated_threshold_on(threshold, dtype):
    import mpmath

    with mpmath.workdps(60):
        for t in np.linspace(threshold, threshold + 20, 997).astype(dtype):
            exact = mpmath.log1p(mpmath.exp(mpmath.mpf(float(t))))
            assert abs(exact - mpmath.mpf(float(t))) <= mpmath.mpf(float(np.spacing(t))) / 2


def test_functions_of_the_inputs_alone_and_integer_work_are_constant_in_the_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x):
            x = torch.relu(x).round() / x.norm(dim=1, keepdim=True)
            if float(x.sum()) > 0:
                x = x.sort(1).values
            return self.a(x)

    assert find_kinks(Net(), torch.randn(6, 4)) == []


@pytest.mark.parametrize("sparse", [False, True])
def test_what_was_computed_of_weights_stays_so_wherever_it_is_written(sparse):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.register_buffer("state", torch.zeros(6))

        def forward(self, x):
            kept = torch.zeros(len(x), 12)
            kept[:, 3:9] = self.a(x)
            self.state += self.a.bias
            part = kept.reshape(-1)[5:17] + self.state.repeat(2)
            if sparse:
                part = torch.sparse_coo_tensor(torch.arange(12)[None], part, (12,)).coalesce().values()
            return part.abs().expand(len(x), 12)

    assert "absolute value in the forward of the network itself" in map(str, find_kinks(Net(), torch.randn(6, 4)))


def test_a_branch_that_only_other_samples_or_weights_take_is_seen():
    class Rare(nn.Module):
        def forward(self, z):
            return z if z.detach().clone().tolist()[-1][0] < 1e9 else -z

    assert find_kinks(nn.Sequential(nn.Linear(4, 6), Rare()), torch.randn(6, 4)) != []


def test_several_samples_are_looked_at():
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(1.0)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    assert find_kinks(model, torch.tensor([[0.0], [1.0], [2.0], [30.0]])) != []


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_recurrent_layers_and_attention(activation):
    class First(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    x = torch.randn(3, 5, 8)
    for layer in (nn.LSTM(8, 3, batch_first=True), nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True)):
        assert find_kinks(First(layer), x) == []
    assert find_kinks(First(nn.GRU(8, 3, batch_first=True)), x) == []
    plain = find_kinks(First(nn.RNN(8, 3, batch_first=True, nonlinearity="tanh")), x)
    assert (plain, str(*find_kinks(First(nn.RNN(8, 3, batch_first=True, nonlinearity="relu")), x))) == (
        [],
        "ReLU in layer",
    )
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    assert (find_kinks(layer, x) == []) == (activation == "gelu")
    assert (make_analytic(layer).left == ()) == (activation == "gelu")


def test_a_hook_that_changes_a_result_is_seen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    model[1].register_forward_hook(lambda module, args, output: output.relu())
    assert [str(kink) for kink in find_kinks(model, torch.randn(6, 4))] == ["ReLU in 1"]


def test_looking_leaves_weights_buffers_random_numbers_and_memory_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Tanh()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_kinks(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())


def peek(z):
    """Read a tensor by a way that no list of methods has."""
    with torch._C.DisableTorchFunction():
        return z.detach().numpy().copy()


def test_a_value_that_is_read_behind_torchs_back_shows_at_other_weights():
    class Doubled(nn.Module):
        def forward(self, z):
            return z.new_tensor(peek(z).tolist()) * 2

    class Sorted(nn.Module):
        def forward(self, z):
            return z[:, peek(z)[0].argsort().tolist()]

    for module in (Doubled(), Sorted()):
        found = find_kinks(nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2)), torch.randn(6, 4))
        assert [kink.what.partition(",")[0] for kink in found] == ["another computation at other weights"]


def in_a_thread(z):
    made = []
    thread = threading.Thread(target=lambda: made.append(z.detach().abs()))
    thread.start()
    thread.join()
    return made[0]


@pytest.mark.parametrize("function", [in_a_thread, lambda z: torch.from_numpy(np.abs(peek(z)))])
def test_outputs_that_no_operator_seen_computed_differ_at_other_weights(function):
    found = find_kinks(nn.Sequential(nn.Linear(4, 6), Apply(function)), torch.randn(6, 4))
    assert [str(kink).partition(",")[0] for kink in found] == ["another computation at other weights"]


class Forces(nn.Module):
    """Returns a derivative by its inputs, as networks of potentials do."""

    def __init__(self, activation):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x)[0]


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.SiLU(), nn.Softmax(1), nn.LayerNorm(6)])
def test_derivatives_inside_a_forward(activation):
    assert find_kinks(Forces(activation), torch.randn(6, 4)) == []
    assert find_kinks(Forces(nn.Sequential(activation, nn.ReLU())), torch.randn(6, 4)) != []


def test_a_fixed_sparse_matrix_may_be_multiplied():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.adjacency = nn.Linear(4, 6), torch.eye(4).to_sparse()

        def forward(self, x):
            return torch.sparse.mm(self.adjacency, self.a(x)).tanh()

    assert find_kinks(Graph(), torch.randn(4, 4)) == []


def test_a_forward_that_fails_at_other_weights_is_not_known_to_be_analytic():
    class Asserts(nn.Module):
        def forward(self, z):
            if peek(z).sum() != self.first:
                raise ValueError("other weights")
            return z

    model, x = nn.Sequential(nn.Linear(4, 6), Asserts()), torch.ones(1, 4)
    model[1].first = peek(model[0](x)).sum()
    assert [(kink.known, "ValueError" in kink.what) for kink in find_kinks(model, x)] == [(False, True)]


def test_a_cache_that_the_first_forward_fills_is_no_other_computation():
    class Cached(nn.Module):
        mask = None

        def forward(self, z):
            if self.mask is None:
                self.mask = torch.ones(6, 6).tril() > 0
            return z.masked_fill(self.mask[0], math.pi)

    assert find_kinks(nn.Sequential(nn.Linear(4, 6), Cached()), torch.randn(6, 4)) == []
