"""Neighbours, alignment and drift from sketches, against the same numbers of exact kernels."""

import copy

import pytest
import torch
from torch import nn

from lightning_conv.kernels.drift import centred_alignment, relative_frobenius_change
from lightning_conv.sketches import SketchStore
from lightning_conv.sketches.estimates import group_kernels
from lightning_conv.sketches.layout import Layout, make_block

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def trained():
    """A network, itself after some steps, and its training set."""
    torch.manual_seed(0)
    x = torch.randn(60, 24)
    y = (x[:, :3].sum(1) > 0).long() + 2 * (x[:, 3] > 0).long()
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    later = copy.deepcopy(model)
    optimizer = torch.optim.SGD(later.parameters(), lr=0.5)
    for _ in range(15):
        optimizer.zero_grad()
        LOSS(later(x), y).backward()
        optimizer.step()
    return {"start": model, "end": later}, (x, y)


def gradients(model, batch):
    rows = []
    for x, y in zip(*batch, strict=True):
        found = torch.autograd.grad(LOSS(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([each.flatten() for each in found]).double())
    return torch.stack(rows)


def filled(folder, trained, **options):
    models, batch = trained
    store = SketchStore.create(folder, models["start"], like=batch, loss_fn=LOSS, **options)
    for name, model in models.items():
        store.add(model, [tuple(each[:25] for each in batch), tuple(each[25:] for each in batch)], name=name)
    return store


def test_a_store_without_projections_gives_the_exact_alignment_drift_and_neighbours(trained, tmp_path):
    models, batch = trained
    store = filled(tmp_path / "a", trained, size=10**5, dtype="float32")
    rows = {name: gradients(model, batch) for name, model in models.items()}
    kernels = {name: g @ g.T for name, g in rows.items()}
    alignment, drift = store.alignment("end", "start"), store.drift("end", "start")
    assert alignment.value == pytest.approx(centred_alignment(kernels["end"], kernels["start"]), rel=1e-5)
    assert drift.value == pytest.approx(relative_frobenius_change(kernels["end"], kernels["start"]), rel=1e-5)
    assert alignment.standard_error < 1e-9
    assert drift.standard_error < 1e-9
    uncentred = float((kernels["end"] * kernels["start"]).sum() / (kernels["end"].norm() * kernels["start"].norm()))
    assert store.alignment("end", "start", centred=False).value == pytest.approx(uncentred, rel=1e-5)
    some = [3, 50, 17]
    part = relative_frobenius_change(
        kernels["end"][some][:, some].contiguous(), kernels["start"][some][:, some].contiguous()
    )
    assert store.drift("end", "start", samples=some).value == pytest.approx(part, rel=1e-5)
    queries = store.sketch(models["end"], tuple(each[:4] for each in batch))
    influence = kernels["end"][:4]
    cosine = influence / (influence.diagonal()[:, None] * kernels["end"].diagonal()).sqrt()
    for by, truth in (("influence", influence), ("opposed", -influence), ("cosine", cosine)):
        found = store.nearest(queries, 7, name="end", by=by)
        best = truth.topk(7, dim=1)
        assert torch.equal(found.samples, best.indices)
        sign = -1 if by == "opposed" else 1
        torch.testing.assert_close(found.influence, sign * best.values, rtol=1e-5, atol=1e-7)
    assert found.samples[:, 0].tolist() == [0, 1, 2, 3]  # each sample is nearest to itself by the cosine


def test_neighbours_are_the_same_when_the_store_is_read_in_parts(trained, tmp_path, monkeypatch):
    store = filled(tmp_path / "a", trained, size=128, groups=8)
    queries = store.sketches("end", slice(0, 5))
    whole = store.nearest(queries, 6, name="end")
    monkeypatch.setattr("lightning_conv.sketches.stored.READ", 7 * store.size)
    parts = store.nearest(queries, 6, name="end")
    assert torch.equal(whole.samples, parts.samples)
    assert torch.equal(whole.standard_error, parts.standard_error)
    assert store.nearest(queries, 1000, name="end").samples.shape == (5, 60)


def test_alignment_and_drift_are_right_within_their_errors(trained, tmp_path):
    models, batch = trained
    kernels = {name: (g := gradients(model, batch)) @ g.T for name, model in models.items()}
    truths = (
        centred_alignment(kernels["end"], kernels["start"]),
        relative_frobenius_change(kernels["end"], kernels["start"]),
    )
    apart = []
    for seed in range(12):
        store = filled(tmp_path / f"{seed}", trained, size=256, groups=16, seed=seed)
        for truth, found in zip(truths, (store.alignment("end", "start"), store.drift("end", "start")), strict=True):
            apart.append((found.value - truth) / found.standard_error)
    apart = torch.tensor(apart).reshape(12, 2)
    assert float(apart.abs().max()) < 5
    assert float((apart.mean(0) * 12**0.5).abs().max()) < 4  # no bias that twelve seeds would show
    assert 0.3 < float(apart.square().mean().sqrt()) < 2  # the stated errors have the right size


def test_no_drift_is_not_mistaken_for_one(trained, tmp_path):
    models, batch = trained
    store = SketchStore.create(tmp_path / "a", models["start"], like=batch, loss_fn=LOSS, size=128, groups=8)
    twin = copy.deepcopy(models["start"])
    with torch.no_grad():
        twin[0].bias += 1e-6
    for name, model in (("a", models["start"]), ("b", twin)):
        store.add(model, [batch], name=name)
    found = store.drift("b", "a")
    assert found.value <= 3 * found.standard_error + 1e-3
    assert store.alignment("b", "a").value == pytest.approx(1, abs=1e-3)


def test_products_of_one_group_with_itself_would_be_biased():
    """The reason why only different groups are multiplied: |K_g|_F^2 is larger than |K|_F^2 on average, by far."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 50, 40, generator=generator, dtype=torch.float64)
    block = make_block(("w",), {"w": (50, 40)}, 9 * 64, 64, once=True)
    layout = Layout((block,), 64, True)
    from lightning_conv.sketches.sides import Sides, rows_sketch

    sketch = rows_sketch(rows, Sides.draw(block, 0, 64, rows)).flatten(1)
    kernels = torch.stack([each.flatten() for each in group_kernels(layout, sketch, sketch)])
    products = kernels @ kernels.T
    truth = float((rows.flatten(1) @ rows.flatten(1).T).square().sum())
    different = float(products.sum() - products.trace()) / (64 * 63)
    assert different == pytest.approx(truth, rel=0.15)
    assert float(products.trace()) / 64 > 1.5 * truth


RATES = {"start": 0.3, "end": 0.05}


@pytest.mark.parametrize("by", ["influence", "opposed"])
def test_the_influence_over_checkpoints_is_the_sum_over_exact_gradients(trained, tmp_path, by):
    models, (x, y) = trained
    store = filled(tmp_path / "a", trained, size=10**5, dtype="float32")
    rows = {name: gradients(model, (x, y)) for name, model in models.items()}
    exact = sum(rate * rows[name][:4] @ rows[name].T for name, rate in RATES.items())
    queries = {name: store.sketch(model, (x[:4], y[:4])) for name, model in models.items()}
    found = store.nearest_over(queries, 6, rates=RATES, by=by)
    best = exact.topk(6, largest=by == "influence")
    assert torch.equal(found.samples, best.indices)
    torch.testing.assert_close(found.influence, best.values, rtol=1e-4, atol=1e-6)
    # Neither checkpoint alone gives these numbers.
    assert not torch.allclose(found.influence, store.nearest(queries["start"], 6, name="start", by=by).influence)


def test_the_error_of_a_sum_counts_that_all_checkpoints_have_the_same_projections(trained, tmp_path):
    models, (x, y) = trained
    exact = sum(rate * (g := gradients(models[name], (x, y)))[:8] @ g.T for name, rate in RATES.items())
    squared, stated = [], []
    for seed in range(6):
        store = filled(tmp_path / str(seed), trained, size=64, groups=8, seed=seed)
        queries = {name: store.sketches(name, slice(0, 8)) for name in models}
        found = store.nearest_over(queries, 60, rates=RATES)
        there = exact.gather(1, found.samples)
        squared.append((found.influence - there).square().mean())
        stated.append(found.standard_error.square().mean())
    assert float(sum(squared) / sum(stated)) == pytest.approx(1.0, abs=0.5)


def test_a_sum_over_parts_of_the_store_is_the_same(trained, tmp_path, monkeypatch):
    store = filled(tmp_path / "a", trained, size=128, groups=8)
    queries = {name: store.sketches(name, slice(0, 5)) for name in RATES}
    whole = store.nearest_over(queries, 6, rates=RATES)
    monkeypatch.setattr("lightning_conv.sketches.stored.READ", 14 * store.size)
    assert torch.equal(store.nearest_over(queries, 6, rates=RATES).samples, whole.samples)


def test_sums_that_make_no_sense_are_refused(trained, tmp_path):
    models, (x, y) = trained
    store = filled(tmp_path / "a", trained, size=64, groups=4)
    queries = {name: store.sketches(name, slice(0, 3)) for name in RATES}
    with pytest.raises(ValueError, match=r"rates: for \['start'\]; need one for each checkpoint of queries"):
        store.nearest_over(queries, rates={"start": 0.1})
    with pytest.raises(ValueError, match=r"rates\['end'\]"):
        store.nearest_over(queries, rates=RATES | {"end": -1.0})
    with pytest.raises(ValueError, match="need the same queries at each checkpoint"):
        store.nearest_over(queries | {"end": store.sketches("end", [0])}, rates=RATES)
    with pytest.raises(ValueError, match="by: 'cosine'"):
        store.nearest_over(queries, rates=RATES, by="cosine")
    store.add(models["end"], [(x[:30], y[:30])], name="fewer")
    with pytest.raises(ValueError, match="'start' and 'fewer' are of different samples"):
        store.nearest_over({"start": queries["start"], "fewer": queries["end"]}, rates={"start": 0.1, "fewer": 0.1})
