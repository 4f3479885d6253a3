"""``ntk_gram`` against a double loop of autograd.grad in float64."""

import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from dense_kernels import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import CASES, build, rand
from kernels.networks import TwoInputs, lived_in_model, mlp, randomise_statistics
from torch import nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.kernels import NTKOperator, plan_ntk
from lightning_conv.kernels.engine import factors
from lightning_conv.kernels.planning import passes, sizes
from lightning_conv.kernels.planning import task as tasks
from lightning_conv.kernels.reading import read_within


def slow(*cases):
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def spectral_norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.slow
def test_agrees_with_the_double_loop_on_resnet18(naive_gram):
    model = randomise_statistics(torchvision.models.resnet18(num_classes=3)).double()
    # The last stage holds three quarters of the 11 million parameters and no other kind of layer: time, not coverage.
    model.layer4.requires_grad_(False)
    model.layer3[1].requires_grad_(False)
    model.layer4[1].bn2.requires_grad_(True)
    inputs = rand(3, 3, 32, 32).double()
    assert_same(ntk_gram(model, inputs, outputs="full").matrix, naive_gram(model, inputs, "full"))


def test_layers_with_a_rule_go_by_it_and_nothing_else_does():
    gram = ntk_gram(*build("cnn with batch norm"))
    assert not gram.general
    assert set(gram.structured) == set(gram.parameters)
    assert not ntk_gram(*build("lstm")).general
    tied = ntk_gram(*build("tied weights, transposed"))
    assert set(tied.general) == {"encoder.weight"}


def test_the_general_engine_agrees_with_the_rules():
    for case in ("cnn with batch norm", "transformer", "embedding", "lstm"):
        model, inputs = build(case)
        jacobian = ntk_gram(model, inputs, engine="jacobian")
        assert not jacobian.structured
        assert_same(jacobian.matrix, ntk_gram(model, inputs).matrix, 1e-11)


def test_closed_form_of_one_linear_layer():
    inputs = rand(5, 4).double()
    expected = 3 * (inputs @ inputs.T + 1)  # C outputs, each x_i . x_j, and 1 from the bias
    assert_same(ntk_gram(nn.Linear(4, 3).double(), inputs).matrix, expected, 1e-14)


def test_gram_is_the_finite_difference_of_a_gradient_step(naive_gram):
    # du_i/dt = -G r under gradient flow: move the weights along -J^T r by a small step and watch the outputs.
    model, inputs = build("cnn with batch norm")
    model.eval()
    residual = rand(5, 2).double()
    gram = ntk_gram(model, inputs, outputs="full").matrix
    model.zero_grad()
    (model(inputs) * residual).sum().backward()
    steps = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p in model.parameters():
                p -= step * p.grad
            steps.append(model(inputs))
            for p in model.parameters():
                p += step * p.grad
    change = (steps[0] - steps[1]).flatten() / 2e-5
    torch.testing.assert_close(change, -gram @ residual.flatten(), rtol=1e-7, atol=1e-8)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "outputs"),
    [
        ("mlp", "trace"),
        ("mlp", "full"),
        ("mlp", "sum"),
        ("cnn with batch norm", "full"),
        ("transformer", "trace"),
        ("vmap cannot", "full"),
        ("module called twice", "sum"),
        ("embedding", "full"),
        ("lstm", "trace"),
    ],
)
def test_cutting_the_work_changes_nothing_but_rounding(case, outputs, monkeypatch):
    monkeypatch.setattr(factors, "TILE", 2)
    model, inputs = build(case)
    whole = ntk_gram(model, inputs, outputs=outputs)

    def cut(*args, **kwargs):
        """Every layer for itself, two samples held at once, one through the network, each output of a trace alone."""
        plan = make_plan(*args, **kwargs)
        cuts_of = []
        for old in plan.passes:
            ranges = [(k, k + 1) for k in range(*old.outputs)] if plan.problem.trace else [old.outputs]
            cuts = [(index, each) for index in old.contributions for each in ranges]
            cuts_of += [replace(old, contributions=(i,), rows=2, tile=1, outputs=each) for i, each in cuts]
        return replace(plan, passes=tuple(cuts_of), outputs_at_once=1)

    make_plan = tasks.make_plan
    monkeypatch.setattr(tasks, "make_plan", cut)
    small = ntk_gram(model, inputs, outputs=outputs)
    assert len(small.plan.passes) > len(whole.plan.passes)
    assert_same(small.matrix, whole.matrix, 1e-13)
    assert small.floor <= 20 * whole.floor
    for layer, trace in whole.layer_traces.items():
        assert small.layer_traces[layer] == pytest.approx(trace, rel=1e-12)


