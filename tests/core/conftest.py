"""The independent computations that the core's numbers are compared with: slow, naive, in float64 or beyond."""

import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from dense_kernels import naive_gram, naive_jacobian
from scipy.linalg import hadamard
from torch import Tensor


def exact_eigenvalues(matrix, digits=50):
    """Ascending eigenvalues of a float64 matrix as it is stored, to ``digits`` digits."""
    with mpmath.workdps(digits):
        values = mpmath.eigsy(mpmath.matrix(matrix.tolist()), eigvals_only=True)
        return sorted(values)


def exact_singular_values(matrix, digits=50):
    """Descending singular values of a float64 matrix as it is stored."""
    with mpmath.workdps(digits):
        return sorted(mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False), reverse=True)


def snapshot(model):
    """Everything that evaluating a model could leave behind, in a form that compares bit for bit."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return {
        "state": {name: value.clone().numpy().tobytes() for name, value in model.state_dict().items()},
        "storage": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "grad": {n: None if p.grad is None else p.grad.numpy().tobytes() for n, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: [list(getattr(m, kind)) for kind in hooks] for n, m in model.named_modules()},
        "torch_rng": torch.get_rng_state().numpy().tobytes(),
        "python_rng": random.getstate(),
        "numpy_rng": str(np.random.get_state()),  # noqa: NPY002  the global state is the point
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "grad_mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "matmul": [backend.fp32_precision for backend in backends],
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "attention": (
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
    }


@pytest.fixture(scope="session", name="naive_gram")
def naive_gram_fixture():
    return naive_gram


@pytest.fixture(scope="session", name="naive_jacobian")
def naive_jacobian_fixture():
    return naive_jacobian


@pytest.fixture(scope="session", name="exact_eigenvalues")
def exact_eigenvalues_fixture():
    return exact_eigenvalues


@pytest.fixture(scope="session", name="exact_singular_values")
def exact_singular_values_fixture():
    return exact_singular_values


@pytest.fixture(scope="session", name="snapshot")
def snapshot_fixture():
    return snapshot


@pytest.fixture(scope="session")
def neural_tangents_says():
    """What a script prints in neural-tangents' environment, which is one without torch; a test is skipped where there is none."""
    jax = (
        Path(__file__).parents[2]
        / ".peers"
        / "jax"
        / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    )

    def run(script, folder):
        if not jax.exists():
            pytest.skip("there is no .peers/jax with neural-tangents; `make bench-peers` makes it")
        command = [str(jax), "-c", script, str(folder)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if "No module named" in result.stderr:
            pytest.skip(f"neural-tangents is not in .peers/jax: {result.stderr.splitlines()[-1]}")
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="session")
def leaves_no_trace():
    """``with leaves_no_trace(model, *tensors)``: amid settings that a computation might change, it changes nothing of all this."""

    @contextmanager
    def check(model, *tensors):
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                before, copies = snapshot(model), [tensor.clone() for tensor in tensors]
                yield
                assert snapshot(model) == before
                for tensor, same in zip(tensors, copies, strict=True):
                    assert torch.equal(tensor, same)
                    assert not tensor.requires_grad
        finally:
            torch.set_float32_matmul_precision("highest")

    return check


@pytest.fixture(scope="session")
def with_spectrum():
    """A dense symmetric float64 matrix with (up to rounding) the eigenvalues that are asked for."""

    def build(eigenvalues, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        matrix = (basis * eigenvalues) @ basis.T
        return (matrix + matrix.T) / 2

    return build


@pytest.fixture(scope="session")
def dyadic():
    """Float64 matrices whose eigenvalues are known exactly."""

    def build(size, power):
        """A float64 matrix with exactly these eigenvalues: H diag(d) H^T / n, with d multiples of 2^-power in (0, 1].

        Sums and the division by a power of two are exact as long as power + log2(n) stays below 53.
        """
        logarithms = np.linspace(0, -power, size)
        eigenvalues = np.maximum(np.round(2.0 ** (logarithms + power)), 1) * 2.0**-power
        eigenvalues[-1] = 2.0**-power
        signs = hadamard(size).astype(np.float64)
        return torch.from_numpy(signs * eigenvalues @ signs.T / size), np.sort(eigenvalues)

    return build


class Elsewhere(Tensor):
    """A tensor as if on another device: mixing it with one that is here raises, as it does on a GPU; numbers and ``to`` bring it here."""

    def __deepcopy__(self, memo):
        return self.as_subclass(Tensor).clone().as_subclass(Elsewhere)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        if name in ("cpu", "to"):
            # To its own ``device`` it would stay, but nothing here may ask for that.
            return getattr(plain[0], name)(
                *[a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args[1:]], **kwargs
            )
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])] + list(kwargs.values())
        here = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, cls) and a.ndim]
        if here and name != "__getitem__":
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert a tensor of another device to numpy")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.fixture
def elsewhere():
    return lambda tensor: tensor.as_subclass(Elsewhere)
