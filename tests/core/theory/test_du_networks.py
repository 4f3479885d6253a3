"""The networks of Du et al. are their formulas, and their last hidden kernel is G^(H) by autograd and in the limit."""

import math

import pytest
import torch
from torch import nn

from lightning_conv import c_sigma, convolutional_limit, fully_connected_limit, h_infinity, ntk_gram, residual_limit
from lightning_conv.networks.analytic import softplus
from lightning_conv.theory import DuConvResNet, DuFC, DuResNet, DuTwoLayer
from lightning_conv.theory.papers.du import hadamard_gram, last_hidden_gram

SOFTPLUS = softplus(1.0)


@pytest.fixture(autouse=True)
def _no_gradients_but_where_asked():
    """Formulas are compared by their values."""
    with torch.no_grad():
        yield


def samples(n=5, d=4, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def images(n=4, channels=2, size=(3, 4)):
    x = torch.randn(n, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x / x.flatten(1).norm(dim=1)[:, None, None, None]


def deep(kind, width=7, depth=3, seed=0, **settings):
    if kind == "conv":
        return DuConvResNet(2, (3, 4), width, depth, seed=seed, **settings), images()
    return {"fc": DuFC, "resnet": DuResNet}[kind](4, width, depth, seed=seed, **settings), samples()


def test_the_fully_connected_network_is_equation_2():
    network, x = deep("fc")
    w = [layer.weight for layer in network.hidden]
    scale = math.sqrt(c_sigma(SOFTPLUS) / 7)
    for i in range(len(x)):
        h = x[i]
        for matrix in w:
            h = scale * torch.log1p(torch.exp(matrix @ h))
        assert float(network(x)[i]) == pytest.approx(float(network.output.weight[0] @ h), rel=1e-12)


def test_the_residual_network_is_equation_3():
    network, x = deep("resnet", c_res=0.7)
    w = [layer.weight for layer in network.hidden]
    for i in range(len(x)):
        h = math.sqrt(c_sigma(SOFTPLUS) / 7) * torch.log1p(torch.exp(w[0] @ x[i]))
        for matrix in w[1:]:
            h = h + 0.7 / (3 * math.sqrt(7)) * torch.log1p(torch.exp(matrix @ h))
        assert float(network(x)[i]) == pytest.approx(float(network.output.weight[0] @ h), rel=1e-12)


def test_the_convolutional_network_is_section_3_3_position_by_position():
    network, x = deep("conv", c_res=0.7)
    m, (height, width) = 7, (3, 4)
    a = network.output.weight.view(m, height, width)
    for image, u in zip(x, network(x), strict=True):
        state = image
        for h, layer in enumerate(network.hidden, start=1):
            new = torch.zeros(m, height, width, dtype=torch.float64)
            for r in range(height):
                for c in range(width):
                    z = torch.zeros(m, dtype=torch.float64)
                    for dr in range(3):
                        for dc in range(3):
                            if 0 <= r + dr - 1 < height and 0 <= c + dc - 1 < width:
                                z = z + layer.weight[:, :, dr, dc] @ state[:, r + dr - 1, c + dc - 1]
                    new[:, r, c] = torch.log1p(torch.exp(z))
            state = math.sqrt(c_sigma(SOFTPLUS) / m) * new if h == 1 else state + 0.7 / (3 * math.sqrt(m)) * new
        assert float(u) == pytest.approx(float((a * state).sum()), rel=1e-12)


def test_the_two_layer_network_is_its_formula_and_trains_only_what_the_theorem_trains():
    network, x = DuTwoLayer(4, 30, seed=3), samples()
    w, a = network.hidden.weight, network.output.weight[0]
    assert set(a.tolist()) == {-1.0, 1.0}
    for i in range(len(x)):
        u = sum(float(a[r]) * max(float(w[r] @ x[i]), 0.0) for r in range(30)) / math.sqrt(30)
        assert float(network(x)[i]) == pytest.approx(u, rel=1e-12)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["hidden.weight"]
    assert all(p.requires_grad for p in DuTwoLayer(4, 30, train_output=True).parameters())
    small = DuTwoLayer(4, 30, seed=3, kappa=0.1)
    assert torch.allclose(small(x), network(x) / 10, rtol=1e-12)


@pytest.mark.parametrize("kind", ["fc", "resnet", "conv"])
def test_weights_are_standard_normal_and_torchs_random_numbers_stay_where_they_are(kind):
    before = torch.get_rng_state()
    network, _ = deep(kind, width=60, depth=2)
    assert torch.equal(torch.get_rng_state(), before)
    for weight in network.parameters():
        n = weight.numel()
        assert abs(float(weight.mean())) < 4.5 / math.sqrt(n)
        assert abs(float(weight.square().mean()) - 1) < 4.5 * math.sqrt(2 / n)
    same, other, single = deep(kind, 60, 2)[0], deep(kind, 60, 2, seed=1)[0], deep(kind, 60, 2, dtype=torch.float32)[0]
    for one, two, three, four in zip(*(each.parameters() for each in (network, same, other, single)), strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
        assert torch.equal(one.float(), four)


def test_the_hadamard_formula_is_a_double_loop_over_outer_products():
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 3), (4, 2, 3)):
        inputs = torch.randn(*shape, generator=generator, dtype=torch.float64)
        cotangents = torch.randn(*shape[:-1], 5, generator=generator, dtype=torch.float64)
        a, b = (t.reshape(4, -1, t.shape[-1]) for t in (inputs, cotangents))
        gradients = [sum(torch.outer(b[i, s], a[i, s]) for s in range(a.shape[1])) for i in range(4)]
        found = hadamard_gram(inputs, cotangents)
        for i in range(4):
            for j in range(4):
                assert float(found[i, j]) == pytest.approx(float((gradients[i] * gradients[j]).sum()), rel=1e-11)
        assert torch.equal(found, found.T)
    with pytest.raises(ValueError, match=r"cotangents: shape \(4, 2\)"):
        hadamard_gram(torch.ones(3, 2), torch.ones(4, 2))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fc", "resnet", "conv"])
def test_the_last_hidden_kernel_is_autograds(kind, depth, naive_gram):
    network, x = deep(kind, depth=depth)
    found = last_hidden_gram(network, x)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name == f"hidden.{depth - 1}.weight")
    with torch.enable_grad():
        assert torch.allclose(found, naive_gram(network, x), rtol=1e-11)
    assert torch.allclose(found, ntk_gram(network, x, precision="certified").matrix, rtol=1e-11)