def ways_to_cut(model, inputs, budget, factor, **options):
    """The ranges of outputs of the passes under less and less memory, until it is refused, each with the smallest budget."""
    found = {}
    with read_once():
        while True:
            try:
                plan = plan_ntk(model, inputs, max_memory=budget, **options)
            except MemoryError:
                return found
            assert plan.bytes <= budget
            found[frozenset(each.outputs for each in plan.passes)] = budget
            budget = int(budget * factor)


@contextmanager
def read_once():
    """Read a network for the first of many plans alone: what is read does not depend on the memory."""
    kept, read = [], read_within.read_network

    def known(*args, **options):
        kept[:] = kept or [read(*args, **options)]
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_within, "read_network", known)
        patch.setattr(tasks, "on_copies", lambda *args: None)
        yield


@pytest.mark.parametrize("case", ["mlp", *slow("cnn with batch norm", "transformer", "embedding", "lstm")])
@pytest.mark.parametrize("outputs", ["trace", *slow("full")])
def test_less_memory_changes_nothing_but_rounding(case, outputs, monkeypatch):
    monkeypatch.setattr(passes, "FORWARD_TARGET", 1)
    monkeypatch.setattr(sizes, "FORWARD_TARGET", 1)
    model, inputs = build(case)
    whole = ntk_gram(model, inputs, outputs=outputs)
    budgets = ways_to_cut(model, inputs, whole.plan.bytes, 0.85, outputs=outputs)
    assert len(budgets) > 0
    for budget in budgets.values():
        cut = ntk_gram(model, inputs, outputs=outputs, max_memory=budget)
        assert cut.plan.bytes <= budget
        assert_same(cut.matrix, whole.matrix, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm"])
def test_too_little_memory_is_refused_with_numbers_and_what_would_fit(case):
    model, inputs = build(case)
    with pytest.raises(
        MemoryError, match=r"max_memory: reading the network .* takes [\d.]+ MiB of the allowed [\d.]+ MiB; .*"
    ):
        ntk_gram(model, inputs, max_memory=64)
    many = torch.randn(900, *inputs.shape[1:], dtype=inputs.dtype)
    with pytest.raises(
        MemoryError, match=r"max_memory: the kernel .* takes .* MiB of the allowed 19.1 MiB; about [345].. samples"
    ):
        ntk_gram(model, many, outputs="full", max_memory=20_000_000)
    least = ntk_gram(model, inputs).plan.bytes
    refused = None
    while refused is None:
        least = int(least * 0.9)
        try:
            ntk_gram(model, inputs, max_memory=least)
        except MemoryError as error:
            refused = str(error)
    assert re.match(r"max_memory: .*MiB.*(allow|would fit)", refused)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm", "transformer", "module called twice", "lstm"])
def test_stated_errors_cover_the_distance_to_the_float64_oracle(case, precision, naive_gram):
    model, inputs = CASES[case]()
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs, precision=precision)
        oracle = naive_gram(model, inputs, outputs)
        error = spectral_norm(gram.matrix - oracle)
        assert error <= gram.floor + 2 * gram.jacobian_error * gram.trace
        if precision == "certified":
            assert error <= 1e-12 * spectral_norm(oracle)  # and the bound is not the only thing that is small
            assert gram.floor + 2 * gram.jacobian_error * gram.trace <= 1e-9 * gram.trace


