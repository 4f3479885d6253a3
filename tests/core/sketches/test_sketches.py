"""Sketches of every network of the matrix against projections of gradients from autograd, and kernels against exact ones."""

from math import prod

import pytest
import torch
from kernels.cases import CASES, build, jacobian
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.losses.sample_gradients import sample_gradients
from lightning_conv.sketches import SketchStore
from lightning_conv.sketches.sides import Sides


def weighted(outputs, targets):
    """A loss whose gradient by the outputs is the targets."""
    return (outputs.flatten() * targets.flatten()).sum()


def case_of(name):
    """A network with inputs, targets in the shape of its outputs, and the gradients of its samples, each of all parameters."""
    model, inputs = build(name)
    rows = jacobian(name)
    first = (
        inputs
        if isinstance(inputs, torch.Tensor)
        else next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    )
    outputs = len(rows) // len(first)
    targets = torch.randn(len(first), outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.einsum("nc,ncp->np", targets, rows.reshape(len(first), outputs, -1))
    return model, (inputs, targets), gradients


def projected(model, gradients, store):
    """The sketches from gradients of all parameters: each is written as a matrix, and multiplied by both of its projections."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = dict(zip([n for n, _ in named], gradients.split([p.numel() for _, p in named], 1), strict=True))
    layout = store.settings.layout
    found = torch.zeros(len(gradients), layout.size, dtype=torch.float64)
    for block, place in zip(layout.blocks, layout.places, strict=True):
        shape = store.settings.shapes[block.names[0]]
        rows = shape[0] if len(shape) > 1 else 1
        matrix = parts[block.names[0]].reshape(len(gradients), rows, prod(shape) // rows)
        if len(block.names) > 1:
            matrix = torch.cat([matrix, parts[block.names[1]][:, :, None]], 2)
        sides = Sides.draw(block, store.settings.seed, layout.groups, gradients)
        for number in range(layout.groups):
            left = torch.eye(rows, dtype=torch.float64) if sides.left is None else sides.left[number]
            right = torch.eye(matrix.shape[2], dtype=torch.float64) if sides.right is None else sides.right[number]
            start = 0 if layout.is_shared(block) else layout.group(number).start
            found[:, start + place.start : start + place.stop] = (left @ matrix @ right.T).flatten(1)
    return found


@pytest.mark.parametrize("case", CASES)
def test_sketches_are_the_projections_of_the_gradients(case, tmp_path):
    model, batch, gradients = case_of(case)
    for size in (16, 48):
        store = SketchStore.create(
            tmp_path / str(size), model, like=batch, loss_fn=weighted, size=size, groups=4, seed=5
        )
        truth = projected(model, gradients, store)
        for engine in ("auto", "jacobian"):
            found = store.sketch(model, batch, engine=engine).values
            assert float((found - truth).norm()) <= 1e-10 * float(truth.norm())


@pytest.mark.parametrize(
    "case",
    [
        "expert that only later samples reach",
        "expert that is dropped for the first samples",
        "transformer",
        "embedding",
    ],
)
def test_blocks_of_a_loader_are_sketched_like_one_batch(case, tmp_path, monkeypatch):
    model, batch, gradients = case_of(case)
    store = SketchStore.create(tmp_path / "a", model, like=batch, loss_fn=weighted, size=48, groups=4, dtype="float32")
    truth = projected(model, gradients, store)
    first, rest = (tuple(each[rows] for each in batch) for rows in (slice(0, 4), slice(4, None)))
    for name, at_once in (("one by one", 1), ("together", 2**28)):
        monkeypatch.setattr("lightning_conv.sketches.sketcher.AT_ONCE", at_once)
        store.add(model, [first, rest], name=name.replace(" ", "_"))
        found = store.sketches(name.replace(" ", "_")).values
        assert float((found - truth).norm()) <= 1e-6 * float(truth.norm())


@pytest.mark.parametrize("case", CASES)
def test_without_projections_the_kernel_is_exact(case, tmp_path):
    model, batch, gradients = case_of(case)
    store = SketchStore.create(tmp_path / "s", model, like=batch, loss_fn=weighted, size=10**6, dtype="float32")
    assert store.relative_error == 0
    store.add(model, [batch], name="a")
    found, truth = store.kernel(name="a"), gradients @ gradients.T
    assert torch.equal(found.standard_error, torch.zeros_like(truth))
    assert float((found.matrix - truth).norm()) <= found.rounding * float(truth.trace())
    assert found.rounding < 2e-7


def digits_like(count=12, width=30, classes=4):
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % classes


def mlp(width=30, classes=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 40), nn.Tanh(), nn.Linear(40, 35), nn.Tanh(), nn.Linear(35, classes))


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (nn.CrossEntropyLoss(), lambda y: y),
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), lambda y: y),
        (nn.MSELoss(), lambda y: torch.eye(4)[y]),
        (lambda u, y: (u - torch.eye(4)[y]).square().mean().sqrt(), lambda y: y),
    ],
)
def test_estimates_are_unbiased_and_their_errors_are_as_stated(loss_fn, targets, tmp_path):
    x, y = digits_like()
    model, batch = mlp(), (x, targets(y))
    slopes = sample_gradients(loss_fn, model(x).detach(), batch[1])
    truth = ntk_gram(model, x, cotangents=slopes, precision="certified").matrix
    sum_, squares, stated, seeds = torch.zeros_like(truth), torch.zeros_like(truth), torch.zeros_like(truth), 24
    for seed in range(seeds):
        store = SketchStore.create(
            tmp_path / f"{seed}", model, like=batch, loss_fn=loss_fn, size=64, groups=8, seed=seed
        )
        sketches = store.sketch(model, batch)
        found = store.kernel(sketches, sketches)
        sum_ += found.matrix - truth
        squares += (found.matrix - truth).square()
        stated += found.standard_error.square()
    scale = (truth.diagonal()[:, None] * truth.diagonal()).sqrt()
    error = (squares / seeds).sqrt()
    # The mean error of 24 seeds is within the errors of such a mean, and the stated variance is right on average.
    assert float(((sum_ / seeds).abs() / (error / seeds**0.5)).max()) < 5
    assert float(stated.sum() / squares.sum()) == pytest.approx(1, abs=0.35)
    assert float((error / scale).max()) < 1.5 * store.relative_error


def test_combinations_of_outputs_estimate_the_trace_kernel(tmp_path):
    x, _ = digits_like()
    model = mlp()
    truth = ntk_gram(model, x, outputs="trace", precision="certified").matrix
    store = SketchStore.create(tmp_path / "s", model, like=x, size=64 * 400, groups=400)
    sketches = store.sketch(model, x)
    found = store.kernel(sketches, sketches)
    assert float(((found.matrix - truth).abs() / found.standard_error).max()) < 5
    assert float(found.standard_error.square().mean().sqrt() / truth.diagonal().mean()) < 0.1


class TiedTable(nn.Module):
    """A table of words that is the last layer, too."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(40, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words):
        return self.head(torch.tanh(self.mix(self.table(words))))


def test_a_language_model_with_tied_words_is_sketched_without_its_gradient(tmp_path, monkeypatch):
    def formed(*_):
        raise AssertionError("the gradient by a weight is formed")

    monkeypatch.setattr("lightning_conv.sketches.routes.site_rows", formed)
    torch.manual_seed(0)
    model, words = TiedTable().double(), torch.randint(0, 40, (5, 6))
    loss = lambda u, y: nn.functional.cross_entropy(u.flatten(0, 1), y.flatten())  # noqa: E731
    store = SketchStore.create(tmp_path / "s", model, like=(words, words.roll(-1, 1)), loss_fn=loss, size=60, groups=4)
    gradients = []
    for i in range(5):
        model.zero_grad()
        loss(model(words[i : i + 1]), words.roll(-1, 1)[i : i + 1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    truth = projected(model, torch.stack(gradients), store)
    found = store.sketch(model, (words, words.roll(-1, 1))).values
    assert float((found - truth).norm()) <= 1e-11 * float(truth.norm())


def test_gradients_of_any_size_are_stored(tmp_path):
    """Losses so small or large that float16, and a backward pass in float32, would lose them."""
    x, y = digits_like()
    model = mlp()
    plain = SketchStore.create(tmp_path / "1", model, like=(x, y), loss_fn=nn.CrossEntropyLoss(), dtype="float16")
    plain.add(model, [(x, y)], name="a")
    reference = plain.kernel(name="a").matrix
    for power in (-90, 60):
        factor = 2.0**power

        def scaled(u, t, factor=factor):
            return nn.functional.cross_entropy(u, t) * factor

        store = SketchStore.create(tmp_path / f"{power}", model, like=(x, y), loss_fn=scaled, dtype="float16")
        store.add(model, [(x, y)], name="a")
        torch.testing.assert_close(store.kernel(name="a").matrix / factor**2, reference, rtol=1e-3, atol=1e-12)


def test_float16_stays_within_its_bound_of_float32(tmp_path):
    x, y = digits_like()
    model = mlp()
    kernels = {}
    for dtype in ("float16", "float32"):
        store = SketchStore.create(
            tmp_path / dtype, model, like=(x, y), loss_fn=nn.CrossEntropyLoss(), dtype=dtype, size=64
        )
        store.add(model, [(x, y)], name="a")
        kernels[dtype] = store.kernel(name="a")
        assert store.bytes_per_sample == store.size * (2 if dtype == "float16" else 4) + 2
    half, full = kernels["float16"], kernels["float32"]
    norms = (full.matrix.diagonal()[:, None] * full.matrix.diagonal()).sqrt()
    apart = (half.matrix - full.matrix).abs() / norms
    assert float(apart.max()) <= half.rounding + full.rounding
    assert float(apart.max()) > 1e-6  # float16 does round
