"""What every test shares: few threads, a fixed seed and no display."""

import os
from collections import Counter
from collections.abc import Iterator

# Set before torch is imported, and inherited by the processes that tests start. Threads that share a core wait for each
# other at every product. The workers of pytest-xdist inherit what their controller has set here, hence the minimum.
os.environ["OMP_NUM_THREADS"] = str(
    min(
        int(os.environ.get("OMP_NUM_THREADS", "2")),
        max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))),
    )
)
os.environ.setdefault("MPLBACKEND", "Agg")
# Processes whose numbers are compared to the last bit must not choose their products by the moment's load.
os.environ.setdefault("LIGHTNING_CONV_PRODUCT", "mm")

import pytest
import torch

THREADS = torch.get_num_threads()

if not torch.accelerator.is_available():
    # Without this a small run spends a fifth of its time on devices that are not there: each seed is kept for them
    # together with the stack of the call, and each torch.cuda.is_available() looks for the driver on disk.
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.manual_seed_all = lambda seed: None
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--every N``: of a test with many cases only each N-th one is run."""
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="run each N-th case of a test with several, from the first on"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that ``--every`` does not ask for; each test keeps its first one."""
    every: int = config.getoption("--every")
    if every < 2:
        return
    counts: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        name = item.nodeid.split("[")[0]
        (left if counts[name] % every else kept).append(item)
        counts[name] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers and threads, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def lenient() -> Iterator[None]:
    """Turn unexpected errors of diagnostics into warnings, as for users; the rooms' tests raise them otherwise (strict mode)."""
    from lightning_conv.callbacks.run.guarded import set_strict  # the tests of the core do without Lightning

    before = set_strict(False)
    yield
    set_strict(before)
