"""The process that runs one method: it reads requests as JSON lines from standard input and answers on standard output.

Started as ``python -m peers.worker NAME``. Requests, by ``op``:

    describe                            versions of the packages
    prepare   case, arrays, dtype       load a case; ``arrays`` is an .npz file with the weights and the inputs
    run       save (optional)           compute the matrix once: seconds, peak bytes above the level before
    plan                                the library's prediction for the case
    release                             forget the case
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from peers.methods import METHODS, ORACLES, Method

MARGIN = 2**30
"""Bytes that stay free for other processes of the machine."""


def status(field: str) -> int | None:
    """Return a size of this process in bytes, if the system reports it (VmRSS, VmHWM, VmData)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def limit_memory() -> None:
    """Make an allocation fail with a message that would otherwise end some process of the machine."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        used = status("VmData")
        Path("/proc/self/oom_score_adj").write_text("1000")
    except (OSError, StopIteration):
        return
    if used is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (max(used + 2**28, used + free - MARGIN), hard))


def release_memory() -> None:
    """Return freed memory to the system, so that the resident size is the used size."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def reset_peak() -> int | None:
    """Reset the peak of the resident size to its present level, and return that level."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return status("VmRSS")


class Worker:
    """One method and at most one prepared case."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.module = importlib.import_module(method.module)
        self.loaded: tuple[Any, ...] | None = None
        self.compute: Any = None

    def describe(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return the versions of the packages of the method."""
        return {"versions": {name: importlib.metadata.version(name) for name in self.method.packages}}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load a case; this is not timed."""
        self.release({})
        limit_memory()
        with np.load(request["arrays"]) as file:
            arrays = dict(file)
        self.loaded = (request["case"], arrays, request["dtype"])
        self.compute = self.module.prepare(*self.loaded, **self.method.options)
        return {}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compute the matrix once and, if asked, save it as float64."""
        release_memory()
        before = reset_peak()
        start = time.perf_counter()
        matrix = self.compute()
        seconds = time.perf_counter() - start
        peak = status("VmHWM")
        if request.get("save"):
            detached = matrix.detach() if hasattr(matrix, "detach") else matrix
            np.save(request["save"], np.asarray(detached, dtype=np.float64))
        return {"seconds": seconds, "peak": None if before is None or peak is None else max(0, peak - before)}

    def plan(self, _: dict[str, Any]) -> dict[str, Any]:
        """Return the library's prediction for the prepared case."""
        assert self.loaded is not None
        return dict(self.module.plan(*self.loaded, **self.method.options))

    def release(self, _: dict[str, Any]) -> dict[str, Any]:
        """Forget the case."""
        self.loaded = self.compute = None
        release_memory()
        return {}


def main() -> None:
    """Answer requests until the input ends. An error is sent as an answer."""
    # Output that libraries print goes to standard error; the answers have their own descriptor.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker((METHODS | ORACLES)[sys.argv[1]])
            answer = getattr(worker, request["op"])(request)
        except Exception as error:
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text}", "memory": isinstance(error, MemoryError)}
            if worker is not None and request["op"] != "describe":
                del error
                worker.release({})
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
