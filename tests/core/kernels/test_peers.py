"""``ntk_gram`` against other libraries, in float64. Each test is skipped where its library is not (`make bench-peers`).

Those on PyTorch run in an environment that has them (``.peers/torch/bin/python -m pytest tests/core/kernels/test_peers.py``);
neural-tangents lives in one without torch and is asked through a process.
"""

import numpy as np
import pytest
import torch
from dense_kernels import reduced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv import ntk_gram

# Weights and inputs come as PyTorch has them; the kernels go back as (n C, n C). Its imports take seconds, hence one call.
NEURAL_TANGENTS = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np


def mlp(p, x):
    x = jax.nn.softplus(x @ p["0.weight"].T + p["0.bias"])
    x = jnp.tanh(x @ p["2.weight"].T + p["2.bias"])
    return x @ p["4.weight"].T + p["4.bias"]


def conv(p, name, x, stride, pad):
    x = jax.lax.conv_general_dilated(
        x, p[name + ".weight"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return x + p[name + ".bias"][:, None, None]


def cnn(p, x):
    x = jax.nn.softplus(conv(p, "0", x, 1, 1))
    x = jnp.tanh(conv(p, "2", x, 2, 0))
    return x.reshape(len(x), -1) @ p["5.weight"].T + p["5.bias"]


for kind, network in {"mlp": mlp, "cnn": cnn}.items():
    p = {name: jnp.asarray(value) for name, value in np.load(f"{sys.argv[1]}/{kind}.npz").items()}
    inputs = p.pop("inputs")
    for implementation in (1, 3):
        ntk = nt.empirical_ntk_fn(network, trace_axes=(), implementation=implementation)
        kernel = np.asarray(jax.jit(ntk)(inputs, None, p))
        size = kernel.shape[0] * kernel.shape[2]
        np.save(f"{sys.argv[1]}/{kind}-{implementation}.npy", kernel.transpose(0, 2, 1, 3).reshape(size, size))
"""


def softplus():
    # jax has no threshold above which softplus is linear; here it lies where float64 does not see it.
    return nn.Softplus(threshold=40.0)


def mlp():
    return nn.Sequential(nn.Linear(6, 9), softplus(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def cnn():
    layers = [nn.Conv2d(2, 4, 3, padding=1), softplus(), nn.Conv2d(4, 3, 3, stride=2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(27, 2)).double()


def build(kind):
    """A network and five inputs."""
    torch.manual_seed(0)
    model, shape = {"mlp": (mlp, (5, 6)), "cnn": (cnn, (5, 2, 7, 7))}[kind]
    return model(), torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=["mlp", "cnn"])
def case(request):
    return build(request.param)


@pytest.fixture(scope="module")
def neural_tangents(tmp_path_factory, neural_tangents_says):
    """Kernels of neural-tangents: (kind, implementation) -> (n C, n C)."""
    folder = tmp_path_factory.mktemp("neural-tangents")
    for kind in ("mlp", "cnn"):
        model, inputs = build(kind)
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        np.savez(folder / f"{kind}.npz", inputs=inputs.numpy(), **state)
    neural_tangents_says(NEURAL_TANGENTS, folder)
    return lambda kind, implementation: torch.as_tensor(np.load(folder / f"{kind}-{implementation}.npy"))


@pytest.fixture
def double_by_default():
    """Some libraries make buffers of the default type inside a float64 computation."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def assert_same_kernel(full, model, inputs, precision="certified"):
    """`full`, (n C, n C), is the full kernel, and its blocks give the trace kernel and that of the summed output."""
    for outputs in ("full", "trace", "sum"):
        matrix = reduced(full, len(inputs), outputs)
        found = ntk_gram(model, inputs, outputs=outputs, precision=precision).matrix
        assert found.shape == matrix.shape, outputs
        assert torch.linalg.matrix_norm(found - matrix) <= 1e-10 * torch.linalg.matrix_norm(matrix), outputs


@pytest.mark.usefixtures("double_by_default")
def test_nngeometry_has_the_same_gram_matrix(case):
    gram = pytest.importorskip("nngeometry.gram", reason="nngeometry is not installed here")
    model, inputs = case
    loader = DataLoader(TensorDataset(inputs.clone()), batch_size=len(inputs))
    blocks = gram.GramMatrix(model, loader).data.detach()  # (C, n, C, n)
    size = blocks.shape[0] * blocks.shape[1]
    assert_same_kernel(blocks.permute(1, 0, 3, 2).reshape(size, size), model, inputs)


@pytest.mark.usefixtures("double_by_default")
def test_curvlinops_jacobians_multiply_to_the_same_kernel(case):
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed here")
    model, inputs = case
    parameters = list(model.parameters())
    data = [(inputs, model(inputs).detach())]
    jacobian = curvlinops.JacobianLinearOperator(model, parameters, data)
    transposed = curvlinops.TransposedJacobianLinearOperator(model, parameters, data)
    size = data[0][1].numel()
    full = jacobian @ (transposed @ torch.eye(size, dtype=torch.float64))
    assert_same_kernel(full.detach(), model, inputs)


@pytest.mark.usefixtures("double_by_default")
def test_curvlinops_generalized_gauss_newton_has_the_eigenvalues_of_the_kernel(case):
    """For S = 1/2 sum |u - y|^2 the Hessian by u is the identity, so J^T J and J J^T share their eigenvalues."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed here")
    model, inputs = case
    targets = torch.zeros_like(model(inputs).detach())
    # MSELoss(reduction="sum") is twice S.
    loss = nn.MSELoss(reduction="sum")
    ggn = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(inputs, targets)])
    matrix = ggn @ torch.eye(ggn.shape[1], dtype=torch.float64) / 2
    found = torch.linalg.eigvalsh(ntk_gram(model, inputs, outputs="full", precision="certified").matrix)
    expected = torch.linalg.eigvalsh((matrix + matrix.T).detach() / 2)[-len(found) :]
    assert (found - expected).abs().max() <= 1e-10 * expected.max()


@pytest.mark.parametrize("implementation", [1, 3], ids=["jacobian-contraction", "structured-derivatives"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_neural_tangents_has_the_same_empirical_kernel(kind, implementation, neural_tangents):
    assert_same_kernel(neural_tangents(kind, implementation), *build(kind))
