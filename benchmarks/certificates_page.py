"""The page that `certificates.py` writes from its records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from lightning_conv.reporting.markdown import markdown_table

HEADER = """# Certificates of the expressivity condition on MNIST, measured

Made by `python benchmarks/certificates.py` (see there for its options). Each row is one run; the table at the end tells its date,
machine and command. Networks are as initialised with seed 0: `wide_fc` is the recipe's network with PyTorch's own
initialisation and a softplus of sharpness 100 on pixels in [0, 1], without a narrow layer; `bn_resnet` is the recipe's network;
ResNet-18 is torchvision's with one input channel and `widen_head`. The wide layer has 1.1 n units. Memory is the process's own
at its peak, libraries and network included, without the pages of mapped files, which the system takes back when it needs them.
Seconds are wall-clock on a machine that had other work, for which the longest run was halted several times.

"""


def write_page(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the page of the records."""
    kinds = {kind: [row for row in rows if row["what"] == kind] for kind in ("distinct", "singular", "ranks")}
    for found in kinds.values():
        found.sort(key=lambda row: (row["network"], row["certificate"]["n"]))
    parts = [HEADER]
    if kinds["distinct"]:
        parts.append(_distinct(kinds["distinct"]))
    if kinds["singular"]:
        parts.append(_singular(kinds["singular"]))
        logs = sorted(path.parent.glob("certificates_*.log"))
        parts += [
            f"How far the run of {log.stem.split('_')[1]} samples was, and when: [log]({log.name}).\n\n" for log in logs
        ]
    if kinds["ranks"]:
        parts.append(_ranks(kinds["ranks"]))
    parts.append(_runs([row for found in kinds.values() for row in found]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts))


def _distinct(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "## `distinct`: rank n for almost every weight of the wide layer\n\n"
        "What enters the wide layer is computed in float64 and in float32 (for its rounding); predicted is the comparison of all pairs,\n"
        "of which most are never looked at.\n\n"
    )
    columns = (
        "network",
        "n",
        "enters",
        "verdict",
        "closest samples",
        "distance",
        "rounding allowed",
        "features",
        "predicted at most",
        "measured",
        "memory",
    )
    cells = []
    for row in rows:
        found = row["certificate"]
        cost, words = found["cost"], found["reason"].replace(",", "").split()
        cells.append(
            [
                row["network"],
                f"{found['n']}",
                f"{row['entering']}",
                f"**{found['verdict']}**",
                f"{words[1]}, {words[3]}",
                f"{found['distance']['value']:.4g}",
                f"{found['feature_error']:.1e}",
                f"{row['features_seconds']:.0f} s",
                f"{cost['predicted']:.0f} s",
                f"{cost['seconds']:.0f} s",
                _gib(row["peak"]["own"]),
            ]
        )
    return head + markdown_table(columns, cells) + "\n\n"


def _singular(rows: Sequence[dict[str, Any]]) -> str:
    head = (
        "## `singular`: rank n at these very weights\n\n"
        "Predicted and measured include computing the features. The proof reaches down to sigma_min / |h|_F of about 1e-6.\n\n"
    )
    columns = (
        "n",
        "m_H",
        "verdict",
        "sigma_min",
        "proven at least",
        "sigma_min / |h|_F",
        "predicted",
        "measured",
        "limit",
        "memory",
        "disk",
    )
    cells, points = [], []
    for row in rows:
        found = row["certificate"]
        cost, low, high = found["cost"], found["sigma_min"], found["sigma_max"]
        ratio = low["value"] / high["upper"]  # sigma_max is bounded by |[h, 1]|_F
        if ratio > 0:
            points.append((math.log(found["n"]), math.log(ratio)))
        predicted = f"{cost['predicted']:.0f} s" if cost["predicted"] else "-"
        cells.append(
            [
                f"{found['n']}",
                f"{found['width']}",
                f"**{found['verdict']}**",
                f"{low['value']:.3e}",
                f"{low['lower']:.3e}",
                f"{ratio:.2e}",
                predicted,
                f"{cost['seconds']:.0f} s",
                _gib(row["max_memory"]),
                _gib(row["peak"]["own"]),
                _gib(cost["disk_bytes"]),
            ]
        )
    lines = [head, markdown_table(columns, cells), "\n"]
    lines += [f"\nn = {row['certificate']['n']}: {row['remark']}\n" for row in rows if "remark" in row]
    if len(points) > 1:
        slope = linear_regression(*zip(*points, strict=True)).slope
        lines.append(f"\nsigma_min / |h|_F falls like n^{slope:.2f} over these (least squares of the logarithms).\n")
    return "".join(lines) + "\n"


def _ranks(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("n", "`matrix_rank`, float32", "`matrix_rank`, float64", "certified", "sigma_min", "of sigma_max")
    cells = []
    for row in rows:
        found, said = row["certificate"], row["matrix_rank"]
        low, high = found["sigma_min"], found["sigma_max"]
        cells.append(
            [
                f"{found['n']}",
                f"{said['torch.float32']}",
                f"{said['torch.float64']}",
                f"**{found['rank_lower']}** ({found['verdict']})",
                f"{low['value']:.2e}",
                f"{low['value'] / high['value']:.1e}",
            ]
        )
    head = "## What `torch.linalg.matrix_rank` says of the same features\n\n"
    return head + markdown_table(columns, cells) + "\n\n"


def _runs(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            f"{row['what']}, {row['network']}",
            f"{row['certificate']['n']}",
            row["date"],
            f"{row['processor']}, {row['threads']}",
            row["torch"],
            f"`{row['command']}`",
        ]
        for row in rows
    ]
    table = markdown_table(("what", "n", "date", "processor, threads", "torch", "command"), cells)
    return f"## Runs\n\n{table}\n"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count else "-"
