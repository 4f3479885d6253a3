r"""``Combinations``: which linear combinations of a sample's outputs have their gradients as rows of a kernel.

A kernel has K rows for each sample i, the gradients :math:`J_i^\top w_{ik}` of the combinations w_ik . u_i of its C outputs:

- ``EachOutput``: w_k = e_k, K = C (``outputs="trace"`` and ``"full"``)
- ``SharedRows``: the same K vectors for every sample (``"sum"``: one row of ones)
- ``SignRows``: the same, of random signs that are drawn when they are needed (``"projected"``)
- ``Cotangents``: one vector s_i for each sample, K = 1 (``cotangents=``)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_conv.arguments import require_type
from lightning_conv.linalg.rounding import require_moderate
from lightning_conv.machine.memory import blocks
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.inputs import Inputs, sample_count

AT_ONCE = 2**20
"""Numbers of the combinations that are converted at once for their norms."""


class Combinations(ABC):
    """K linear combinations of the outputs of each sample.

    Attributes:
        count: K.
        scales: (n,), float64 powers of two by which rows of the kernel must be multiplied, as ``taken`` leaves them out; None: ones.
    """

    count: int
    scales: Tensor | None = None

    @abstractmethod
    def taken(self, which: slice, rows: slice, like: Tensor) -> Tensor:
        """Return combinations ``which`` for the samples ``rows``: (k, t, C), or (k, 1, C) where all samples have the same.

        The result has the dtype and the device of ``like``.
        """

    def norms(self, samples: int, like: Tensor) -> Tensor:
        """Return the Euclidean norm over the combinations of each sample, (n,), without ``scales``."""
        first = self.taken(slice(0, self.count), slice(0, 1), like)
        parts = []
        for rows in blocks(samples, max(1, AT_ONCE // max(1, first.numel()))):
            found = self.taken(slice(0, self.count), rows, like)
            norms = torch.linalg.vector_norm(found, dim=(0, 2), dtype=torch.float64)
            parts.append(norms.expand(rows.stop - rows.start))
        return torch.cat(parts)


class EachOutput(Combinations):
    """Every output by itself; the identity is never formed as a whole."""

    def __init__(self, outputs: int) -> None:
        self.count = outputs

    def taken(self, which: slice, rows: slice, like: Tensor) -> Tensor:
        """Return rows of the identity; see ``Combinations.taken``."""
        del rows
        chosen = torch.arange(self.count, device=like.device)[which, None]
        found = like.new_zeros(len(chosen), self.count)
        return found.scatter_(1, chosen, 1.0)[:, None]


class SharedRows(Combinations):
    """The rows of one matrix (K, C), for every sample."""

    def __init__(self, rows: Tensor) -> None:
        self.count, self._rows = len(rows), rows

    def taken(self, which: slice, rows: slice, like: Tensor) -> Tensor:
        """Return rows of the matrix; see ``Combinations.taken``."""
        del rows
        return self._rows[which, None].to(like)


class SignRows(Combinations):
    """Random signs times a constant, for every sample, each vector drawn when it is needed: only those in use are in memory.

    They are the rows of one matrix of ``torch.randint``, which draws its numbers one after the other.

    Args:
        count: number of vectors.
        outputs: C.
        generator: of the signs; it is then behind them.
        scale: the constant.
    """

    def __init__(self, count: int, outputs: int, generator: torch.Generator, scale: float) -> None:
        self.count, self._outputs, self._scale = count, outputs, scale
        self._states: list[Tensor] = []
        for _ in range(count):
            self._states.append(generator.get_state())
            _signs(outputs, generator)

    def taken(self, which: slice, rows: slice, like: Tensor) -> Tensor:
        """Return vectors of signs; see ``Combinations.taken``."""
        del rows
        chosen = self._states[which]
        found = like.new_empty(len(chosen), 1, self._outputs)
        for row, state in zip(found, chosen, strict=True):
            generator = torch.Generator()
            generator.set_state(state)
            row[0] = _signs(self._outputs, generator)
        return found.mul_(2.0).sub_(1.0).mul_(self._scale)


def _signs(outputs: int, generator: torch.Generator) -> Tensor:
    """Return zeros and ones, (C,), one byte each."""
    return torch.randint(0, 2, (outputs,), generator=generator, dtype=torch.uint8)


class Cotangents(Combinations):
    """One vector s_i for each sample: the kernel is s_i^T K_ij s_j.

    Each s_i is passed as s_i / 2^e_i with a largest entry in [1/2, 1), and its row and column are multiplied by 2^e_i at the end. So a
    backward pass in float32 neither loses nor overflows, whatever the size of s_i, and an entry (i, j) is as accurate relative to
    sqrt(M_ii M_jj) for tiny s_i as for large ones. Both steps are exact, barring underflow.

    Args:
        given: (n, C), as it was given; its rows are converted when they are needed.
        device: where the kernel is computed.
    """

    count = 1

    def __init__(self, given: Tensor, device: torch.device) -> None:
        self._given = given
        largest = _largest(given).to(device)
        # x = m 2^e with 1/2 <= m < 1, so that x / m is 2^e, without rounding.
        self.scales = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)

    def taken(self, which: slice, rows: slice, like: Tensor) -> Tensor:
        """Return s_i / 2^e_i; see ``Combinations.taken``."""
        assert self.scales is not None
        chosen = self._given[rows].to(like.device, torch.float64) / self.scales[rows, None].to(like.device)
        return chosen.to(like.dtype)[None][which]


def checked_cotangents(given: object, samples: int, name: str = "cotangents") -> Tensor:
    """Return the cotangents without their graph, if they are one row of finite real numbers for each sample.

    Args:
        given: what the user passed.
        samples: n.
        name: the argument, as messages call it.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not floating (real), not finite, has not n rows, or is of a size whose squares over- or underflow.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; need a tensor with one row of output shape per sample")
    if not given.is_floating_point():
        raise ValueError(
            f"{name}: {given.dtype}; need real floating-point numbers, such as cotangents.to(torch.float32)"
        )
    if given.ndim == 0 or len(given) != samples:
        raise ValueError(
            f"{name}: shape {tuple(given.shape)} for {samples} samples; need one row of output shape per sample, ({samples}, C)"
        )
    if given.layout != torch.strided:
        raise ValueError(f"{name}: {given.layout}; need a dense tensor, such as cotangents.to_dense()")
    given = given.detach()
    largest = _largest(given.reshape(samples, -1))
    if not bool(torch.isfinite(largest).all()):
        raise ValueError(f"{name}: contains NaN or infinity; check the loss, its targets and their scale")
    require_moderate(largest, name)
    return given


