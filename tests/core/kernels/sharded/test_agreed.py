"""All processes of a sharded module have the same kernel and plan, and four that divide it in two ways have that of the whole module."""

import pytest
import torch
from on_ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_conv import ntk_gram
from lightning_conv.kernels import gram
from lightning_conv.kernels.resolve import resolved_spectrum

pytestmark = pytest.mark.slow

INPUTS = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
OPTIONS = {
    "trace": {},
    "sum": {"outputs": "sum"},
    "full": {"outputs": "full"},
    "projected": {"outputs": "projected", "projections": 2},
    "layers": {"per_layer": True},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 6))


def divided_twice():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = network()
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": ColwiseParallel(), "5": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    for number in (0, 3, 5):
        fully_shard(model[number], mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def moved(rank):
    """Return ``compute_kernel`` with numbers and durations of this process alone."""
    plain = gram.compute_kernel

    def compute(*args, **options):
        found = plain(*args, **options)
        found.matrix.mul_(1 + 1e-9 * rank)
        return found

    return compute


def four(rank, world):
    model, said = divided_twice(), ""
    found = {name: ntk_gram(model, INPUTS, **options) for name, options in OPTIONS.items()}
    found = {name: each.matrix for name, each in found.items()} | {"sums": sum(found["layers"].layer_matrices.values())}
    try:
        ntk_gram(model, INPUTS + (rank == 3))
    except ValueError as error:
        said = str(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "compute_kernel", moved(rank))
        one = ntk_gram(model, INPUTS, per_layer=True)
        spectrum = resolved_spectrum(model, INPUTS)[1]
    reading = one.plan.reading
    alike = one.matrix, one.floor, one.jacobian_error, reading.forward_seconds, float(spectrum.lambda_min.value)
    return found, said, alike


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = run(4, four, tmp_path_factory.mktemp("ranks"))
    assert all(each is not None for each in results)
    return results


@pytest.mark.parametrize("name", [*OPTIONS, "sums"])
def test_four_processes_have_the_kernel_of_the_whole_module(name, found):
    whole = network()
    rows = [
        torch.autograd.grad(u, list(whole.parameters()), retain_graph=True) for x in INPUTS for u in whole(x[None])[0]
    ]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double().unflatten(0, (7, 6))
    trace = torch.einsum("icp,jcp->ij", j, j)
    expected = {
        "trace": trace,
        "layers": trace,
        "sums": trace,
        "sum": j.sum(1) @ j.sum(1).T,
        "full": j.flatten(0, 1) @ j.flatten(0, 1).T,
        "projected": ntk_gram(whole, INPUTS, **OPTIONS["projected"]).matrix,  # of the same random signs
    }[name]
    for each, _, _ in found:
        assert (each[name] - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_other_samples_on_one_of_four_are_refused_on_all(found):
    assert len({said for _, said, _ in found}) == 1
    assert "were given different samples" in found[0][1]


def test_all_decide_by_the_numbers_of_the_first_one(found):
    first, *others = [alike for _, _, alike in found]
    for other in others:
        assert torch.equal(first[0], other[0])
        assert first[1:] == other[1:]
