"""Measure cost and error of the three precisions on the recipe's network and real digits; write docs/results/precision.md."""

from __future__ import annotations

import statistics
import time
from datetime import date
from pathlib import Path

import torch
from ntk_bench.calibration import processor
from sklearn.datasets import load_digits

from lightning_conv import KernelGram, kernel_spectrum, ntk_gram
from lightning_conv.kernels.products.precision import PRECISIONS
from lightning_conv.recipes import wide_fc
from lightning_conv.reporting.markdown import markdown_table

SAMPLES = 128
WIDTH = 1581
REPEATS = 15
PAGE = Path(__file__).parent.parent / "docs" / "results" / "precision.md"
COLUMNS = (
    "precision",
    "time",
    "floor (proven)",
    "error of the products",
    "estimated error of J (relative)",
    "distance to certified",
    "lambda_min",
)


def main() -> None:
    """Measure in turn, so that a slow phase of the machine affects all precisions, and write the page."""
    torch.manual_seed(0)
    network = wide_fc(64, 10, width=WIDTH)
    inputs = torch.tensor(load_digits().data[:SAMPLES] / 16, dtype=torch.float32)
    grams: dict[str, KernelGram] = {p: ntk_gram(network, inputs, precision=p) for p in PRECISIONS}
    seconds: dict[str, list[float]] = {p: [] for p in PRECISIONS}
    for _ in range(REPEATS):
        for precision in PRECISIONS:
            start = time.perf_counter()
            ntk_gram(network, inputs, precision=precision)
            seconds[precision].append(time.perf_counter() - start)
    best = grams["certified"]
    rows = []
    for precision, gram in grams.items():
        smallest = kernel_spectrum(gram).lambda_min
        products = torch.linalg.matrix_norm(gram.matrix - grams["exact"].matrix, 2) if precision == "fast" else 0.0
        error = torch.linalg.matrix_norm(gram.matrix - best.matrix, 2)
        rows.append(
            [
                precision,
                f"{statistics.median(seconds[precision]) / statistics.median(seconds['fast']):.2f}",
                f"{gram.floor / gram.trace:.1e}",
                f"{float(products) / gram.trace:.1e}",
                f"{gram.jacobian_error:.1e}",
                f"{float(error) / gram.trace:.1e}",
                f"{smallest.value:.6f} in [{smallest.lower:.6f}, {smallest.upper:.6f}]",
            ]
        )
    text = f"""# The three precisions, measured

Trace kernel of `wide_fc(64, 10, width={WIDTH})` at initialisation on {SAMPLES} digits, float32 model. Made by
`python benchmarks/precision.py` on {date.today()}, {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}.

Errors are spectral norms relative to the trace. Time: median of {REPEATS} interleaved runs relative to `fast`
({statistics.median(seconds["fast"]) * 1e3:.0f} ms here).

{markdown_table(COLUMNS, rows)}
"""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
