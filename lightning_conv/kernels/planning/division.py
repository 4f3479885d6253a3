"""``Division``: how the passes of a plan are divided among processes, and what they send to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.planning.sizes import MIRRORED

By: TypeAlias = Literal["outputs", "samples"]

BYTES_PER_FLOP = 0.02
"""Bytes that travel between processes in the time of a flop of a matrix product: 1 GB/s beside 50 Gflop/s."""

GLOO_BYTE = 1.4e-9
"""Seconds per byte that is sent, by gloo from the memory of the host: as docs/results/scale_model.md has it, on one machine."""


@dataclass(frozen=True)
class Division:
    """How a kernel is divided among processes.

    Attributes:
        by: ``"outputs"``: each has some of the outputs of all samples, and the matrices are added up. ``"samples"``: each has some of the
            samples, whose factors travel.
        processes: Their number.
        sent: Bytes that each process sends.
        share: Part of the flops of passes and products that a process has.
    """

    by: By
    processes: int
    sent: int
    share: float

    def __str__(self) -> str:
        return (
            f"divided by {self.by} among {self.processes} processes: {self.share:.0%} of the flops and {self.sent / 2**20:.1f} MiB "
            "sent by each"
        )


def division(
    found: Sequence[Contribution],
    problem: Problem,
    network: tuple[float, float],
    processes: int,
    rate: float | None = None,
) -> Division | None:
    """Return the cheaper way to divide a kernel whose samples do not couple; None: each process alone is faster than all together.

    By outputs the forward passes and what the products have of the inputs alone are repeated in each process, and n x m numbers in float64
    are added up. By samples everything is divided, each process sends its factors to half of the others (to all others where there are
    two sets of samples), and then its blocks of the matrix to all. Of gradients that are formed late each gets a share of the channels, and
    the matrices are added up.

    Args:
        found: The contributions of the plan.
        problem: The sizes of the kernel.
        network: Flops of a forward and a backward pass of one sample.
        processes: Their number W.
        rate: flops per second of each; None: on processors, where dividing is taken to pay. A GPU computes most kernels in less time than
            gloo takes to send their factors through the memory of the host.
    """
    columns = problem.others or problem.samples
    stride = 1 if problem.trace else problem.outputs
    added = int(2 * 8 * problem.samples * columns * stride**2 * (processes - 1) / processes)
    forward, backward = network
    passes = problem.rows * (forward + problem.outputs * backward)
    products = sum(each.flops for each in found)
    total = passes + products
    symmetric = problem.others is None
    # By pairs: of the last one of an even number one process sends all and the other one half.
    partners = processes // 2 if symmetric else processes - 1
    late = [each for each in found if symmetric and each.formed_late]  # their channels are divided
    factors = sum(each.sent_bytes(problem.outputs) for each in found if each not in late) * columns // processes
    channels = sum(each.sent_bytes(0) + problem.outputs * each.output_bytes // processes for each in late) * (
        columns // processes
    )
    mine = problem.samples * columns // processes
    if symmetric:  # half of the matrix, and the corners of the strips of the process's own block
        own = problem.samples // processes
        mine = mine // 2 + own * min(MIRRORED, own) // 2
    blocks = added if late else 8 * (processes - 1) * mine * stride**2
    travelling = partners * factors + (processes - 1) * channels
    ways = [Division("samples", processes, blocks + travelling, 1 / processes)]
    if problem.trace and problem.outputs >= processes:
        largest = -(-problem.outputs // processes) / problem.outputs
        alone = problem.rows * forward + sum(each.flops for each in found) / (problem.outputs + 1)
        divided = alone + largest * (total - alone)
        ways.append(Division("outputs", processes, added, divided / total if total else 1.0))
    in_a_flop = BYTES_PER_FLOP if rate is None else 1 / (rate * GLOO_BYTE)

    def flops(one: Division) -> float:
        """Return how many flops take as long."""
        return one.share * total + one.sent / in_a_flop

    best = min(ways, key=flops)
    return best if rate is None or flops(best) < total else None
