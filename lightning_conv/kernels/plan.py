"""The plan of a kernel: what is computed how, in which passes, with how many bytes and flops, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_conv.kernels.planning.costs import Contribution, Problem
from lightning_conv.kernels.planning.memory import mebibytes
from lightning_conv.kernels.planning.pass_flops import PassCost
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.reading.discovery import Anatomy


@dataclass(frozen=True)
class Pass:
    """One run over the samples: the contributions whose factors are held together."""

    contributions: tuple[int, ...]
    outputs: tuple[int, int]  # range of the outputs (or projections) it covers
    rows: int  # samples whose factors are held at once; fewer than n: in pairs of blocks
    tile: int  # samples that go through the network together
    bytes: int  # held by its factors, and by torch.func while it forms them
    general: bool


@dataclass(frozen=True)
class NTKPlan:
    """How ``ntk_gram`` will compute a kernel and what it will cost."""

    problem: Problem
    contributions: tuple[Contribution, ...]
    passes: tuple[Pass, ...]
    outputs_at_once: int
    workspace: int
    """Bytes of a piece of memory in which gradients are formed."""
    precision: Precision
    flops: float
    """Of the forward and backward passes and all products, a multiplication and an addition counted as two; not of reading the
    network."""
    bytes: int
    """Peak of the memory that is taken beyond what was taken before, the result included."""
    result_bytes: int
    reading_bytes: int
    """Of ``bytes``: what looking at the network takes before the passes begin. ``max_memory`` does not bound it."""
    seconds: float
    """Of a call of ``ntk_gram``: ``reading_seconds``, and the flops at the rate of a matrix product measured in this process (the
    backward passes of a whole batch at the speed of one that was timed); within a factor of 3 as a rule."""
    reading_seconds: float
    """Of ``seconds``: what looking at the network took, just now. Zero for a kernel with ``plan=``, and not paid by the next one."""
    max_memory: int
    parameters: tuple[str, ...] = field(repr=False)
    """Names, in the order in which they were read."""
    reading: Anatomy = field(repr=False)
    """What was found in the network."""
    general_pass: PassCost | None = field(repr=False)
    """What a pass costs for the parameters without a rule."""

    def __str__(self) -> str:
        lines = [
            f"NTK of {self.problem.samples} samples x {self.problem.outputs} outputs: {self.flops / 1e9:.1f} Gflop, "
            f"at most {mebibytes(self.bytes)} of {mebibytes(self.max_memory)}, about {self.seconds:.2g} s "
            f"({self.reading_seconds:.2g} s of them to read the network), {len(self.passes)} pass(es)"
        ]
        width = max((len(c.layer) for c in self.contributions), default=0)
        lines += [
            f"  {c.layer:<{width}}  {c.way:<20}  {c.flops / 1e9:9.3f} Gflop  {c.kind}" for c in self.contributions
        ]
        if self.reading.unused:
            lines.append(f"  no sample reaches {', '.join(self.reading.unused)}")
        return "\n".join(lines)
