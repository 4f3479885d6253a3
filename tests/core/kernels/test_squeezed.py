"""Networks that squeeze their outputs lose the dimension of a single sample; what mixes or sums samples is still refused."""

import pytest
import torch
import torch.nn.functional as F
from dense_kernels import assert_same, naive_gram
from torch import nn

from lightning_conv import NTKOperator, ntk_gram, plan_ntk

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Squeezed(nn.Module):
    def __init__(self, outputs=1, wrap=lambda layer: layer, end=lambda u: u.squeeze()):
        super().__init__()
        self.a, self.b, self.end = wrap(nn.Linear(4, 5)), nn.Linear(5, outputs), end

    def forward(self, x):
        return self.end(self.b(self.a(x).tanh()))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.h = nn.Conv2d(1, 3, 2), nn.Linear(3, 1)

    def forward(self, x):
        return self.h(self.c(x.view(-1, 1, 2, 2)).relu().squeeze((2, 3))).squeeze()


class Tokens(nn.Module):
    """One number per position: (n, T, 1) -> (n, T), or (T,) for one sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.b(F.silu(self.a(x[..., None]))).squeeze()


parametrized = nn.utils.parametrizations
CASES = {
    "regression": Squeezed,
    "classes": lambda: Squeezed(3),
    "squeeze(0)": lambda: Squeezed(3, end=lambda u: u.squeeze(0)),
    "squeeze(-1)": lambda: Squeezed(end=lambda u: u.squeeze(-1)),
    "reshape": lambda: Squeezed(end=lambda u: u.reshape([size for size in u.shape if size > 1])),
    "weight norm": lambda: Squeezed(wrap=parametrized.weight_norm),
    "weight norm, classes": lambda: Squeezed(2, wrap=parametrized.weight_norm),
    "orthogonal": lambda: Squeezed(wrap=parametrized.orthogonal),
    "convolution": Images,
    "positions": Tokens,
}


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("samples", [1, 2, 24])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_that_of_every_sample_alone(name, samples, engine):
    torch.manual_seed(0)
    model, inputs = CASES[name](), X[:samples]
    expected = naive_gram(model, inputs, "trace")
    found = ntk_gram(model, inputs, engine=engine, precision="certified")
    assert_same(found.matrix, expected, 1e-10)
    assert not found.narrow
    assert_same(ntk_gram(model, inputs, engine=engine).matrix, expected, 1e-5)
    assert_same(
        ntk_gram(model, inputs, engine=engine, outputs="full", precision="certified").matrix,
        naive_gram(model, inputs),
        1e-10,
    )


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("chunk", [1, 3, 23])
@pytest.mark.parametrize("name", CASES)
def test_batches_with_a_last_one_of_one_sample(name, chunk, engine):
    torch.manual_seed(0)
    model, inputs = CASES[name](), X[: 4 if chunk == 3 else 24]
    expected = naive_gram(model, inputs, "trace")
    operator = NTKOperator(model, inputs, outputs="trace", dtype=torch.float64, chunk=chunk)
    assert_same(operator.dense(), expected, 1e-10)
    least = plan_ntk(model, inputs, engine=engine).reading_bytes
    for more in (1_000, 20_000, 60_000):
        try:
            plan = plan_ntk(model, inputs, engine=engine, max_memory=least + more)
        except MemoryError:
            continue
        assert_same(ntk_gram(model, inputs, engine=engine, max_memory=least + more, plan=plan).matrix, expected, 1e-5)


def test_layer_rules_are_used():
    model = Squeezed(3)
    for samples in (1, 2, 24):
        assert set(ntk_gram(model, X[:samples]).structured) == {name for name, _ in model.named_parameters()}


REFUSED = {
    "sum": lambda u: u.sum(),
    "mean over samples": lambda u: u.mean(0),
    "sum over outputs and samples": lambda u: u.flatten().cumsum(0)[-1],
    "transposed": lambda u: u.T.squeeze() if u.shape[1] > 1 else (u - u.mean(0)).squeeze(),
}


@pytest.mark.parametrize("samples", [2, 3, 24])
@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_or_sums_samples_is_refused(name, outputs, samples):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"dimension 0 must index the samples|samples couple"):
        ntk_gram(Squeezed(outputs, end=REFUSED[name]), X[:samples])


@pytest.mark.parametrize("end", [lambda u: u.sum(), lambda u: u.mean(0)[1:], lambda u: u.std(0, correction=0).sum()])
@pytest.mark.parametrize("engine", ["auto", "jacobian"])
def test_one_sample_alone_does_not_hide_a_sum_over_samples(end, engine):
    with pytest.raises(ValueError, match="dimension 0 must index the samples"):
        ntk_gram(Squeezed(3, end=end), X[:1], engine=engine)