@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm"])
def test_floor_bounds_the_products_of_fast(case, outputs):
    # Both evaluate one float32 Jacobian; only the products differ.
    model, inputs = CASES[case]()
    fast, exact = (ntk_gram(model, inputs, outputs=outputs, precision=p) for p in ("fast", "exact"))
    difference = spectral_norm(fast.matrix - exact.matrix)
    assert 0 < difference <= fast.floor + exact.floor
    assert exact.floor < 1e-7 * fast.floor


def test_floor_is_near_the_error_where_the_error_is_largest():
    # One input feature and one output: a product of two numbers errs by up to u = 2^-24. Over many samples the worst is
    # found, and a floor below it would be no bound.
    layer = nn.Linear(1, 1, bias=False)
    inputs = torch.linspace(1.0, 1.5, 2001)[:, None]
    worst = 0.0
    for sample in inputs[::40]:
        fast, exact = (ntk_gram(layer, sample[None], precision=p) for p in ("fast", "exact"))
        error = float((fast.matrix - exact.matrix).abs())
        assert error <= fast.floor
        worst = max(worst, error / fast.floor)
    assert worst > 0.2


def test_precision_certified_uses_a_copy_and_leaves_the_model_float32():
    model, inputs = CASES["mlp"]()
    ntk_gram(model, inputs, precision="certified")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- the model is left alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["eval", "frozen"])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_leaves_no_trace(precision, batch_norm, leaves_no_trace):
    model, inputs = lived_in_model(), rand(5, 2, 4, 4)
    with leaves_no_trace(model, inputs):
        ntk_gram(model, inputs, precision=precision, batch_norm=batch_norm)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_norm", ["eval", "frozen"])
def test_leaves_no_trace_when_the_forward_raises(fails_at, batch_norm, snapshot):
    model, inputs = lived_in_model(), rand(5, 2, 4, 4)
    calls = []

    class Failing(nn.Module):
        def forward(self, x):
            calls.append(torch.rand(1))
            if len(calls) >= fails_at:
                raise KeyError("from inside the forward")
            return x

    model[3] = nn.Sequential(model[3], Failing())
    before = snapshot(model)
    with pytest.raises(KeyError, match="from inside"):
        ntk_gram(model, inputs, batch_norm=batch_norm)
    assert snapshot(model) == before


def test_leaves_the_fused_attention_switches_alone(snapshot):
    model, inputs = CASES["transformer"]()
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            before = snapshot(model)
            ntk_gram(model, inputs)
            assert snapshot(model) == before
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_works_beside_the_per_backend_precision_setting(snapshot, naive_gram):
    # torch refuses get_float32_matmul_precision once a run has used the newer, per-backend interface.
    model, inputs = CASES["mlp"]()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        before = snapshot(model)
        gram = ntk_gram(model, inputs)
        assert snapshot(model) == before
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert_same(gram.matrix, naive_gram(model, inputs, "trace"), 1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_is_the_same_inside_a_validation_loop(context, naive_gram):
    model, inputs = build("mlp")
    expected = naive_gram(model, inputs, "trace")
    with context():
        gram = ntk_gram(model, inputs * 1.0)  # inputs that were made in there, too
    assert_same(gram.matrix, expected)


# --- batch norm -----------------------------------------------------------------------------------------------------


def test_frozen_batch_norm_holds_the_statistics_of_the_batch_constant(naive_gram):
    model, inputs = build("cnn with batch norm")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class ByHand(nn.Module):
        """The network with statistics as constants: those that train mode normalises this batch with."""

        def __init__(self):
            super().__init__()
            self.net = model
            with torch.no_grad():
                x = model[0](inputs)
                self.first = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
                x = model[5](self.front(x))
                self.second = x.mean(0), x.var(0, correction=0)

        def front(self, x):
            norm = self.net[1]
            x = F.batch_norm(x, *self.first, norm.weight, norm.bias, training=False, eps=norm.eps)
            return self.net[4](self.net[3](self.net[2](x)))

        def forward(self, x):
            norm = self.net[6]
            x = self.net[5](self.front(self.net[0](x)))
            x = F.batch_norm(x, *self.second, norm.weight, norm.bias, training=False, eps=norm.eps)
            return self.net[8](self.net[7](x))

    by_hand = ByHand()
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs, batch_norm="frozen")
        assert_same(gram.matrix, naive_gram(by_hand, inputs, outputs))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The function is the one of train mode, and its kernel is not that of eval mode.
    torch.testing.assert_close(by_hand(inputs), model(inputs))
    assert spectral_norm(ntk_gram(model, inputs).matrix - gram.matrix) > 0.01 * spectral_norm(gram.matrix)


