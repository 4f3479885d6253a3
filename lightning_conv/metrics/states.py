"""The base classes of the metrics: float64 states, kernels as states, and the combination of the ranks' states."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_conv.kernels.gram import KernelGram

RANK_TOLERANCE = 1e-3
"""Relative Frobenius distance up to which two ranks hold the same kernel. Rounding on different devices stays below it."""


class MetricOptions(TypedDict, total=False):
    """Options of every metric; see ``torchmetrics.Metric``."""

    compute_on_cpu: bool
    dist_sync_on_step: bool
    process_group: Any
    dist_sync_fn: Callable[..., list[Tensor]]
    distributed_available_fn: Callable[[], bool]
    sync_on_compute: bool
    compute_with_cache: bool


class Float64Metric(Metric):
    """A metric whose states keep their type and whose value is a float64 scalar.

    ``module.to(torch.bfloat16)``, ``Trainer(precision="16-true")`` and ``set_dtype`` move the states but never round them,
    because rounding destroys small eigenvalues and ranks. On devices without float64 (Apple's GPUs) the states stay on the
    CPU.
    """

    is_differentiable = False
    _found: Any = None  # what ``compute`` found beside its number; None: nothing to compute from

    @override
    def reset(self) -> None:
        """Discard what ``update`` collected."""
        super().reset()
        self._found = None

    def _details(self, argument: str) -> Any:
        """Compute, and return what was found beside the number.

        Args:
            argument: the argument of ``update`` that is missing if nothing was found.

        Raises:
            ValueError: nothing was collected yet.
        """
        self.compute()
        if self._found is None:
            raise ValueError(f"{argument}: there is none yet; call update({argument}) first")
        return self._found

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        def move(tensor: Tensor) -> Tensor:
            # An empty float32 tensor reveals the target device of fn without a conversion of the state.
            return to_supported_device(tensor, fn(torch.empty(0, device=tensor.device)).device)

        return super()._apply(move, exclude_state)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw ``compute()``, or the value(s) ``val``, on ``ax`` or a new figure, and return (figure, axes)."""
        return self._plot(val, ax)

    def _scalar(self, value: float) -> Tensor:
        return to_supported_device(torch.tensor(value, dtype=torch.float64, device="cpu"), self.device)


class KernelMetric(Float64Metric):
    """A metric of the latest kernel, which each ``update`` replaces.

    Under DDP every rank must pass the kernel of the same samples. With equal weights these kernels are the same, and that of
    the first rank is used. A rank without a kernel is left out. Kernels of different samples cannot be combined, because the
    kernel of their union also has the blocks between them; they are refused on every rank (``gather_kernels``).
    """

    full_state_update = True
    matrix: Tensor  # float64, (N, N); (0, 0) before the first update
    matrix_facts: Tensor

    def __init__(self, **options: Unpack[MetricOptions]) -> None:
        options.setdefault("dist_sync_fn", gather_kernels)
        super().__init__(**options)
        self._add_kernel("matrix")

    def _add_kernel(self, name: str, gram: KernelGram | Tensor | None = None, *, persistent: bool = False) -> None:
        states = _pack(gram, self.device, given=gram is not None)
        for state, default in zip((name, f"{name}_facts"), states, strict=True):
            self.add_state(state, default, dist_reduce_fx=first_entry, persistent=persistent)

    def _store(self, name: str, gram: KernelGram | Tensor) -> None:
        matrix, facts = _pack(gram, self.device, given=False)
        setattr(self, name, matrix)
        setattr(self, f"{name}_facts", facts)

    def _stored(self, name: str) -> KernelGram | Tensor | None:
        matrix, facts = getattr(self, name), getattr(self, f"{name}_facts")
        if not matrix.numel():
            return None
        known: dict[str, Any] | None = json.loads(facts.cpu().numpy().tobytes())["gram"]
        if known is None:
            assert isinstance(matrix, Tensor)
            return matrix
        return KernelGram.from_facts(matrix, known)


def _pack(gram: KernelGram | Tensor | None, device: torch.device, *, given: bool) -> tuple[Tensor, Tensor]:
    """Convert a kernel into two tensors, the only kind of state that torchmetrics saves, moves and gathers.

    The second tensor is JSON. It contains the facts of a ``KernelGram`` beside its matrix, and whether the kernel was given
    to the constructor, so that a ``MetricCollection`` does not merge a given reference and an equal first kernel.
    """
    if gram is None:
        return torch.empty(0, 0, dtype=torch.float64, device=device), torch.empty(0, dtype=torch.uint8, device=device)
    known = gram.facts() if isinstance(gram, KernelGram) else None
    text = json.dumps({"given": given, "gram": known}).encode()
    # A copy, because the caller may fill the same memory with the next kernel.
    matrix = to_supported_device(matrix_of(gram).clone(), device)
    return matrix, torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def to_supported_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move ``tensor`` to ``device``, or to the CPU if the device does not support its type."""
    lacking = device.type == "mps" and tensor.dtype == torch.float64
    return tensor.to("cpu" if lacking else device)


def gather_kernels(result: Tensor, group: Any = None) -> list[Tensor]:
    """Return the state of the first rank that has one, after a check that the others are the same (a ``dist_sync_fn``).

    Args:
        result: a matrix, or its facts; of length 0 on a rank without a kernel.
        group: process group.

    Raises:
        ValueError: on every rank, if two matrices differ in shape or by more than ``RANK_TOLERANCE``.

    Cost: one matrix of memory per rank.
    """
    held = [(rank, part) for rank, part in enumerate(gather_all_tensors(result, group)) if part.numel()]
    if not held:
        return [result]
    first, one = held[0]
    if not one.is_floating_point():  # the facts; the matrices themselves are compared
        return [one]
    for rank, other in held[1:]:
        if difference := _difference(one, other):
            raise ValueError(
                f"gram: ranks {first} and {rank} hold different kernels ({difference}), which cannot be combined; compute the "
                'kernel of the same samples on every rank (batch_norm="frozen" makes it independent of running statistics), or '
                "log one number per rank with sync_on_compute=False"
            )
    return [one]


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
    distance, norm = float((other - one).norm()), float(one.norm())
    return f"a distance of {distance:.1e} at norm {norm:.1e}" if distance > RANK_TOLERANCE * norm else ""


def gather_rows(result: Tensor, group: Any = None) -> list[Tensor]:
    """Gather the rows of all ranks that have any, or the scalars of all ranks (a ``dist_sync_fn``).

    Args:
        result: a float64 matrix, torchmetrics' placeholder for an empty list, or a scalar.
        group: process group.

    Raises:
        ValueError: on every rank, if the rows of the ranks differ in length.
    """
    if result.ndim == 0:
        return gather_all_tensors(result, group)
    if result.ndim == 1:  # the placeholder is a float32 vector, but collectives need the others' type and dimensions
        result = torch.empty(0, 0, dtype=torch.float64, device=result.device)
    held = [part for part in gather_all_tensors(result, group) if part.numel()]
    widths = sorted({part.shape[1] for part in held})
    if len(widths) > 1:
        raise ValueError(
            f"features: the ranks hold rows of {' and '.join(map(str, widths))} features; pass those of one last hidden layer "
            "on every rank"
        )
    return held or [result]


def matrix_of(gram: KernelGram | Tensor) -> Tensor:
    """Return the matrix of a kernel without its graph, because no metric is differentiable."""
    return (gram.matrix if isinstance(gram, KernelGram) else gram).detach()


def first_entry(stacked: Tensor) -> Tensor:
    """Return the only entry: the reduction for ``gather_kernels``, which returns one state."""
    return stacked[0]
