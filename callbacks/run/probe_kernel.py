"""``probe_kernel``: the kernel on the samples of a probe at one moment of a run, and its spectrum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_conv.callbacks.run.isolated import isolated
from lightning_conv.callbacks.run.moment import Moment
from lightning_conv.callbacks.run.probe import Probe
from lightning_conv.kernels.gram import KernelGram
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.products.precision import Precision
from lightning_conv.kernels.resolve import resolved_spectrum
from lightning_conv.linalg.spectrum import Spectrum
from lightning_conv.machine.processes import Processes
from lightning_conv.reporting.progress import Lines

PAUSE = 10.0
"""Seconds after which a measurement that takes long says how far it is; training has the bar."""


def probe_kernel(
    moment: Moment,
    probe: Probe,
    parameters: Sequence[str],
    *,
    step: int,
    per_layer: bool,
    start: Precision,
    highest: Precision,
    cotangents: Tensor | None,
    plans: Mapping[Precision, NTKPlan],
    processes: Processes | None = None,
) -> tuple[KernelGram, Spectrum]:
    """Return the kernel at one moment and its spectrum; nothing of the run moves.

    Args:
        moment: has the network and the samples.
        probe: says which kernel it is.
        parameters: names of those that it is over.
        step: optimizer steps done, for the line that shows the progress.
        per_layer: whether each layer's own kernel is wanted.
        start: precision to begin with.
        highest: the last precision that is tried.
        cotangents: s, (m, C), of a kernel of the loss gradients; None: it is another one.
        plans: what was read of the network for earlier kernels, by precision.
        processes: those among which it is divided; None: there is one.

    Raises:
        MemoryError: there is no room for it.
        ValueError: see ``ntk_gram``.

    Cost: one ``ntk_gram``, again in each higher precision that is needed.
    """
    with isolated():
        return resolved_spectrum(
            moment.network,
            moment.inputs,
            outputs="trace" if probe.outputs == "loss" else probe.outputs,
            cotangents=cotangents,
            parameters=parameters,
            per_layer=per_layer,
            start=start,
            highest=highest,
            precision=probe.precision,
            batch_norm=probe.batch_norm,
            max_memory=probe.max_memory,
            projections=probe.projections,
            seed=probe.seed,
            plans=plans,
            processes=processes,
            progress=Lines(rank_zero_info, f"Tangent kernel at step {step}", pause=PAUSE, predicts=True),
        )
