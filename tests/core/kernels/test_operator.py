"""``NTKOperator`` against dense kernels: products, laws, memory, and nothing left behind."""

import copy
import math

import pytest
import torch
from dense_kernels import assert_same, reduced_rows, train_mode_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import CASES, build
from kernels.networks import lived_in_model
from torch import nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.kernels import NTKOperator


def vectors(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["full", "sum", "trace"])
@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_every_batch_norm_mode(mode, outputs):
    model, inputs = build("cnn with batch norm")
    operator = NTKOperator(model, inputs, outputs=outputs, batch_norm=mode)
    if mode == "batch":
        truth = reduced_rows(train_mode_rows(model, inputs), len(inputs), outputs)
    else:
        truth = ntk_gram(model, inputs, outputs=outputs, batch_norm=mode).matrix
    assert_same(operator.dense(), truth)


def test_batch_mode_goes_without_running_statistics_and_with_one_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x):
            return self.head(self.norm(torch.tanh(self.norm(self.layer(x)))))

    model, inputs = Twice().double(), torch.randn(6, 3).double()
    operator = NTKOperator(model, inputs, batch_norm="batch")
    assert_same(operator.dense(), reduced_rows(train_mode_rows(model, inputs), 6, "full"))
    assert operator.jvp_method == "forward mode"


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_float32_models_are_good_to_float32_and_exact_in_a_converted_copy(mode):
    model, inputs = CASES["cnn with batch norm"]()
    truth = NTKOperator(copy.deepcopy(model).double(), inputs.double(), batch_norm=mode).dense()
    operator = NTKOperator(model, inputs, batch_norm=mode)
    assert operator.precision == torch.float32
    assert_same(operator.dense(), truth, 1e-5)
    assert_same(NTKOperator(model, inputs, batch_norm=mode, dtype=torch.float64).dense(), truth, 1e-12)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_vectors_beyond_the_range_of_float32_pass(scale):
    model, inputs = CASES["mlp"]()
    operator = NTKOperator(model, inputs)
    several, weights = vectors(18, 2), vectors(operator.n_parameters)
    mixed = several * torch.tensor([scale, 1.0], dtype=torch.float64)
    assert_same((operator @ mixed)[:, 0] / scale, (operator @ several)[:, 0], 1e-5)
    assert_same(operator.transposed(scale * several[:, 0]) / scale, operator.transposed(several[:, 0]), 1e-5)
    assert_same(operator.jvp(scale * weights) / scale, operator.jvp(weights), 1e-5)
    assert float((operator @ torch.zeros(18)).abs().max()) == 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ("0.weight", "3.weight", "3.bias", "5.weight", "5.bias")),
        ("*.bias", ("0.bias", "3.bias", "5.bias")),
        (["5.*", "0.weight"], ("0.weight", "5.weight", "5.bias")),
        (["[03].weight"], ("0.weight", "3.weight")),
    ],
)
def test_parameters_by_name_and_pattern(asked, expected):
    model, inputs = build("mlp with dropout")
    model[0].bias.requires_grad_(False)
    operator = NTKOperator(model, inputs, parameters=asked)
    assert operator.parameters == expected
    assert_same(operator.dense(), ntk_gram(model, inputs, outputs="full", parameters=expected).matrix)


# --- laws -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["mlp", "cnn with batch norm", "tied weights, two modules"]),
    st.sampled_from(["full", "sum", "trace"]),
    st.sampled_from(["eval", "frozen", "batch"]),
    st.integers(0, 2**31),
)
def test_laws_symmetric_semidefinite_linear_and_column_by_column(case, outputs, mode, seed):
    torch.manual_seed(seed)
    operator = NTKOperator(*build(case), outputs=outputs, batch_norm=mode)
    u, v = vectors(operator.shape[0], 2, seed=seed).T
    images = operator @ torch.stack([u, v, 2 * u - 3 * v], 1)
    size = float(operator.trace(products=60).value) * float(u.norm() + v.norm()) ** 2
    assert abs(float(v @ images[:, 0] - u @ images[:, 1])) <= 1e-13 * size
    assert min(float(u @ images[:, 0]), float(v @ images[:, 1])) >= -1e-13 * size
    assert float((images[:, 2] - 2 * images[:, 0] + 3 * images[:, 1]).norm()) <= 1e-12 * size
    for column, vector in enumerate((u, v)):
        assert float((operator @ vector - images[:, column]).norm()) <= 1e-13 * size


