"""Compare lambda_min with a verified lower bound to torch.linalg.eigvalsh; write docs/results/lambda_min.md and .json."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ntk_bench.calibration import processor
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_conv import kernel_spectrum
from lightning_conv.linalg.eigenvalues import smallest_eigenvalue
from lightning_conv.reporting.markdown import markdown_table

SIZES = (500, 1000, 2000, 4000, 8000)
RESULTS = Path(__file__).parent.parent / "docs" / "results"


def softplus_gram(data: Tensor, sharpness: float, generator: torch.Generator) -> Tensor:
    """Build the Gram matrix of 5/4 n random softplus features with a bias: the last layer's kernel of a wide network."""
    samples, inputs = data.shape
    width = samples + samples // 4
    weights = torch.randn(inputs, width, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.softplus(data @ weights, beta=sharpness) / width**0.5
    return symmetric(features @ features.T + 1)


def reflected(eigenvalues: Tensor, generator: torch.Generator) -> Tensor:
    """Build a dense matrix with these eigenvalues by three Householder reflections of the diagonal one, O(n^2)."""
    matrix = torch.diag(eigenvalues)
    for _ in range(3):
        normal = torch.randn(len(eigenvalues), generator=generator, dtype=torch.float64)
        normal /= normal.norm()
        matrix -= 2 * torch.outer(normal, normal @ matrix)
        matrix -= 2 * torch.outer(matrix @ normal, normal)
    return symmetric(matrix)


def symmetric(matrix: Tensor) -> Tensor:
    """Remove the rounding that differs between the two triangles."""
    return (matrix + matrix.T) / 2


def cases(size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices of about this size, one at a time."""
    generator = torch.Generator().manual_seed(size)
    digits = torch.tensor(load_digits().data / 16, dtype=torch.float64)
    if size <= 2000:
        yield "softplus(100) features of digits", softplus_gram(digits[:size], 100.0, generator)
    sphere = torch.nn.functional.normalize(torch.randn(size, 64, generator=generator, dtype=torch.float64))
    yield "softplus features, random data", softplus_gram(sphere, 1.0, generator)
    factor = torch.randn(size, size + size // 4, generator=generator, dtype=torch.float64)
    yield "Wishart (flat spectrum)", symmetric(factor @ factor.T) / size
    del factor
    yield "eigenvalues 1 ... 1e-8", reflected(torch.logspace(0, -8, size, dtype=torch.float64), generator)


def interleaved(methods: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, measured in turn so that a slow phase of the machine affects all; one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def measure(name: str, matrix: Tensor, repeats: int) -> dict[str, object]:
    """Measure one row: the seconds of the three ways, and the interval beside the value of eigvalsh."""
    methods: dict[str, Callable[[], object]] = {
        "eigvalsh": lambda: torch.linalg.eigvalsh(matrix),
        "smallest_eigenvalue": lambda: smallest_eigenvalue(matrix),
        "kernel_spectrum": lambda: kernel_spectrum(matrix, method="extremes"),
    }
    seconds = interleaved(methods, repeats)
    values = torch.linalg.eigvalsh(matrix)
    spectrum = kernel_spectrum(matrix, method="extremes")
    smallest, largest = spectrum.lambda_min, spectrum.lambda_max
    return {
        "case": name,
        "n": len(matrix),
        "repeats": repeats,
        "seconds": seconds,
        "speedup_smallest": seconds["eigvalsh"] / seconds["smallest_eigenvalue"],
        "speedup_spectrum": seconds["eigvalsh"] / seconds["kernel_spectrum"],
        "eigvalsh": [float(values[0]), float(values[-1])],
        "lambda_min": vars(smallest),
        "lambda_max": vars(largest),
    }


COLUMNS = (
    "n",
    "matrix",
    "`eigvalsh`",
    "`smallest_eigenvalue`",
    "faster",
    "`kernel_spectrum`",
    "faster",
    "lambda_min",
    "width",
    "excess",
)


def cells(row: dict[str, Any]) -> list[str]:
    """Format a row of the table."""
    seconds, low, high = row["seconds"], row["lambda_min"], row["lambda_max"]
    width = (low["upper"] - low["lower"]) / abs(low["value"])
    excess = high["upper"] / high["lower"] - 1
    return [
        f"{row['n']}",
        row["case"],
        f"{seconds['eigvalsh']:.3f}",
        f"{seconds['smallest_eigenvalue']:.3f}",
        f"**{row['speedup_smallest']:.1f}**",
        f"{seconds['kernel_spectrum']:.3f}",
        f"**{row['speedup_spectrum']:.1f}**",
        f"{low['value']:.3e}",
        f"{width:.0e}",
        f"{excess:.0e}",
    ]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition: whether it runs at all")
    parser.add_argument("--sizes", type=int, nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for lambda_min.md and lambda_min.json")
    options = parser.parse_args()
    rows = []
    for size in options.sizes or ((200, 600) if options.quick else SIZES):
        repeats = 1 if options.quick else 15 if size <= 1000 else 7 if size <= 2000 else 3
        for name, matrix in cases(size):
            rows.append(measure(name, matrix, repeats))
            print(*cells(rows[-1]), sep="  ", flush=True)
    text = f"""# The outermost eigenvalues, measured

Seconds, median of interleaved runs in float64, made by `python benchmarks/lambda_min.py` on {date.today()}, {processor()},
{torch.get_num_threads()} threads, torch {torch.__version__}. `eigvalsh` gives values without bounds. `smallest_eigenvalue` gives lambda_min
with proven bounds, `kernel_spectrum(method="extremes")` lambda_min and lambda_max with proven bounds; "faster" is `eigvalsh`
over each. Width and excess: relative width of the lambda_min interval, and of the lambda_max interval.

{markdown_table(COLUMNS, map(cells, rows))}
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lambda_min.md").write_text(text)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    (options.out / "lambda_min.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
