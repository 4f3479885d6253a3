"""``cotangents=``: the kernel s_i^T K_ij s_j of contracted outputs, against per-sample gradients of sum_c s_ic u_ic by autograd."""

import copy
import dataclasses
from fractions import Fraction

import mpmath
import pytest
import torch
from dense_kernels import assert_same, contracted_gram, train_mode_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import CASES, COUPLED, build, build_coupled, kernel
from torch import nn

from lightning_conv import (
    NTKOperator,
    kernel_drift,
    kernel_spectrum,
    layer_spectra,
    ntk_gram,
    plan_ntk,
    resolved_spectrum,
)
from lightning_conv.kernels.contraction import full_lambda_max, is_full
from lightning_conv.kernels.engine import factors
from lightning_conv.kernels.planning import task as tasks
from lightning_conv.kernels.result import KernelGram


class Language(nn.Module):
    """One distribution over the words at each position, (n, T, V); the head is the embedding if ``tied``."""

    def __init__(self, words=9, width=4, tied=False):
        super().__init__()
        self.table = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(width, words)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.encoder(self.table(tokens)))


def network(case):
    """A network in float64 with its inputs: a case, or one with outputs (n, T, V)."""
    if not case.startswith("language"):
        return build(case)
    torch.manual_seed(0)
    return Language(tied="tied" in case).double(), torch.randint(9, (5, 3))


NETWORKS = [*CASES, "language", "language, tied"]


def drawn(shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cotangents_for(model, inputs, seed=2):
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(
            *([inputs] if isinstance(inputs, torch.Tensor) else inputs if isinstance(inputs, tuple) else []),
            **(inputs if isinstance(inputs, dict) else {}),
        )
    return drawn(outputs.shape, seed)


def spectral_norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def allowed(gram):
    """The stated errors: the floor, and |G + dG|^2 - |G|^2 for |dG| <= jacobian_error |G|."""
    return gram.floor + (2 * gram.jacobian_error + gram.jacobian_error**2) * gram.trace


# --- against autograd -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NETWORKS)
def test_gram_layers_and_operator_agree_with_the_double_loop_of_autograd(case):
    model, inputs = network(case)
    s = cotangents_for(model, inputs)
    truth = contracted_gram(model, inputs, s)
    gram = ntk_gram(model, inputs, cotangents=s, per_layer=True)
    assert_same(gram.matrix, truth)
    assert torch.equal(gram.matrix, gram.matrix.T)
    assert gram.outputs == "cotangents"
    assert_same(sum(gram.layer_matrices.values()), gram.matrix, 1e-12)
    for layer, matrix in gram.layer_matrices.items():
        assert gram.layer_traces[layer] == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-12 * gram.trace)
    assert_same(ntk_gram(model, inputs, cotangents=s.flatten(1), engine="jacobian").matrix, truth)
    operator = NTKOperator(model, inputs, cotangents=s)
    assert operator.shape == truth.shape
    vector = drawn((len(s),))
    assert_same(operator @ vector, truth @ vector)
    assert_same(operator.dense(), truth)
    assert_same(operator.jvp(operator.vjp(vector)), truth @ vector)


