"""The long-lived processes, one per method, each in the environment of its library."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from peers.install import failure, python_of
from peers.methods import Method

ROOT = Path(__file__).parent.parent.parent
START = 120.0
"""Seconds that a process may take to import its libraries or to load a case."""


class Failed(Exception):
    """A method failed; the text is the reason."""


class Stopped(Failed):
    """A method was ended because it exceeded its time."""


class Process:
    """The worker of one method, started on the first request, and again after it died or was stopped."""

    def __init__(self, method: Method, threads: int, folder: Path) -> None:
        self.method, self.threads = method, threads
        self.log = folder / f"{method.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.missing: str | None = None
        self.versions: dict[str, str] = {}

    def available(self) -> bool:
        """Start the worker; return False, with the reason in ``missing``, if its library cannot be imported."""
        python = python_of(self.method.environment)
        if not python.exists():
            self.missing = f"not installed (no .peers/{self.method.environment}; `make bench-peers` makes it)"
            return False
        try:
            self.versions = self.ask({"op": "describe"}, START)["versions"]
        except Failed as error:
            reasons = [reason for name in self.method.packages if (reason := failure(name))]
            self.missing = f"not installed ({reasons[0] if reasons else error})"
        return self.missing is None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Args:
            request: see `peers/worker.py`.
            seconds: time limit, after which the process is ended.

        Returns:
            The answer.

        Raises:
            Failed: the method raised, or the process died.
            Stopped: the time limit was exceeded.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._read(process, seconds)
        except (BrokenPipeError, EOFError) as error:
            code = process.wait()
            self.process = None
            raise Failed(f"the process died ({_code(code)}); last words: {self._last_words()}") from error
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"][:400])
        return dict(answer)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            threads = str(self.threads)
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)]),
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "JAX_PLATFORMS": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [str(python_of(self.method.environment)), "-m", "peers.worker", self.method.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    cwd=ROOT,
                )
            if hasattr(os, "sched_setaffinity") and self.threads < len(os.sched_getaffinity(0)):
                # XLA uses as many threads as there are available processors, whatever the variables say.
                os.sched_setaffinity(self.process.pid, sorted(os.sched_getaffinity(0))[: self.threads])
        return self.process

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        end = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                self.close()
                raise Stopped(f"stopped after {seconds:.0f} s")
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                raise EOFError
            line += piece
        return line

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "none"


def _code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
