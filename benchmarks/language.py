"""Measure kernels of a module of GPT-2's size and vocabulary against their plans; write docs/results/language.md and .json.

`python benchmarks/language.py` measures every case in a process of its own: the peak of the memory of a process is that of one case.
`--quick` takes a tiny network, `--out FOLDER` another folder, and `--cases NAME ...` some of the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ntk_bench.calibration import processor
from torch import Tensor, nn

from lightning_conv import kernel_spectrum, ntk_gram
from lightning_conv.health.kernel.subset_bound import subset_bound
from lightning_conv.recipes import GPT
from lightning_conv.reporting.markdown import markdown_table

FOLDER = Path(__file__).parent.parent / "docs" / "results"
# Other work on the machine falls on the wall time of either, of what is timed for the plan and of what was planned.
time.perf_counter = time.process_time
LIMIT = 8 * 2**30
SAMPLES, POSITIONS = 16, 128
SIZES = {"vocabulary": 50_257, "positions": 1024, "width": 768, "depth": 12, "heads": 12}
QUICK = {"vocabulary": 500, "positions": 1024, "width": 32, "depth": 2, "heads": 4}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
CASES = {
    "loss": "kernel of the loss gradients, `ntk_gram(..., cotangents=s)`",
    "loss, own head": "the same, with a head of its own",
    "projected": 'trace kernel by 4 sign vectors, `outputs="projected"`',
    "last block": 'certified lower bound of lambda_min of the loss kernel, `lambda_min_bound(..., parameters="h.11.*")`',
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One case: what was planned, and what it took."""

    case: str
    parameters: int  # of the module
    over: int  # parameters that the kernel is over
    looked_seconds: float  # reading the network and comparing its outputs, before there is a plan
    planned_seconds: float  # of the rest
    seconds: float  # of the rest, by the processor
    planned_bytes: int
    bytes: int
    passes: int
    found: str


def peak(key: str) -> int:
    """Return a number of bytes from the status of this process, such as ``"VmHWM"``."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def loss_slopes(network: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    """Return the gradient of the mean cross-entropy by the logits, (n, T, V)."""
    with torch.no_grad():
        slopes = torch.cat([F.softmax(network(each[None]), -1) for each in tokens])
    slopes.scatter_add_(2, following[..., None], slopes.new_full((*following.shape, 1), -1.0))
    return slopes.div_(following.numel())


def measure(case: str, *, quick: bool) -> Measured:
    """Plan a case and compute it, in this process."""
    sizes = QUICK if quick else SIZES
    torch.manual_seed(0)
    shape = {name: sizes[name] for name in ("width", "depth", "heads")}
    network = GPT(sizes["vocabulary"], sizes["positions"], **shape, tied="own head" not in case).eval()
    tokens = torch.randint(sizes["vocabulary"], (SAMPLES, POSITIONS + 1))
    tokens, following = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    of: dict[str, Any] = {"max_memory": LIMIT}
    if case == "projected":
        of |= {"outputs": "projected", "projections": 4}
    else:
        of |= {"cotangents": loss_slopes(network, tokens, following)}
    if case == "last block":
        of |= {"parameters": f"h.{sizes['depth'] - 1}.*", "precision": "certified"}
    ntk_gram(nn.Linear(4, 2), torch.rand(3, 4), precision="certified")  # libraries load what they load
    Path("/proc/self/clear_refs").write_text("5")
    before = peak("VmRSS")
    gram = ntk_gram(network, tokens, **of)
    used, plan = peak("VmHWM") - before, gram.plan
    assert plan is not None
    smallest = kernel_spectrum(gram).lambda_min
    found = f"trace {gram.trace:.4g}, lambda_min {smallest.value:.4g} in [{smallest.lower:.4g}, {smallest.upper:.4g}]"
    if case == "last block":  # what ``lambda_min_bound`` does
        bound = subset_bound([gram], [smallest]).probe
        found = f"at least {bound.lower:.4g}, {'certified' if bound.certified else 'not certified'}"
    over = {name: each.numel() for name, each in network.named_parameters()}
    return Measured(
        case=case,
        parameters=sum(over.values()),
        over=sum(over[name] for name in plan.parameters),
        looked_seconds=plan.reading_seconds,
        planned_seconds=plan.seconds - plan.reading_seconds,
        seconds=gram.seconds - plan.reading_seconds,
        planned_bytes=plan.bytes,
        bytes=used,
        passes=len(plan.passes),
        found=found,
    )


def page(results: list[Measured], machine: dict[str, Any]) -> str:
    """Return the page."""
    rows = [
        [
            CASES[each.case],
            f"{each.over / 1e6:.1f} M of {each.parameters / 1e6:.1f} M",
            f"{each.looked_seconds:.0f} s",
            f"{each.planned_seconds:.0f} s",
            f"{each.seconds:.0f} s",
            f"{each.seconds / each.planned_seconds - 1:+.0%}",
            f"{(each.seconds + each.looked_seconds) / (each.planned_seconds + each.looked_seconds) - 1:+.0%}",
            f"{each.planned_bytes / 2**30:.2f} GiB",
            f"{each.bytes / 2**30:.2f} GiB",
            f"{each.bytes / each.planned_bytes - 1:+.0%}",
            each.found,
        ]
        for each in results
    ]
    columns = [
        "kernel",
        "parameters",
        "reading",
        "rest, planned",
        "took",
        "",
        "of the whole call",
        "memory, planned",
        "peak",
        "",
        "found",
    ]
    sizes = machine["sizes"]
    vocabulary, outputs = f"{sizes['vocabulary']:,}", f"{POSITIONS * sizes['vocabulary']:,}"
    return f"""# Kernels of a language model, planned and measured

