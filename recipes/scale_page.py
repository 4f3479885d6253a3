"""``show_scale``: what a measurement would take on many ranks, as a table for a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from lightning_conv.callbacks import ScaleCheck
from lightning_conv.health.wording import counted
from lightning_conv.machine.memory import mebibytes
from lightning_conv.reporting.terminal import print_table

DIVIDED = {
    "outputs": "by outputs: every rank has some of the outputs of all samples, and the matrices are added up",
    "samples": "by samples: every rank has some of the samples, and the factors of the layers travel",
    "nothing": (
        "it is not, and each rank does all of it: there is one rank, there are fewer samples than ranks, or sending would take longer than "
        "computing"
    ),
}

PARTS = {
    "matrices": "products of large matrices",
    "small": "convolutions, small products",
    "moved": "elementwise, memory",
    "sent": "bytes sent",
    "message": "messages",
    "fixed": "of any size",
    "eigenvalues": "eigenvalues",
    "gathered": "gathered parameters",
}


def show_scale(scale: ScaleCheck, to: Console, of: str = "") -> None:
    """Print what was predicted.

    Args:
        scale: The prediction.
        to: The console.
        of: Whose measurement it is, such as ``" of adam"``; empty: that of the only network.
    """
    fits = scale.parameters + scale.memory <= scale.device_memory
    rows = [
        ("on", f"{scale.device}: {counted(scale.ranks, 'rank')} on {counted(scale.nodes, 'node')}"),
        ("a measurement", f"{written(scale.seconds)}, {_of_steps(scale)}"),
        ("divided", DIVIDED[scale.by]),
        (
            "memory of a rank",
            f"at most {mebibytes(scale.memory)} beside {mebibytes(scale.parameters)} of parameters; "
            f"{'fits into' if fits else 'does not fit into'} {mebibytes(scale.device_memory)}",
        ),
        ("sent by a rank", f"{mebibytes(scale.sent)} in {counted(scale.messages, 'message')}"),
    ]
    if scale.ranks > 1 and scale.divided > scale.seconds:
        rows.append(
            ("if it were divided", f"{written(scale.divided)}, since factors go through the memory of the host")
        )
    if scale.ranks > 1:
        rows.append(("over NVLink or InfiniBand", f"{written(scale.direct)}, if the engine sent factors that way"))
    print_table(to, ("", ""), rows, title=f"Predicted for {counted(scale.ranks, 'rank')}{of}")
    parts = [
        (PARTS[name], written(seconds), written(scale.same.get(name, 0.0)))
        for name, seconds in scale.parts.items()
        if seconds
    ]
    print_table(to, ("seconds of a rank for", "all", "whatever N"), parts)
    to.print(Text(f"rates: {scale.source}; docs/scale.md says what is assumed"))


def _of_steps(scale: ScaleCheck) -> str:
    if scale.share is None or scale.step is None:
        return "beside training steps of unknown length: the size of a batch is not known"
    return f"{scale.share:.3g} times a training step of {written(scale.step)} (kernel launches not counted)"


def written(seconds: float) -> str:
    """Return a duration in words.

    Args:
        seconds: Its seconds; NaN: not known.
    """
    if math.isnan(seconds):
        return "an unknown time"
    if 0 < seconds < 0.01:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