@pytest.mark.parametrize("case", COUPLED)
def test_samples_that_couple_have_a_row_for_each_contracted_sample(case):
    model, inputs = build_coupled(case)
    rows = train_mode_rows(model, inputs)
    s = drawn((len(inputs), len(rows) // len(inputs))) * torch.logspace(-8, 6, len(inputs))[:, None]
    contracted = (s.flatten()[:, None] * rows).unflatten(0, s.shape).sum(1)
    truth = contracted @ contracted.T
    gram = ntk_gram(model, inputs, cotangents=s, batch_norm="batch", per_layer=True)
    assert_relative(gram.matrix, truth, 1e-9)
    assert_same(sum(gram.layer_matrices.values()), gram.matrix, 1e-12)
    assert spectral_norm(gram.matrix - truth) <= allowed(gram)
    assert_relative(NTKOperator(model, inputs, cotangents=s, batch_norm="batch").dense(), truth, 1e-9)


def assert_relative(found, expected, tolerance):
    """Each entry, to this share of the norms of its two rows of J."""
    sizes = expected.diagonal().sqrt()
    assert float(((found - expected).abs() / (sizes[:, None] * sizes)).max()) <= tolerance


def test_frozen_statistics_are_constants():
    model, inputs = build("cnn with batch norm")
    s = drawn((len(inputs), 2))
    frozen = copy.deepcopy(model)

    def adopt(module, args):
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        module.running_mean.copy_(args[0].mean(axes))
        module.running_var.copy_(args[0].var(axes, correction=0))

    handles = [m.register_forward_pre_hook(adopt) for m in frozen if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        frozen.eval()(inputs)
    for handle in handles:
        handle.remove()
    truth = contracted_gram(frozen, inputs, s)
    assert_same(ntk_gram(model, inputs, cotangents=s, batch_norm="frozen").matrix, truth)
    assert_same(NTKOperator(model, inputs, cotangents=s, batch_norm="frozen").dense(), truth)
    other = ntk_gram(model, inputs, cotangents=s).matrix
    assert float((other - truth).norm()) > 0.01 * float(truth.norm())


@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm", "embedding", "lstm", "vmap cannot"])
def test_between_two_sets_it_is_a_block_of_the_kernel_of_their_union(case):
    model, inputs = network(case)
    s = cotangents_for(model, inputs) * torch.logspace(-5, 5, len(inputs))[:, None]
    whole = ntk_gram(model, inputs, cotangents=s).matrix
    between = ntk_gram(model, inputs[:2], inputs[2:], cotangents=s[:2], cotangents2=s[2:], per_layer=True)
    sizes = whole.diagonal().sqrt()
    assert float(((between.matrix - whole[:2, 2:]) / (sizes[:2, None] * sizes[2:])).abs().max()) <= 1e-9
    assert_same(sum(between.layer_matrices.values()), between.matrix, 1e-12)
    assert spectral_norm(between.matrix - whole[:2, 2:]) <= between.floor + 1e-14 * float(whole.trace())


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "transformer", "lstm"])
def test_law_ones_give_the_kernel_of_the_sum_and_unit_vectors_add_up_to_the_trace_kernel(case):
    model, inputs = build(case)
    n, outputs = len(inputs), ntk_gram(model, inputs).n_outputs
    assert_same(
        ntk_gram(model, inputs, cotangents=torch.ones(n, outputs, dtype=torch.float64)).matrix, kernel(case, "sum")
    )
    units = torch.eye(outputs, dtype=torch.float64)
    parts = [ntk_gram(model, inputs, cotangents=unit.expand(n, -1)).matrix for unit in units]
    assert_same(sum(parts), kernel(case, "trace"))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-60, 60), min_size=6, max_size=6),
    st.sampled_from(["fast", "exact", "certified"]),
    st.sampled_from(["auto", "jacobian"]),
)
def test_law_powers_of_two_on_the_cotangents_change_no_digit(exponents, precision, engine):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(6, 4)
    s, powers = torch.randn(6, 3), torch.tensor([2.0**k for k in exponents])
    options = {"precision": precision, "engine": engine}
    plain = ntk_gram(model, inputs, cotangents=s, **options)
    scaled = ntk_gram(model, inputs, cotangents=s * powers[:, None], **options)
    assert torch.equal(scaled.matrix, plain.matrix * powers.double()[:, None] * powers.double())
    one = ntk_gram(model, inputs, cotangents=s * 2.0 ** exponents[0], **options)
    assert one.floor == pytest.approx(plain.floor * 4.0 ** exponents[0], rel=1e-12)
    assert one.jacobian_error == pytest.approx(plain.jacobian_error, rel=1e-6)


# --- stated errors --------------------------------------------------------------------------------------------------

