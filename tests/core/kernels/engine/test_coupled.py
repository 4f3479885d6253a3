"""``coupled_gram`` against train-mode autograd row by row and against finite differences."""

import pytest
import torch
from dense_kernels import assert_same, reduced_rows, train_mode, train_mode_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.cases import COUPLED, build_coupled
from kernels.networks import lived_in_model
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.kernels.engine.coupled import coupled_gram, strips
from lightning_conv.kernels.products.combinations import EachOutput, SharedRows
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.undisturbed import undisturbed


def gram(model, inputs, outputs="full", dtype=None, precision="exact", names=None, **options):
    with undisturbed(model):
        module = StatelessModule(model, dtype=dtype, batch_norm="batch")
        width = module.outputs({}, module.convert(inputs)).shape[1]
        combinations = SharedRows(torch.ones(1, width, dtype=module.dtype)) if outputs == "sum" else EachOutput(width)
        return coupled_gram(
            module,
            names or module.trainable,
            module.convert(inputs),
            combinations,
            trace=outputs != "full",
            precision=precision,
            **options,
        )


def difference_rows(model, inputs, step=2e-3):
    """J by central differences of the train-mode forward, Richardson-extrapolated to order step^6."""
    twin = train_mode(model)
    columns = []
    with torch.no_grad():
        for parameter in twin.parameters():
            for value in parameter.view(-1):
                start = value.clone()

                def central(h, value=value, start=start):
                    value.copy_(start + h)
                    above = twin(inputs)
                    value.copy_(start - h)
                    below = twin(inputs)
                    value.copy_(start)
                    return (above - below).flatten() / (2 * h)

                coarse, middle, fine = central(step), central(step / 2), central(step / 4)
                first, second = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
                columns.append((16 * second - first) / 15)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("outputs", ["full", "trace", "sum"])
@pytest.mark.parametrize("case", COUPLED)
def test_agrees_with_train_mode_autograd(case, outputs):
    model, inputs = build_coupled(case)
    found, floor = gram(model, inputs, outputs)
    assert_same(found, reduced_rows(train_mode_rows(model, inputs), len(inputs), outputs), 1e-9)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert 0 < floor <= 1e-11 * float(found.trace())


@pytest.mark.parametrize("case", ["cnn with batch norm", "batch norm called twice", "without batch norm"])
def test_agrees_with_finite_differences_of_the_train_mode_network(case):
    model, inputs = build_coupled(case)
    rows = difference_rows(model, inputs)
    for outputs in ("full", "trace", "sum"):
        assert_same(gram(model, inputs, outputs)[0], reduced_rows(rows, len(inputs), outputs), 1e-8)


def test_has_the_terms_across_samples_that_frozen_statistics_drop():
    model, inputs = build_coupled("cnn with batch norm")
    found = gram(model, inputs)[0]
    for mode in ("frozen", "eval"):
        other = ntk_gram(model, inputs, outputs="full", batch_norm=mode).matrix
        assert float((found - other).norm()) > 0.05 * float(other.norm())
    # BatchNorm takes out whatever shifts all samples alike: a bias before it has no derivative at all.
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    inputs = torch.randn(5, 3).double()
    assert float(gram(layers, inputs, names=["0.bias"])[0].norm()) < 1e-12
    assert float(ntk_gram(layers, inputs, parameters=["0.bias"], batch_norm="frozen").matrix.norm()) > 1


def test_is_the_kernel_of_ntk_gram_where_no_layer_couples():
    model, inputs = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), torch.randn(6, 3).double()
    for outputs in ("full", "trace", "sum"):
        assert_same(gram(model, inputs, outputs)[0], ntk_gram(model, inputs, outputs=outputs).matrix, 1e-13)


@pytest.mark.parametrize("outputs", ["full", "trace"])
def test_strips_of_columns_change_nothing(outputs):
    model, inputs = build_coupled("wide")
    whole = gram(model, inputs, outputs)[0]
    most = None
    for memory in [round(20_000 * 1.3**k) for k in range(12)]:  # up to 360 kB
        calls = []
        try:
            tiled, floor = gram(model, inputs, outputs, max_memory=memory, report=calls.append)
        except MemoryError:
            assert most is None  # what fits once fits with more memory
            continue
        assert_same(tiled, whole, 1e-13)
        assert calls == sorted(calls)
        assert calls[-1] == 1
        assert floor > 0
        most = most or len(calls)
    rows = len(inputs) * 2
    assert most is not None
    assert most > 4 * rows  # more strips than parameters
    assert len(calls) <= rows  # and one


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 60))
def test_law_strips_cover_every_column_once_in_order(sizes, limit):
    names = [f"p{i}" for i in range(len(sizes))]
    covered = []
    for strip in strips(list(zip(names, sizes, strict=True)), limit):
        assert 0 < strip.width <= limit
        columns = [(name, k) for name in strip.names for k in range(sizes[names.index(name)])]
        covered += columns[strip.start : strip.stop]
    assert covered == [(name, k) for name, size in zip(names, sizes, strict=True) for k in range(size)]


@pytest.mark.parametrize("outputs", ["full", "trace", "sum"])
def test_floor_bounds_the_products_of_fast(outputs):
    model, inputs = build_coupled("cnn with batch norm")
    model, inputs = model.float(), inputs.float()
    (fast, floor), (exact, tiny) = (gram(model, inputs, outputs, precision=p) for p in ("fast", "exact"))
    error = float(torch.linalg.matrix_norm(fast - exact, 2))
    assert 0 < error <= floor + tiny
    assert tiny < 1e-7 * floor
    certified = gram(model, inputs, outputs, dtype=torch.float64, precision="certified")[0]
    assert_same(certified, reduced_rows(train_mode_rows(model, inputs), len(inputs), outputs), 1e-12)
    assert_same(exact, certified, 1e-4)


@pytest.mark.parametrize("memory", [None, 40_000])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_leaves_no_trace(dtype, memory, leaves_no_trace):
    model, inputs = lived_in_model(), torch.randn(5, 2, 4, 4)
    with leaves_no_trace(model, inputs):
        gram(model, inputs, dtype=dtype, max_memory=memory)
    assert all(layer.track_running_stats for layer in (model[1], model[6]))


def test_subset_of_parameters_and_outputs_that_depend_on_none():
    model, inputs = build_coupled("batch norm called twice")
    rows = train_mode_rows(model, inputs)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    columns = rows[:, starts["shift"] : starts["shift"] + sizes["shift"]]
    assert_same(gram(model, inputs, names=["shift"])[0], columns @ columns.T, 1e-9)
    assert float(gram(model, inputs, names=["unused"])[0].abs().max()) == 0


@pytest.mark.parametrize("memory", [2_500, 8_000, 12_000])
def test_what_does_not_fit_is_refused_with_the_numbers(memory):
    model, inputs = build_coupled("cnn with batch norm")
    with pytest.raises(MemoryError, match=r"max_memory: .* MiB"):
        gram(model, inputs, max_memory=memory)


def test_a_random_forward_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x + torch.randn_like(x))

    with pytest.raises(ValueError, match="model: two forward passes of one batch differ"):
        ntk_gram(Noisy(), torch.randn(4, 3), batch_norm="batch")


def test_large_layers_go_one_backward_at_a_time_and_agree():
    model = nn.Sequential(nn.Linear(260, 260), nn.BatchNorm1d(260), nn.ReLU(), nn.Linear(260, 1)).double()
    inputs = torch.randn(4, 260).double()
    assert_same(gram(model, inputs)[0], reduced_rows(train_mode_rows(model, inputs), 4, "full"), 1e-12)