def test_frozen_batch_norm_is_the_same_in_tiles_and_in_the_float64_copy(naive_gram):
    model, inputs = CASES["cnn with batch norm"]()
    whole = ntk_gram(model, inputs, batch_norm="frozen", precision="certified")
    memory = int(0.8 * whole.plan.bytes)
    tiles = ntk_gram(model, inputs, batch_norm="frozen", precision="certified", max_memory=memory)
    assert_same(tiles.matrix, whole.matrix, 1e-13)
    assert_same(ntk_gram(model.double(), inputs.double(), batch_norm="frozen").matrix, whole.matrix, 1e-12)


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"model: BatchNorm without running statistics \(1\)"):
        ntk_gram(model, rand(4, 4))


def test_frozen_refuses_a_batch_norm_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.norm(torch.tanh(self.norm(x))))

    with pytest.raises(ValueError, match=r"batch_norm: .*\['norm'\]"):
        ntk_gram(Twice(), rand(5, 4), batch_norm="frozen")


# --- refusals -------------------------------------------------------------------------------------------------------


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return torch.tanh(self.layer(x - x.mean(0)))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) + torch.randn(len(x), 2)


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 2), function

    def forward(self, x):
        return self.function(self.layer(x))


@pytest.mark.parametrize("n", [2, 3, 4, 20])
@pytest.mark.parametrize("kind", [Centred, Noisy])
def test_samples_that_couple_and_random_forwards_are_refused(kind, n):
    with pytest.raises(ValueError, match=r"model: the outputs of the first (sample|\d+ samples) change"):
        ntk_gram(kind(), rand(n, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused(value):
    inputs = rand(5, 4)
    inputs[3, 1] = value
    with pytest.raises(ValueError, match=r"inputs: tensor 0 of shape \(5, 4\) contains NaN"):
        ntk_gram(nn.Linear(4, 1), inputs)
    with pytest.raises(ValueError, match=r"inputs: tensor 1 "):
        ntk_gram(TwoInputs(), (rand(5, 3), inputs[:, :2]))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.empty(0, 4), ValueError, "inputs: need one or more samples"),
        (torch.tensor(1.0), ValueError, "inputs: need one or more samples"),
        ((), TypeError, "inputs: .*nothing"),
        ((torch.ones(3, 3), torch.ones(4, 2)), ValueError, r"inputs: .*\[3, 4\]"),
        ((torch.ones(3, 3), "text"), TypeError, "inputs: .*str"),
    ],
)
def test_unusable_inputs_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        ntk_gram(TwoInputs(), inputs)


def test_no_trainable_parameter_is_refused():
    with pytest.raises(ValueError, match="model: no parameter has requires_grad"):
        ntk_gram(nn.Linear(4, 1).requires_grad_(False), rand(3, 4))
    with pytest.raises(ValueError, match="model: no parameter has requires_grad"):
        ntk_gram(nn.Tanh(), rand(3, 4))


