"""LambdaMin: the decay of the spectrum and the degrees of freedom, against closed forms and against the kernel by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_conv.callbacks import LambdaMin
from lightning_conv.callbacks.monitors.spectral_decay import decay_quantities
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.spectrum import Spectrum


def spectrum_of(eigenvalues: torch.Tensor) -> Spectrum:
    """Of a matrix with these eigenvalues."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))[0]
    matrix = basis @ torch.diag(eigenvalues.double()) @ basis.T
    return kernel_spectrum((matrix + matrix.T) / 2)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_power_law_has_its_exponent_whatever_the_first_and_the_last_do(beta):
    values = 3 * torch.arange(1, 65, dtype=torch.float64) ** -beta
    assert decay_quantities(spectrum_of(values), 64)["decay_exponent"] == pytest.approx(beta, rel=1e-6)
    values[0], values[40:] = 1000.0, 1e-3 * values[40:]
    assert decay_quantities(spectrum_of(values), 64)["decay_exponent"] == pytest.approx(beta, rel=1e-6)


def test_degrees_of_freedom_lie_between_those_of_rank_one_and_of_equal_eigenvalues():
    one, equal = torch.zeros(20), torch.full((20,), 7.0)
    one[0] = 5.0
    assert decay_quantities(spectrum_of(one), 20) == {"degrees_of_freedom": pytest.approx(20 / 21)}
    found = decay_quantities(spectrum_of(equal), 20)
    assert found["degrees_of_freedom"] == pytest.approx(10)
    assert found["decay_exponent"] == pytest.approx(0, abs=1e-9)
    assert decay_quantities(spectrum_of(7 * equal), 20)["degrees_of_freedom"] == pytest.approx(10)  # no scale in it


def test_what_is_not_there_is_left_out():
    values = torch.arange(1, 41, dtype=torch.float64) ** -1.0
    known = spectrum_of(values)
    outermost = Spectrum(None, known.lambda_min, known.lambda_max, None)
    assert decay_quantities(outermost, 40) == {}
    assert decay_quantities(spectrum_of(torch.zeros(5)), 5) == {}
    assert set(decay_quantities(spectrum_of(values[:5]), 5)) == {"degrees_of_freedom"}  # ranks 2 to 2
    coarse = Spectrum(known.eigenvalues, known.lambda_min, known.lambda_max, radius=0.1)
    assert set(decay_quantities(coarse, 40)) == {"degrees_of_freedom"}  # none but the first is ten times its error


def test_in_a_run_they_are_those_of_the_kernel_by_hand(make_trainer, make_regression, recorder):
    torch.manual_seed(1)
    x = torch.randn(24, 40, dtype=torch.float64) * torch.arange(1, 41, dtype=torch.float64) ** -0.7
    data = TensorDataset(x, x.sum(1, keepdim=True))
    module = make_regression(nn.Linear(40, 1), lr=0.01).double()
    make_trainer([LambdaMin(every_n_steps=1)], max_epochs=1, logger=recorder).fit(
        module, DataLoader(data, batch_size=24)
    )
    kernel = (x @ x.T + 1).numpy()  # weights, and the bias
    ridge = np.trace(kernel) / 24  # n lambda
    freedom = float(np.trace(kernel @ np.linalg.inv(kernel + ridge * np.eye(24))))
    values = np.linalg.eigvalsh(kernel)[::-1]
    slope = np.polyfit(np.log(np.arange(2, 13)), np.log(values[1:12]), 1)[0]
    for t in (0, 1):
        assert recorder.scalars["kernel/degrees_of_freedom"][t] == pytest.approx(freedom, rel=1e-4)
        assert recorder.scalars["kernel/decay_exponent"][t] == pytest.approx(-slope, rel=1e-4)
