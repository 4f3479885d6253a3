"""K^(H) against neural-tangents' analytic kernels, in float64; skipped where `make bench-peers` has not made its environment.

Fully connected networks only. A residual network of Du et al. adds c_res / (H sqrt m) sigma(W x) to x, with no linear layer behind
sigma: the branch is no Gaussian, and its mean (the b_i of the recursion) does not vanish. neural-tangents' `FanInSum` refuses
branches that are not mean-zero Gaussians, since a `Kernel` carries no means; with a linear layer behind sigma it takes them, but
that is another network, whose kernel has no cross terms between the branch and the skip. `lightning-conv lab du` holds these
kernels against finite networks instead.
"""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_conv import c_sigma, fully_connected_limit
from lightning_conv.networks.analytic import softplus

# Between two dense layers of variance c_sigma the tangent kernel is nngp + c_sigma theta E[sigma' sigma'], and nngp before the
# activation is K^(H-1): so both factors of K^(H) come from two kernels of neural-tangents, one with another layer on top.
ANALYTIC = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import neural_tangents.stax as stax
import numpy as np

data = np.load(sys.argv[1] + "/inputs.npz")
x = jnp.asarray(data["inputs"])
activations = {
    "relu": lambda: stax.Relu(),
    "erf": lambda: stax.Erf(),
    "softplus": lambda: stax.ElementwiseNumerical(jax.nn.softplus, deg=120),
}


def dense(variance):
    return stax.Dense(1, W_std=float(np.sqrt(variance)), b_std=None)


for name, activation in activations.items():
    constant = float(data[name])
    for depth in (1, 2, 3, 4):
        layers = [dense(x.shape[1])] + [layer for _ in range(depth - 1) for layer in (activation(), dense(constant))]
        below = stax.serial(*layers)[2](x, None, ("nngp", "ntk"))
        above = stax.serial(*layers, activation(), dense(constant))[2](x, None, ("nngp", "ntk"))
        kernel = below.nngp * (above.ntk - above.nngp) / below.ntk
        np.savez(f"{sys.argv[1]}/{name}-{depth}.npz", kernel=np.asarray(kernel), covariance=np.asarray(below.nngp))
"""

RESIDUAL = """
import jax.numpy as jnp
import neural_tangents.stax as stax

branch = stax.serial(stax.Dense(8), stax.Erf())
network = stax.serial(stax.Dense(8), stax.Erf(), stax.FanOut(2), stax.parallel(stax.Identity(), branch), stax.FanInSum())
try:
    network[2](jnp.eye(3), None, "nngp")
except NotImplementedError as error:
    print(error)
"""

ACTIVATIONS = {"relu": nn.ReLU(), "erf": torch.erf, "softplus": softplus(1.0)}


def samples():
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x / x.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [1.0], [0.7], [1.3], [1.0]])


@pytest.fixture(scope="module")
def neural_tangents(tmp_path_factory, neural_tangents_says):
    """K^(H) and K^(H-1) of neural-tangents: (activation, depth) -> two (n, n)."""
    folder = tmp_path_factory.mktemp("neural-tangents")
    constants = {name: c_sigma(activation) for name, activation in ACTIVATIONS.items()}
    np.savez(folder / "inputs.npz", inputs=samples().numpy(), **constants)
    neural_tangents_says(ANALYTIC, folder)

    def read(name, depth):
        with np.load(folder / f"{name}-{depth}.npz") as file:
            return torch.from_numpy(file["kernel"]), torch.from_numpy(file["covariance"])

    return read


def test_neural_tangents_refuses_the_papers_residual_branch(tmp_path, neural_tangents_says):
    """Why the residual kernels are not compared: the sum of a skip and sigma(W x) is refused, for lack of the branch's mean."""
    assert "mean-zero Gaussian" in neural_tangents_says(RESIDUAL, tmp_path)


# relu: neural-tangents' arc cosine is off by some 1e-9 on the diagonal.
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "tolerance"), [("relu", 1e-8), ("erf", 1e-10), ("softplus", 1e-6)])
def test_neural_tangents_has_the_same_limit_kernel(name, tolerance, depth, neural_tangents):
    kernel, covariance = neural_tangents(name, depth)
    found = fully_connected_limit(samples(), depth, ACTIVATIONS[name])
    assert torch.linalg.matrix_norm(found.covariances[-1] - covariance) <= tolerance * torch.linalg.matrix_norm(
        covariance
    )
    assert torch.linalg.matrix_norm(found.matrix - kernel) <= tolerance * torch.linalg.matrix_norm(kernel)