A module of the shape of GPT-2's smallest one (`lightning_conv.recipes.GPT`, random weights, float32): {sizes["depth"]} blocks,
{sizes["width"]} numbers per position, a vocabulary of {vocabulary}; {SAMPLES} sequences of {POSITIONS} random tokens,
so that a sample has {outputs} outputs. `max_memory` is {LIMIT / 2**30:.0f} GiB. The head has the weights of the embedding
where nothing else is said.

Made by `python benchmarks/language.py` on {machine["date"]}, {machine["processor"]}, {machine["threads"]} thread(s),
torch {machine["torch"]}.

{markdown_table(columns, rows)}

*Reading* is what it takes to read the network on three sequences and to compare the outputs of all of them between
batches, with which every call without a plan begins; *planned* is what the plan then says of the rest, and *took* the
time of that. All times are those of the processor, by which the library timed its passes here, too, since other work on
the machine falls on wall times. *Peak* is what the resident memory of the process rises above
that before the call, in which are the weights and, where the loss is contracted, its {SAMPLES} x {outputs} slopes; freed
memory is returned to the system at once (`MALLOC_TRIM_THRESHOLD_=0`).

The kernel over all parameters is the sum of that over the last block and of that over the others, which is positive
semidefinite: the bound in the row of the last block holds for the kernel over all parameters, on these sequences
([Health](../health.md#lambda-min)).
"""


def main() -> None:
    """Measure the cases and write the page, or one case in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny network")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of language.md and language.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="cases")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the time of the processor is that of the work
    if options.one is not None:
        print(json.dumps(asdict(measure(options.one, quick=options.quick))))
        return
    kept = options.out / "language.json"
    stored: dict[str, Any] = json.loads(kept.read_text())["cases"] if kept.is_file() else {}
    machine = {
        "date": str(date.today()),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sizes": QUICK if options.quick else SIZES,
    }
    for case in options.cases:
        words = [sys.executable, __file__, "--one", case, *(["--quick"] if options.quick else [])]
        # Told to give back at once what was freed, the process has at its peak what is in use.
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | RETURNED)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(f"{case}: failed")
        stored[case] = json.loads(done.stdout.splitlines()[-1])
        print(stored[case], flush=True)
        write(options.out, stored, machine)
    print((options.out / "language.md").read_text())


def write(folder: Path, stored: dict[str, Any], machine: dict[str, Any]) -> None:
    """Write page and numbers of the cases so far."""
    results = [Measured(**stored[case]) for case in CASES if case in stored]
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "cases": {each.case: asdict(each) for each in results}}
    (folder / "language.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "language.md").write_text(page(results, machine))


if __name__ == "__main__":
    main()
