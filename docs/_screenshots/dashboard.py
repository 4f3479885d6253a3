"""A TensorBoard on a free port of this machine, and the charts that a run has asked it for."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

LAYOUT = "custom_scalars__config__"
"""Tag under which a run logs the layout of its charts."""

PATIENCE = 180.0


def expected_charts(folder: Path) -> list[str]:
    """Return the titles of the charts that a run's own layout names, in its order.

    Args:
        folder: Where the run's logger has written.

    Raises:
        ValueError: The run has logged no layout.
    """
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    if LAYOUT not in events.Tags()["tensors"]:
        raise ValueError(f"{folder}: the run has logged no layout of charts")
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors(LAYOUT)[-1].tensor_proto.string_val[0])
    return [chart.title for category in layout.category for chart in category.chart]


def logged_images(folder: Path) -> list[str]:
    """Return the tags of the images that a run has logged."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return list(events.Tags()["images"])


def has_hyper_parameters(folder: Path) -> bool:
    """Return whether a run has logged what the tab HParams shows."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return any("_hparams_/" in tag for tag in events.summary_metadata)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Start TensorBoard on a folder, wait until it answers, and yield its address.

    Args:
        logdir: Folder with runs.

    Yields:
        Its address.

    Raises:
        RuntimeError: It ended, or did not answer.
    """
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    process = subprocess.Popen(
        # Blocking: it answers when all runs are read, so that no curve ends where reading had come to.
        [
            *(*command, "--host", "127.0.0.1", "--samples_per_plugin", "images=100"),
            *("--load_fast", "false", "--reload_task", "blocking", "--reload_interval", "0"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"TensorBoard does not answer at {address}; run it by hand: {' '.join(command)}")
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    """Return whether the runs can be asked for; the first answer comes once they are read."""
    try:
        with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
            return answer.read().strip() not in (b"", b"[]")
    except OSError:
        return False
