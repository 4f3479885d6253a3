"""``Processes``: the processes of ``torch.distributed`` among which a computation is divided; none waits for ever for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")

Block: TypeAlias = tuple[int, int, int, int]
"""Of a matrix: first row, the row after the last, first column, the column after the last."""

SECONDS = 120.0
"""How long a process waits for the others by default."""
PIECE = 2**18
"""Numbers of a matrix that are sent at once."""


class ProcessesError(RuntimeError):
    """Another process did not answer in time, or has ended; nothing more can be divided among them."""


class Processes:
    """All processes of the default group, and this one's place among them.

    All of them must make the same calls in the same order. A process in which a call fails tells the others, so that all raise the same
    error; one that does not answer within ``timeout`` is named in a ``ProcessesError``, after which every call raises it.

    Args:
        timeout: Seconds for which a process waits for the others; they need not be equally fast.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        sent: Bytes that this process has sent to others so far, as data of the computation.

    Raises:
        RuntimeError: There is no default group.
        ValueError: The timeout is not a positive number.

    Cost: a process group of its own; all processes make it together.
    """

    def __init__(self, timeout: float = SECONDS) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout!r}; need a positive number of seconds")
        if not dist.is_initialized():
            raise RuntimeError("Processes: torch.distributed has no process group; call init_process_group first")
        self._wait = timedelta(seconds=timeout)
        # Also beside nccl: it says in time who is missing, and waits on the processor's side.
        self._group: Any = dist.new_group(backend="gloo", timeout=self._wait)
        self.rank: int = dist.get_rank()
        self.world: int = dist.get_world_size()
        self.sent = 0
        self._broken = ""

    def share(self, count: int, rank: int | None = None) -> slice:
        """Return which of ``count`` things are this process's: consecutive ones, evenly divided.

        Args:
            count: Number of things.
            rank: Of the process; None: of this one.
        """
        own = self.rank if rank is None else rank
        return slice(count * own // self.world, count * (own + 1) // self.world)

    def together(self, compute: Callable[[], T]) -> T:
        """Return what this process computes, once all have computed theirs; ``compute`` must not communicate.

        Raises:
            Exception: It failed in one of the processes; raised in all of them, of the same type where it can be sent.
            ProcessesError: One does not answer.
        """
        made: list[T] = []
        error: Exception | None = None
        try:
            made.append(compute())
        except Exception as failed:
            error = failed
        found = self.gather(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        theirs = next((_of_another(rank, *each) for rank, each in enumerate(found) if each is not None), None)
        if theirs is not None:
            raise theirs
        return made[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order.

        Args:
            value: Anything that can be pickled.

        Raises:
            ProcessesError: One does not answer.
        """
        found: list[T | None] = [None] * self.world
        self._communicate(lambda: dist.all_gather_object(found, value, group=self._group))
        return found  # type: ignore[return-value]

    def once(self, compute: Callable[[], T]) -> T:
        """Return what the first process computes, in all of them; ``compute`` must not communicate.

        Raises:
            Exception: It failed, as in ``together``.
            ProcessesError: One does not answer.
        """
        made = self.together(lambda: compute() if self.rank == 0 else None)
        box = [made]
        self._communicate(lambda: dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]  # type: ignore[return-value]

    def add(self, tensor: Tensor) -> None:
        """Add up a tensor over the processes, in place.

        Args:
            tensor: Of the same shape and type in all of them.

        Raises:
            ProcessesError: One does not answer.
        """
        whole = tensor.detach().cpu().contiguous()
        self._communicate(lambda: dist.all_reduce(whole, group=self._group))
        self.sent += 2 * (self.world - 1) * whole.nbytes // self.world
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)

    def share_blocks(self, matrix: Tensor, blocks: Sequence[Sequence[Block]]) -> None:
        """Send the blocks of a matrix that this process has to all others, and fill in theirs.

        The numbers pass through pieces of memory that stay in the cache.

        Args:
            matrix: Of the same shape and type in all processes.
            blocks: Those that each process has, by its rank; no two overlap.

        Raises:
            ProcessesError: One does not answer.
        """
        pieces = [[matrix[rows, columns] for rows, columns in _pieces(of)] for of in blocks]
        room = max((each.numel() for of in pieces for each in of), default=0)
        leaving, arriving = (torch.empty(room, dtype=matrix.dtype) for _ in range(2))

        def swap() -> None:
            for distance in range(1, self.world):
                to, source = (self.rank - distance) % self.world, (self.rank + distance) % self.world
                for mine, theirs in zip_longest(pieces[self.rank], pieces[source]):
                    works = []
                    if theirs is not None:
                        works.append(dist.irecv(arriving[: theirs.numel()], source, group=self._group))
                    if mine is not None:
                        leaving[: mine.numel()].view(mine.shape).copy_(mine)
                        works.append(dist.isend(leaving[: mine.numel()], to, group=self._group))
                    _wait_for(works)
                    if theirs is not None:
                        theirs.copy_(arriving[: theirs.numel()].view(theirs.shape))

        self._communicate(swap)
        self.sent += (self.world - 1) * sum(each.numel() * each.element_size() for each in pieces[self.rank])

    def spread(self, tensor: Tensor, source: int = 0) -> Callable[[], None]:
        """Begin to fill a tensor, in place, with the numbers that one process has; call what is returned before they are used.

        The processes need not be here at the same time.

        Args:
            tensor: On the CPU, contiguous, of the same shape and type in all of them; it must stay as it is until then.
            source: Rank of the process.

        Raises:
            ProcessesError: One does not answer; raised by what is returned.
        """
        works: list[dist.Work | None] = []
        self._attempt(lambda: works.append(dist.broadcast(tensor.detach(), source, group=self._group, async_op=True)))
        self.sent += tensor.nbytes if self.rank == source else 0
        return lambda: self._attempt(lambda: _wait_for(works))

    def pass_on(self, parcels: Sequence[Sequence[Tensor]], *, to_first: bool) -> None:
        """Send tensors from the first process to the others, or from the others to the first, in place.

        Args:
            parcels: Those that each process gets or gives, by its rank; in each process its own suffice, in the first one all. On the CPU
                and contiguous.
            to_first: Whether the first process gets them.

        Raises:
            ProcessesError: One does not answer.
        """
        others = range(1, self.world) if self.rank == 0 else [self.rank]
        gets = to_first == (self.rank == 0)

        def move() -> None:
            works = []
            for other in others:
                for tensor in parcels[other]:
                    end = other if self.rank == 0 else 0
                    move = dist.irecv if gets else dist.isend
                    works.append(move(tensor.detach(), end, group=self._group))
            _wait_for(works)

        self._communicate(move)
        self.sent += 0 if gets else sum(tensor.nbytes for other in others for tensor in parcels[other])

    def exchange(
        self, tensors: Sequence[Tensor], to: int, source: int, shapes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Send tensors to one process, and return those that another one sends.

        Args:
            tensors: What is sent.
            to: Rank of the process that gets them.
            source: Rank of the process that sends.
            shapes: Shapes of what it sends; the types are those of ``tensors``.

        Raises:
            ProcessesError: One does not answer.
        """
        outgoing = [each.detach().cpu().contiguous() for each in tensors]
        incoming = [each.new_empty(tuple(shape)) for each, shape in zip(outgoing, shapes, strict=True)]

        def swap() -> None:
            works = [dist.isend(each, to, group=self._group, tag=k) for k, each in enumerate(outgoing)]
            works += [dist.irecv(each, source, group=self._group, tag=k) for k, each in enumerate(incoming)]
            _wait_for(works)

        self._communicate(swap)
        self.sent += sum(each.nbytes for each in outgoing)
        return [each.to(mine.device) for each, mine in zip(incoming, tensors, strict=True)]

    def _communicate(self, send: Callable[[], object]) -> None:
        """Communicate once all processes are here.

        Raises:
            ProcessesError: One of them is not, in time.
        """

        def meet() -> None:
            dist.monitored_barrier(self._group, timeout=self._wait, wait_all_ranks=True)
            send()

        self._attempt(meet)

    def _attempt(self, send: Callable[[], object]) -> None:
        """Communicate, and tell what an error means.

        Raises:
            ProcessesError: There was one, or has been one before.
        """
        if self._broken:
            raise ProcessesError(self._broken)
        try:
            # A mode that watches the computation for casts must not see the bytes of messages.
            with _disable_current_modes():
                send()
        except RuntimeError as error:  # also torch.distributed.DistBackendError
            self._broken = (
                f"process {self.rank} of {self.world}: another process has not answered within {self._wait.total_seconds():g} s or has "
                f"ended ({' '.join(str(error).split())[:300]})"
            )
            raise ProcessesError(self._broken) from error


def alone(compute: Callable[[], T]) -> T:
    """Return what is computed, where there are no other processes, in place of ``Processes.once`` and ``together``."""
    return compute()


def _wait_for(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None
        work.wait()


def _pieces(blocks: Sequence[Block]) -> Iterator[tuple[slice, slice]]:
    """Cut blocks into pieces of about ``PIECE`` numbers."""
    for first, last, left, right in blocks:
        step = max(1, PIECE // max(1, right - left))
        for start in range(first, last, step):
            yield slice(start, min(start + step, last)), slice(left, right)


def _of_another(rank: int, kind: type[Exception], message: str) -> Exception:
    """Return the error of another process, of its type where that takes a message only."""
    # One that was raised here because of a third process says so already.
    place = "" if message.startswith("process ") else f"process {rank}: "
    try:
        return kind(f"{place}{message}")
    except Exception:  # the type asks for more
        return RuntimeError(f"{place}{kind.__name__}: {message}")
