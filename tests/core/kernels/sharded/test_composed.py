"""Checkpoints, tensor-parallel plans, compiled blocks and precision policies on a sharded module: the same kernel, or a sentence."""

import pytest
import torch
from on_ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lightning_conv import NTKOperator, ntk_gram, plan_ntk
from lightning_conv.kernels.rules.linear import LinearRule
from lightning_conv.machine.processes import Processes

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.again = again

    def forward(self, x):
        if self.again:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x):
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class Network(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block(again) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Doubled(torch.autograd.Function):
    """A function that no recorder sees into."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T * 2

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 2 * gradient.T @ x


class Hidden(Network):
    """Has a weight in a layer, and once more where no rule applies."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return Doubled.apply(super().forward(x), self.head.weight)


INPUTS = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))


def shard(network, mesh, **options):
    for block in network.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(network, mesh=mesh, **options)


def tensor_parallel(mesh, *, head=False):
    network = Network()
    for block in network.blocks:
        parallelize_module(block, mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})
    if head:
        parallelize_module(network, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    return network


def composed(rank, world):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    mesh = init_device_mesh("cpu", (world,))
    found = {}

    def measure(name, network, **options):
        try:
            found[name] = ntk_gram(network, INPUTS, **options).matrix
        except (ValueError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert (
            not any(each._forward_pre_hooks for each in network.modules() if not hasattr(each, "_get_fsdp_state"))
            or "parallel" in name
        )

    measure("checkpoint", shard(Network(again=True), mesh))
    wrapped = Network()
    wrapped.blocks = nn.ModuleList(map(checkpoint_wrapper, wrapped.blocks))
    measure("checkpoint wrapper", shard(wrapped, mesh))
    compiled = Network()
    for block in compiled.blocks:
        block.compile()
    measure("compiled", shard(compiled, mesh))
    wrapped = Network()
    wrapped.blocks = nn.ModuleList(torch.compile(each) for each in wrapped.blocks)
    measure("compiled wrapper", shard(wrapped, mesh))
    measure("never resharded", shard(Network(), mesh, reshard_after_forward=False))
    measure("half reduction", shard(Network(), mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)))
    measure("half parameters", shard(Network(), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    measure("half outputs", shard(Network(), mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16)))
    measure("offloaded", shard(Network(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)))
    measure("double", shard(Network().double(), mesh))
    measure("tensor parallel", tensor_parallel(mesh))
    measure("tensor parallel head", tensor_parallel(mesh, head=True))
    measure("hybrid", shard(Network(), init_device_mesh("cpu", (1, world), mesh_dim_names=("replicas", "shards"))))
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    measure("parallel in both ways", shard(tensor_parallel(both["tensor"]), both["data"]))
    measure("some", shard(Network(), mesh), parameters=["blocks.1.*", "head.*"])
    frozen = shard(Network(), mesh)
    frozen.first.weight.requires_grad_(False)
    measure("frozen", frozen)

    measure("certified", shard(Network(), mesh), precision="certified")
    measure("jacobian", shard(Network(), mesh), engine="jacobian")
    measure("batch statistics", shard(Network(), mesh), batch_norm="batch")
    measure("half", shard(Network().bfloat16(), mesh))
    measure("frozen but named", frozen, parameters=["first.weight"])
    flat = Network()
    flat.blocks[0] = FullyShardedDataParallel(flat.blocks[0], device_id=torch.device("cpu"))
    measure("flat", flat)
    coupled = Network()
    coupled.head.register_forward_hook(lambda module, args, output: output - output.mean(0))
    measure("coupled", shard(coupled, mesh))
    chance = Network()
    chance.head.register_forward_hook(lambda module, args, output: output + torch.rand(()))
    measure("chance", shard(chance, mesh))
    detached = Network()
    detached.head.register_forward_hook(lambda module, args, output: output - output.mean(0).detach())
    measure("coupled in the outputs alone", shard(detached, mesh))
    with pytest.MonkeyPatch.context() as patch:
        right = LinearRule.bias_rows
        patch.setattr(LinearRule, "bias_rows", lambda rule, gradients: 1.001 * right(rule, gradients))
        measure("wrong rule", shard(Network(), mesh))
    measure("hidden in a function", shard(Hidden(), mesh))
    unseen = Network()
    unseen.forward = lambda x: Network.forward(unseen, x) * (1 + unseen.first.bias.sin().sum())
    measure("without a rule", shard(unseen, mesh))
    other = Network()
    for block in other.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "inner")
    other.forward = lambda x: other.head(other.blocks[1].inner(other.blocks[0].inner(other.first(x))).mean(1))
    measure("another method", fully_shard(other, mesh=mesh))
    for name, other in {
        "plan": lambda: plan_ntk(shard(Network(), mesh), INPUTS),
        "operator": lambda: NTKOperator(shard(Network(), mesh), INPUTS),
        "processes": lambda: ntk_gram(shard(Network(), mesh), INPUTS, processes=Processes(30)),
    }.items():
        try:
            other()
        except ValueError as error:
            found[name] = str(error)
    renormed = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2))
    fully_shard(renormed, mesh=mesh)
    try:
        ntk_gram(renormed, torch.tensor([[1], [2]]))
    except ValueError as error:
        found["renormed"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    first, second = run(2, composed, tmp_path_factory.mktemp("ranks"))
    assert first is not None
    assert second is not None
    for name, each in first.items():
        same = torch.equal(each, second[name]) if isinstance(each, torch.Tensor) else each == second[name]
        assert same or isinstance(each, torch.Tensor), name
    return first


def kernel(names):
    network = Network().eval()
    weights = [each for name, each in network.named_parameters() if names(name)]
    rows = [torch.autograd.grad(u, weights, retain_graph=True) for x in INPUTS for u in network(x[None])[0]]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double().unflatten(0, (6, 3))
    return torch.einsum("icp,jcp->ij", j, j)


SAME = [
    "checkpoint",
    "checkpoint wrapper",
    "compiled",
    "compiled wrapper",
    "never resharded",
    "half reduction",
    "offloaded",
    "double",
    "tensor parallel",
    "tensor parallel head",
    "hybrid",
    "parallel in both ways",
]


@pytest.mark.parametrize("name", SAME)
def test_the_kernel_is_that_of_the_whole_module(name, found):
    truth = kernel(lambda name: True)
    assert isinstance(found[name], torch.Tensor), found[name]
    assert (found[name] - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("some", lambda name: name.startswith(("blocks.1.", "head."))), ("frozen", lambda name: name != "first.weight")],
)
def test_the_kernel_of_some_parameters_is_theirs(name, chosen, found):
    truth = kernel(chosen)
    assert isinstance(found[name], torch.Tensor), found[name]
    assert (found[name] - truth).abs().max() <= 1e-6 * truth.abs().max()


