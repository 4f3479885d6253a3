"""Metrics against a reference kernel: ``KernelDrift``, ``KernelAlignment``."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Self, Unpack

import torch
from torch import Tensor
from typing_extensions import override

from lightning_conv.arguments import require_type
from lightning_conv.kernels.drift import (
    Drift,
    centred_alignment,
    kernel_drift,
    relative_frobenius_change,
    require_comparable,
)
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.linalg.spectrum import require_symmetric
from lightning_conv.metrics.states import KernelMetric, MetricOptions, first_entry, matrix_of, to_supported_device


class ReferenceMetric(KernelMetric):
    """A metric of the latest kernel against a reference: the given one, or the first kernel that ``update`` received.

    ``reset`` discards the latest kernel and keeps the reference. Lightning resets every logged metric at the end of each
    epoch; if the reference were discarded too, each epoch's drift would be zero. ``forget`` discards both. The reference is
    in the ``state_dict``, so that a resumed run measures against the same one. The latest kernel is not
    (``persistent(True)`` adds it).

    A copy (``clone``, ``copy.deepcopy``) has the reference of its original. If the original has none yet, the first kernel
    that one of its copies receives becomes its reference as well, and so that of all copies made later. So
    ``MetricTracker(KernelDrift())``, which makes a new copy of its metric at each ``increment`` and updates only copies,
    measures every period against the very first kernel. Copies made before have their own first kernel, such as
    ``metrics.clone(prefix="train_")`` and ``metrics.clone(prefix="val_")``. A pickled metric has no original.
    """

    reference: Tensor
    reference_facts: Tensor
    _original: weakref.ref[ReferenceMetric] | None = None  # metric without a reference of which this one is a copy

    def __init__(self, reference: KernelGram | Tensor | None = None, **options: Unpack[MetricOptions]) -> None:
        super().__init__(**options)
        if reference is not None:
            require_type("reference", reference, (KernelGram, Tensor), "a kernel of ntk_gram, or a matrix in float64")
            require_symmetric(matrix_of(reference), "reference")
        self._add_kernel("reference", reference, persistent=True)

    def _receive(self, gram: KernelGram | Tensor, *, compare: bool) -> None:
        require_symmetric(matrix_of(gram))
        if compare:
            reference = self._stored("reference")
            if reference is None:
                self._store("reference", gram)
                self._hand_on()
            else:
                require_comparable(gram, reference)
        self._store("matrix", gram)

    def _hand_on(self) -> None:
        """Make the first kernel the reference of the original, too, unless that has one."""
        original = self._original() if self._original is not None else None
        if original is not None and not original.reference.numel():
            original.reference, original.reference_facts = (
                state.to(original.device)
                if state.dtype != torch.float64
                else to_supported_device(state, original.device)
                for state in (self.reference, self.reference_facts)
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the metric; the copy knows its original (see the class)."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # A module among the attributes would become a child module, a weak reference does not.
        copied._original = weakref.ref(self)
        return copied

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy, without the reference to the original."""
        return {name: value for name, value in super().__getstate__().items() if name != "_original"}

    @override
    def reset(self) -> None:
        """Discard the latest kernel and keep the reference."""
        kept = self.reference, self.reference_facts
        super().reset()
        self.reference, self.reference_facts = kept

    def forget(self) -> None:
        """Discard the latest kernel and the reference; a reference given to the constructor becomes the reference again."""
        self.reset()  # what was computed last
        super().reset()  # the matrix and the default of the reference


