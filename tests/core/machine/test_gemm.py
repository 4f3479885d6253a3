"""The choice between matrix products."""

import pytest
import torch

from lightning_conv.machine import gemm


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (7, 1, 300), (64, 513, 31)])
@pytest.mark.parametrize("function", [gemm.matrix_product, gemm.convolution_product])
def test_all_candidates_are_the_product(function, shape):
    p, k, q = shape
    x, y = torch.randn(p, k + 3)[:, :k], torch.randn(q, k)  # a slice of longer rows, as blocks of columns are
    exact = x.double() @ y.double().T
    bound = 2.0**-24 * (k + 1) * (x.double().norm(dim=1)[:, None] * y.double().norm(dim=1))
    assert bool(((function(x, y).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("seconds", "chosen"), [((1.0, 0.5), 1), ((1.0, 0.9), 0), ((1.0, 2.0), 0)])
def test_another_product_is_chosen_only_where_it_is_clearly_faster(seconds, chosen, monkeypatch):
    monkeypatch.setattr(gemm, "_seconds", lambda functions, x, y: list(seconds)[: len(functions)])
    monkeypatch.delenv(gemm.CHOICE, raising=False)
    gemm.calibrated.cache_clear()
    function, rate = gemm.calibrated("cpu", torch.float32, 1)
    gemm.calibrated.cache_clear()
    assert function is [gemm.matrix_product, gemm.convolution_product][chosen]
    assert rate == pytest.approx(2 * gemm.CALIBRATION_SIZE**3 / seconds[chosen])


@pytest.mark.parametrize("name", ["mm", "convolution"])
def test_the_environment_names_the_product(name, monkeypatch):
    monkeypatch.setattr(gemm, "_seconds", lambda functions, x, y: [1.0, 0.5 if name == "mm" else 2.0][: len(functions)])
    monkeypatch.setenv(gemm.CHOICE, name)
    gemm.calibrated.cache_clear()
    assert gemm.product_name() == name
    gemm.keep_product("convolution" if name == "mm" else "mm")
    assert gemm.product_name() == name
    gemm.calibrated.cache_clear()


@pytest.mark.parametrize("name", ["mm", "convolution"])
def test_a_product_chosen_before_is_kept(name, monkeypatch):
    monkeypatch.setattr(gemm, "_seconds", lambda functions, x, y: [1.0, 0.5 if name == "mm" else 2.0][: len(functions)])
    monkeypatch.delenv(gemm.CHOICE, raising=False)
    monkeypatch.setattr(gemm, "_kept", {})
    gemm.calibrated.cache_clear()
    assert gemm.product_name() != name
    gemm.keep_product(name)
    assert gemm.product_name() == name
    gemm.keep_product("no such product")
    assert gemm.product_name() == name
    assert gemm.CHOICE not in gemm.os.environ
    gemm.calibrated.cache_clear()


def test_only_float32_on_a_cpu_has_a_choice():
    assert gemm.gemm_for(torch.zeros(2, 2, dtype=torch.float64)) is gemm.matrix_product
    assert gemm.gemm_for(torch.zeros(2, 2, device="meta")) is gemm.matrix_product