REFUSED = {
    "half parameters": "is computed with in torch.bfloat16 (MixedPrecisionPolicy)",
    "half outputs": "torch.bfloat16",
    "certified": "no process has a copy of it in another type",
    "jacobian": 'engine: "jacobian" needs all parameters',
    "batch statistics": "batch_norm: 'batch' on a sharded module",
    "half": "sharded parameters of torch.bfloat16",
    "frozen but named": "parameters: 'first.weight' has no requires_grad",
    "flat": "FullyShardedDataParallel (FSDP1)",
    "coupled": "samples that couple",
    "chance": "model: the outputs of the first 2 samples change",
    "coupled in the outputs alone": "model: the outputs of the first 2 samples change",
    "wrong rule": "its layer rule does not give autograd's gradient",
    "hidden in a function": "'head.weight' is used in a way that no layer rule covers",
    "without a rule": "'first.bias' is used in a way that no layer rule covers",
    "another method": "'blocks.0.norm.weight' is used in a way that no layer rule covers",
    "renormed": "max_norm",
    "plan": "its parameters are sharded, and this needs all of them in one process",
    "operator": "its parameters are sharded, and this needs all of them in one process",
    "processes": "processes: given for a sharded module",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_in_one_sentence(name, found):
    assert isinstance(found[name], str), name
    assert REFUSED[name] in found[name]
    assert "\n" not in found[name]
