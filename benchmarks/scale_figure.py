"""The pictures of docs/scale.md: what was predicted beside what was measured, and seconds against the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from scale_models import IMAGES, LEFT, PROJECTIONS, resnet_plan
from scale_score import Point

from lightning_conv.kernels.planning.prediction import predict
from lightning_conv.kernels.planning.scale import Rates
from lightning_conv.machine.devices import GPUS

COLOURS = {1: "#2171b5", 2: "#d95f02", 4: "#1b9e77"}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def draw_score(found: Sequence[Point], rates: Rates, path: Path) -> None:
    """Write the chart of predicted against measured seconds, with a band of 25 % around the diagonal."""
    figure = Figure(figsize=(6.4, 5.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    seconds = [each.seconds for each in found]
    ends = (0.8 * min(seconds), 1.25 * max(seconds))
    axes.fill_between(ends, [0.75 * each for each in ends], [1.25 * each for each in ends], color="0.9", label="25 %")
    axes.plot(ends, ends, color="0.6", linewidth=1)
    for ranks, colour in COLOURS.items():
        for fitted in (True, False):
            chosen = [each for each in found if each.ranks == ranks and each.case.fitted == fitted]
            axes.plot(
                [each.seconds for each in chosen],
                [rates.seconds(each.work) for each in chosen],
                "o",
                color=colour,
                fillstyle="none" if fitted else "full",
                label=f"{ranks} rank{'s' if ranks > 1 else ''}, {'fitted' if fitted else 'not fitted'}",
            )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set_xlabel("measured, s of the processor, slowest rank")
    axes.set_ylabel("predicted, s")
    axes.set_title("Kernels of sizes that the model was fitted on, and of others")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path)


def draw_ranks(path: Path, device: str = "h100") -> None:
    """Write the chart of a ResNet-50's measurement against the number of devices."""
    on = GPUS[device]
    plan = resnet_plan(IMAGES, LEFT * on.memory, projections=PROJECTIONS)
    found = [predict(plan, on, ranks) for ranks in RANKS]
    figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    lines = {
        "divided, sent by gloo": ("o-", "#d95f02", [each.divided for each in found]),
        "divided, if it were sent over NVLink and InfiniBand": ("o-", "#2171b5", [each.direct for each in found]),
        "as the engine does it": ("s--", "0.3", [each.seconds for each in found]),
    }
    for label, (style, colour, seconds) in lines.items():
        axes.plot(RANKS, seconds, style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(RANKS, [str(each) for each in RANKS])
    axes.set_xlabel(f"devices ({on.title}), one rank each, {on.per_node} in a node")
    axes.set_ylabel("predicted, s")
    axes.set_title(f"ResNet-50, trace kernel by {PROJECTIONS} projections, {IMAGES} images")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path)
