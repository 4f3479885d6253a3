"""The processes of a run: one, or several under DDP. Work is divided among them, decisions are made once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_conv.callbacks.run.guarded import attempted
from lightning_conv.machine.processes import SECONDS, Processes

T = TypeVar("T")


class Ranks:
    """The processes of a run, and this one's place among them.

    All ranks must call the methods that communicate, in the same order.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self.rank: int = trainer.global_rank
        self.world: int = trainer.world_size

    def share(self, start: int, stop: int) -> range:
        """Return which of the samples start, ..., stop - 1 this rank computes: consecutive ones, evenly divided."""
        count = stop - start
        return range(start + count * self.rank // self.world, start + count * (self.rank + 1) // self.world)

    def broadcast(self, value: T) -> T:
        """Return the value that rank 0 has."""
        return value if self.world == 1 else self._strategy.broadcast(value)

    def gather(self, compute: Callable[[], T]) -> list[T]:
        """Return what each rank computes, in the order of the ranks, on all of them.

        Raises:
            RuntimeError: the computation failed on one of several ranks; raised on all, so that none waits for another.
        """
        if self.world == 1:
            return [compute()]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, _tried(compute))
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error]
        if failed:
            raise RuntimeError("; ".join(failed))
        return [value for value, _ in found]

    def alike(self, compute: Callable[[], T]) -> T:
        """Return what this rank computes, once all have computed theirs; ``compute`` must not communicate.

        Raises:
            RuntimeError: the computation failed on one of several ranks; raised on all of them.
        """
        made: list[T] = []
        self.gather(lambda: made.append(compute()))
        return made[0]

    def once(self, compute: Callable[[], T]) -> T:
        """Return what rank 0 computes, on all ranks; ``compute`` must not communicate.

        Raises:
            RuntimeError: the computation failed; raised on all ranks.
        """
        if self.world == 1:
            return compute()
        value, failed = self.broadcast(_tried(compute) if self.rank == 0 else (None, ""))
        if failed:
            raise RuntimeError(failed)
        return value  # type: ignore[return-value]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        if self.world == 1:
            return value
        reduced = self._strategy.reduce(value.clone(), reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    @torch.no_grad()
    def agree_on(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0.

        Under DDP the ranks' BatchNorm statistics differ until the next forward pass.
        """
        if self.world == 1:
            return
        for tensor in tensors.values():
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)

    def rewrap(self) -> None:
        """Wrap the module in ``DistributedDataParallel`` anew.

        Its reducer waits for the gradients of exactly those parameters that were trainable when it was made; after some
        have been frozen it would wait for ever. The old wrapper removes its hooks when it is collected, which must
        happen at once.
        """
        strategy = self._strategy
        if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, nn.parallel.DistributedDataParallel):
            return
        strategy.model = strategy.lightning_module
        gc.collect()
        strategy.configure_ddp()


def _tried(compute: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result and an empty string, or None and the error as words, which the caller raises on all ranks."""
    made: T | None = None
    with attempted(Exception) as attempt:
        made = compute()
    return made, attempt.reason


_made: WeakKeyDictionary[pl.Trainer, dict[float, Processes]] = WeakKeyDictionary()
"""One group of processes for each run and timeout: making one takes all of them, and none is ever given back."""


def processes_of(trainer: pl.Trainer, timeout: float = SECONDS) -> Processes | None:
    """Return the processes among which a computation is divided: those of DDP, whose weights are equal; None: there is one process.

    All ranks call this together.

    Args:
        trainer: Trainer of the run.
        timeout: Seconds for which each waits for the others.
    """
    if trainer.world_size == 1 or not isinstance(trainer.strategy, DDPStrategy):
        return None
    made = _made.setdefault(trainer, {})
    if timeout not in made:
        made[timeout] = Processes(timeout)
    return made[timeout]


def require_whole_copies(trainer: pl.Trainer, name: str) -> None:
    """Refuse a strategy that divides the parameters among devices.

    Args:
        trainer: Trainer of the run.
        name: Of the callback.

    Raises:
        MisconfigurationException: It does.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{name}: {type(trainer.strategy).__name__} shards the parameters, and a kernel needs all of them on one device; use a single "
            "device or DDP"
        )