def checked_sets(
    inputs: Inputs, inputs2: Inputs | None, cotangents: Tensor | None, cotangents2: Tensor | None
) -> list[tuple[Tensor, str]]:
    """Return the cotangents of the rows and, for two sets of samples, of the columns, with the names of their arguments.

    Raises:
        ValueError: one set has cotangents and the other has none, or there is no second set.
    """
    if inputs2 is None:
        require_type(
            "cotangents2", cotangents2, (Tensor, type(None)), "a tensor with a row for each of inputs2, or None"
        )
    if cotangents2 is not None and (inputs2 is None or cotangents is None):
        missing = "inputs2" if inputs2 is None else "cotangents"
        raise ValueError(
            f"cotangents2: given without {missing}; they are those of inputs2, beside cotangents, which are those of inputs"
        )
    if cotangents is None:
        return []
    found = [(checked_cotangents(cotangents, sample_count(inputs)), "cotangents")]
    if inputs2 is not None:
        if cotangents2 is None:
            raise ValueError("cotangents2: None; a kernel between two sets needs those of inputs2 beside cotangents")
        found.append((checked_cotangents(cotangents2, sample_count(inputs2), "cotangents2"), "cotangents2"))
    return found


def cotangents_of_shape(
    given: Tensor, module: StatelessModule, few: Inputs, outputs: int, name: str = "cotangents"
) -> Cotangents:
    """Return ``checked_cotangents`` as combinations, if they have the shape of the outputs.

    Args:
        given: (n, C), or the shape of the outputs themselves, (n, ...).
        module: the network, inside ``undisturbed``.
        few: samples on which it may be evaluated.
        outputs: C.
        name: the argument, as messages call it.

    Raises:
        ValueError: it has another shape, such as one with two dimensions exchanged.

    Cost: one forward of ``few``, unless the shape is (n, C).
    """
    samples = len(given)
    if given.shape != (samples, outputs):
        shape = (samples, *_shape_of_outputs(module, few))
        if given.shape != shape:
            of_outputs = "" if shape == (samples, outputs) else f" or {shape}, the shape of the outputs"
            raise ValueError(f"{name}: shape {tuple(given.shape)}; need {(samples, outputs)}{of_outputs}")
    return Cotangents(given.reshape(samples, outputs), module.device)


def _shape_of_outputs(module: StatelessModule, few: Inputs) -> tuple[int, ...]:
    result = module.call({}, few)
    assert isinstance(result, Tensor)
    return tuple(result.shape[1:])


def _largest(rows: Tensor) -> Tensor:
    """Return the largest |entry| of each row in float64 (NaN where there is one), without a copy of the rows."""
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows), dtype=torch.float64)
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    return largest.double()