SCALES = {
    "one": [1.0] * 6,
    "tiny": [1e-8] * 6,
    "large": [1e6] * 6,
    "below the range of float32 squares": [1e-30] * 6,
    "ill-scaled": [1e-30, 1e-8, 1.0, 1e6, 1e-3, 1e-12],
    "one sample and zeros": [0.0, 0.0, 1e-8, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("case", ["mlp", "transformer", "lstm", "cnn with batch norm"])
@pytest.mark.parametrize("scale", SCALES)
def test_stated_errors_cover_the_distance_to_the_float64_oracle_at_every_scale(case, precision, scale, dtype):
    model, inputs = CASES[case]()
    s = cotangents_for(model, inputs) * torch.tensor(SCALES[scale][: len(inputs)], dtype=torch.float64)[:, None]
    s = s.to(dtype)
    truth = contracted_gram(model, inputs, s)
    gram = ntk_gram(model, inputs, cotangents=s, precision=precision)
    assert spectral_norm(gram.matrix - truth) <= allowed(gram)
    assert allowed(gram) <= (1e-12 if precision == "certified" else 1e-4) * gram.trace  # and they mean something
    sizes = truth.diagonal().sqrt()
    accuracy = 1e-12 if precision == "certified" else 1e-5
    assert bool(((gram.matrix - truth).abs() <= accuracy * sizes[:, None] * sizes).all())


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
def test_the_floor_bounds_the_error_of_a_linear_network_in_rational_arithmetic(precision):
    torch.manual_seed(0)
    inputs, s = torch.randn(5, 700), torch.randn(5, 40) * torch.tensor([1e-8, 1e6, 1.0, 1e-20, 1e3])[:, None]
    gram = ntk_gram(nn.Linear(700, 40), inputs, cotangents=s, precision=precision)

    def products(rows):
        exact = [[Fraction(v) for v in row] for row in rows.tolist()]
        return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in exact] for x in exact]

    a, b = products(inputs), products(s)
    wrong = [[float(Fraction(float(gram.matrix[i, j])) - b[i][j] * (a[i][j] + 1)) for j in range(5)] for i in range(5)]
    error = spectral_norm(torch.tensor(wrong, dtype=torch.float64))
    assert 0 < error <= gram.floor


def test_certified_bounds_hold_the_eigenvalues_of_a_network_evaluated_to_fifty_digits():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(4, 3).double()
    s = torch.randn(4, 2).double() * torch.tensor([1e-8, 1.0, 1e6, 1e-3])[:, None]
    with mpmath.workdps(50):
        first, b, second, _ = (mpmath.matrix(p.tolist()) for p in model.parameters())
        rows = []
        for x, cotangent in zip(inputs.tolist(), s.tolist(), strict=True):
            x, cotangent = mpmath.matrix(x), mpmath.matrix(cotangent)
            hidden = (first * x + b).apply(mpmath.tanh)
            below = second.T * cotangent
            below = mpmath.matrix([g * (1 - h * h) for g, h in zip(below, hidden, strict=True)])
            rows.append([*(below * x.T), *below, *(cotangent * hidden.T), *cotangent])
        exact = mpmath.matrix([[mpmath.fdot(p, q) for q in rows] for p in rows])
        values = sorted(mpmath.eigsy(exact, eigvals_only=True))
        spectrum = kernel_spectrum(ntk_gram(model, inputs, cotangents=s, precision="certified"))
        assert spectrum.lambda_min.lower <= values[0] <= spectrum.lambda_min.upper
        assert spectrum.lambda_max.lower <= values[-1] <= spectrum.lambda_max.upper
    assert spectrum.lambda_max.certified


class Fitted(nn.Module):
    """Log-probabilities of a classifier: where a sample is fitted, the terms of its gradient cancel."""

    def __init__(self, sharpness):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.sharpness = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 10)), sharpness

    def forward(self, x):
        return torch.log_softmax(self.sharpness * self.trunk(x), 1)


@pytest.mark.parametrize("precision", ["fast", "exact", "certified"])
@pytest.mark.parametrize("sharpness", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_stated_errors_allow_for_terms_that_cancel(sharpness, precision, mode):
    model, inputs = Fitted(sharpness), torch.randn(8, 5)
    s = -nn.functional.one_hot(model(inputs).argmax(1), 10) / 8.0
    truth = contracted_gram(model, inputs, s)
    gram = ntk_gram(model, inputs, cotangents=s, precision=precision, batch_norm=mode)
    assert spectral_norm(gram.matrix - truth) <= allowed(gram)


@pytest.mark.parametrize("precision", ["exact", "certified"])
@pytest.mark.parametrize("how", ["sum", "cotangents"])
def test_outputs_whose_sum_is_constant_have_a_kernel_that_may_be_zero(how, precision):
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softmax(1)), torch.randn(7, 4)
    options = {"outputs": "sum"} if how == "sum" else {"cotangents": torch.full((7, 3), 1e-3)}
    spectrum = kernel_spectrum(ntk_gram(model, inputs, precision=precision, **options))
    assert spectrum.lambda_min.lower == spectrum.lambda_max.lower == 0
    operator = NTKOperator(model, inputs, **options)
    assert operator.cancellation > 1e4


