"""One tester for every metric: as class and as function, against NumPy and SciPy, in every use that torchmetrics makes of it."""

import copy
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric, MetricCollection

from lightning_conv import centred_alignment, certify_expressivity, kernel_spectrum, ntk_gram
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.kernels.drift import relative_frobenius_change
from lightning_conv.metrics import EffectiveRank, ExpressivityRank, KernelAlignment, KernelDrift, MinEigenvalue

N = 7


def kernels(count=3, size=N, seed=0):
    """Return positive definite kernels, each a change of the previous one."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((size, 20))
    found = []
    for _ in range(count):
        found.append(torch.from_numpy(features @ features.T))
        features = features + 0.3 * random.standard_normal((size, 20))
    return found


def feature_batches(seed=0):
    """8 + 4 + 3 samples in 9 features: rank [h, 1] is 8, 10 and 10 as they come, of the batches alone 8, 4 and 3."""
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.standard_normal((rows, 9))) for rows in (8, 4, 3)]


def frobenius_change(now, then):
    return scipy.linalg.norm(now - then) / scipy.linalg.norm(then)


def cka(now, then):
    h = np.eye(len(now)) - 1 / len(now)
    left, right = h @ now @ h, h @ then @ h
    return np.trace(left @ right) / math.sqrt(np.trace(left @ left) * np.trace(right @ right))


def entropy_rank(gram):
    return math.exp(scipy.stats.entropy(scipy.linalg.eigvalsh(gram)))


def rank(rows):
    return np.linalg.matrix_rank(np.hstack([rows, np.ones((len(rows), 1))]))


@dataclass(frozen=True)
class Case:
    """Inputs of a metric and expected results: NumPy oracles of all batches so far and of the latest batch."""

    make: Callable[..., Metric]
    batches: list[torch.Tensor]
    total: Callable[[list[np.ndarray]], float]
    batch: Callable[[list[np.ndarray]], float]  # of the last in the list
    function: Callable[[list[torch.Tensor]], float]
    details: str | None
    options: dict[str, Any] = field(default_factory=dict)

    def metric(self, **options):
        return self.make(**self.options, **options)

    def expected(self, count, oracle="total"):
        return getattr(self, oracle)([batch.numpy() for batch in self.batches[:count]])


def latest(oracle):
    return {"total": oracle, "batch": oracle}


SOME = kernels()
GIVEN = kernels(seed=9)[2]
CASES = {
    "drift": Case(
        KernelDrift,
        SOME,
        **latest(lambda g: frobenius_change(g[-1], g[0])),
        function=lambda g: relative_frobenius_change(g[-1], g[0]),
        details="drift",
    ),
    "drift from a given reference": Case(
        KernelDrift,
        SOME,
        **latest(lambda g: frobenius_change(g[-1], GIVEN.numpy())),
        function=lambda g: relative_frobenius_change(g[-1], GIVEN),
        details="drift",
        options={"reference": GIVEN},
    ),
    "alignment": Case(
        KernelAlignment,
        SOME,
        **latest(lambda g: cka(g[-1], g[0])),
        function=lambda g: centred_alignment(g[-1], g[0]),
        details=None,
    ),
    "alignment with a given reference": Case(
        KernelAlignment,
        SOME,
        **latest(lambda g: cka(g[-1], GIVEN.numpy())),
        function=lambda g: centred_alignment(g[-1], GIVEN),
        details=None,
        options={"reference": GIVEN},
    ),
    "lambda_min": Case(
        MinEigenvalue,
        SOME,
        **latest(lambda g: scipy.linalg.eigvalsh(g[-1])[0]),
        function=lambda g: kernel_spectrum(g[-1]).lambda_min.value,
        details="bounds",
    ),
    "effective rank": Case(
        EffectiveRank,
        SOME,
        **latest(lambda g: entropy_rank(g[-1])),
        function=lambda g: kernel_spectrum(g[-1]).effective_rank,
        details="spectrum",
    ),
    "expressivity": Case(
        ExpressivityRank,
        feature_batches(),
        total=lambda h: rank(np.vstack(h)),
        batch=lambda h: rank(h[-1]),
        function=lambda h: certify_expressivity(torch.cat(h)).rank_lower,
        details="certificate",
    ),
    "expressivity without bias": Case(
        ExpressivityRank,
        feature_batches(1),
        total=lambda h: np.linalg.matrix_rank(np.vstack(h)),
        batch=lambda h: np.linalg.matrix_rank(h[-1]),
        function=lambda h: certify_expressivity(torch.cat(h), bias=False).rank_lower,
        details="certificate",
        options={"bias": False},
    ),
}
KERNEL_CASES = {name: case for name, case in CASES.items() if case.make is not ExpressivityRank}
REFERENCE_CASES = [name for name, case in CASES.items() if case.make in {KernelDrift, KernelAlignment}]
close = {"rel": 1e-10, "abs": 1e-13}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=KERNEL_CASES)
def kernel_case(request):
    return KERNEL_CASES[request.param]


def fed(case, count=None, **options):
    metric = case.metric(**options)
    for batch in case.batches[:count]:
        metric.update(batch)
    return metric


# What a metric is


def test_class_and_function_agree_with_the_reference(case):
    metric = case.metric()
    for count, batch in enumerate(case.batches, 1):
        metric.update(batch)
        assert float(metric.compute()) == pytest.approx(case.expected(count), **close)
        assert case.function(case.batches[:count]) == pytest.approx(case.expected(count), **close)


def test_forward_returns_the_value_of_the_batch_and_accumulates(case):
    metric = case.metric()
    for count, batch in enumerate(case.batches, 1):
        assert float(metric(batch)) == pytest.approx(case.expected(count, "batch"), **close)
        assert metric.update_count == count
    assert float(metric.compute()) == pytest.approx(case.expected(None), **close)


def test_value_is_a_float64_scalar_without_graph(case):
    metric = case.metric()
    value = metric(case.batches[0].clone().requires_grad_())
    assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float64, False)
    state = [t for s in metric.metric_state.values() for t in (s if isinstance(s, list) else [s])]
    assert not any(tensor.requires_grad for tensor in state)


def test_facts_of_the_class(case):
    metric = case.metric()
    assert metric.is_differentiable is False
    assert metric.full_state_update is (case.make is not ExpressivityRank)
    assert metric.higher_is_better is {MinEigenvalue: True, ExpressivityRank: True}.get(case.make)
    values = [float(fed(case, count).compute()) for count in (1, 2, 3)]
    assert metric.plot_lower_bound <= min(values)
    assert metric.plot_upper_bound is None or max(values) <= metric.plot_upper_bound + 1e-12
    assert (metric.plot_upper_bound == 1) == (case.make is KernelAlignment)


def test_options_of_torchmetrics_pass_and_others_are_refused(case):
    assert case.metric(sync_on_compute=False).sync_on_compute is False
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `sync_in_compute`"):
        case.metric(sync_in_compute=False)


# What torchmetrics and its users do to one


def test_pickled_half_way_it_carries_on(case):
    metric = fed(case, 2)
    metric.compute()
    metric = pickle.loads(pickle.dumps(metric))
    assert float(metric.compute()) == pytest.approx(case.expected(2), **close)
    metric.update(case.batches[2])
    assert float(metric.compute()) == pytest.approx(case.expected(3), **close)


def test_clone_goes_its_own_way(case):
    metric = fed(case, 1)
    clone = metric.clone()
    for batch in case.batches[1:]:
        clone.update(batch)
    assert float(metric.compute()) == pytest.approx(case.expected(1), **close)
    assert float(clone.compute()) == pytest.approx(case.expected(3), **close)


def test_state_dict_of_all_states_carries_a_metric_over_half_way(case, tmp_path):
    metric = fed(case, 2)
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    other = case.metric()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with pytest.warns(UserWarning, match="before the ``update`` method"):  # torchmetrics does not save its counter
        assert float(other.compute()) == pytest.approx(case.expected(2), **close)
    other.update(case.batches[2])
    assert float(other.compute()) == pytest.approx(case.expected(3), **close)


def test_state_dict_has_the_reference_and_nothing_else(case):
    expected = {"reference", "reference_facts"} if case.make in {KernelDrift, KernelAlignment} else set()
    assert set(fed(case).state_dict()) == expected


def test_before_the_first_update_there_is_a_warning_and_no_number(case):
    metric = case.metric()
    with pytest.warns(UserWarning, match=f"{type(metric).__name__} was called before the ``update`` method"):
        assert math.isnan(metric.compute())
    if case.details:
        refused = pytest.raises(ValueError, match=r"there (is none|are none) yet; call update")
        with pytest.warns(UserWarning, match="was called before"), refused:
            getattr(metric, case.details)()


def test_reset_starts_over_but_for_the_reference(case):
    metric = fed(case)
    metric.compute()
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute())
    metric.update(case.batches[1])
    kept = [case.batches[0].numpy()] if case.make in {KernelDrift, KernelAlignment} else []
    assert float(metric.compute()) == pytest.approx(case.total([*kept, case.batches[1].numpy()]), **close)


@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_forget_goes_back_to_the_given_reference_or_to_the_next_kernel(name):
    case = CASES[name]
    metric = fed(case)
    metric.forget()
    for count, batch in enumerate(case.batches[1:], 1):
        metric.update(batch)
        seen = [b.numpy() for b in case.batches[1 : 1 + count]]
        assert float(metric.compute()) == pytest.approx(case.total(seen), **close)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "set_dtype"])
def test_states_are_not_rounded_with_the_module_that_holds_them(case, cast):
    metric = fed(case, 2)
    holder = torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(2, 2)})
    if cast == "set_dtype":
        metric.set_dtype(torch.float32)
    else:
        holder.to(torch.bfloat16) if cast == "to" else getattr(holder, cast)()
        assert holder["layer"].weight.dtype in {torch.float16, torch.bfloat16}
    metric.update(case.batches[2])
    assert float(metric.compute()) == pytest.approx(case.expected(3), **close)
    metric.reset()
    if "reference" in case.options:
        metric.forget()
        metric.update(case.batches[2])
        assert float(metric.compute()) == pytest.approx(case.expected(3), **close)


def test_states_follow_the_module_to_another_device(case):
    metric = fed(case, 2).to("meta")
    states = [t for s in metric.metric_state.values() for t in (s if isinstance(s, list) else [s])]
    assert states
    assert {tensor.device.type for tensor in states} == {"meta"}
    assert metric.device.type == "meta"


def test_kernels_made_in_inference_mode_serve_outside_of_it(case):
    with torch.inference_mode():
        metric = case.metric()
        metric(case.batches[0].clone())
        metric.update(case.batches[1].clone())
    metric = copy.deepcopy(metric)
    metric(case.batches[2])
    assert float(metric.compute()) == pytest.approx(case.expected(3), **close)


def test_the_callers_memory_may_be_used_again(kernel_case):
    metric, buffer = kernel_case.metric(), torch.empty(N, N, dtype=torch.float64)
    for batch in kernel_case.batches:
        metric.update(buffer.copy_(batch))
    buffer.zero_()
    assert float(metric.compute()) == pytest.approx(kernel_case.expected(3), **close)


def test_plot_draws_the_value_and_a_series(case):
    metric = fed(case)
    figure, axes = metric.plot()
    assert axes.get_lines()[0].get_ydata()[0] == pytest.approx(case.expected(3), **close)
    assert axes.get_ylabel() == type(metric).__name__
    plt.close(figure)
    figure, axes = plt.subplots()
    none, same = metric.plot([case.metric()(case.batches[0]), metric.compute()], ax=axes)
    assert none is None
    assert same is axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [case.expected(1), case.expected(3)], atol=1e-13)
    plt.close(figure)


# What is refused, and leaves the metric as it was


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), ValueError, "NaN"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("inf")), ValueError, "infinit"),
        (lambda t: t[0], ValueError, r"shape \(\d,\)"),
        (lambda t: t[None], ValueError, r"shape \(1, \d, \d\)"),
        (lambda t: t[:0, :0], ValueError, "shape .*; need a non-empty"),
        (lambda t: t.float(), (ValueError, TypeError), "torch.float32.* float64"),
    ],
)
def test_wrong_inputs_are_refused_and_change_nothing(case, spoil, error, message):
    metric = fed(case, 2)
    with pytest.raises(error, match=message):
        metric.update(spoil(case.batches[2]))
    assert float(metric.compute()) == pytest.approx(case.expected(2), **close)
    metric.update(case.batches[2])
    assert float(metric.compute()) == pytest.approx(case.expected(3), **close)


def test_matrices_that_are_no_kernels_are_refused(kernel_case):
    with pytest.raises(ValueError, match="gram: not symmetric"):
        kernel_case.metric().update(SOME[0] + torch.triu(SOME[0]))
    with pytest.raises(ValueError, match=r"gram: shape \(6, 7\)"):
        kernel_case.metric().update(SOME[0][:6])


@pytest.mark.parametrize("make", [KernelDrift, KernelAlignment])
def test_reference_is_checked_like_a_kernel(make):
    with pytest.raises(ValueError, match=r"reference: torch\.float32; need float64"):
        make(reference=SOME[0].float())
    metric = make(reference=SOME[0])
    with pytest.raises(ValueError, match=r"reference: shape \(7, 7\) against \(5, 5\)"):
        metric.update(SOME[1][:5, :5])
    with pytest.raises(ValueError, match=r"other: shape \(5, 5\) against \(7, 7\)"):
        KernelAlignment().update(SOME[1], SOME[1][:5, :5])


def test_batches_of_other_width_and_negative_errors_are_refused():
    metric = fed(CASES["expressivity"], 2)
    with pytest.raises(ValueError, match="features: 8 per sample after batches of 9"):
        metric.update(feature_batches()[2][:, :8])
    for error in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="feature_error"):
            metric.update(feature_batches()[2], feature_error=error)
    assert float(metric.compute()) == CASES["expressivity"].expected(2)


def test_relative_change_from_zero_is_refused():
    metric = KernelDrift(reference=torch.zeros(N, N, dtype=torch.float64))
    metric.update(SOME[0])
    with pytest.raises(ValueError, match="reference: the matrix is zero"):
        metric.compute()


# What lies behind the value


@pytest.fixture
def grams():
    """Return two kernels of a network in training, as ``KernelGram``s."""
    torch.manual_seed(0)
    model, inputs = (
        torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)),
        torch.randn(6, 4),
    )
    before = ntk_gram(model, inputs, precision="fast")
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    return ntk_gram(model, inputs, precision="certified"), before


def test_what_a_kernel_knows_outlives_the_state(grams, tmp_path):
    now, before = grams
    metric = KernelDrift()
    metric.update(before)
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    resumed = KernelDrift()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.update(now)
    drift = resumed.drift()
    floors = sum(g.floor + 2 * g.jacobian_error * np.trace(g.matrix.numpy()) for g in grams)
    assert drift.floor == pytest.approx(floors / scipy.linalg.norm(before.matrix.numpy()), rel=1e-12)
    assert drift.relative_frobenius == float(resumed.compute())
    assert not drift.lambda_min_ratio.certified  # the reference is "fast"


def test_kernels_that_do_not_compare_are_refused(grams):
    now, before = grams
    for make in (KernelDrift, KernelAlignment):
        metric = make(reference=before)
        with pytest.raises(ValueError, match="reference: outputs='trace' against 'sum'"):
            metric.update(replace(now, outputs="sum"))
        with pytest.raises(ValueError, match=r"only one of them over 0\.bias"):
            metric.update(replace(now, parameters=tuple(n for n in now.parameters if n != "0.bias")))
    KernelAlignment().update(now, replace(before, outputs="sum"))  # two kernels of any kind


def test_bounds_of_lambda_min_are_those_of_the_kernel_given(grams, exact_eigenvalues):
    for gram in grams:
        metric = MinEigenvalue()
        metric.update(gram)
        bounds = metric.bounds()
        assert bounds.certified == (gram.precision == "certified")
        assert bounds.lower <= exact_eigenvalues(gram.matrix)[0] <= bounds.upper
        assert bounds.value == float(metric.compute())
        assert bounds.value - bounds.lower >= gram.floor / 2


def test_certificate_is_of_all_batches():
    random = np.random.default_rng(3)
    batches = [torch.from_numpy(random.standard_normal((4, 12))) for _ in range(3)]
    metric = ExpressivityRank()
    for batch in batches:
        metric(batch)
    certificate = metric.certificate()
    rows = np.hstack([np.vstack(batches), np.ones((12, 1))])
    assert (certificate.verdict, certificate.n, certificate.width) == ("certified", 12, 12)
    assert certificate.sigma_min.lower <= scipy.linalg.svdvals(rows)[-1] <= certificate.sigma_min.upper
    metric.update(batches[0][:1])
    assert metric.certificate().verdict == "refuted"
    assert "samples 0 and 12 have equal features" in metric.certificate().reason
    assert float(metric.compute()) == 12


def test_rounding_inside_the_trunk_adds_up_over_batches():
    random = np.random.default_rng(4)
    fine = [torch.from_numpy(random.standard_normal((4, 20))) for _ in range(3)]
    metric = ExpressivityRank()
    for features in fine:
        metric.update(features, feature_error=feature_rounding(features.float(), features))
    difference = np.vstack(fine) - np.vstack(fine).astype(np.float32).astype(np.float64)
    expected = 16 * 2.0**-29 * scipy.linalg.norm(difference)
    certificate = metric.certificate()
    assert certificate.feature_error == pytest.approx(expected, rel=1e-10)
    assert not certificate.sigma_min.certified
    metric.update(fine[0][:1] + 1, feature_error=1e3)  # more than any singular value
    assert float(metric.compute()) == 0
    metric.reset()
    metric.update(fine[0])
    assert metric.certificate().feature_error == 0


def test_alignment_of_a_pair_leaves_the_reference_alone():
    metric = KernelAlignment()
    assert float(metric(SOME[1], SOME[2])) == pytest.approx(cka(SOME[1].numpy(), SOME[2].numpy()), **close)
    metric.update(SOME[0])
    metric.update(SOME[2], other=SOME[1])
    assert float(metric.compute()) == pytest.approx(cka(SOME[2].numpy(), SOME[1].numpy()), **close)
    assert float(metric(SOME[2])) == pytest.approx(cka(SOME[2].numpy(), SOME[0].numpy()), **close)
    assert math.isnan(metric(torch.ones(N, N, dtype=torch.float64)))  # not defined


# Together


def test_collection_gives_what_each_gives_alone():
    alone = {name.replace(" ", "_"): case for name, case in KERNEL_CASES.items()}
    together = MetricCollection({name: case.metric() for name, case in alone.items()})
    for batch in SOME:
        together.update(batch)
    for name, value in together.compute().items():
        assert float(value) == pytest.approx(alone[name].expected(3), **close)
    shared = [set(group) for group in together.compute_groups.values() if len(group) > 1]
    assert shared == [{"lambda_min", "effective_rank"}]
    assert together["lambda_min"].bounds().value == pytest.approx(CASES["lambda_min"].expected(3), **close)
    together.reset()
    together.update(SOME[1])
    for name, value in together.compute().items():
        kept = [SOME[0].numpy()] if "reference" in dir(together[name]) else []
        assert float(value) == pytest.approx(alone[name].total([*kept, SOME[1].numpy()]), **close)


def test_collection_tells_a_given_reference_from_an_equal_first_kernel():
    both = MetricCollection({"given": KernelDrift(reference=SOME[0]), "first": KernelDrift()})
    both.update(SOME[0])
    assert len(both.compute_groups) == 2
    both["given"].forget()
    both["first"].forget()
    both.update(SOME[1])
    values = both.compute()
    assert float(values["first"]) == 0
    assert float(values["given"]) == pytest.approx(frobenius_change(SOME[1].numpy(), SOME[0].numpy()), **close)


def test_collection_hands_kernels_and_features_to_whom_they_belong():
    both = MetricCollection([KernelDrift(), ExpressivityRank()])
    for gram, features in zip(SOME, feature_batches(), strict=True):
        both.update(gram=gram, features=features)
    values = both.compute()
    assert float(values["KernelDrift"]) == pytest.approx(CASES["drift"].expected(3), **close)
    assert float(values["ExpressivityRank"]) == CASES["expressivity"].expected(3)


# Laws

seeds = st.integers(0, 2**16)
factors = st.floats(1e-6, 1e6)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, a=factors, b=factors)
def test_law_drift_scales_with_neither_and_measures_a_factor(seed, a, b):
    now, then = kernels(2, seed=seed)
    metric = KernelDrift(reference=a * then)
    assert float(metric(a * now)) == pytest.approx(frobenius_change(now.numpy(), then.numpy()), rel=1e-9)
    assert float(metric(b * then)) == pytest.approx(abs(b / a - 1), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, a=factors, b=factors)
def test_law_alignment_sees_no_scale_no_constant_and_no_order(seed, a, b):
    now, then = kernels(2, seed=seed)
    value = float(KernelAlignment()(now, then))
    assert 0 <= value <= 1 + 1e-12
    assert float(KernelAlignment()(a * now, b * then)) == pytest.approx(value, rel=1e-9)
    assert float(KernelAlignment()(now + a / 1e6, then)) == pytest.approx(value, rel=1e-9)
    assert float(KernelAlignment()(then, now)) == pytest.approx(value, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, a=factors)
def test_law_spectrum_turns_with_the_basis_and_scales_with_the_kernel(seed, a):
    gram = kernels(1, seed=seed)[0]
    turn = torch.from_numpy(scipy.stats.ortho_group.rvs(N, random_state=seed))
    turned = a * turn @ gram @ turn.T
    turned = (turned + turned.T) / 2
    assert float(MinEigenvalue()(turned)) == pytest.approx(a * float(MinEigenvalue()(gram)), rel=1e-9)
    effective = float(EffectiveRank()(gram))
    assert 1 <= effective <= N
    assert float(EffectiveRank()(turned)) == pytest.approx(effective, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, cuts=st.sets(st.integers(1, 14)), width=st.integers(1, 20))
def test_law_rank_does_not_depend_on_how_samples_come_in_batches(seed, cuts, width):
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((15, width)))
    metric = ExpressivityRank()
    for batch in torch.tensor_split(rows, sorted(cuts)):
        metric.update(batch)
    assert float(metric.compute()) == min(15, width + 1)


# Two processes

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
import lightning_conv.metrics as metrics

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
found = {}
for name, job in torch.load(f"{folder}/jobs.pt", weights_only=True).items():
    metric = getattr(metrics, job["make"])(**job["options"])
    take = metric if metric.dist_sync_on_step else metric.update
    try:
        batches = [take(*arguments) for arguments in job["updates"][rank]]
        first = float(metric.compute())
        again = float(metric.compute())
        more = [float(batch) for batch in batches if batch is not None]
        if isinstance(metric, metrics.MinEigenvalue) and first == first:
            more.append(metric.bounds().value)
        metric.sync_on_compute = metric._to_sync = False
        metric._computed = None
        found[name] = [first, again, float(metric.compute()), *more]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
    dist.barrier()
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Run every metric in two gloo processes: {job: (results of rank 0, results of rank 1)}.

    The results are [synced, synced once more, own, bounded value or the values of the batches].
    """
    folder = tmp_path_factory.mktemp("ranks")
    same = {
        name: {"updates": [[(b,) for b in case.batches]] * 2, "make": case.make.__name__, "options": case.options}
        for name, case in KERNEL_CASES.items()
    }
    one = {f"{name}, on one rank": job | {"updates": [[], job["updates"][0]]} for name, job in same.items()}
    none = {f"{name}, on no rank": job | {"updates": [[], []]} for name, job in same.items()}
    rounded = [[(SOME[0],)], [(SOME[0] * (1 + 1e-7),)]]
    rows = {"make": "ExpressivityRank", "options": {}}
    h = feature_batches()
    jobs = same | one | none
    jobs |= {
        "rounded": same["lambda_min"] | {"updates": rounded},
        "shards": same["lambda_min"] | {"updates": [[(SOME[0],)], [(SOME[1],)]]},
        "shards, apart": same["lambda_min"]
        | {"updates": [[(SOME[0],)], [(SOME[1],)]], "options": {"sync_on_compute": False}},
        "shapes": same["drift"] | {"updates": [[(SOME[0],)], [(SOME[0][:5, :5],)]]},
        "references": same["drift"] | {"updates": [[(SOME[0],), (SOME[2],)], [(SOME[1],), (SOME[2],)]]},
        "pairs": same["alignment"] | {"updates": [[(SOME[0], SOME[1])]] * 2},
        "rows": rows | {"updates": [[(h[0],)], [(h[1],), (h[2],)]]},
        "rows, with errors": rows | {"updates": [[(h[0], 3e-1)], [(h[1], 4e-1)]]},
        "rows, on every step": rows
        | {"updates": [[(h[0],), (h[1],)], [(h[2],), (h[0],)]], "options": {"dist_sync_on_step": True}},
        "drift, on every step": same["drift"] | {"options": {"dist_sync_on_step": True}},
        "rows, on one rank": rows | {"updates": [[], [(h[0],), (h[1],)]]},
        "rows, on no rank": rows | {"updates": [[], []]},
        "widths": rows | {"updates": [[(h[0],)], [(h[1][:, :5],)]]},
    }
    torch.save(jobs, folder / "jobs.pt")
    # Run from the root of the checkout: "-c" puts the working directory first on the import path.
    root = Path(__file__).resolve().parents[3]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(r)], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors[-3000:]
    left, right = (json.loads((folder / f"rank{r}.json").read_text()) for r in range(2))
    assert set(left) == set(right) == set(jobs)
    return {name: (left[name], right[name]) for name in jobs}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_equal_kernels_on_both_ranks_are_one_kernel(two_ranks, name):
    expected = KERNEL_CASES[name].expected(3)
    for found in two_ranks[name]:
        assert found[:3] == pytest.approx([expected] * 3, **close)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_rank_without_a_kernel_takes_the_others_and_keeps_none(two_ranks, name):
    expected = KERNEL_CASES[name].expected(3)
    empty, full = two_ranks[f"{name}, on one rank"]
    assert full[:3] == pytest.approx([expected] * 3, **close)
    assert empty[:2] == pytest.approx([expected] * 2, **close)
    assert math.isnan(empty[2])
    assert all(math.isnan(value) for found in two_ranks[f"{name}, on no rank"] for value in found)


