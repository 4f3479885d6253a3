"""What the operators of a forward prove: nothing of a network whose samples couple, and what is true of the others."""

import random

import pytest
import torch
import torchvision
from torch import nn

from lightning_conv import ntk_gram
from lightning_conv.kernels.reading import coupling
from lightning_conv.kernels.reading.own_samples import OwnSamples
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.recipes import GPT

F = nn.functional


class Then(nn.Module):
    def __init__(self, then):
        super().__init__()
        self.then, self.layer, self.attribute = then, nn.Linear(4, 4), torch.ones(4)

    def forward(self, x):
        return self.then(self, self.layer(x))


def proof_of(model, x):
    torch.manual_seed(0)
    module = StatelessModule(model.eval())
    proof = OwnSamples(module)
    assert torch.allclose(proof.outputs(x), module.outputs({}, x), atol=1e-4) or not proof.holds
    return proof


def written(z):
    found = torch.zeros(6, 4)
    found[0].copy_(z[1])
    return found


def replaced(z):
    z.data = z.flip(0)
    return z


COUPLED = {
    "mean": lambda s, z: z - z.mean(0),
    "sum": lambda s, z: z / z.sum(),
    "softmax": lambda s, z: z.softmax(0),
    "flip": lambda s, z: z.flip(0),
    "roll": lambda s, z: z.roll(1, 0),
    "roll of all": lambda s, z: z.roll(1),
    "Gram": lambda s, z: z @ z.T,
    "product of Gram": lambda s, z: (z @ z.T) @ z,
    "index": lambda s, z: z[torch.tensor([1, 0, 2, 3, 4, 5])],
    "first": lambda s, z: z + z[0],
    "first, sliced": lambda s, z: z + z[:1],
    "numbers of samples": lambda s, z: z + torch.arange(6.0)[:, None],
    "item": lambda s, z: z * z.max().item(),
    "bool": lambda s, z: z * 2 if z.sum() > 0 else z,
    "NumPy": lambda s, z: z + torch.from_numpy(z.detach().numpy().mean(0)),
    "list": lambda s, z: z * max(z.detach().flatten().tolist()),
    "filled from a list": lambda s, z: z * torch.full((4,), max(z.detach().flatten().tolist())),
    "data": lambda s, z: z + z.data.mean(0),
    "data replaced": lambda s, z: replaced(z),
    "shape": lambda s, z: z.reshape(4, 6).T.reshape(6, 4),
    "transposed shape": lambda s, z: z.T.reshape(6, 4),
    "merged": lambda s, z: z.reshape(3, 8).softmax(1).reshape(6, 4),
    "random": lambda s, z: z + torch.rand(4),
    "random, like": lambda s, z: z + torch.rand_like(z),
    "dropout": lambda s, z: F.dropout(z, 0.5, True),
    "cumsum": lambda s, z: z.cumsum(0),
    "sort": lambda s, z: z.sort(0)[0],
    "index_copy": lambda s, z: z.clone().index_copy_(0, torch.tensor([0]), z[1:2]),
    "written into a constant": lambda s, z: torch.zeros(6, 4).copy_(z).mean(0) + z,
    "written into a row": lambda s, z: written(z) + z,
    "BatchNorm": lambda s, z: F.batch_norm(z, None, None, training=True),
    "std": lambda s, z: z / z.std(),
    "norm": lambda s, z: z / z.norm(),
    "einsum": lambda s, z: torch.einsum("ij,kj->ik", z, z),
    "cat": lambda s, z: torch.cat([z[3:], z[:3]], 0),
    "stack": lambda s, z: torch.stack([z, z]).mean(1)[0] + z,
    "unfold": lambda s, z: z.unfold(0, 2, 1).sum() + z,
    "as_strided": lambda s, z: z.as_strided((6, 4), (0, 1)),
    "as_strided in place": lambda s, z: z.clone().as_strided_((6, 4), (1, 6)),
    "attention": lambda s, z: F.scaled_dot_product_attention(z[None, None], z[None, None], z[None, None])[0, 0],
    "where": lambda s, z: torch.where(torch.arange(6)[:, None] > 2, z, 0 * z),
    "LayerNorm": lambda s, z: F.layer_norm(z, (6, 4)),
    "convolution": lambda s, z: F.conv1d(z.T[None], torch.ones(4, 4, 3), padding=1)[0].T,
    "pooling": lambda s, z: F.avg_pool2d(z[None], 3, 1, 1)[0],
    "storage": lambda s, z: z + z.untyped_storage().nbytes(),
    "expanded": lambda s, z: z[:1].expand(6, 4) + z,
    "padding": lambda s, z: F.pad(z, (0, 0, 1, 0))[:6],
    "bmm": lambda s, z: torch.bmm(z[None], z.T[None])[0] @ z,
    "baddbmm": lambda s, z: torch.baddbmm(
        torch.ones(6, 4, 4) * torch.arange(6.0)[:, None, None], z[:, :, None], z[:, None]
    ),
    "addmm": lambda s, z: torch.addmm(torch.arange(24.0).reshape(6, 4), z, torch.eye(4)),
    "weight": lambda s, z: F.linear(z, z),
    "table": lambda s, z: F.embedding((z > 0).long(), z).sum(1),
    "group": lambda s, z: F.group_norm(z.reshape(3, 2, 4), 1).reshape(6, 4),
}
APART = {
    "mean": lambda s, z: z - z.mean(1, keepdim=True),
    "softmax": lambda s, z: z.softmax(1) * z.norm(dim=1, keepdim=True),
    "bmm": lambda s, z: torch.bmm(z[:, :, None], z[:, None, :]).flatten(1),
    "einsum": lambda s, z: torch.einsum("ij,ik->ijk", z, z).flatten(1),
    "merged": lambda s, z: (z.reshape(24, 1) * torch.ones(1, 3)).reshape(6, 12),
    "in place": lambda s, z: z.clone().mul_(2).relu_(),
    "transposed": lambda s, z: (s.layer.weight @ z.T).T,
    "stack": lambda s, z: torch.stack([z, 2 * z], 1).flatten(1),
    "split": lambda s, z: torch.cat(z.split(2, 1)[::-1], 1),
    "chunk": lambda s, z: torch.cat([a * b for a, b in zip(z.chunk(2, 1), z.chunk(2, 1), strict=True)], 1),
    "unbind": lambda s, z: torch.stack(z.unbind(1)[::-1], 1),
    "max": lambda s, z: z.max(1)[0][:, None] + z,
    "permute": lambda s, z: z.reshape(6, 2, 2).permute(1, 2, 0).permute(2, 0, 1).reshape(6, 4),
    "where": lambda s, z: torch.where(z > 0, z, 0 * z),
    "token of a class": lambda s, z: torch.cat([s.layer.bias.expand(6, -1), z], 1),
    "roll": lambda s, z: z.roll(1, 1).flip(-1),
    "positions": lambda s, z: z + F.embedding(torch.arange(4).expand(6, -1), s.layer.weight).sum(2),
}
NETWORKS = {
    "resnet": (lambda: torchvision.models.resnet18(), torch.randn(4, 3, 32, 32)),
    "resnet, channels last": (
        lambda: torchvision.models.resnet18(),
        torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last),
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64), torch.randn(4, 3, 32, 32)),
    "convnext": (lambda: torchvision.models.convnext_tiny(), torch.randn(2, 3, 32, 32)),
    "gpt": (lambda: GPT(50, 16, width=32, depth=2, heads=4), torch.arange(48).reshape(3, 16)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_forward_that_may_couple_samples_is_not_proven(name):
    proof = proof_of(Then(COUPLED[name]), torch.randn(6, 4))
    assert not proof.holds
    assert proof.why


@pytest.mark.parametrize("name", APART)
def test_a_forward_of_known_operators_is_proven(name):
    proof = proof_of(Then(APART[name]), torch.randn(6, 4))
    assert (proof.holds, proof.why) == (True, "")


@pytest.mark.parametrize("name", NETWORKS)
def test_ordinary_networks_are_proven(name):
    make, x = NETWORKS[name]
    assert proof_of(make(), x).holds


def test_a_tensor_from_elsewhere_proves_nothing():
    assert not proof_of(Then(lambda s, z: z + s.attribute), torch.randn(6, 4)).holds


STEPS = [
    lambda z: z.relu(),
    lambda z: z * z.sum(-1, keepdim=True),
    lambda z: z.transpose(0, 1),
    lambda z: z.transpose(-1, -2),
    lambda z: z.reshape(z.shape[1], z.shape[0], *z.shape[2:]),
    lambda z: z.permute(2, 0, 1),
    lambda z: z.flatten(0, 1)[None].reshape(z.shape),
    lambda z: z.softmax(0),
    lambda z: z.cumsum(1),
    lambda z: z.flip(2),
    lambda z: z @ torch.ones(z.shape[-1], z.shape[-1]).tril(),
    lambda z: torch.bmm(z, z.transpose(1, 2)) @ z,
    lambda z: z + z.mean(1, keepdim=True).expand_as(z),
    lambda z: z + torch.arange(float(z.shape[0]))[:, None, None],
    lambda z: torch.cat([z[:, :1], z[:, 1:]], 1),
    lambda z: torch.stack([z, 2 * z], 2).sum(2),
    lambda z: z.reshape(-1, z.shape[-1]).mm(torch.ones(z.shape[-1], z.shape[-1])).reshape(z.shape),
]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_proven_is_true_of_random_programs(seed):
    """Another sample than one that was changed has the same outputs, and the samples in another order have theirs in that order."""
    drawn, proven = random.Random(seed), 0
    for _ in range(60):
        steps = drawn.choices(STEPS, k=drawn.randint(1, 6))
        size = drawn.choice([(4, 4, 4), (3, 3, 5), (4, 2, 2), (2, 3, 4)])

        class Program(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(()))

            def forward(self, x, steps=steps):
                for step in steps:
                    x = step(x)
                return self.weight * x

        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(size, generator=generator, dtype=torch.float64)
        module = StatelessModule(Program().double())
        try:
            whole = module.outputs({}, x)
        except (RuntimeError, ValueError):  # these steps do not fit together
            continue
        proof = OwnSamples(module)
        assert torch.equal(proof.outputs(x), whole)
        if not proof.holds:
            continue
        proven += 1
        changed = x.clone()
        changed[0] += 1
        assert torch.allclose(module.outputs({}, changed)[1:], whole[1:], rtol=1e-12)
        assert torch.allclose(module.outputs({}, x.flip(0)), whole.flip(0), rtol=1e-12)
    assert proven >= 5


def test_a_kernel_takes_one_forward_of_all_samples_for_the_comparison(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(9, 4)
    seen = []
    monkeypatch.setattr(coupling, "change_alone", lambda *given: seen.append(given) or 0.0)
    plain = ntk_gram(model, x)
    assert not seen
    assert plain.matrix.shape == (9, 9)
    ntk_gram(Then(lambda s, z: z + s.attribute), x)
    assert len(seen) == 1


def test_batches_of_one_two_and_three_are_still_compared():
    """A forward that asks for the number of its samples is proven of each batch, and refused."""
    model = Then(lambda s, z: z / len(z))
    assert proof_of(model, torch.randn(6, 4)).holds
    with pytest.raises(ValueError, match="samples couple"):
        ntk_gram(model, torch.randn(6, 4))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.shape[0] > 0, torch.sin, torch.cos, (self.layer(x),))


def test_an_operator_that_takes_functions_is_run_as_it_is():
    model, x = Branches(), torch.randn(6, 4)
    assert ntk_gram(model, x).matrix.shape == (6, 6)
    proof_of(model, x)
