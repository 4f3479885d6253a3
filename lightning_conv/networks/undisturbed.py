"""``undisturbed``: evaluate a module as it is written, in eval mode and full precision, and put everything back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_conv.networks.dense_gradients import dense_gradients
from lightning_conv.networks.precision import full_float32
from lightning_conv.networks.recomputation import no_recomputation
from lightning_conv.networks.supported import require_module


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Switch ``model`` to eval mode, full float32 precision and no autocast; restore all of it afterwards.

    The global generators of torch, Python and NumPy are restored, too.

    Fused attention is switched off, because its fast path has no derivative with respect to the layers inside it, and the
    fused kernels have no rule for per-sample derivatives. Activation checkpoints keep their activations. Embeddings have dense
    gradients.

    Raises:
        TypeError: ``model`` is no module.
    """
    require_module(model)
    flags = [(module, module.training) for module in model.modules()]
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    devices = list(range(torch.cuda.device_count())) if device_type == "cuda" else []
    python, numpy = random.getstate(), _numpy_random()
    of_numpy = None if numpy is None else numpy.get_state()
    try:
        for module, _ in flags:
            module.training = False
        with (
            without_fused_attention(),
            full_float32(),
            _as_written(),
            no_recomputation(),
            dense_gradients(),
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(of_numpy)
        for module, flag in flags:
            module.training = flag


def _numpy_random() -> Any:
    """Return NumPy's module of global random numbers; None: NumPy is not in memory, so that nothing draws from it."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Switch off torch's fast path of attention and Transformer layers in eval mode, and restore the setting.

    It is taken once no parameter needs a gradient, sets what is computed at padded positions to zero, and has no derivative by the
    layers inside it.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _as_written() -> AbstractContextManager[None]:
    """Run compiled modules eagerly, because hooks and per-sample derivatives do not reach into compiled code."""
    # Without dynamo in memory nothing is compiled, and loading it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