@pytest.mark.slow
def test_kernels_that_differ_by_rounding_are_the_first_ranks(two_ranks):
    smallest = CASES["lambda_min"].expected(1)
    left, right = two_ranks["rounded"]
    assert left[:2] == right[:2]
    assert left == [pytest.approx(smallest, rel=1e-12)] * 4
    assert right[2] == pytest.approx(smallest * (1 + 1e-7), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "apart"),
    [("shards", "a distance of"), ("shapes", "shapes (7, 7) and (5, 5)"), ("references", "a distance of")],
)
def test_kernels_of_different_samples_are_refused_on_both_ranks(two_ranks, name, apart):
    for found in two_ranks[name]:
        assert found.startswith("ValueError: gram: ranks 0 and 1 hold different kernels")
        assert apart in found
        assert "sync_on_compute=False" in found


@pytest.mark.slow
def test_without_sync_every_rank_has_its_own(two_ranks):
    for found, gram in zip(two_ranks["shards, apart"], SOME, strict=False):
        assert found[:3] == pytest.approx([scipy.linalg.eigvalsh(gram.numpy())[0]] * 3, **close)


@pytest.mark.slow
def test_pairs_are_aligned_over_ranks(two_ranks):
    for found in two_ranks["pairs"]:
        assert found == pytest.approx([cka(SOME[0].numpy(), SOME[1].numpy())] * 3, **close)


