"""What is found in a network on a handful of samples, how exact its Jacobian is said to be, and what it takes in memory."""

import copy

import pytest
import torch
from kernels.networks import CalledAtPositions, Positions, Words
from torch import nn

from lightning_conv import ntk_gram, plan_ntk
from lightning_conv.kernels.products.pullback import graph_size
from lightning_conv.kernels.reading import anatomy
from lightning_conv.kernels.reading.memory import MadeBytes
from lightning_conv.networks import narrow_watch
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.undisturbed import undisturbed


@pytest.fixture(name="network")
def network_fixture():
    return CalledAtPositions(), torch.randn(6, 2, 5, 5)


def true_error(model, inputs, samples):
    """|v^T J_32 - v^T J_64| / |v^T J_64| for the samples and the combination of outputs that reading takes."""
    read = inputs[[0, 2, 5]]  # the first, the middle one, the last
    mixture = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))[:samples]
    found = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        (twin(read[:samples].to(dtype)) * mixture.to(dtype)).sum().backward()
        found.append(torch.cat([p.grad.flatten().double() for p in twin.parameters()]))
    return float((found[0] - found[1]).norm() / found[1].norm())


@pytest.mark.parametrize("large", [False, True])
def test_the_error_of_the_jacobian_is_measured(large, monkeypatch):
    if large:
        monkeypatch.setattr(anatomy, "LARGE", 0)
    # How a product rounds depends on the processor: the first weights are taken for which it rounds visibly here.
    for seed in range(20):
        torch.manual_seed(seed)
        model, inputs = CalledAtPositions(), torch.randn(6, 2, 5, 5)
        true = true_error(model, inputs, samples=1 if large else 3)
        if true > 2.0**-24:
            break
    said = ntk_gram(model, inputs, precision="fast").jacobian_error
    assert true > 2.0**-24, "the rounding of this test is not there"
    # Four times what was measured; where layers are compared by their factors, what is measured is a bound.
    assert 3.9 * true <= said <= 8 * true


def test_a_large_network_is_read_on_one_sample_and_found_the_same(network, monkeypatch):
    model, inputs = network
    before = plan_ntk(model, inputs, precision="fast").reading
    monkeypatch.setattr(anatomy, "LARGE", 0)
    after = plan_ntk(model, inputs, precision="fast").reading
    assert (after.sites, after.general, after.signature) == (before.sites, before.general, before.signature)


