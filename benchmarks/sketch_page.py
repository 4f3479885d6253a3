"""The page that `sketch.py` writes from its records."""

from __future__ import annotations

from statistics import median
from typing import Any

from lightning_conv.reporting.markdown import markdown_table

HEAD = """# Sketches of per-sample gradients, measured

Made by `python benchmarks/sketch.py` (see there for its options). What a sketch is: [Gradients of a whole training set](../sketches.md). All ways take the
gradient of the loss of each sample, on random samples at the weights of seed 0, and are measured in turn, {rounds} rounds after one that warms up; the median
counts, and that of the shares of the plain passes of the same round. A store is measured from its creation to the last byte on disk, the reading of the network included. The error is that of the entries of the kernel of 64
samples (traker: fewer) against `ntk_gram`, root mean square, relative to $\\sqrt{{K_{{ii}} K_{{jj}}}}$; in brackets what the store itself states.

Machine: {machine}, one thread, with other work beside it, so that only ways of one table can be compared; torch {torch}, traker {traker}, dattri {dattri}; {date}.

"""  # noqa: E501

ABOUT = """traker projects the whole gradient at once, which is formed for each sample, and makes its projection anew for each batch; its projector for CPUs is a
fallback for the one in CUDA, so its rate says what a CPU gets and nothing about GPUs. Its numbers are in float32 here, since its half precision is for GPUs. A one-sided
projection to k numbers has a relative variance of up to 2 / k, a two-sided one of about 4 / sqrt(k): two sides pay for speed with accuracy at the same number of bytes, and groups win a part of
it back. dattri's LoGra has one pair of normal projections for each linear layer, leaves other parameters out (its error is against the kernel of the linear layers),
states no error, and was kept in memory, since its way to the disk asks for a GPU.

"""  # noqa: E501

PUBLISHED = """## What others have published

Figures of the authors, for their networks on their machines. They cannot be compared with the tables above, and none of them is a number of samples per second for a network that is measured
here.

| library | figure | machine | source |
|---|---|---|---|
| LoGra (LogIX) | up to 6,500 times the throughput of EKFAC influence and a fifth of its GPU memory, for Llama3-8B-Instruct and 1B tokens | GPUs | abstract of [2405.13954](https://arxiv.org/abs/2405.13954) |
| LogIX | gradients compressed 1,000 to 100,000 times, in memory-mapped files | not said | README of [LogIX](https://github.com/logix-project/logix) |
| FactGraSS | up to 165 % faster than the methods before it, on models of billions of parameters | not said there | abstract of [2505.18976](https://arxiv.org/abs/2505.18976) |
| Bergson | about 17 % more time for a training run while its gradients are collected | not said | README of [Bergson](https://github.com/EleutherAI/bergson) |
| Bergson | `projection_dim` 16 in its example, which is 256 numbers for each layer; models of 70B parameters and more, on several nodes | not said | the same |
| TRAK | 2,048 numbers for each sample and network by default, from all parameters at once | its fast projector needs CUDA | documentation of `TRAKer`; [2303.14186](https://arxiv.org/abs/2303.14186) |

At the defaults a sketch has at most 1,024 numbers for each layer, in float16. Bergson's 17 % are on top of passes that training makes anyway, while a `SketchStore` makes passes of its
own; what it takes beside these passes is in the column "of the plain passes".
"""  # noqa: E501


def page(data: dict[str, Any]) -> str:
    """Return the page of the records."""
    facts = {key: data[key] for key in ("rounds", "machine", "date")}
    parts = [HEAD.format(**facts, **data["versions"])]
    for case in data["cases"]:
        plain = [case["rows"][0]["samples"] / each for each in case["rows"][0]["seconds"]]
        cells = []
        for row in case["rows"]:
            error = "" if row["error"] is None else f"{row['error']:.3f}"
            stated = "" if row["stated"] is None else f" ({row['stated']:.3f})"
            rates = [row["samples"] / each for each in row["seconds"]]
            share = median(own / base for own, base in zip(rates, plain, strict=True))
            size = "" if row["bytes"] is None else f"{row['bytes']:,}"
            span = f"{min(rates):.4g} to {max(rates):.4g}"
            cells.append([row["way"], f"{row['rate']:.4g}", span, f"{share:.3g}", size, error + stated])
        columns = ["way", "samples per second", "range", "of the plain passes", "bytes per sample", "error"]
        parts.append(f"## {case['network']}, {case['parameters']:,} parameters\n\n{markdown_table(columns, cells)}\n\n")
    return "".join([*parts, ABOUT, PUBLISHED])