@pytest.mark.slow
def test_features_of_all_ranks_are_concatenated(two_ranks):
    h = [batch.numpy() for batch in feature_batches()]
    left, right = two_ranks["rows"]
    assert left == [rank(np.vstack(h)), rank(np.vstack(h)), rank(h[0])]
    assert right == [rank(np.vstack(h)), rank(np.vstack(h)), rank(np.vstack(h[1:]))]
    left, right = two_ranks["rows, on one rank"]
    assert left[:2] == right[:2] == [rank(np.vstack(h[:2]))] * 2
    assert math.isnan(left[2])
    assert all(math.isnan(value) for found in two_ranks["rows, on no rank"] for value in found)
    for found in two_ranks["widths"]:
        assert found.startswith("ValueError: features: the ranks hold rows of 5 and 9 features")


@pytest.mark.slow
def test_forward_on_all_ranks_at_every_step(two_ranks):
    h = [batch.numpy() for batch in feature_batches()]
    left, right = two_ranks["rows, on every step"]
    assert left[3:] == right[3:] == [rank(np.vstack([h[0], h[2]])), rank(np.vstack([h[1], h[0]]))]
    assert left[0] == right[0] == rank(np.vstack(h))
    for found in two_ranks["drift, on every step"]:
        assert found[3:] == pytest.approx([CASES["drift"].expected(count) for count in (1, 2, 3)], **close)


@pytest.mark.slow
def test_errors_of_all_ranks_add_up_in_square(two_ranks):
    h = np.vstack([batch.numpy() for batch in feature_batches()[:2]])
    values = scipy.linalg.svdvals(np.hstack([h, np.ones((len(h), 1))]))
    for found in two_ranks["rows, with errors"]:
        assert found[0] == (values > 0.5).sum()
    assert two_ranks["rows, with errors"][0][0] < len(values)