def test_the_two_layer_kernel_is_h_of_t_by_its_definition(naive_gram):
    network, x = DuTwoLayer(4, 50), samples()
    w, n = network.hidden.weight.detach(), len(x)
    h = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            both = sum(float(w[r] @ x[i]) >= 0 and float(w[r] @ x[j]) >= 0 for r in range(50))
            h[i, j] = float(x[i] @ x[j]) * both / 50
    assert torch.allclose(last_hidden_gram(network, x), h, rtol=1e-12)
    with torch.enable_grad():
        assert torch.allclose(last_hidden_gram(network, x), naive_gram(network, x), rtol=1e-12)


def test_a_float32_network_has_the_float64_kernel_of_its_weights():
    network, x = deep("resnet", dtype=torch.float32)
    exact = last_hidden_gram(network, x)
    assert exact.dtype == torch.float64
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert torch.equal(exact, last_hidden_gram(network.double(), x))


LIMITS = {"fc": fully_connected_limit, "resnet": residual_limit, "conv": convolutional_limit}


@pytest.mark.parametrize(("kind", "depth"), [("fc", 2), ("fc", 3), ("resnet", 3), ("conv", 2), ("conv", 3)])
def test_finite_widths_have_the_limit_kernel_as_their_mean(kind, depth):
    """Mean over draws against K^(H): within five standard errors of the trace and of the sum of all entries."""
    draws = []
    for seed in range(40):
        network, x = deep(kind, width=192, depth=depth, seed=seed)
        draws.append(last_hidden_gram(network, x))
    stacked = torch.stack(draws)
    limit = LIMITS[kind](x, depth, SOFTPLUS).matrix
    for number in (lambda k: k.diagonal(dim1=-2, dim2=-1).sum(-1), lambda k: k.sum((-1, -2))):
        values = number(stacked)
        error = float(values.std()) / math.sqrt(40)
        assert abs(float(values.mean() - number(limit))) < 5 * error
        assert error < 0.05 * float(number(limit))


def test_the_two_layer_kernel_tends_to_h_infinity():
    x = samples()
    gaps = [
        sum(float((last_hidden_gram(DuTwoLayer(4, m, seed=s), x) - h_infinity(x)).norm()) for s in range(5)) / 5
        for m in (100, 10_000)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.4)


def test_the_classes_train_with_the_library_as_any_module_does():
    network, x = deep("resnet", width=64)
    targets = torch.linspace(-1, 1, 5, dtype=torch.float64)
    loss_fn = nn.MSELoss()
    before = float(loss_fn(network(x), targets).detach())
    for _ in range(20):
        network.zero_grad()
        with torch.enable_grad():
            loss = loss_fn(network(x), targets)
            loss.backward()
        for p in network.parameters():
            p -= 0.1 * p.grad
    assert float(loss.detach()) < 0.5 * before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DuFC(4, 8, 0), "depth: 0"),
        (lambda: DuResNet(4, 8, 2, c_res=0.0), r"c_res: 0\.0"),
        (lambda: DuConvResNet(1, (4, 4), 8, 2, kernel_size=4), "kernel_size: 4"),
        (lambda: DuTwoLayer(4, 8, kappa=0.0), r"kappa: 0\.0"),
    ],
)
def test_what_the_papers_do_not_define_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