@pytest.mark.parametrize("option", ["outputs", "precision", "batch_norm"])
def test_unknown_options_are_refused_with_what_is_allowed(option):
    with pytest.raises(ValueError, match=rf"{option}: 'best' is not one of '"):
        ntk_gram(nn.Linear(4, 1), rand(3, 4), **{option: "best"})


@pytest.mark.parametrize("memory", [0, -1, 0.5, -1e9, float("nan"), float("inf"), "1 GB", True, [2**30]])
@pytest.mark.parametrize("function", [ntk_gram, plan_ntk, NTKOperator])
def test_max_memory_must_be_a_positive_number(function, memory):
    with pytest.raises(ValueError, match=f"max_memory: {re.escape(repr(memory))}; give a positive number of bytes"):
        function(nn.Linear(4, 1), rand(3, 4), max_memory=memory)


@pytest.mark.parametrize("memory", [1e8, np.float64(1e8), np.int64(10**8)])
def test_max_memory_may_be_any_kind_of_number(memory):
    model, inputs = nn.Linear(4, 2), rand(3, 4)
    for batch_norm in ("eval", "batch"):
        gram = ntk_gram(model, inputs, max_memory=memory, batch_norm=batch_norm)
        assert gram.plan.max_memory == 10**8
        assert type(gram.plan.max_memory) is int
    assert NTKOperator(model, inputs, max_memory=memory).dense().shape == (6, 6)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda u: (u, u), TypeError, "model: returned tuple"),
        (lambda u: {"logits": u}, TypeError, "model: returned dict"),
        (lambda u: u.argmax(1), TypeError, r"model: returned torch\.int64"),
        (lambda u: u.mean(), ValueError, r"model: returned shape \(\) for"),
        (lambda u: u.T, ValueError, r"model: returned shape \(2, \d\) for"),
    ],
)
def test_results_that_are_not_one_row_a_sample_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        ntk_gram(Returns(function), rand(5, 4))


# --- laws -----------------------------------------------------------------------------------------------------------

LAWS = settings(max_examples=12, deadline=None)


@st.composite
def networks(draw):
    """A small float64 network with inputs; widths, depth, activation and samples vary."""
    seed = draw(st.integers(0, 2**31))
    width, depth, c, n = (draw(st.integers(1, top)) for top in (6, 3, 3, 6))
    activation = draw(st.sampled_from([nn.Tanh, nn.Softplus, nn.ReLU, nn.Identity]))
    torch.manual_seed(seed)
    return mlp(3, *[width] * depth, c, activation=activation).double(), rand(n, 3).double()


@LAWS
@given(networks(), st.sampled_from(["trace", "full", "sum"]))
def test_law_symmetric_and_positive_semidefinite_up_to_the_floor(network, outputs):
    gram = ntk_gram(*network, outputs=outputs)
    assert torch.equal(gram.matrix, gram.matrix.T)
    slack = 1e-13 * gram.trace  # of eigvalsh itself
    assert float(torch.linalg.eigvalsh(gram.matrix)[0]) >= -gram.floor - slack


@LAWS
@given(networks(), st.randoms(use_true_random=False))
def test_law_permuting_the_samples_permutes_the_kernel(network, random):
    model, inputs = network
    order = list(range(len(inputs)))
    random.shuffle(order)
    direct, permuted = ntk_gram(model, inputs), ntk_gram(model, inputs[order])
    assert float((permuted.matrix - direct.matrix[order][:, order]).abs().max()) <= 1e-12 * direct.trace


@pytest.mark.slow
@LAWS
@given(networks())
def test_law_the_kernel_is_the_sum_of_the_layers_kernels(network):
    model, inputs = network
    whole = ntk_gram(model, inputs, outputs="full")
    total = torch.zeros_like(whole.matrix)
    for parameter in model.parameters():
        model.requires_grad_(False)
        parameter.requires_grad_(True)
        total += ntk_gram(model, inputs, outputs="full").matrix
    assert float((total - whole.matrix).abs().max()) <= 1e-12 * whole.trace


