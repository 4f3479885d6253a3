"""Fit and score the model of docs/scale.md on 1, 2 and 4 processes, predict large runs with it; write docs/results/scale_model.md.

``python benchmarks/scale_model.py`` measures the sweeps that docs/results/scale_model.json does not have yet, and writes the page. The
repetitions of a case are minutes apart, and the fastest counts: other work of the machine only adds.

    --sweeps N    sweeps over all cases, in 1, 2 and 4 processes each
    --rounds N    repetitions of a case in a sweep
    --page        write the page only
    --fresh       measure all anew
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ntk_bench.calibration import processor
from scale_cases import CASES, on_rank
from scale_figure import draw_ranks, draw_score
from scale_score import fitted, page, points

from lightning_conv.machine.devices import this_cpu

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WORLDS = (1, 2, 4)
MATRICES = (1000, 2000)
"""Sizes of the matrices whose eigenvalues are timed."""


def sweep(world: int, rounds: int) -> dict[str, list[Any]]:
    """Return what all cases took in so many processes: for each repetition, what each process has written down."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (world, folder, CASES, rounds), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return {case.name: list(zip(*(of[case.name] for of in ranks), strict=True)) for case in CASES}


def machine() -> dict[str, Any]:
    """Return what this processor does in a second by one thread: flops, bytes, and flops of eigenvalues."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = this_cpu()
    rates = []
    for size in MATRICES:
        made = torch.randn(size, size, dtype=torch.float64)
        begun = time.process_time()
        torch.linalg.eigvalsh(made @ made.T)
        rates.append(4 / 3 * size**3 / (time.process_time() - begun))
    torch.set_num_threads(threads)
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "flops": found.flops,
        "double_flops": found.double_flops,
        "bandwidth": found.bandwidth,
        "eigenvalues": rates,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "scale_model.json")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    kept = options.json.exists() and not options.fresh
    found: dict[str, Any] = json.loads(options.json.read_text()) if kept else {"sweeps": []}
    while len(found["sweeps"]) < options.sweeps and not options.page:
        found |= {"machine": machine(), "date": str(date.today()), "rounds": options.rounds}
        begun = time.time()
        found["sweeps"].append({str(world): sweep(world, options.rounds) for world in WORLDS})
        options.json.write_text(json.dumps(found) + "\n")
        print(f"sweep {len(found['sweeps'])} of {options.sweeps}: {time.time() - begun:.0f} s", flush=True)
    folder = options.json.parent
    (folder / "scale_model.md").write_text(page(found))
    measured = points(found["sweeps"])
    draw_score(measured, fitted(measured), folder / "scale_model.png")
    draw_ranks(folder / "scale_ranks.png")
    print((folder / "scale_model.md").read_text())


if __name__ == "__main__":
    main()
