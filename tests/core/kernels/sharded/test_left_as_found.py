"""A sharded module that was measured is as it was, wherever in a training step, and after an error; inside a pass it is refused."""

import random

import pytest
import torch
from on_ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_conv import ntk_gram
from lightning_conv.kernels.sharded.passes import sharded_outputs

pytestmark = pytest.mark.slow

INPUTS = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))


class Counting(nn.Module):
    """A network whose forward counts its calls and collects what it has seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 6))
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.total += x.sum()
        return self.net(x)


def sharded(world):
    mesh = init_device_mesh("cpu", (world,))
    model = Counting()
    for each in (model.net[0], model.net[3], model.net[4]):
        fully_shard(each, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def state(model):
    """Return everything of a sharded module that a measurement could change."""
    states = [each._get_fsdp_state() for each in model.modules() if hasattr(each, "_get_fsdp_state")]
    groups = [group for each in states for group in each._fsdp_param_groups]
    order = getattr(groups[0].comm_ctx, "post_forward_order", [])
    parameters = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
    grads = [None if each.grad is None else each.grad.to_local().clone() for each in model.parameters()]
    return {
        "parameters": [each.detach().clone() for each in parameters],
        "gradients": grads,
        "buffers": [each.clone() for each in model.buffers()],
        "training": [each.training for each in model.modules()],
        "attributes": (model.calls, list(model.seen)),
        "hooks": [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules()],
        "groups": [(each._sharded_state.name, each.reduce_grads, each.all_reduce_grads) for each in groups],
        "order": [groups.index(each) for each in order] + [list(each._post_forward_indices) for each in groups],
        "passes": [each._training_state.name for each in (*states, *groups)],
        "random": (torch.get_rng_state(), random.getstate()),
    }


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def trained(rank, world, *, measured):
    """Train, measuring at every place of a step; return which measurements have left a trace, and how it ends."""
    model, traces = sharded(world), []
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    random.seed(0)
    torch.manual_seed(rank)

    def measure(place, **options):
        if measured:
            before = state(model)
            ntk_gram(model, INPUTS, **options)
            if not equal(before, state(model)):
                traces.append(place)

    for step in range(3):
        if step:  # before the first forward FSDP has not decided which module is the outermost
            measure("before a step")
        loss = model(torch.randn(5, 8)).square().sum()
        measure("between forward and backward")
        loss.backward()
        measure("before the optimizer", outputs="sum")
        optimizer.step()
        model.net[0].unshard()
        measure("gathered by hand")
        model.net[0].reshard()
        optimizer.zero_grad()
    if measured:
        before = state(model)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ntk_gram(model, INPUTS[:, :3])
        if not equal(before, state(model)):
            traces.append("an error")
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    return traces, state(model)


def both(rank, world):
    return trained(rank, world, measured=False), trained(rank, world, measured=True)


def with_own_buffers(rank, world):
    model = sharded(world)
    model.net[1].running_mean += rank + 1.0
    outputs, gram = sharded_outputs(model, INPUTS), ntk_gram(model, INPUTS, cotangents=INPUTS[:, :6])
    return model.net[1].running_mean.clone(), outputs, gram.matrix


def test_processes_with_statistics_of_their_own_measure_those_of_the_first(tmp_path):
    whole = Counting().eval()
    whole.net[1].running_mean += 1.0
    rows = [torch.autograd.grad(whole(x[None])[0] @ x[:6], list(whole.parameters())) for x in INPUTS]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    for rank, (mean, outputs, matrix) in enumerate(run(2, with_own_buffers, tmp_path)):
        assert torch.equal(mean, torch.full((32,), rank + 1.0))
        assert torch.allclose(outputs, whole(INPUTS), atol=1e-6)
        assert (matrix - j @ j.T).abs().max() <= 1e-6 * (j @ j.T).abs().max()


def test_training_goes_on_to_the_same_bit_wherever_it_is_measured(tmp_path):
    for (_, without), (traces, measured) in run(2, both, tmp_path):
        assert traces == []
        assert equal(without, measured)


def refused(rank, world):
    """Measure in hooks of a forward and of a backward pass; return what is said, and whether the step is that without."""
    ends, said = [], []
    for measures in (False, True):
        model = sharded(world)

        def measure(model=model, measures=measures):
            if not measures:
                return
            with pytest.raises(RuntimeError) as error:
                ntk_gram(model, INPUTS)
            said.append(str(error.value))

        handle = model.net[3].register_forward_hook(lambda *_, measure=measure: measure())
        outputs = model.net[4].register_forward_hook(
            lambda layer, args, output, measure=measure: output.register_hook(lambda grad: measure()) and None
        )
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(rank))).square().sum().backward()
        handle.remove()
        outputs.remove()
        ends.append(state(model))
    return said, equal(*ends), ntk_gram(model, INPUTS).matrix.isfinite().all()


def test_inside_a_pass_it_is_refused_in_a_sentence(tmp_path):
    for said, same, after in run(2, refused, tmp_path):
        assert len(said) == 2
        assert all("FSDP is inside a forward or backward pass" in each for each in said)
        assert same
        assert after
