"""The cases: networks, numbers of samples and kinds of kernel. Every case has a tiny version for testing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from networks import sample


@dataclass(frozen=True)
class Case:
    """One kernel of one network."""

    name: str
    title: str
    description: Mapping[str, Any]  # of the network, see networks.py
    shape: tuple[int, ...]  # of the inputs
    classes: int
    outputs: str = "trace"  # or "full", "projected"
    sweep: bool = False  # leaves out methods that form the n x P Jacobian

    @property
    def size(self) -> int:
        """Number of rows of the matrix."""
        return self.shape[0] * (self.classes if self.outputs == "full" else 1)

    def message(self) -> dict[str, Any]:
        """Return the description of the case for a worker."""
        return {"description": dict(self.description), "classes": self.classes, "outputs": self.outputs}

    def write(self, path: Path, seed: int = 0) -> None:
        """Save weights and inputs, which depend on the seed alone, as an .npz file."""
        model, inputs = sample(self.description, self.shape, seed)
        arrays = {f"state.{name}": value.numpy() for name, value in model.state_dict().items()}
        np.savez(path, inputs=inputs.numpy(), **arrays)


def _mlp(name: str, title: str, widths: list[int], n: int, **options: Any) -> Case:
    description = {"network": "mlp", "widths": widths, "activation": "softplus"}
    return Case(name, title, description, (n, widths[0]), widths[-1], **options)


def cases(quick: bool) -> list[Case]:
    """Return all cases, at full size or tiny."""
    d, w, wide, n = (12, 16, 24, 7) if quick else (784, 1024, 4096, 512)
    n_wide = 9 if quick else 2000
    c = 3 if quick else 10
    image = (3, 8, 8) if quick else (3, 32, 32)
    small = {"network": "resnet", "width": 4 if quick else 16, "depth": 8, "outputs": c, "activation": "relu"}
    large = {"network": "resnet18_cifar", "width": 4 if quick else 64, "outputs": c, "activation": "relu"}
    vit = {"network": "vit_stack", "outputs": c}
    vit |= (
        {"layers": 2, "dim": 8, "heads": 2, "hidden": 12}
        if quick
        else {"layers": 12, "dim": 768, "heads": 12, "hidden": 3072}
    )
    tokens = (5, 8) if quick else (197, 768)
    recurrent = {"network": "lstm", "features": 8, "hidden": 6 if quick else 128, "outputs": c}
    n8, n18, n18_full, n_vit = (6, 4, 3, 3) if quick else (256, 64, 16, 4)
    many = 20 if quick else 1000
    label = f"MLP {d}-{w}-{w}"
    found = [
        _mlp("mlp-single", f"{label}-1, one output, n = {n}", [d, w, w, 1], n),
        _mlp("mlp-trace", f"{label}-{c}, trace, n = {n}", [d, w, w, c], n),
        _mlp("mlp-full", f"{label}-{c}, full {n * c} x {n * c}", [d, w, w, c], n, outputs="full"),
        _mlp("mlp-wide", f"MLP {d}-{wide}-{wide}-1, n = {n_wide}", [d, wide, wide, 1], n_wide),
        Case("resnet8-trace", f"ResNet-8 width {small['width']}, trace, n = {n8}", small, (n8, *image), c),
        Case("resnet18-full", f"ResNet-18, full {n18_full * c} x {n18_full * c}", large, (n18_full, *image), c, "full"),
        Case("resnet18-trace", f"ResNet-18, trace, n = {n18}", large, (n18, *image), c),
        Case("vit-trace", f"encoder {vit['layers']} x {vit['dim']}, trace, n = {n_vit}", vit, (n_vit, *tokens), c),
        Case("lstm-trace", f"LSTM {recurrent['hidden']} on digit rows, trace, n = {n}", recurrent, (n, 8, 8), c),
        _mlp("classes-trace", f"{label}-{many}, trace, n = {n}", [d, w, w, many], n, sweep=True),
        _mlp(
            "classes-projected",
            f"{label}-{many}, projected, n = {n}",
            [d, w, w, many],
            n,
            outputs="projected",
            sweep=True,
        ),
    ]
    found += [
        _mlp(f"width-{width}", f"MLP {d}-{width}-{width}-1, n = {n}", [d, width, width, 1], n, sweep=True)
        for width in ((4, 40) if quick else (256, 2048, 4096, 8192))
    ]
    return found + [
        _mlp(f"samples-{count}", f"{label}-1, n = {count}", [d, w, w, 1], count, sweep=True)
        for count in ((3, 20) if quick else (128, 2048, 8192))
    ]


def agreement_cases() -> list[Case]:
    """Return small smooth networks, whose float64 results differ by rounding only."""
    mlp = {"network": "mlp", "widths": [12, 16, 24, 3], "activation": "softplus"}
    small = {"network": "resnet", "width": 4, "depth": 8, "outputs": 3, "activation": "softplus"}
    large = {"network": "resnet18_cifar", "width": 3, "outputs": 2, "activation": "softplus"}
    vit = {"network": "vit_stack", "layers": 2, "dim": 8, "heads": 2, "hidden": 12, "outputs": 3}
    recurrent = {"network": "lstm", "features": 8, "hidden": 6, "outputs": 3}
    found = []
    for outputs in ("trace", "full"):
        found += [
            Case(f"mlp-{outputs}", "MLP", mlp, (7, 12), 3, outputs),
            Case(f"resnet8-{outputs}", "ResNet-8", small, (5, 3, 8, 8), 3, outputs),
            Case(f"resnet18-{outputs}", "ResNet-18", large, (3, 3, 8, 8), 2, outputs),
            Case(f"vit-{outputs}", "encoder", vit, (4, 5, 8), 3, outputs),
            Case(f"lstm-{outputs}", "LSTM", recurrent, (6, 8, 8), 3, outputs),
        ]
    return found
