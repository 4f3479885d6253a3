"""Every network of the matrix through everything that a kernel promises, against the double loop of autograd in float64."""

import pytest
import torch
from dense_kernels import assert_same, reduced_rows, train_mode_rows
from kernels.cases import CASES, COUPLED, build, build_coupled, jacobian, kernel

from lightning_conv import NTKOperator, kernel_drift, kernel_spectrum, ntk_gram, plan_ntk
from lightning_conv.kernels.layers import trace_shares


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_gram_agrees_with_the_double_loop_of_autograd(case):
    model, inputs = build(case)
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs)
        assert_same(gram.matrix, kernel(case, outputs))
        assert torch.equal(gram.matrix, gram.matrix.T)
        assert gram.matrix.dtype == torch.float64
        assert set(gram.structured) | set(gram.general) | set(gram.unused) == set(gram.parameters)


@pytest.mark.parametrize("case", CASES)
def test_plan_is_the_one_that_is_carried_out_and_serves_again(case):
    model, inputs = build(case)
    plan, gram = plan_ntk(model, inputs), ntk_gram(model, inputs)
    assert (plan.contributions, plan.passes, plan.bytes, plan.flops) == (
        gram.plan.contributions,
        gram.plan.passes,
        gram.plan.bytes,
        gram.plan.flops,
    )
    assert {name for one in plan.contributions for name in one.parameters} == {*gram.structured, *gram.general}
    assert torch.equal(ntk_gram(model, inputs, plan=plan).matrix, gram.matrix)


@pytest.mark.parametrize("case", CASES)
def test_reading_gives_the_same_kernel_as_without_layer_rules(case):
    model, inputs = build(case)
    by_jacobian = ntk_gram(model, inputs, engine="jacobian")
    assert not by_jacobian.structured
    assert_same(by_jacobian.matrix, ntk_gram(model, inputs).matrix, 1e-11)


@pytest.mark.parametrize("case", CASES)
def test_layers_add_up_to_the_kernel_and_the_spectrum_holds_its_eigenvalues(case):
    gram = ntk_gram(*build(case), per_layer=True, precision="certified")
    assert_same(sum(gram.layer_matrices.values()), gram.matrix, 1e-12)
    for layer, matrix in gram.layer_matrices.items():
        assert gram.layer_traces[layer] == pytest.approx(float(matrix.trace()), rel=1e-9, abs=1e-12 * gram.trace)
    assert sum(trace_shares(gram).values()) == pytest.approx(1, rel=1e-12)
    exact = torch.linalg.eigvalsh(kernel(case, "trace"))
    slack = 1e-12 * gram.trace  # of eigvalsh itself
    spectrum = kernel_spectrum(gram)
    for end, value in ((spectrum.lambda_min, exact[0]), (spectrum.lambda_max, exact[-1])):
        assert end.lower - slack <= float(value) <= end.upper + slack
    assert kernel_drift(gram, gram).relative_frobenius == 0


@pytest.mark.parametrize("outputs", ["full", "sum", "trace"])
@pytest.mark.parametrize("case", CASES)
def test_operator_products_agree_with_the_double_loop_of_autograd(case, outputs):
    model, inputs = build(case)
    truth = kernel(case, outputs)
    operator = NTKOperator(model, inputs, outputs=outputs)
    assert operator.shape == tuple(truth.shape)
    several = vectors(len(truth), 3)
    assert_same(operator @ several, truth @ several)
    assert_same(operator.matmul(several[:, 0]), truth @ several[:, 0])
    dense = operator.dense()
    assert_same(dense, truth)
    assert torch.equal(dense, dense.T)


@pytest.mark.parametrize("outputs", ["full", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_both_halves_of_the_operator_agree_with_the_jacobian(case, outputs):
    model, inputs = build(case)
    rows = jacobian(case)
    operator = NTKOperator(model, inputs, outputs=outputs)
    if outputs == "sum":
        rows = rows.reshape(operator.n_samples, operator.n_outputs, -1).sum(1)
    assert operator.n_parameters == rows.shape[1]
    left, right = vectors(len(rows), 2), vectors(rows.shape[1], 2)
    assert_same(operator.transposed(left), rows.T @ left)
    assert_same(operator.jvp(right), rows @ right)
    by_name = operator.vjp(left[:, 0])
    assert {name: value.shape for name, value in by_name.items()} == {
        name: p.shape for name, p in model.named_parameters() if p.requires_grad
    }
    assert_same(torch.cat([value.flatten() for value in by_name.values()]), rows.T @ left[:, 0])
    assert_same(operator.jvp(by_name), rows @ (rows.T @ left[:, 0]))


@pytest.mark.parametrize("case", COUPLED)
def test_samples_that_couple_agree_with_train_mode_autograd(case):
    model, inputs = build_coupled(case)
    rows = train_mode_rows(model, inputs)
    for outputs in ("full", "sum", "trace"):
        truth = reduced_rows(rows, len(inputs), outputs)
        assert_same(ntk_gram(model, inputs, outputs=outputs, batch_norm="batch").matrix, truth)
        assert_same(NTKOperator(model, inputs, outputs=outputs, batch_norm="batch").dense(), truth)
