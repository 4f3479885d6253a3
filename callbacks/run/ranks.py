"""The processes of a run: one, or several under DDP. Work is divided among them, decisions are made once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """Who takes part in a run. Every method that communicates is called by all ranks, in the same order.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self.rank: int = trainer.global_rank
        self.world: int = trainer.world_size

    def share(self, start: int, stop: int) -> range:
        """The samples of start, ..., stop - 1 that this rank computes: consecutive ones, as many for each as can be."""
        count = stop - start
        return range(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)

    def broadcast(self, value: T) -> T:
        """What rank 0 has."""
        return value if self.world == 1 else self._strategy.broadcast(value)

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """What each rank computes, in their order, on all of them.

        Raises:
            RuntimeError: it went wrong on one of several ranks; raised on all of them, so that none waits for the others.
        """
        if self.world == 1:
            return [compute()]
        mine: tuple[T | None, str | None]
        try:
            mine = compute(), None
        except Exception as error:
            mine = None, f"{type(error).__name__}: {error}"
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error is not None]
        if failed:
            raise RuntimeError("; ".join(failed))
        return [value for value, _ in found]

    def alike(self, compute: Callable[[], T]) -> T:
        """What each rank computes for itself, where it went well on all of them; ``compute`` must not communicate.

        Raises:
            RuntimeError: it went wrong on one of several ranks; raised on all of them.
        """
        made: list[T] = []
        self.gather(lambda: made.append(compute()))
        return made[0]

    def once(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on all ranks; ``compute`` must not communicate.

        Raises:
            RuntimeError: it went wrong there; raised on all ranks.
        """
        if self.world == 1:
            return compute()
        made: tuple[T | None, str | None] = None, None
        if self.rank == 0:
            try:
                made = compute(), None
            except Exception as error:
                made = None, f"{type(error).__name__}: {error}"
        value, failed = self.broadcast(made)
        if failed is not None:
            raise RuntimeError(failed)
        return value  # type: ignore[return-value]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks."""
        if self.world == 1:
            return value
        reduced = self._strategy.reduce(value.clone(), reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    @torch.no_grad()
    def agree_on(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0: under DDP the BatchNorm statistics of the ranks differ until the next forward."""
        if self.world == 1:
            return
        for tensor in tensors.values():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)

    def rewrap(self) -> None:
        """Wrap the module in ``DistributedDataParallel`` anew.

        Its reducer waits for the gradients of exactly those parameters that were trainable when it was made; after some were
        frozen it would wait for ever. The old one takes its hooks along when it goes, so it has to go at once.
        """
        strategy = self._strategy
        if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            return
        strategy.model = strategy.lightning_module
        gc.collect()
        strategy.configure_ddp()


class Led:
    """Rank 0 leads a computation that asks for rows; the others compute their part of each as long as it does.

    Args:
        ranks: of the run.
        rows: ``rows(start, stop)``: computed together, by all ranks.
    """

    def __init__(self, ranks: Ranks, rows: Callable[[int, int], Tensor]) -> None:
        self._ranks, self._rows = ranks, rows

    def ask(self, start: int, stop: int) -> Tensor:
        """Rows start, ..., stop - 1, for rank 0."""
        self._ranks.broadcast((start, stop))
        return self._rows(start, stop)

    def run(self, lead: Callable[[], T]) -> T:
        """What ``lead`` returns on rank 0, where it may call ``ask``; on all ranks.

        Raises:
            RuntimeError: it went wrong; raised on all ranks.
        """

        def led() -> T:
            if self._ranks.rank == 0:
                with self._the_others_end():
                    return lead()
            while (asked := self._ranks.broadcast(None)) is not None:
                start, stop = asked
                try:
                    self._rows(start, stop)
                except Exception:  # raised on rank 0, too, which says so
                    continue
            return None  # type: ignore[return-value]

        if self._ranks.world == 1:
            return lead()
        failed: str | None = None
        made: T | None = None
        try:
            made = led()
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        made, failed = self._ranks.broadcast((made, failed))
        if failed is not None:
            raise RuntimeError(failed)
        return made  # type: ignore[return-value]

    @contextmanager
    def _the_others_end(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._ranks.broadcast(None)