class KernelDrift(ReferenceMetric):
    r"""Relative change of the latest kernel against a reference.

    .. math:: \|G - G_0\|_F \; / \; \|G_0\|_F

    It is 0 if the kernel has not changed, as in the linearised model. Each ``update`` replaces the latest kernel; ``forward``
    returns the change of the kernel that it receives. For several ranks see ``KernelMetric``.

    Args:
        reference: G_0, a ``KernelGram`` or a symmetric float64 matrix (N, N); None: the first kernel that ``update``
            receives. ``reset`` keeps it, ``forget`` does not (``ReferenceMetric``).
        options: options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: from ``update`` if the kernel is not a finite symmetric float64 matrix or cannot be compared with the
            reference; from ``compute`` if the reference is zero, or ranks hold different kernels.

    Cost: O(N^2) time and two matrices of memory; ``drift()`` takes three eigenvalue problems.
    Source: Du et al. 2019, Lemma B.4, bounds the change in spectral norm, which ``drift()`` returns.

    Example:
        >>> import torch
        >>> metric = KernelDrift()
        >>> for scale in (1.0, 1.5):
        ...     metric.update(scale * torch.eye(3, dtype=torch.float64))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = None  # a network in the lazy regime keeps its kernel, one that learns features changes it
    plot_lower_bound = 0.0

    @override
    def update(self, gram: KernelGram | Tensor) -> None:
        """Take ``gram``, a ``KernelGram`` or a symmetric float64 matrix (N, N), as the latest kernel."""
        self._receive(gram, compare=True)

    @override
    def compute(self) -> Tensor:
        """Compute |G - G_0|_F / |G_0|_F; NaN before the first update."""
        gram, reference = self._stored("matrix"), self._stored("reference")
        self._found = None
        if gram is None or reference is None:
            return self._scalar(float("nan"))
        self._found = gram, reference
        return self._scalar(relative_frobenius_change(gram, reference))

    def drift(self) -> Drift:
        """Return all numbers of ``kernel_drift``, with the floor below which a change is rounding.

        Like ``compute``, this is a collective operation: all ranks must call it.

        Raises:
            ValueError: there is no kernel yet.
        """
        return kernel_drift(*self._details("gram"))


class KernelAlignment(ReferenceMetric):
    r"""Centred alignment (CKA) of the latest kernel with a reference, or of two kernels with each other.

    .. math:: \langle HGH, HG_0H \rangle_F \; / \; (\|HGH\|_F \, \|HG_0H\|_F), \qquad H = I - 11^T/N

    It is 1 if the kernels are equal up to scale and constants, and 0 if they are orthogonal. Each ``update`` replaces the
    latest kernel; ``forward`` returns the alignment of the kernel that it receives. For several ranks see ``KernelMetric``.

    Args:
        reference: G_0, a ``KernelGram`` or a symmetric float64 matrix (N, N), for instance y y^T of the labels; None: the
            first kernel that ``update`` receives. ``reset`` keeps it, ``forget`` does not (``ReferenceMetric``).
        options: options of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: from ``update`` if a kernel is not a finite symmetric float64 matrix or cannot be compared; from
            ``compute`` if ranks hold different kernels.

    Cost: O(N^2) time and three matrices of memory.
    Source: Cortes, Mohri, Rostamizadeh 2012, Definition 4; Kornblith et al. 2019.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
        >>> metric = KernelAlignment(reference=labels @ labels.T)
        >>> metric(torch.eye(3, dtype=torch.float64))
        tensor(0.7071, dtype=torch.float64)
    """

    higher_is_better = None  # True against the labels' kernel, not against the initial kernel
    plot_lower_bound = 0.0  # for positive semidefinite matrices
    plot_upper_bound = 1.0
    other: Tensor

    def __init__(self, reference: KernelGram | Tensor | None = None, **options: Unpack[MetricOptions]) -> None:
        super().__init__(reference, **options)
        self.add_state("other", torch.empty(0, 0, dtype=torch.float64, device=self.device), dist_reduce_fx=first_entry)

    @override
    def update(self, gram: KernelGram | Tensor, other: KernelGram | Tensor | None = None) -> None:
        """Take ``gram`` as the latest kernel, for the alignment with ``other`` or, if that is None, with the reference.

        The two kernels may belong to different networks, parameters or outputs if their shapes agree. Passing ``other`` does
        not set the reference.

        Raises:
            ValueError: see the class.
        """
        if other is not None:
            require_symmetric(matrix_of(other), "other")
            if matrix_of(gram).shape != matrix_of(other).shape:
                raise ValueError(
                    f"other: shape {tuple(matrix_of(other).shape)} against {tuple(matrix_of(gram).shape)}; pass kernels on the "
                    "same samples"
                )
        self._receive(gram, compare=other is None)
        empty = torch.empty(0, 0, dtype=torch.float64, device=self.device)
        self.other = empty if other is None else to_supported_device(matrix_of(other).clone(), self.device)

    @override
    def compute(self) -> Tensor:
        """Compute the alignment; NaN before the first update, and if a centred kernel is zero."""
        partner = self.other if self.other.numel() else self.reference
        if not self.matrix.numel() or not partner.numel():
            return self._scalar(float("nan"))
        return self._scalar(centred_alignment(self.matrix, partner.to(self.matrix.device)))