def test_samples_that_couple_are_all_read_however_large_they_are(monkeypatch):
    monkeypatch.setattr(anatomy, "LARGE", 0)
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    # One sample normalised by itself has no gradient, and no rounding error either.
    gram = ntk_gram(model, inputs, batch_norm="batch")
    assert gram.jacobian_error > 4 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_in_another_precision_has_the_frozen_statistics_of_the_first(dtype):
    model, inputs = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(6, 4)
    with undisturbed(model):
        module = StatelessModule(model, batch_norm="frozen", statistics_of=inputs)
        twin = module.twin(dtype)
        outputs = twin.outputs({}, twin.convert(inputs))
        assert outputs.dtype == dtype
        hidden = model[0](inputs)
        plain = model[3](torch.tanh((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + model[1].eps).sqrt()))
    assert torch.allclose(outputs, plain.to(dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(twin.buffers["1.running_mean"], module.buffers["1.running_mean"].to(dtype))
    twin.buffers["1.running_mean"].add_(1)
    assert not torch.equal(twin.buffers["1.running_mean"], module.buffers["1.running_mean"].to(dtype))


class Antisymmetric(nn.Module):
    """Two equal halves whose outputs cancel: zero up to rounding, as starts of "lazy training" are."""

    def __init__(self, share=0.0):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(7, 301), nn.Tanh(), nn.Linear(301, 1))
        self.other, self.share = copy.deepcopy(self.one), share

    def forward(self, x):
        return self.one(x) - self.other(x.flip(0)).flip(0) + self.share * x.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_cancel_are_not_taken_for_coupled_samples(dtype, naive_gram):
    model, inputs = Antisymmetric().to(dtype), torch.randn(20, 7, dtype=dtype)
    gram = ntk_gram(model, inputs, precision="certified")
    naive = naive_gram(model, inputs, "trace")
    assert float((gram.matrix - naive).norm()) <= 1e-9 * float(naive.norm())
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(Antisymmetric(0.05).to(dtype), inputs)


# --- few rows, many columns -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3, 4])
@pytest.mark.parametrize("kind", ["table", "network", "network of a batch of one"])
def test_one_row_against_many_columns(kind, length, naive_gram):
    model, inputs = Positions(kind, length).double(), torch.randn(7, length, 2).double()
    for outputs, stride in (("trace", 1), ("full", 2)):
        whole = naive_gram(model, inputs, outputs)
        for rows in (1, 2):
            found = ntk_gram(model, inputs[:rows], inputs[rows:], outputs=outputs).matrix
            expected = whole[: stride * rows, stride * rows :]
            assert float((found - expected).abs().max()) <= 1e-12 * float(whole.abs().max())
        alone = ntk_gram(model, inputs[:1], outputs=outputs).matrix
        assert float((alone - whole[:stride, :stride]).abs().max()) <= 1e-12 * float(whole.abs().max())
        pair = ntk_gram(model, inputs[:1], inputs[1:2], outputs=outputs).matrix
        assert float((pair - whole[:stride, stride : 2 * stride]).abs().max()) <= 1e-12 * float(whole.abs().max())


def test_rows_and_columns_that_are_mappings_are_read_together(naive_gram):
    class Two(Positions):
        def forward(self, a, b):
            return super().forward(a + b)

    model = Two("table", 3).double()
    a, b = torch.randn(2, 5, 3, 2).double()
    whole = naive_gram(model, {"a": a, "b": b}, "trace")
    found = ntk_gram(model, {"a": a[:1], "b": b[:1]}, {"b": b[1:], "a": a[1:]}).matrix
    assert float((found - whole[:1, 1:]).abs().max()) <= 1e-12 * float(whole.abs().max())


def test_one_row_and_columns_of_another_length_are_read_on_the_columns(naive_jacobian):
    model = Words()
    rows, columns = torch.randint(0, 5, (1, 2)), torch.randint(0, 5, (4, 3))
    found = ntk_gram(model.double(), rows, columns, outputs="full").matrix
    gradients = [naive_jacobian(model, tokens) for tokens in (rows, columns)]
    assert float((found - gradients[0] @ gradients[1].T).abs().max()) <= 1e-12


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_columns_that_couple_are_refused_however_few_the_rows(rows):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return torch.tanh(self.layer(x - x.mean(0)))

    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(Centred(), torch.randn(rows, 4), torch.randn(6, 4))


# --- forwards that differentiate ------------------------------------------------------------------------------------


class Score(nn.Module):
    """The gradient of a scalar network by its inputs, by ``torch.func`` or by autograd."""

    def __init__(self, way):
        super().__init__()
        self.way, self.net = way, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        func = torch.func
        if self.way == "grad":
            return func.vmap(func.grad(lambda row: self.net(row).sum()))(x)
        if self.way == "vjp":
            return func.vjp(lambda rows: self.net(rows).sum(), x)[1](torch.ones((), dtype=x.dtype))[0]
        if self.way == "jacrev":
            return func.vmap(func.jacrev(self.net))(x)[:, 0]
        if self.way == "hessian":
            return func.vmap(func.hessian(lambda row: self.net(row).sum()))(x).diagonal(dim1=1, dim2=2)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(self.net(leaf).sum(), leaf, create_graph=True)[0]


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("way", ["grad", "vjp", "jacrev", "hessian", "autograd"])
def test_forwards_that_differentiate_inside_go_by_the_general_engine(way, engine, naive_gram):
    model, inputs = Score(way).double(), torch.randn(5, 3).double()
    for outputs in ("trace", "full", "sum"):
        gram = ntk_gram(model, inputs, outputs=outputs, engine=engine)
        naive = naive_gram(model, inputs, outputs)
        assert float((gram.matrix - naive).abs().max()) <= 1e-12 * float(naive.abs().max())
    assert set(gram.general) == {"net.0.weight", "net.0.bias", "net.2.weight"}
    assert gram.unused == ("net.2.bias",)
    assert 0 < gram.jacobian_error < 1e-12
    if way == "grad" and engine == "auto":
        assert {c.kind for c in gram.plan.contributions} == {"the forward differentiates by torch.func inside"}


def test_what_such_a_forward_keeps_is_estimated_from_above():
    # Of a plain network both can be had: what autograd keeps, and what is made. The hooks see inputs and parameters too.
    model, inputs = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh()), torch.randn(3, 6)
    kept = plan_ntk(model, inputs).reading.forward_bytes
    with undisturbed(model), MadeBytes() as made:
        StatelessModule(model).outputs({}, inputs)
    assert made.bytes == 3 * 4 * 50 * 4  # the results of both layers and both activations, each once
    assert made.bytes / 3 <= kept <= 3 * made.bytes / 3


# --- memory that a forward takes ------------------------------------------------------------------------------------


def test_the_bytes_of_a_sample_do_not_depend_on_the_set_it_is_taken_from():
    model, many = nn.Sequential(nn.Linear(30, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(4000, 30)
    few = many[:6].clone()
    expected = plan_ntk(model, few).reading.forward_bytes
    assert plan_ntk(model, many).reading.forward_bytes == expected
    assert plan_ntk(model, many[5:11]).reading.forward_bytes == expected
    with undisturbed(model):
        module = StatelessModule(model)
        sizes = [graph_size(module, module.trainable, inputs).saved_bytes for inputs in (few, many[5:11])]
    assert sizes[0] == sizes[1]


def test_the_comparison_with_the_other_precision_brings_no_numbers_from_outside(monkeypatch):
    asked = []
    outside = narrow_watch.numbers_from_outside
    monkeypatch.setattr(narrow_watch, "numbers_from_outside", lambda *args: asked.append(1) or outside(*args))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    ntk_gram(model.eval(), torch.randn(5, 2, 6, 6))
    assert not asked

    class FromNumpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) * torch.from_numpy(x.detach().numpy().mean(1, keepdims=True)).to(x)

    ntk_gram(FromNumpy(), torch.randn(5, 4))
    assert asked