@pytest.mark.parametrize("outputs", ["full", "sum", "trace"])
@pytest.mark.parametrize("case", ["mlp", "cnn with batch norm", "lstm", "mapping of inputs"])
def test_chunks_of_samples_change_nothing(case, outputs):
    model, inputs = build(case)
    whole = NTKOperator(model, inputs, outputs=outputs, batch_norm="frozen")
    several = vectors(whole.shape[0], 2)
    for chunk in (1, 2, 4, 100):
        operator = NTKOperator(model, inputs, outputs=outputs, batch_norm="frozen", chunk=chunk)
        assert_same(operator @ several, whole @ several, 1e-13)


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_little_memory_changes_nothing_and_too_little_is_refused_with_the_numbers(mode):
    model, inputs = build("cnn with batch norm")
    inputs = torch.cat([inputs] * 3)
    several = vectors(len(inputs) * 2, 3)
    truth = NTKOperator(model, inputs, batch_norm=mode) @ several
    refused, fitted = [], 0
    for memory in [round(3_000 * 2.0**k) for k in range(8)]:
        try:
            operator = NTKOperator(model, inputs, batch_norm=mode, max_memory=memory)
        except MemoryError as error:
            refused.append(str(error))
            continue
        fitted += 1
        assert_same(operator @ several, truth, 1e-12)
    assert min(fitted, len(refused)) >= 2
    assert all(message.startswith("max_memory: ") and "MiB" in message for message in refused)


# --- a moment, held -------------------------------------------------------------------------------------------------


def test_stays_the_kernel_of_its_moment_while_training_goes_on():
    model, inputs = CASES["cnn with batch norm"]()
    model.train()
    operators = [NTKOperator(model, inputs, batch_norm=mode) for mode in ("eval", "frozen", "batch")]
    before = [operator.dense() for operator in operators]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(inputs + 1).square().sum().backward()
    optimizer.step()
    for operator, matrix in zip(operators, before, strict=True):
        assert torch.equal(operator.dense(), matrix)
    now = NTKOperator(model, inputs, batch_norm="frozen")
    assert float((now.dense() - before[1]).norm()) > 0.01 * float(before[1].norm())
    truth = float((now.dense() * before[1]).sum() / (now.dense().norm() * before[1].norm()))
    assert now.alignment(operators[1]).value == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_leaves_no_trace(mode, dtype, leaves_no_trace):
    model, inputs, given_vector = lived_in_model(), torch.randn(6, 2, 4, 4), vectors(12)
    with leaves_no_trace(model, inputs, given_vector):
        operator = NTKOperator(model, inputs, batch_norm=mode, dtype=dtype)
        operator @ given_vector
        operator.transposed(given_vector)
        operator.jvp(vectors(operator.n_parameters))
        operator.effective_rank()
        operator.trace()


@pytest.mark.parametrize("mode", ["eval", "frozen", "batch"])
def test_flags_come_back_when_a_product_raises(mode, snapshot):
    model, inputs = CASES["cnn with batch norm"]()
    fails = []

    class Failing(nn.Module):
        def forward(self, x):
            return 1 / 0 if fails else x

    model[3] = nn.Sequential(model[3], Failing())
    operator = NTKOperator(model.train(), inputs, batch_norm=mode)
    fails.append(True)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        operator @ vectors(operator.shape[0])
    assert snapshot(model) == before


