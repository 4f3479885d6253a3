"""``show_check``: what a check has found, in sections for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lightning_conv.callbacks import HeadCheck, NetworkCheck, RunCheck
from lightning_conv.callbacks.check.run_check import CostCheck
from lightning_conv.health.wording import counted
from lightning_conv.machine.memory import mebibytes
from lightning_conv.recipes.scale_page import show_scale, written
from lightning_conv.reporting.terminal import print_table

Row = tuple[str, str]


def show_check(found: RunCheck, to: Console) -> None:
    """Print what was found.

    Args:
        found: What `check_run` has returned.
        to: The console.
    """
    verdict = "everything can be measured" if found.ok else "something cannot be done"
    to.print(Text(f"{found.module}: {verdict}", style="bold green" if found.ok else "bold red"))
    for reason in found.refused:
        to.print(Text(f"refused: {reason}", style="red"))
    for network in found.networks:
        of = f" of {network.optimizer}" if network.optimizer else ""
        print_table(to, ("", ""), _observed(network), title=f"What is measured{of}")
        print_table(to, ("", ""), _cost(network.cost), title=f"What it costs{of}")
        if network.scale is not None:
            show_scale(network.scale, to, of)
        elif network.scale_missing:
            to.print(Text(f"not predicted{of}: {network.scale_missing}", style="yellow"))
        rows = [
            (each.paper, "no" if each.reasons else "as far as known", "; ".join(each.reasons))
            for each in network.theorems
        ]
        print_table(to, ("theorem of", "is about this run", "because"), rows, title=f"Theorems{of}")
    print_table(
        to, ("", ""), _head(found.head), title="The guard" if found.head.asked else "A guard, if there were one"
    )
    for note in found.notes:
        to.print(Text(f"note: {note}"))


def _observed(network: NetworkCheck) -> list[Row]:
    inputs = ", ".join(f"{name} {shape}".strip() for name, shape in network.inputs.items())
    of = "" if network.of is None else f" of {network.of:,}"
    return [
        ("by", ", ".join(network.callbacks)),
        ("network", f"{network.call} ({network.call_source})"),
        ("samples", f"{network.samples:,}{of}, of the shape {inputs}"),
        ("targets", network.targets or "none were found"),
        ("loss", network.loss),
        (
            "outputs of a sample",
            "known after the first measurement" if network.n_outputs is None else f"{network.n_outputs:,}",
        ),
        ("kernel", f"{network.kernel}, over {counted(network.weights, 'weight')}"),
    ]


def _cost(cost: CostCheck) -> list[Row]:
    first = f"{written(cost.first)}, made here"
    if cost.waits:
        first = f"about {written(cost.waits)}; it waits until the run is long enough for it (every_n_steps= asks for it at once)"
    if cost.every_n_steps is not None:
        when = f"at every multiple of {cost.every_n_steps} steps"
    elif cost.later:
        when = f"{cost.share:.0%} of the wall time is for them: about one in {written(cost.later / cost.share)}, and the last step"
    else:
        when = f"{cost.share:.0%} of the wall time is for them"
    later = f"about {written(cost.later)} each" if cost.later else "not known before the first one"
    rows = [("first measurement", first), ("later ones", f"{later}; {when}")]
    if cost.epoch:
        run = "" if cost.epochs is None else f"; {counted(cost.epochs, 'epoch')}: {written(cost.epoch * cost.epochs)}"
        rows.append(("an epoch", f"about {written(cost.epoch)} of forward and backward passes{run}"))
    if cost.memory is not None and cost.memory_allowed is not None:
        rows.append(
            ("memory of a kernel", f"at most {mebibytes(cost.memory)} of the {mebibytes(cost.memory_allowed)} allowed")
        )
    rows.append(
        (
            "to measure more",
            cost.choice or "all that was asked for is measured; Probe(size=..., outputs=...) asks for more",
        )
    )
    return rows


def _head(head: HeadCheck) -> list[Row]:
    if head.refused:
        return [("head", f"none: {head.refused}")]
    can = "can have" if head.is_wide_enough else "cannot have"
    return [
        ("head", head.name),
        ("last features", f"{head.features:,}: [h, 1] of {counted(head.rows, 'row')} {can} full rank"),
    ]
