"""The kernel of a module that ``fully_shard`` divides among two processes is that of the whole module, and the module is left alone."""

import pytest
import torch
from on_ranks import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_conv import ntk_gram
from lightning_conv.kernels.resolve import resolved_spectrum

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.before(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.narrow(nn.functional.gelu(self.wide(self.after(x))))


class Transformer(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(23, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(7, 16))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 23, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words):
        x = self.words(words) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def convolutions():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    network[1].running_mean.normal_()
    return network


def transformer(tied=False):
    torch.manual_seed(0)
    return Transformer(tied)


def samples():
    generator = torch.Generator().manual_seed(1)
    images, numbers = torch.randn(7, 2, 6, 6, generator=generator), torch.randn(9, 6, generator=generator)
    words = torch.randint(0, 23, (6, 7), generator=generator)
    return {"mlp": numbers, "convolutions": images, "transformer": words, "tied": words}


MAKERS = {
    "mlp": mlp,
    "convolutions": convolutions,
    "transformer": transformer,
    "tied": lambda: transformer(tied=True),
}
OPTIONS = {
    "trace": {"outputs": "trace"},
    "sum": {"outputs": "sum"},
    "full": {"outputs": "full"},
    "projected": {"outputs": "projected", "projections": 2, "seed": 3},
    "fast": {"outputs": "trace", "precision": "fast"},
    "little memory": {"outputs": "trace", "max_memory": 4e6},
}


def sharded(network, world):
    mesh = init_device_mesh("cpu", (world,))
    layers = getattr(network, "blocks", None) or [each for each in network if isinstance(each, (nn.Linear, nn.Conv2d))]
    for each in layers:
        fully_shard(each, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def jacobian(network, inputs):
    """Return the gradient of every output of every sample by all parameters, (n, C, P), from plain autograd, one after the other."""
    rows = []
    for i in range(len(inputs)):
        outputs = network(inputs[i : i + 1])[0].flatten()
        for each in outputs:
            found = torch.autograd.grad(each, list(network.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).double().unflatten(0, (len(inputs), -1))


def cotangents(name, outputs):
    return torch.randn(len(samples()[name]), outputs, generator=torch.Generator().manual_seed(2))


def kernels(rank, world):
    found = {}
    for name, make in MAKERS.items():
        network, inputs = sharded(make(), world), samples()[name]
        for kind, options in OPTIONS.items():
            gram = ntk_gram(network, inputs, **options)
            found[name, kind] = gram.matrix
        found[name, "facts"] = gram.n_outputs, gram.unused, gram.general, gram.jacobian_error
        found[name, "cotangents"] = ntk_gram(network, inputs, cotangents=cotangents(name, gram.n_outputs)).matrix
        layers = ntk_gram(network, inputs, per_layer=True)
        found[name, "layers"] = sum(layers.layer_matrices.values())
        found[name, "two sets"] = ntk_gram(network, inputs, inputs[:4]).matrix
        found[name, "planned"] = ntk_gram(network, inputs, plan=layers.plan).matrix
    gram, spectrum = resolved_spectrum(network, inputs, outputs="trace")
    found["resolved"] = (
        gram.precision,
        float(spectrum.lambda_min.value),
        spectrum.lambda_min.certified,
        spectrum.lambda_min.reason,
    )
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = run(2, kernels, tmp_path_factory.mktemp("ranks"))
    assert all(each is not None for each in results)
    return results


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_kernel_of_per_sample_gradients_of_the_whole_module(name, found):
    network, inputs = MAKERS[name]().eval(), samples()[name]
    j = jacobian(network, inputs)
    assert found[0][name, "facts"][:3] == (j.shape[1], (), ())
    s = cotangents(name, j.shape[1]).double()
    contracted, summed = torch.einsum("ncp,nc->np", j, s), j.sum(1)
    trace = torch.einsum("icp,jcp->ij", j, j)
    expected = {
        "trace": trace,
        "fast": trace,
        "little memory": trace,
        "layers": trace,
        "planned": trace,
        "sum": summed @ summed.T,
        "full": j.flatten(0, 1) @ j.flatten(0, 1).T,
        "cotangents": contracted @ contracted.T,
        "two sets": trace[:, :4],
        "projected": ntk_gram(network, inputs, **OPTIONS["projected"]).matrix,  # of the same random signs
    }
    for each in found:
        for kind, truth in expected.items():
            assert (each[name, kind] - truth).abs().max() <= 1e-6 * truth.abs().max(), kind


@pytest.mark.parametrize("name", MAKERS)
def test_its_rounding_is_estimated_as_that_of_the_whole_module(name, found):
    network, inputs = MAKERS[name]().eval(), samples()[name]
    wide = MAKERS[name]().double().eval()
    given = inputs.double() if inputs.is_floating_point() else inputs
    exact, rounded = jacobian(wide, given), jacobian(network, inputs)
    error = float((exact - rounded).norm() / exact.norm())
    assert error <= found[0][name, "facts"][3] <= 40 * error


def test_lambda_min_of_a_sharded_module_is_measured_and_not_certified(found):
    precision, value, certified, reason = found[0]["resolved"]
    wide = MAKERS["tied"]().double().eval()
    j = jacobian(wide, samples()["tied"]).flatten(1)
    assert value == pytest.approx(float(torch.linalg.eigvalsh(j @ j.T)[0]), rel=1e-4)
    assert precision in ("fast", "exact")
    assert not certified or reason == ""


def trained(rank, world, measured):
    """Train for two steps with accumulated gradients, and measure in between or not; return weights, gradients and what else might move."""
    network, inputs = sharded(convolutions(), world), samples()["convolutions"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    rows = inputs[rank::world]
    hooks = [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in network.modules()]
    network.eval()[1].train()
    flags = [each.training for each in network.modules()]
    for _ in range(2):
        network.set_requires_gradient_sync(False)
        network(rows).square().sum().backward()
        if measured:
            state = torch.get_rng_state()
            ntk_gram(network, inputs)
            with pytest.raises(ValueError, match="different samples"):
                ntk_gram(network, inputs + rank)
            network.register_forward_hook(failing := lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ntk_gram(network, inputs)
            [key] = [key for key, hook in network._forward_hooks.items() if hook is failing]
            del network._forward_hooks[key]
            assert torch.equal(torch.get_rng_state(), state)
        network.set_requires_gradient_sync(True)
        network(rows).square().sum().backward()
        gradients = [each.grad.full_tensor() for each in network.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    assert hooks == [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in network.modules()]
    assert flags == [each.training for each in network.modules()]
    assert all(hasattr(each, "full_tensor") for each in network.parameters())
    return [*gradients, *(each.full_tensor() for each in network.parameters()), *network.buffers()]


def trained_both_ways(rank, world):
    return trained(rank, world, True), trained(rank, world, False)


def test_training_with_accumulated_gradients_goes_on_to_the_same_bit(tmp_path):
    for measured, plain in run(2, trained_both_ways, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(measured, plain, strict=True))


def most_gathered(rank, world):
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    network = sharded(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]), world)
    groups = [
        group
        for each in network.modules()
        if (get := getattr(each, "_get_fsdp_state", None))
        for group in get()._fsdp_param_groups
    ]
    most, plain = 0, FSDPParamGroup.unshard

    def counted(self, *args):
        nonlocal most
        plain(self, *args)
        most = max(most, sum(each is self or each.is_unsharded for each in groups))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", counted)
        ntk_gram(network, torch.randn(5, 64, generator=torch.Generator().manual_seed(0)))
    return most, len(groups)


def test_no_process_has_more_than_a_few_layers_at_a_time(tmp_path):
    for most, groups in run(2, most_gathered, tmp_path):
        assert groups >= 8
        assert 1 <= most <= 3
