"""Noise, freezing, fingerprints and the infimum of a loss."""

import inspect
import math

import pytest
import torch
from torch import nn

from lightning_conv import certify_expressivity
from lightning_conv.networks.perturbation import fingerprint, freeze, perturb

DENSE_OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in {"Optimizer", "SparseAdam", "LBFGS"}
)


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 0.3])
def test_noise_has_the_stated_size_relative_to_each_tensor(scale):
    tensors = {
        "small": 1e-4 * torch.randn(200, 200),
        "large": 50 + torch.zeros(40_000),
        "matrix": torch.randn(100, 400),
    }
    before = {name: tensor.clone().double() for name, tensor in tensors.items()}
    perturb(tensors, scale, seed=1)
    for name, tensor in tensors.items():
        noise = tensor.double() - before[name]
        rms = float(before[name].square().mean().sqrt())
        # The standard deviation of 40,000 samples errs by 1 / sqrt(80,000) = 0.35 %, the mean by 0.5 % of it.
        assert float(noise.std()) == pytest.approx(scale * rms, rel=0.02)
        assert abs(float(noise.mean())) < 0.025 * scale * rms
        # Gaussian: kurtosis 3, and as many beyond two sigma as there should be.
        standard = noise / noise.std()
        assert float(standard.pow(4).mean()) == pytest.approx(3, abs=0.2)
        assert float((standard.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.005)


def test_noise_is_independent_between_tensors():
    tensors = {name: torch.ones(40_000, dtype=torch.float64) for name in "ab"}
    perturb(tensors, 1.0, seed=0)
    correlation = torch.corrcoef(torch.stack([tensors["a"], tensors["b"]]))[0, 1]
    assert abs(float(correlation)) < 0.025


def test_noise_depends_on_the_seed_alone():
    results = []
    for seed, ambient in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(ambient)
        tensors = {"w": torch.ones(50)}
        perturb(tensors, 0.1, seed)
        results.append(tensors["w"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_noise_does_not_consume_the_global_random_numbers():
    before = torch.get_rng_state()
    perturb({"w": torch.ones(50)}, 0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_covers_tensors_of_zeros():
    tensors = {"bias": torch.zeros(40_000), "weight": torch.full((40_000,), 2.0)}
    perturb(tensors, 0.1, seed=0)
    overall = math.sqrt((0 + 4) / 2)
    assert float(tensors["bias"].std()) == pytest.approx(0.1 * overall, rel=0.02)
    alone = {"bias": torch.zeros(40_000)}
    assert perturb(alone, 0.1, seed=0).relative == math.inf
    assert float(alone["bias"].std()) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("size", [1e-30, 1e-170, 1e-310])
def test_noise_covers_tensors_that_are_nearly_zero_beside_the_others(size):
    tensors = {"dead": torch.full((40_000,), size, dtype=torch.float64), "weight": torch.full((40_000,), 2.0).double()}
    perturb(tensors, 0.1, seed=0)
    assert float(tensors["dead"].std()) == pytest.approx(0.1 * math.sqrt(2), rel=0.02)


@pytest.mark.parametrize("size", [1e-310, 1e-170, 1e160, 1e300])
def test_noise_is_relative_at_every_scale(size):
    tensors = {"w": torch.full((40_000,), size, dtype=torch.float64)}
    report = perturb(tensors, 0.1, seed=0)
    assert float((tensors["w"] / size - 1).std()) == pytest.approx(0.1, rel=0.02)
    assert report.relative == pytest.approx(0.1, rel=0.02)


def test_a_layer_of_zeros_separates_inputs_again():
    """A trunk whose first layer is zero gives all inputs the same features; noise in every coordinate repairs it."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh()).double()
    for parameter in trunk[0].parameters():
        nn.init.zeros_(parameter)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    before = certify_expressivity(trunk(inputs).detach(), same_inputs=lambda i, j: False)
    assert before.verdict == "refuted"
    assert before.at_these_weights
    perturb(dict(trunk.named_parameters()), 1e-2, seed=0)
    assert certify_expressivity(trunk(inputs).detach()).verdict == "certified"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reported_norm_is_what_was_really_added(dtype):
    tensors = {
        "a": torch.randn(30, 7).to(dtype),
        "b": torch.zeros(5, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    before = torch.cat([t.clone().double().flatten() for t in tensors.values()])
    report = perturb(tensors, 0.05, seed=0)
    after = torch.cat([t.double().flatten() for t in tensors.values()])
    norm = float((after - before).norm())
    assert norm > 0
    assert report.norm == pytest.approx(norm, rel=1e-12)
    assert report.relative == pytest.approx(norm / float(before.norm()), rel=1e-12)
    assert report.tensors == 3


def test_parameters_that_require_grad_stay_leaves():
    layer = nn.Linear(3, 2)
    perturb(dict(layer.named_parameters()), 0.1, seed=0)
    assert all(p.is_leaf and p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("scale", [0.0, -0.1, math.nan])
def test_noise_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="noise_scale: "):
        perturb({"w": torch.ones(3)}, scale, seed=0)


# --- freezing -------------------------------------------------------------------------------------------------------


def options(kind):
    """Every option by which an optimizer moves a parameter without a gradient."""
    accepted = inspect.signature(kind).parameters
    chosen = {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.01}
    return {name: value for name, value in chosen.items() if name in accepted}


def network():
    # No biases: Muon takes matrices only.
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False))


def step(model, optimizer, inputs, targets):
    optimizer.zero_grad(set_to_none=False)  # gradients that are left behind stay there, as zeros
    (model(inputs) - targets).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_frozen_parameters_stay_bit_for_bit_under(name):
    kind = getattr(torch.optim, name)
    model, inputs, targets = network(), torch.randn(8, 4), torch.randn(8, 2)
    optimizer = kind(model.parameters(), **options(kind))
    start = model[0].weight.detach().clone()
    for _ in range(3):  # momentum builds up
        step(model, optimizer, inputs, targets)
    assert not torch.equal(model[0].weight, start)
    freeze(model[0].parameters())
    trunk, head = (fingerprint({"w": model[k].weight}) for k in (0, 2))
    for _ in range(5):
        step(model, optimizer, inputs, targets)
    assert fingerprint({"w": model[0].weight}) == trunk
    assert fingerprint({"w": model[2].weight}) != head
    assert model[0].weight.grad is None


def test_frozen_parameters_stay_under_lbfgs_when_its_history_is_cleared():
    model, inputs, targets = network(), torch.randn(8, 4), torch.randn(8, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    freeze(model[0].parameters())
    optimizer.state.clear()
    trunk, head = (fingerprint({"w": model[k].weight}) for k in (0, 2))
    for _ in range(3):
        optimizer.step(closure)
    assert fingerprint({"w": model[0].weight}) == trunk
    assert fingerprint({"w": model[2].weight}) != head


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_zero_gradient_would_not_freeze(name):
    # The reason why freeze removes the gradient: the same optimizers move a weight whose gradient is zero.
    kind = getattr(torch.optim, name)
    model, inputs, targets = network(), torch.randn(8, 4), torch.randn(8, 2)
    optimizer = kind(model.parameters(), **options(kind))
    for _ in range(3):
        step(model, optimizer, inputs, targets)
    before = model[0].weight.detach().clone()
    model[0].weight.grad.zero_()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_freezing_saves_the_backward_pass_of_the_trunk():
    model = network()
    freeze(model[0].parameters())
    output = model(torch.randn(3, 4))
    assert output.grad_fn is not None
    assert not model[:2](torch.randn(3, 4)).requires_grad


# --- fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_fingerprint_changes_with_a_single_bit(dtype):
    tensor = torch.ones(5, 3).to(dtype)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    before = fingerprint({"a": torch.zeros(2), "w": tensor})
    assert fingerprint({"a": torch.zeros(2), "w": tensor.clone()}) == before
    for index in (0, 7, 14):
        changed = tensor.clone()
        changed.view(integers).flatten()[index] ^= 1
        assert fingerprint({"a": torch.zeros(2), "w": changed}) != before


def test_fingerprint_tells_zero_from_minus_zero_and_names_apart():
    zero = torch.zeros(3)
    assert fingerprint({"w": zero}) != fingerprint({"w": -zero})
    assert fingerprint({"w": zero}) != fingerprint({"v": zero})


def test_fingerprint_sees_values_not_memory_layout():
    matrix = torch.randn(4, 6)
    assert fingerprint({"w": matrix.T}) == fingerprint({"w": matrix.T.contiguous()})
    assert fingerprint({"w": torch.tensor(1.5)}) == fingerprint({"w": nn.Parameter(torch.tensor(1.5))})