def test_float64_cotangents_of_a_float32_network_are_rounded_within_the_stated_error():
    """Two entries of s cancel but for the digits that float32 does not have."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(6, 2), torch.randn(8, 6)
    with torch.no_grad():
        model = nn.Sequential(model, nn.Linear(2, 2, bias=False))
        model[1].weight.fill_(1.0)
    model[1].requires_grad_(False)
    s = torch.ones(8, 2, dtype=torch.float64)
    s[:, 1] = -1 + 1e-9 * torch.arange(1, 9)
    truth = contracted_gram(model, inputs, s)
    for precision in ("fast", "exact", "certified"):
        gram = ntk_gram(model, inputs, cotangents=s, precision=precision)
        spectrum = kernel_spectrum(gram)
        assert spectrum.lambda_max.lower <= float(torch.linalg.eigvalsh(truth)[-1]) <= spectrum.lambda_max.upper
    assert_same(gram.matrix, truth, 1e-6)


# --- the plan -------------------------------------------------------------------------------------------------------


def test_it_costs_one_backward_pass_and_no_memory_beyond_the_outputs_of_a_forward():
    torch.manual_seed(0)
    n, positions, words = 6, 4, 50_000
    model, inputs = Language(words, 8), torch.randint(words, (n, positions))
    s = torch.randn(n, positions, words) / n
    plan = plan_ntk(model, inputs, cotangents=s)
    assert {each.outputs for each in plan.passes} == {(0, 1)}
    assert plan.problem.outputs == 1
    assert plan.flops == plan_ntk(model, inputs, outputs="sum").flops
    assert plan.bytes <= 25 * s.numel() * 4  # 24 MiB each; the trace kernel's unit vectors alone would take 149 GiB
    gram = ntk_gram(model, inputs, cotangents=s, plan=plan)
    assert_same(gram.matrix, contracted_gram(model, inputs, s), 1e-4)


@pytest.mark.parametrize("case", ["mlp", "transformer", "lstm", "vmap cannot", "embedding"])
def test_cutting_the_work_changes_nothing_but_rounding(case, monkeypatch):
    monkeypatch.setattr(factors, "TILE", 2)
    model, inputs = network(case)
    s = cotangents_for(model, inputs) * torch.logspace(-9, 7, len(inputs))[:, None]
    whole = ntk_gram(model, inputs, cotangents=s)

    def cut(*args, **kwargs):
        """Every layer for itself, two samples held at once, one through the network."""
        plan = make_plan(*args, **kwargs)
        cuts = [
            dataclasses.replace(o, contributions=(i,), rows=2, tile=1) for o in plan.passes for i in o.contributions
        ]
        return dataclasses.replace(plan, passes=tuple(cuts))

    make_plan = tasks.make_plan
    monkeypatch.setattr(tasks, "make_plan", cut)
    small = ntk_gram(model, inputs, cotangents=s)
    assert len(small.plan.passes) > len(whole.plan.passes)
    assert_relative(small.matrix, whole.matrix, 1e-12)
    assert small.floor == pytest.approx(whole.floor, rel=20)


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_less_memory_changes_nothing_but_rounding(mode):
    torch.manual_seed(0)
    if mode == "eval":
        model, inputs, s = Language(300, 16).double(), torch.randint(300, (24, 8)), drawn((24, 8, 300))
    else:
        model = nn.Sequential(nn.Linear(20, 200), nn.BatchNorm1d(200), nn.Tanh(), nn.Linear(200, 30)).double()
        inputs, s = torch.randn(24, 20).double(), drawn((24, 30))
    s *= torch.logspace(-9, 7, 24).view(24, *[1] * (s.ndim - 1))
    whole = ntk_gram(model, inputs, cotangents=s, batch_norm=mode)
    flops = set()
    for memory in [round(12_000_000 * 0.75**k) for k in range(20)]:
        try:
            small = ntk_gram(model, inputs, cotangents=s, batch_norm=mode, max_memory=memory)
        except MemoryError:
            break
        flops.add(small.plan.flops)
        assert_relative(small.matrix, whole.matrix, 1e-11)
    assert len(flops) > 1  # more passes than one
    operator = NTKOperator(model, inputs, cotangents=s, batch_norm=mode, chunk=5 if mode == "eval" else None)
    assert_relative(operator.dense(), whole.matrix, 1e-10)


def test_a_plan_serves_other_weights_and_cotangents_and_their_rounding_is_measured_again():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softmax(1)), torch.randn(7, 4)
    plan = plan_ntk(model, inputs, cotangents=torch.randn(7, 3))
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    s = torch.randn(7, 3)
    gram = ntk_gram(model, inputs, cotangents=s, plan=plan)
    assert_same(gram.matrix, contracted_gram(model, inputs, s), 1e-5)
    assert gram.jacobian_error < 1e-4
    assert ntk_gram(model, inputs, cotangents=torch.ones(7, 3), plan=plan).jacobian_error > 0.1
    with pytest.raises(ValueError, match=r"plan: made for .*outputs=3.*asked for .*outputs=1"):
        ntk_gram(model, inputs, cotangents=s, plan=plan_ntk(model, inputs))


# --- what goes with it ----------------------------------------------------------------------------------------------


def test_spectra_and_facts_keep_what_the_kernel_is():
    model, inputs = build("mlp")
    s = drawn((6, 3))
    gram, spectrum = resolved_spectrum(model, inputs, cotangents=s, per_layer=True)
    exact = torch.linalg.eigvalsh(contracted_gram(model, inputs, s))
    assert spectrum.lambda_max.lower <= float(exact[-1]) <= spectrum.lambda_max.upper
    assert set(layer_spectra(gram)) == {"0", "2", "4"}
    kept = KernelGram.from_facts(gram.matrix, gram.facts())
    assert (kept.outputs, kept.floor, kept.trace) == ("cotangents", gram.floor, gram.trace)
    with pytest.raises(ValueError, match="reference: outputs='trace' against 'cotangents'"):
        kernel_drift(kept, ntk_gram(model, inputs))


def test_it_is_never_taken_for_the_full_kernel():
    model, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    gram = ntk_gram(model, inputs, cotangents=torch.full((4, 1), 1e3))
    assert not is_full(gram)
    assert full_lambda_max(gram, kernel_spectrum(gram)) == (0.0, float("inf"))


def test_all_floating_types_graphs_and_views_are_taken_as_they_are():
    model, inputs = build("mlp")
    wide = drawn((3, 6)).half()
    truth = contracted_gram(model, inputs, wide.T)
    leaf = wide.T.double().requires_grad_()
    for s in (wide.T, wide.T.float(), wide.T.bfloat16().double() * 0 + wide.T, 1.0 * leaf):
        assert_same(ntk_gram(model, inputs, cotangents=s).matrix, truth, 1e-12)
        assert_same(NTKOperator(model, inputs, cotangents=s).dense(), truth, 1e-12)
    assert leaf.grad is None


def test_leaves_no_trace_and_the_cotangents_alone(leaves_no_trace):
    model, inputs = CASES["cnn with batch norm"]()
    s = torch.randn(5, 2)
    before = s.clone()
    with leaves_no_trace(model, inputs):
        ntk_gram(model, inputs, cotangents=s, batch_norm="frozen")
        NTKOperator(model, inputs, cotangents=s).matmul(torch.ones(5))
    assert torch.equal(s, before)


def test_zero_cotangents_give_a_zero_kernel():
    model, inputs = build("mlp")
    gram = ntk_gram(model, inputs, cotangents=torch.zeros(6, 3))
    assert float(gram.matrix.abs().max()) == gram.floor == 0
    assert gram.jacobian_error < 1e-12


# --- refusals -------------------------------------------------------------------------------------------------------

BAD = {
    "rows": (torch.ones(5, 3), ValueError, r"cotangents: shape \(5, 3\) for 6 samples; need one row"),
    "no rows": (torch.tensor(1.0), ValueError, r"cotangents: shape \(\) for 6 samples"),
    "width": (torch.ones(6, 4), ValueError, r"cotangents: shape \(6, 4\); need \(6, 3\)$"),
    "flat": (torch.ones(6), ValueError, r"cotangents: shape \(6,\); need \(6, 3\)$"),
    "transposed": (torch.ones(6, 1, 3), ValueError, r"cotangents: shape \(6, 1, 3\); need \(6, 3\)$"),
    "nan": (torch.full((6, 3), torch.nan), ValueError, "cotangents: contains NaN or infinity; check the loss"),
    "one inf": (torch.ones(6, 3).index_fill(0, torch.tensor([4]), torch.inf), ValueError, "cotangents: contains NaN"),
    "complex": (torch.ones(6, 3, dtype=torch.complex64), ValueError, "cotangents: torch.complex64; need real"),
    "integer": (torch.ones(6, 3, dtype=torch.long), ValueError, "cotangents: torch.int64; need real floating-point"),
    "boolean": (torch.ones(6, 3, dtype=torch.bool), ValueError, "cotangents: torch.bool; need real floating-point"),
    "sparse": (torch.ones(6, 3).to_sparse(), ValueError, "cotangents: torch.sparse_coo; need a dense tensor"),
    "list": ([[1.0, 2.0, 3.0]] * 6, TypeError, "cotangents: got list; need a tensor"),
    "huge": (
        torch.full((6, 3), 1e200, dtype=torch.float64),
        ValueError,
        "cotangents: of size up to .* overflow; divide",
    ),
    "vanishing": (torch.full((6, 3), 1e-300, dtype=torch.float64), ValueError, "cotangents: .* vanish; multiply"),
}


@pytest.mark.parametrize("function", [ntk_gram, plan_ntk, NTKOperator, resolved_spectrum])
@pytest.mark.parametrize("bad", BAD)
def test_bad_cotangents_are_refused_by_name(function, bad):
    model, inputs = build("mlp")
    given, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        function(model, inputs, cotangents=given)


def test_exchanged_dimensions_of_the_outputs_are_refused_with_both_shapes():
    model, inputs = network("language")
    for mode in ("eval", "batch"):
        with pytest.raises(ValueError, match=r"shape \(5, 9, 3\); need \(5, 27\) or \(5, 3, 9\), the shape of the out"):
            ntk_gram(model, inputs, cotangents=torch.ones(5, 9, 3), batch_norm=mode)


@pytest.mark.parametrize("function", [ntk_gram, plan_ntk, resolved_spectrum])
@pytest.mark.parametrize("outputs", ["full", "sum", "projected"])
def test_outputs_beside_cotangents_are_refused(function, outputs):
    model, inputs = build("mlp")
    with pytest.raises(ValueError, match=f"outputs: '{outputs}' together with cotangents=.*leave out"):
        function(model, inputs, outputs=outputs, cotangents=torch.ones(6, 3))
    for beside in (None, torch.ones(6, 3)):
        with pytest.raises(
            ValueError, match=r"'cotangents' is no option; pass cotangents=, .*, and leave out outputs="
        ):
            function(model, inputs, outputs="cotangents", cotangents=beside)
    function(model, inputs, cotangents=torch.ones(6, 3))  # as it says


@pytest.mark.parametrize("outputs", ["trace", "sum"])
def test_outputs_beside_cotangents_of_an_operator_are_refused(outputs):
    model, inputs = build("mlp")
    with pytest.raises(ValueError, match=f"outputs: '{outputs}' together with cotangents=.*leave out"):
        NTKOperator(model, inputs, outputs=outputs, cotangents=torch.ones(6, 3))
    with pytest.raises(ValueError, match=r"outputs: 'projected' together with cotangents=.*leave out"):
        NTKOperator(model, inputs, outputs="projected", cotangents=torch.ones(6, 3))
    with pytest.raises(ValueError, match="model: an operator with cotangents= does not follow it; make a new NTKOpera"):
        NTKOperator(model, inputs, cotangents=torch.ones(6, 3)).follow(model)


@pytest.mark.parametrize("function", [ntk_gram, plan_ntk])
def test_cotangents_of_one_set_alone_are_refused(function):
    model, inputs = build("mlp")
    s = torch.ones(3, 3)
    with pytest.raises(ValueError, match="cotangents2: None; a kernel between two sets needs those of inputs2"):
        function(model, inputs[:3], inputs[3:], cotangents=s)
    with pytest.raises(ValueError, match="cotangents2: given without cotangents"):
        function(model, inputs[:3], inputs[3:], cotangents2=s)
    with pytest.raises(ValueError, match="cotangents2: given without inputs2"):
        function(model, inputs[:3], cotangents=s, cotangents2=s)
    with pytest.raises(ValueError, match=r"cotangents2: shape \(2, 3\) for 3 samples"):
        function(model, inputs[:3], inputs[3:], cotangents=s, cotangents2=s[:2])