@LAWS
@given(networks(), st.floats(1e-3, 1e3))
def test_law_outputs_times_a_give_a_squared_times_the_kernel(network, a):
    model, inputs = network
    before = ntk_gram(model, inputs)
    scaled = ntk_gram(Scaled(model, a), inputs)
    assert float((scaled.matrix - a**2 * before.matrix).abs().max()) <= 1e-12 * a**2 * before.trace


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.factor * self.net(x)


@LAWS
@given(networks(), st.data())
def test_law_interlacing_a_subset_has_the_larger_lambda_min(network, data):
    model, inputs = network
    subset = data.draw(st.lists(st.sampled_from(range(len(inputs))), min_size=1, unique=True))
    whole, part = ntk_gram(model, inputs), ntk_gram(model, inputs[subset])
    smallest, of_part = (torch.linalg.eigvalsh(gram.matrix) for gram in (whole, part))
    slack = 1e-12 * whole.trace
    assert float(of_part[0]) >= float(smallest[0]) - slack
    assert float(of_part[-1]) <= float(smallest[-1]) + slack


# --- a plan that is used again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm", "transformer", "lstm", "embedding"])
def test_a_plan_serves_other_weights_and_samples_of_the_same_shape(case, naive_gram):
    model, inputs = build(case)
    plan = plan_ntk(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    others = inputs.flip(0) if case == "embedding" else torch.randn_like(inputs)
    gram = ntk_gram(model, others, plan=plan)
    assert_same(gram.matrix, naive_gram(model, others, "trace"))
    assert gram.plan.bytes == plan.bytes


def test_a_plan_of_another_kernel_is_refused():
    model, inputs = build("mlp")
    plan = plan_ntk(model, inputs)
    with pytest.raises(ValueError, match=r"plan: made for .*samples=6.*samples=5"):
        ntk_gram(model, inputs[:5], plan=plan)
    with pytest.raises(ValueError, match=r"plan: made for .*'exact', but asked for is .*'fast'"):
        ntk_gram(model, inputs, precision="fast", plan=plan)
    with pytest.raises(ValueError, match=r"plan: made for 6 parameters .* is over 1 "):
        ntk_gram(model, inputs, parameters=["0.weight"], plan=plan)
    with pytest.raises(ValueError, match="model: called"):
        ntk_gram(
            nn.Sequential(model, nn.Identity())[0],
            inputs,
            plan=replace(plan, reading=replace(plan.reading, signature=())),
        )


# --- two sets of samples, layers, patterns, projections -------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm", "transformer", "lstm"])
def test_between_two_sets_it_is_a_block_of_the_kernel_of_their_union(case, outputs, precision):
    model, inputs = CASES[case]()
    first, second = inputs[:3], inputs[1:]
    whole = ntk_gram(model.double(), torch.cat([first, second]).double(), outputs=outputs)
    between = ntk_gram(model.float(), first, second, outputs=outputs, precision=precision)
    stride = len(whole.matrix) // (len(first) + len(second))
    expected = whole.matrix[: 3 * stride, 3 * stride :]
    assert between.matrix.shape == expected.shape
    error = spectral_norm(between.matrix - expected)
    assert error <= between.floor + 2 * between.jacobian_error * whole.trace
    assert precision != "certified" or error <= 1e-12 * spectral_norm(expected)
    with pytest.raises(ValueError, match="trace: the kernel is between two sets"):
        _ = between.trace
    with pytest.raises(ValueError, match="gram: a kernel between two sets"):
        kernel_spectrum(between)


def test_parameters_by_pattern_are_those_that_match(naive_gram):
    model, inputs = build("mlp")
    for pattern, names in (
        ("*.bias", {"0.bias", "2.bias", "4.bias"}),
        (["2.*", "0.weight"], {"2.weight", "2.bias", "0.weight"}),
    ):
        gram = ntk_gram(model, inputs, parameters=pattern)
        assert set(gram.parameters) == names
        chosen, _ = build("mlp")
        chosen.load_state_dict(model.state_dict())
        for name, parameter in chosen.named_parameters():
            parameter.requires_grad_(name in names)
        assert_same(gram.matrix, naive_gram(chosen, inputs, "trace"))
    with pytest.raises(ValueError, match=r"parameters: \['3\.\*'\]; need names or patterns"):
        ntk_gram(model, inputs, parameters=["0.*", "3.*"])


@pytest.mark.slow
def test_projections_estimate_the_trace_kernel_without_bias():
    model, inputs = mlp(4, 8, 30).double(), rand(5, 4).double()
    truth = ntk_gram(model, inputs).matrix
    draws = [ntk_gram(model, inputs, outputs="projected", projections=6, seed=seed) for seed in range(200)]
    errors = torch.stack([gram.matrix - truth for gram in draws])
    spread = float(errors.square().sum((1, 2)).mean().sqrt())
    # The mean of 200 independent errors is about spread / sqrt(200) where there is no bias.
    assert float(errors.mean(0).norm()) <= 2 * spread / 200**0.5
    stated = (sum(gram.projection_error**2 for gram in draws) / len(draws)) ** 0.5
    assert 0.8 * spread <= stated <= 1.25 * spread
    again = ntk_gram(model, inputs, outputs="projected", projections=6, seed=3)
    assert torch.equal(again.matrix, draws[3].matrix)
    assert sum(again.layer_traces.values()) == pytest.approx(again.trace, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("projections", [6, pytest.param(17, marks=pytest.mark.slow)])
def test_groups_of_projections_of_unequal_size_may_be_cut(projections):
    # Groups of 2, 2, 1, 1 and 5, 4, 4, 4: some passes of a plan for the largest have nothing to do for the smaller ones.
    model, inputs = mlp(4, 8, 64, 30).double(), rand(120, 4).double()
    whole = ntk_gram(model, inputs, outputs="projected", projections=projections)
    ranges = ways_to_cut(model, inputs, whole.plan.bytes, 0.88, outputs="projected", projections=projections)
    for cuts, budget in ranges.items():
        cut = ntk_gram(model, inputs, outputs="projected", projections=projections, max_memory=budget)
        assert {each.outputs for each in cut.plan.passes} == cuts
        assert_same(cut.matrix, whole.matrix, 1e-13)
        assert cut.projection_error == pytest.approx(whole.projection_error, rel=1e-9)
        for layer, trace in whole.layer_traces.items():
            assert cut.layer_traces[layer] == pytest.approx(trace, rel=1e-12)
    assert any(first >= projections // 4 for first, _ in frozenset().union(*ranges)), (
        "no pass was empty for the smallest group"
    )


@pytest.mark.parametrize("outputs", [1, 5])
def test_no_more_outputs_than_projections_are_summed_exactly(outputs):
    model, inputs = mlp(4, 8, outputs).double(), rand(5, 4).double()
    gram, trace = ntk_gram(model, inputs, outputs="projected", projections=5), ntk_gram(model, inputs)
    assert torch.equal(gram.matrix, trace.matrix)
    assert (gram.outputs, gram.projection_error, gram.plan.flops) == ("projected", 0.0, trace.plan.flops)


@pytest.mark.parametrize("outputs", ["trace", "full", "sum"])
def test_batch_statistics_couple_the_samples_and_layers_add_up(outputs):
    model, inputs = build("cnn with batch norm")
    gram = ntk_gram(model, inputs, outputs=outputs, batch_norm="batch", per_layer=True)
    frozen = ntk_gram(model, inputs, outputs=outputs, batch_norm="frozen")
    assert spectral_norm(gram.matrix - frozen.matrix) > 0.01 * spectral_norm(frozen.matrix)
    assert_same(sum(gram.layer_matrices.values()), gram.matrix, 1e-12)
    with pytest.raises(ValueError, match="inputs2: with batch_norm"):
        ntk_gram(model, inputs, inputs, batch_norm="batch")
