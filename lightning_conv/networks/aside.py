"""Work beside an evaluation that is being recorded or transformed: ``aside``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _pop_mode, _pop_mode_temporarily, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def aside(*, transforms: bool = True) -> Iterator[None]:
    """Suspend all modes that intercept functions or operators, but for torch's default device.

    Args:
        transforms: whether those of ``torch.func`` are suspended, too.
    """
    with ExitStack() as stack, _disable_current_modes():
        if transforms:
            stack.enter_context(torch._C._DisableFuncTorch())
        modes = []
        while torch._C._len_torch_function_stack():
            modes.append(stack.enter_context(_pop_mode_temporarily()))
        device = next((mode for mode in modes if isinstance(mode, DeviceContext)), None)
        if device is not None:
            _push_mode(device)  # type: ignore[no-untyped-call]
            stack.callback(_pop_mode)
        yield
