"""Records of runs for the tests of the page: a healthy one, and names and messages that try to break out of it."""

from __future__ import annotations

import math

from lightning_conv.health.finding import Finding
from lightning_conv.reporting.page.run_record import RunRecord
from lightning_conv.reporting.series import Series
from lightning_conv.theory.criterion import at_least, at_most, not_applicable

EVIL = "<script>alert(1)</script>"
QUOTED = "\"'><img src=x onerror=alert(2)>"


def series_of_run(length: int = 400, seed: int = 0) -> dict[str, Series]:
    measured = range(0, length, 10)
    lambda_min = [(k, 1e-6 * (1 + k + seed)) for k in measured]
    return {
        "loss": Series().extend((k, 2.0 * math.exp(-k / 100)) for k in range(length)),
        "val_loss": Series().extend((k, 2.0 * math.exp(-k / 120)) for k in range(0, length, 50)),
        "theory/loss": Series().extend((k, 2.0 * math.exp(-k / 100)) for k in measured),
        "health/stability": Series().extend((k, math.nan if k == 50 else k / length * 1.5) for k in measured),
        "health/forecast": Series().extend((k, 1.0) for k in measured),
        "kernel/lambda_min": Series().extend(lambda_min),
        "kernel/lambda_min_lower": Series().extend((k, -v if k < 100 else 0.9 * v) for k, v in lambda_min),
        "kernel/lambda_min_upper": Series().extend((k, 1.1 * v) for k, v in lambda_min),
        "kernel/relative_frobenius_change": Series().extend((k, k / 100) for k in measured),
        "kernel/alignment": Series().extend((k, 1 - k / length / 2) for k in measured),
    }


def record(name: str = "run", layers: int = 3, evil: str = "", seed: int = 0, **others) -> RunRecord:
    shares = {f"net.{k}{evil}": (k + 1) / (layers * (layers + 1) / 2) for k in range(layers)}
    known = {
        "name": f"{name}{evil}",
        "facts": {"module": f"Net{evil}", "run": "completed", "optimizer steps": 400},
        "findings": [
            Finding(name="stability", level="ok", sentence="The step is far from the edge."),
            Finding(
                name="units", level="alert", sentence=f"The units of {evil}x are dead.", advice=f"Look at {evil}y."
            ),
        ],
        "not_judged": {f"no time for {evil}it": ["forecast"]},
        "criteria": [
            at_least("share", "Du et al. 2019", "a >= b", 1.0, 0.5),
            at_least("open", f"S{evil}", "a >= b", math.nan, 0.5),
            at_most("false", "S", f"a <= {evil}b", 2.0, 0.5),
            *(not_applicable(f"other_{k}", "S", "a", f"momentum{evil}") for k in range(3)),
        ],
        "metrics": {"kernel/lambda_min": 4e-4, f"theory/x{evil}": 2.0, "theory/none": math.nan},
        "steps": {"kernel/lambda_min": 390},
        "series": series_of_run(seed=seed) | {f"acc{evil}": Series().extend([(0, 0.1), (399, 0.9)])},
        "shares": {"": shares},
        "settings": {"Trainer": {f"precision{evil}": f"32{evil}", "seed": seed}},
        "seconds": {"measuring": 1.25},
        "labels": f"| table {evil} |",
    }
    return RunRecord(**(known | others))
