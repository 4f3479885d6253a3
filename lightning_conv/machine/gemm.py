"""The fastest matrix product on this machine, chosen among public operators of torch by a short measurement."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_conv.machine.clock import now

Gemm: TypeAlias = Callable[[Tensor, Tensor], Tensor]

CALIBRATION_SIZE = 512
CALIBRATION_REPEATS = 9
MARGIN = 1.25
"""Factor by which another product must be faster than the plain one to be chosen. Where it matters the gain is a factor
of 2, while a wrong choice on a busy machine would last as long as the process."""


def matrix_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T, (p, k) and (q, k) -> (p, q), by ``torch.mm`` (MKL, OpenBLAS, cuBLAS, ...)."""
    return torch.mm(x, y.T)


def convolution_product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y^T, (p, k) and (q, k) -> (p, q), by a 1 x 1 convolution of channels-last images.

    CPU builds of torch pass it to oneDNN, which uses vector instructions that MKL does not use on some processors
    (twice the rate on those of AMD with AVX-512).
    """
    pixels = x.reshape(1, x.shape[0], 1, x.shape[1]).permute(0, 3, 1, 2)
    product = F.conv2d(pixels, y.reshape(*y.shape, 1, 1))
    return product.permute(0, 2, 3, 1).reshape(x.shape[0], y.shape[0])


PRODUCTS: dict[str, Gemm] = {"mm": matrix_product, "convolution": convolution_product}

CHOICE = "LIGHTNING_CONV_PRODUCT"
"""Environment variable that names the product, for runs that must agree to the last bit although the machine was busy
in one of them. A resumed run continues with the product that it began with, by ``keep_product``."""


_kept: dict[str, str] = {}
"""The product that ``keep_product`` has set."""


@lru_cache(maxsize=8)
def calibrated(device_type: str, dtype: torch.dtype, threads: int) -> tuple[Gemm, float]:
    """Return the fastest product of floating-point matrices on this machine, and its rate in flops per second.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...; there is a choice only on the CPU.
        dtype: dtype of the factors; there is a choice only for float32.
        threads: ``torch.get_num_threads()``, on which the answer depends; it is a part of the cache key.

    Cost: about 20 ms, once per process.
    """
    del threads
    generator = torch.Generator().manual_seed(0)
    shape = (CALIBRATION_SIZE, CALIBRATION_SIZE)
    x, y = (torch.randn(shape, generator=generator).to(device_type, dtype) for _ in range(2))
    candidates: list[Gemm] = [matrix_product]
    if device_type == "cpu" and dtype == torch.float32:
        named = os.environ.get(CHOICE) or _kept.get("product")
        candidates = [PRODUCTS[named]] if named in PRODUCTS else list(PRODUCTS.values())
    seconds = _seconds(candidates, x, y)
    best = 0
    for index in range(1, len(candidates)):
        if seconds[index] * MARGIN < seconds[best]:
            best = index
    return candidates[best], 2 * CALIBRATION_SIZE**3 / seconds[best]


def _seconds(functions: Sequence[Gemm], x: Tensor, y: Tensor) -> list[float]:
    """Return the duration of the fastest call of each function.

    They take turns, since other work of the machine only adds.
    """
    fastest = [float("inf")] * len(functions)
    with torch.no_grad():
        for function in functions:
            function(x, y)
        for _ in range(CALIBRATION_REPEATS):
            for index, function in enumerate(functions):
                start = now(x.device)
                function(x, y)
                fastest[index] = min(fastest[index], now(x.device) - start)
    return fastest


def gemm_for(x: Tensor) -> Gemm:
    """Return the product to use for factors like ``x``."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return matrix_product
    return calibrated("cpu", x.dtype, torch.get_num_threads())[0]


def product_name() -> str:
    """Return the name of the product that this process uses for float32 on a CPU."""
    chosen = gemm_for(torch.empty(0))
    return next(name for name, product in PRODUCTS.items() if product is chosen)


def keep_product(name: str) -> None:
    """Use the product that an earlier process had chosen, so that a resumed run rounds as before.

    It has no effect if the environment names a product, or if no product has this name.
    """
    if name in PRODUCTS and product_name() != name:
        _kept["product"] = name
        calibrated.cache_clear()
