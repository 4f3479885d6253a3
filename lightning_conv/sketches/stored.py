"""``StoredSketches``: what is estimated from the sketches in a store: kernels, neighbours, alignment and drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, get_args

from torch import Tensor

from lightning_conv.arguments import require_number, require_option, require_type, require_whole
from lightning_conv.linalg.estimates import Estimate
from lightning_conv.machine.memory import blocks
from lightning_conv.sketches.comparison import Products, alignment_of, drift_of, products_of
from lightning_conv.sketches.estimates import SketchedKernel, Sketches, decoded, kernel_estimate, refuse_lambda_min
from lightning_conv.sketches.folder import PART, RECORD, Checkpoint, require_name
from lightning_conv.sketches.neighbours import Neighbours, Order, Summed, nearest_of
from lightning_conv.sketches.selection import Numbers, chosen_samples, require_room
from lightning_conv.sketches.settings import Settings

READ = 2**22
"""Numbers of the sketches that are read at once."""


class StoredSketches:
    """The sketches of a store, as far as no model is needed; see ``SketchStore``.

    Attributes:
        folder: where it is.
        settings: what all of its sketches have in common.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints that are complete, in order of the alphabet."""
        found = [each.parent for each in self.folder.glob(f"*/{RECORD}")]
        return sorted(each.name for each in found if not each.name.endswith(PART))

    @property
    def size(self) -> int:
        """Number K of numbers in a sketch."""
        return self.settings.layout.size

    @property
    def bytes_per_sample(self) -> int:
        """Bytes on disk of one sample at one checkpoint."""
        return self.size * self.settings.kind.itemsize + 2

    @property
    def relative_error(self) -> float:
        r"""Bound of the standard error of an entry of the kernel, relative to :math:`\sqrt{K_{ii} K_{jj}}`."""
        return self.settings.layout.relative_error

    def checkpoint(self, name: str) -> Checkpoint:
        """Return what is known of a checkpoint.

        Raises:
            ValueError: there is none of this name, or its files are not what they were.
        """
        if require_name(name) not in self.names:
            raise ValueError(f"name: {name!r}; the store has {', '.join(map(repr, self.names)) or 'no checkpoints'}")
        return Checkpoint.read(self.folder / name, self.size, self.settings.kind, self.settings.identity)

    def verify(self, name: str) -> None:
        """Read a checkpoint as a whole and compare its check sums.

        Raises:
            ValueError: it was changed after it was written.
        """
        self.checkpoint(name).verify()

    def sketches(self, name: str, samples: Numbers = None) -> Sketches:
        """Return the sketches of some samples of a checkpoint.

        Args:
            name: of the checkpoint.
            samples: their numbers in the order of the loader, or a slice; None: all of them.

        Raises:
            ValueError: there is no such checkpoint, or a number is outside of it.
        """
        found = self.checkpoint(name)
        rows, exponents = found.arrays()
        chosen = chosen_samples(samples, found.samples)
        values = decoded(rows[chosen], exponents[chosen])
        return Sketches(values, self.settings.layout, self.settings.identity, self.settings.rounding)

    def kernel(
        self,
        rows: Sketches | Numbers = None,
        columns: Sketches | Numbers = None,
        *,
        name: str | None = None,
        max_memory: float | None = None,
    ) -> SketchedKernel:
        """Estimate the kernel of the gradients of some samples, with the standard error of each entry.

        Args:
            rows: numbers of samples of the checkpoint, or sketches; None: all samples.
            columns: likewise; None: those of the rows.
            name: of the checkpoint; None: rows and columns are sketches.
            max_memory: bytes that sketches and matrices may take; None: a quarter of the free memory.

        Raises:
            ValueError: a number is outside of the checkpoint; sketches belong to another store.
            MemoryError: it does not fit.

        Cost: 2 n m K flops, 8 (n + m) K + 32 n m bytes.
        """
        left = self._sketches(rows, name, "rows", max_memory)
        right = left if columns is None else self._sketches(columns, name, "columns", max_memory)
        require_room(32 * len(left) * len(right), max_memory)
        matrix, error = kernel_estimate(self.settings.layout, left.values, right.values)
        u, v = left.rounding, right.rounding
        return SketchedKernel(matrix, error, self.settings.layout.groups, u + v + u * v)

    def nearest(self, queries: Sketches, most: int = 5, *, name: str, by: Order = "influence") -> Neighbours:
        r"""Return the samples of a checkpoint with the largest influence on some queries.

        Args:
            queries: from ``sketch``, at the weights of the checkpoint, or from ``sketches``.
            most: how many for each query.
            name: of the checkpoint.
            by: ``"influence"``: the largest :math:`\langle g_i, g \rangle` first. ``"opposed"``: the most negative first. ``"cosine"``:
                the largest cosine of the sketches first, which does not prefer samples with large gradients.

        Raises:
            ValueError: an option is outside its range; the queries belong to another store.

        Cost: 2 q n K flops and one reading of the checkpoint.
        """
        require_whole("most", most, least=1)
        require_option("by", by, get_args(Order))
        require_type("queries", queries, Sketches, "sketches from store.sketch(...) or store.sketches(...)")
        queries = self._sketches(queries, name, "queries", None)
        return self._nearest([(1.0, queries)], [self.checkpoint(name)], most, by)

    def nearest_over(
        self, queries: Mapping[str, Sketches], most: int = 5, *, rates: Mapping[str, float], by: Summed = "influence"
    ) -> Neighbours:
        r"""Return the samples with the largest influence on some queries over several checkpoints, as TracIn sums it up.

        .. math:: \sum_t \eta_t \, \langle g_t(x), g_t(z) \rangle

        Args:
            queries: for each checkpoint the sketches of the same queries at its weights, from ``sketch`` or ``sketches``.
            most: how many for each query.
            rates: for each checkpoint its :math:`\eta_t`: the learning rate there, times the steps that it stands for.
            by: ``"influence"``: the largest sum first. ``"opposed"``: the most negative first.

        Raises:
            ValueError: an option is outside its range; queries or rates are missing for a checkpoint; checkpoints are of different
                samples; the queries belong to another store, or are not equally many.
            TypeError: queries are no sketches.

        Cost: 2 q n K flops and one reading for each checkpoint. Source: Pruthi et al. 2020 (2002.08484), section 3.2, TracInCP.
        """
        require_whole("most", most, least=1)
        require_option("by", by, get_args(Summed))
        if not rates or set(rates) != set(queries):
            raise ValueError(f"rates: for {sorted(rates)}; need one for each checkpoint of queries, {sorted(queries)}")
        for name, rate in rates.items():
            require_number(f"rates[{name!r}]", rate, least=0.0)
            require_type(f"queries[{name!r}]", queries[name], Sketches, "sketches from store.sketch(...)")
        found = [self.checkpoint(name) for name in rates]
        for name, each in zip(rates, found, strict=True):
            self._require_same_data(next(iter(rates)), found[0], name, each)
        asked = [(float(rate), self._sketches(queries[name], name, "queries", None)) for name, rate in rates.items()]
        if len({len(each) for _, each in asked}) > 1:
            counts = {name: len(queries[name]) for name in rates}
            raise ValueError(f"queries: {counts} samples; need the same queries at each checkpoint")
        return self._nearest(asked, found, most, by)

    def _nearest(
        self, queries: Sequence[tuple[float, Sketches]], found: Sequence[Checkpoint], most: int, by: Order
    ) -> Neighbours:
        arrays = [each.arrays() for each in found]

        def stored() -> Iterator[tuple[int, list[Tensor]]]:
            for part in blocks(found[0].samples, max(1, READ // max(1, self.size * len(found)))):
                yield part.start, [decoded(rows[part], exponents[part]) for rows, exponents in arrays]

        return nearest_of(queries, stored, most, by)

    def alignment(self, name: str, reference: str, *, samples: Numbers = None, centred: bool = True) -> Estimate:
        r"""Estimate the alignment of the kernels of two checkpoints, :math:`\langle K, K_0 \rangle_F / (|K|_F |K_0|_F)`.

        Args:
            name: of a checkpoint.
            reference: of another one.
            samples: numbers of samples; None: all of them.
            centred: whether both kernels are centred, as in ``centred_alignment``.

        Returns:
            The estimate with a standard error by the jackknife over the groups. Numerator and squared denominators are unbiased, see
            ``sketches.comparison``.

        Raises:
            ValueError: the checkpoints are of different samples.

        Cost: 2 n^2 K flops for each of the two.
        """
        return alignment_of(self._products(name, reference, samples, centred=centred))

    def drift(self, name: str, reference: str, *, samples: Numbers = None) -> Estimate:
        """Estimate the relative change |K - K_0|_F / |K_0|_F of the kernel between two checkpoints.

        Args:
            name: of the later checkpoint.
            reference: of the earlier one, K_0.
            samples: numbers of samples; None: all of them.

        Returns:
            The root of an unbiased estimate of the square over another one; 0 where the first is negative. Below the standard error a
            drift is not told from none.

        Raises:
            ValueError: the checkpoints are of different samples.

        Cost: as ``alignment``.
        """
        return drift_of(self._products(name, reference, samples, centred=False))

    def lambda_min(self) -> NoReturn:
        """Refuse: the smallest eigenvalue is not estimated from sketches.

        Raises:
            ValueError: always; the message says why, and what to use.
        """
        refuse_lambda_min()

    def _products(self, name: str, reference: str, samples: Numbers, *, centred: bool) -> Products:
        found = {"a": self.checkpoint(name), "b": self.checkpoint(reference)}
        self._require_same_data(reference, found["b"], name, found["a"], argument="reference")
        chosen = chosen_samples(samples, found["a"].samples)
        arrays = {which: each.arrays() for which, each in found.items()}

        def read(which: str, part: slice) -> Tensor:
            rows, exponents = arrays[which]
            return decoded(rows[chosen[part]], exponents[chosen[part]])

        return products_of(self.settings.layout, len(chosen), read, centred=centred)

    def _require_same_data(
        self, one: str, first: Checkpoint, other: str, second: Checkpoint, argument: str = "rates"
    ) -> None:
        if first.data != second.data:
            raise ValueError(
                f"{argument}: {one!r} and {other!r} are of different samples, or of other batches; add both from one loader"
            )

    def _sketches(
        self,
        given: Sketches | Numbers,
        name: str | None,
        argument: str,
        max_memory: float | None,
    ) -> Sketches:
        if isinstance(given, Sketches):
            if given.identity != self.settings.identity:
                raise ValueError(f"{argument}: sketches of a store with other settings; use those of this one")
            return given
        if name is None:
            raise ValueError(f"name: None; need that of the checkpoint whose samples are meant by {argument}")
        count = len(chosen_samples(given, self.checkpoint(name).samples))
        require_room(8 * count * self.size, max_memory)
        return self.sketches(name, given)
