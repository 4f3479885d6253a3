"""``resolved_spectrum``: a kernel in the lowest precision in which lambda_min stands clear of its rounding errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lightning_conv.kernels.gram import KernelGram, Outputs, ntk_gram
from lightning_conv.kernels.planning.plan import NTKPlan
from lightning_conv.kernels.products.precision import PRECISIONS, Precision
from lightning_conv.kernels.spectrum import kernel_spectrum
from lightning_conv.linalg.eigenvalues.bounded import Bounded
from lightning_conv.linalg.spectrum import Method, Spectrum
from lightning_conv.machine.processes import Processes
from lightning_conv.networks.evaluation import BatchNormMode
from lightning_conv.networks.inputs import Inputs
from lightning_conv.networks.origins import NoSuchPathError
from lightning_conv.networks.sharded import agreed, is_sharded
from lightning_conv.reporting.progress import Report


def resolved_spectrum(
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: Outputs = "trace",
    cotangents: Tensor | None = None,
    parameters: Sequence[str] | str | None = None,
    per_layer: bool = False,
    start: Precision = "fast",
    highest: Precision = "certified",
    precision: Precision | None = None,
    batch_norm: BatchNormMode = "eval",
    max_memory: float | None = None,
    method: Method = "dense",
    projections: int = 16,
    seed: int = 0,
    plans: Mapping[Precision, NTKPlan] | None = None,
    progress: bool | Report | None = None,
    processes: Processes | None = None,
) -> tuple[KernelGram, Spectrum]:
    """Compute a kernel and its spectrum, in higher and higher precision until lambda_min is well above its error.

    The precisions are ``"fast"``, ``"exact"`` and ``"certified"``, in this order. The first one with
    ``lambda_min.resolved`` (an error of at most a tenth of the value to either side) is returned. If the last one does
    not resolve lambda_min either, its result is returned, with a lower bound of 0. A network that cannot be evaluated in float64,
    since its forward makes numbers in float32, ends at ``"exact"``; ``lambda_min.reason`` then names the place.

    Args:
        model: see ``ntk_gram``.
        inputs: see ``ntk_gram``.
        outputs: see ``ntk_gram``.
        cotangents: see ``ntk_gram``.
        parameters: see ``ntk_gram``.
        per_layer: see ``ntk_gram``.
        start: precision to begin with, such as the one that was needed a few steps ago.
        highest: the last precision that is tried, where a higher one takes too long.
        precision: the only precision to use, whether it resolves lambda_min or not; None: as described above.
        batch_norm: see ``ntk_gram``.
        max_memory: see ``ntk_gram``.
        method: see ``kernel_spectrum``.
        projections: see ``ntk_gram``.
        seed: see ``ntk_gram``.
        plans: ``KernelGram.plan`` of earlier kernels of the same network at other weights, or on other samples, by precision. The network
            is then not read again, but its rounding is measured. A plan that does not fit any more is left out.
        progress: see ``ntk_gram``.
        processes: see ``ntk_gram``; the first of them computes the spectrum.

    Returns:
        The last Gram matrix, whose ``precision`` tells which one was needed, and its spectrum.

    Raises:
        NoSuchPathError: with ``precision="certified"``, for such a network; or a network of parameters in 16 bits whose forward cannot
            be evaluated in float32.
    """

    def found(each: Precision) -> tuple[KernelGram, Spectrum]:
        # What was read in one precision, or for fewer samples, holds in another one.
        plan = plans.get(each, next(iter(plans.values()))) if plans else None
        try:
            return computed(each, plan)
        except ValueError as error:
            # Of a sharded module another process may not have failed, and would wait for passes that are not made again.
            if plan is None or (is_sharded(model) and not str(error).startswith("plan:")):
                raise
            return computed(each, None)

    def computed(each: Precision, plan: NTKPlan | None) -> tuple[KernelGram, Spectrum]:
        gram = ntk_gram(
            model,
            inputs,
            plan=plan,
            remeasure=True,
            outputs=outputs,
            cotangents=cotangents,
            parameters=parameters,
            per_layer=per_layer,
            precision=each,
            batch_norm=batch_norm,
            max_memory=max_memory,
            projections=projections,
            seed=seed,
            progress=progress,
            processes=processes,
        )
        if processes is None:
            spectrum = kernel_spectrum(gram, method=method)
            if is_sharded(model):  # whether another pass follows must be the same for all
                spectrum = replace(spectrum, lambda_min=agreed(model, spectrum.lambda_min))
            return gram, spectrum
        return gram, processes.once(lambda: kernel_spectrum(gram, method=method))

    if precision is not None:
        return found(precision)
    last: tuple[KernelGram, Spectrum] | None = None
    stop = PRECISIONS.index(highest)
    for each in PRECISIONS[min(PRECISIONS.index(start), stop) : stop + 1]:
        try:
            last = found(each)
        except NoSuchPathError as error:
            if each != "certified":
                raise
            gram, spectrum = last or found("exact")
            # The bounds stand; why nothing finer follows is said with them.
            return gram, replace(spectrum, lambda_min=_explained(spectrum.lambda_min, error))
        if last[1].lambda_min.resolved:
            break
    assert last is not None
    return last


def _explained(bounded: Bounded, error: NoSuchPathError) -> Bounded:
    return replace(bounded, certified=False, reason="; ".join(filter(None, (bounded.reason, str(error)))))