@pytest.mark.parametrize("case", ["mlp", "lstm"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_is_the_same_inside_a_validation_loop(context, case):
    model, inputs = build(case)
    expected = NTKOperator(model, inputs) @ vectors(2 * 5 if case == "lstm" else 18)
    with context():
        operator = NTKOperator(model, inputs * 1.0)
        found = operator @ (vectors(operator.shape[0]) * 1.0)
        assert_same(operator.jvp(operator.transposed(vectors(operator.shape[0]))), expected, 1e-13)
    assert_same(found, expected, 1e-13)
    with context():
        assert_same(NTKOperator(model, inputs).dense(), NTKOperator(model, inputs).dense())


# --- estimates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    inputs = torch.randn(150, 6).double()
    return model, inputs, NTKOperator(model, inputs), ntk_gram(model, inputs, outputs="full").matrix


def test_estimates_lie_by_the_dense_kernel(wide):
    _, _, operator, matrix = wide
    spectrum = kernel_spectrum(matrix)
    for found, truth in (
        (operator.trace(), float(matrix.trace())),
        (operator.frobenius_norm(), float(matrix.norm())),
        (operator.effective_rank(), spectrum.effective_rank),
    ):
        assert abs(found.value - truth) <= 4 * found.standard_error
        assert found.standard_error <= 0.1 * truth
        assert found.samples < 300
    top = operator.lambda_max()
    assert abs(top.value - spectrum.lambda_max.value) <= top.standard_error + 1e-12 * top.value


def test_seeds_are_explicit(wide):
    operator = wide[2]
    assert operator.trace(seed=3) == operator.trace(seed=3) != operator.trace(seed=4)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    operator.effective_rank(seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_alignment_with_targets_and_operators(wide):
    model, inputs, operator, matrix = wide
    labels = vectors(150, 2)

    def truth(left, right):
        return float((left * right).sum() / (left.norm() * right.norm()))

    found = operator.alignment(labels)
    stacked = labels.flatten()
    assert abs(found.value - truth(matrix, torch.outer(stacked, stacked))) <= 4 * found.standard_error
    trace = NTKOperator(model, inputs, outputs="trace")
    found = trace.alignment(labels, products=150)
    dense = matrix.reshape(150, 2, 150, 2).diagonal(dim1=1, dim2=3).sum(-1)
    assert found.value == pytest.approx(truth(dense, labels @ labels.T), rel=1e-9)
    last = NTKOperator(model, inputs, parameters="2.*")
    found = operator.alignment(last)
    assert abs(found.value - truth(matrix, last.dense())) <= 4 * found.standard_error
    assert 0 < found.standard_error < 0.05


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["outputs", "batch_norm", "dtype"])
def test_unknown_options_are_refused_with_what_is_allowed(option):
    with pytest.raises(ValueError, match=f"{option}: 'best' is not one of "):
        NTKOperator(nn.Linear(4, 1), torch.randn(3, 4), **{option: "best"})


def test_the_projected_kernel_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"outputs: 'projected' .* has 'trace'"):
        NTKOperator(nn.Linear(4, 3), torch.randn(3, 4), outputs="projected")


@pytest.mark.parametrize(("asked", "message"), [(["nothing.*"], r"\['nothing\.\*'\]"), ([], "an empty list")])
def test_parameters_that_match_nothing_are_refused(asked, message):
    with pytest.raises(ValueError, match=f"parameters: {message}; need names or patterns"):
        NTKOperator(nn.Linear(4, 1), torch.randn(3, 4), parameters=asked)
    with pytest.raises(ValueError, match="model: no parameter has requires_grad"):
        NTKOperator(nn.Linear(4, 1).requires_grad_(False), torch.randn(3, 4))


def test_coupled_and_random_networks_are_refused_where_they_must_be():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    inputs = torch.randn(5, 4)
    with pytest.raises(ValueError, match="samples couple"):
        NTKOperator(Centred(4, 1), inputs)
    for mode in ("eval", "batch"):
        with pytest.raises(ValueError, match="random"):
            NTKOperator(Noisy(4, 1), inputs, batch_norm=mode)
    model = Centred(4, 1).double()
    whole = NTKOperator(model, inputs, batch_norm="batch").dense()
    centred = inputs.double() - inputs.double().mean(0)
    assert_same(whole, centred @ centred.T + 1)


@pytest.mark.parametrize(("chunk", "mode"), [(0, "eval"), (-1, "frozen"), (4, "batch")])
def test_chunks_that_cannot_be_are_refused(chunk, mode):
    with pytest.raises(ValueError, match=f"chunk: {chunk}; need (a whole number of at least 1|all 5 samples)"):
        NTKOperator(nn.Linear(4, 1), torch.randn(5, 4), chunk=chunk, batch_norm=mode)


def test_vectors_and_inputs_that_do_not_fit_are_refused():
    operator = NTKOperator(nn.Linear(4, 2), torch.randn(5, 4))
    for vector in (torch.ones(9), torch.ones(9, 2), torch.ones(10, 0), torch.ones(10, 1, 1)):
        with pytest.raises(ValueError, match=r"vectors: shape .*; need \(10,\) or \(10, k\)"):
            operator @ vector
    with pytest.raises(ValueError, match=r"need \(10,\)"):
        operator.vjp(torch.ones(10, 2))
    with pytest.raises(ValueError, match=r"directions: \['weight'\]; need \['bias', 'weight'\]"):
        operator.jvp({"weight": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"other: shape \(5, 5\) against \(10, 10\)"):
        operator.alignment(NTKOperator(nn.Linear(4, 1), torch.randn(5, 4)))
    trace = NTKOperator(nn.Linear(4, 2), torch.randn(5, 4), outputs="trace")
    for call in (trace.transposed, trace.vjp, trace.jvp):
        with pytest.raises(ValueError, match='outputs: "trace" is a sum'):
            call(torch.ones(5))
    with pytest.raises(ValueError, match=r"inputs: tensor 0 .* NaN"):
        NTKOperator(nn.Linear(1, 1), torch.tensor([[math.nan]]))
    with pytest.raises(MemoryError, match="max_memory"):
        NTKOperator(nn.Linear(4, 2), torch.randn(100, 4), max_memory=200_000).dense()


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_an_operator_that_follows_its_model_is_a_new_one(mode):
    model, inputs = build("cnn with batch norm")
    operator = NTKOperator(model, inputs, batch_norm=mode)
    before = operator.dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(operator.dense(), before)  # until it is told to
    operator.follow(model)
    assert torch.equal(operator.dense(), NTKOperator(model, inputs, batch_norm=mode).dense())
    assert not torch.equal(operator.dense(), before)


def test_an_operator_follows_no_other_model():
    operator = NTKOperator(nn.Linear(3, 2), torch.eye(3))
    with pytest.raises(ValueError, match=r"weight is of shape \(4, 3\)"):
        operator.follow(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="weight is missing"):
        operator.follow(nn.ReLU())
    with pytest.raises(ValueError, match="model: an operator with outputs='sum' does not follow it"):
        NTKOperator(nn.Linear(3, 2), torch.eye(3), outputs="sum").follow(nn.Linear(3, 2))
