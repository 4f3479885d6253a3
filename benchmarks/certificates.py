"""Measure certificates of the expressivity condition on MNIST; write docs/results/certificates.md and .json.

    python benchmarks/certificates.py distinct --data PATH --networks "wide_fc*" "bn_resnet*"
    python benchmarks/certificates.py ranks --data PATH
    python benchmarks/certificates.py singular --data PATH --n 2000 5000 10000 --max-memory 8
    python benchmarks/certificates.py singular --data PATH --n 60000 --max-memory 5 --folder FOLDER --log FILE
    python benchmarks/certificates.py page --add FILE

PATH contains torchvision's MNIST. Without it the digits of scikit-learn are certified and nothing is written. Every run adds
its lines to the page. A killed run with ``--folder`` continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from certificates_page import write_page
from ntk_bench.calibration import processor
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_conv import certify_expressivity
from lightning_conv.expressivity import RankCertificate
from lightning_conv.expressivity.singular import feature_rounding
from lightning_conv.networks.evaluation import StatelessModule
from lightning_conv.networks.head import Head, find_head
from lightning_conv.networks.hidden_features import features_of
from lightning_conv.networks.wide_layer import find_wide_layer, wide_layer_width, widen_head
from lightning_conv.recipes import bn_resnet, wide_fc

RESULTS = Path(__file__).parent.parent / "docs" / "results"
BATCH = 128
SAMPLED = 512
"""Number of samples on which the rounding inside the trunk is measured for the streamed certificate."""


@dataclass(frozen=True)
class Rows:
    """The inputs of a linear layer of a network, computed on demand, in batches that always start at multiples of 128."""

    module: StatelessModule
    layer: Head
    images: Tensor
    stop: bool = False  # whether the forward ends at the layer

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return len(self.images)

    @property
    def width(self) -> int:
        """Number of features at the input of the layer."""
        return self.layer.width

    def rows(self, start: int, stop: int) -> Tensor:
        """Compute the features of some samples."""
        found = torch.empty(stop - start, self.width, dtype=self.module.dtype)
        for first in range(start - start % BATCH, stop, BATCH):
            batch = features_of(self.module, self.layer, self.images[first : first + BATCH], stop=self.stop)
            low, high = max(first, start), min(first + BATCH, stop)
            found[low - start : high - start] = batch[low - first : high - first]
        return found


def images(path: Path | None, n: int) -> Tensor:
    """Return the first n training images in [0, 1], (n, 1, side, side), float32."""
    if path is None:
        return torch.from_numpy(load_digits().images[:n] / 16).float()[:, None]
    from torchvision.datasets import MNIST

    return MNIST(str(path), download=False).data[:n].float()[:, None] / 255


def fully_connected(x: Tensor, n: int) -> nn.Module:
    """Build the recipe's network with PyTorch's initialisation, without a narrow layer: the wide one gets the pixels."""
    torch.manual_seed(0)
    return wide_fc(x[0].numel(), 10, width=wide_layer_width(n), hidden=()).eval()


def residual(x: Tensor, n: int) -> nn.Module:
    """Build torchvision's ResNet-18 at its initialisation, with a wide layer before its head."""
    from torchvision.models import resnet18

    del x
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return widen_head(network, n).eval()


def recipe(x: Tensor, n: int) -> nn.Module:
    """Build the recipe `bn_resnet`, ResNet-14 of width 16, at its initialisation."""
    torch.manual_seed(0)
    return bn_resnet(x.shape[1], 10, width=wide_layer_width(n)).eval()


FULLY_CONNECTED = "wide_fc, hidden=()"
NETWORKS: dict[str, Callable[[Tensor, int], nn.Module]] = {
    FULLY_CONNECTED: fully_connected,
    "bn_resnet, ResNet-14": recipe,
    "ResNet-18, widened": residual,
}


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure the peak memory of the process during the block, in bytes: its own, and with mapped files (Linux)."""
    peak = {"own": 0, "resident": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            text = Path("/proc/self/status").read_text().splitlines()
            kilobytes = {
                line.split(":")[0]: line.split()[1] for line in text if line.startswith("Rss") or "VmRSS" in line
            }
            peak["own"] = max(peak["own"], 1024 * int(kilobytes["RssAnon"]))
            peak["resident"] = max(peak["resident"], 1024 * int(kilobytes["VmRSS"]))

    thread = threading.Thread(target=watch, daemon=True)
    if Path("/proc/self/status").exists():
        thread.start()
    try:
        yield peak
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def logged(path: Path | None) -> Callable[[float], None] | None:
    """Return a report that writes a line to a file at each percent."""
    if path is None:
        return None
    last = [-1]
    start = time.perf_counter()

    def report(share: float) -> None:
        percent = int(100 * share)
        if percent > last[0]:
            last[0] = percent
            with path.open("a") as file:
                file.write(f"{datetime.now():%F %T} {percent:3d} % after {time.perf_counter() - start:.0f} s\n")

    return report


def row(what: str, network: str, found: RankCertificate, **more: Any) -> dict[str, Any]:
    """Return what the page reports about one certificate."""
    return {
        "what": what,
        "network": network,
        "date": f"{datetime.now():%F}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "certificate": asdict(found),
        **more,
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of a record; a newer record of the same key replaces it."""
    return row["what"], row["network"], row["certificate"]["n"]


def added(rows: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge newer records into the records, with the paths of this machine replaced by names."""
    for new in more:
        new["command"] = re.sub(
            r"--(data|folder|log|out) \S+", lambda option: f"--{option[1]} {option[1].upper()}", new["command"]
        )
        rows = [old for old in rows if key(old) != key(new)] + [new]
    return rows


def distinct(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Certify that the inputs of the wide layer of each network are distinct."""
    for name, build in NETWORKS.items():
        if not any(fnmatch(name, pattern) for pattern in options.networks):
            continue
        x = images(options.data, (options.n or [60_000])[0])
        network = build(x, len(x))
        head = find_head(network, x[:2])
        wide = find_wide_layer(network, head, x[:2])
        if isinstance(wide, str):
            raise SystemExit(wide)
        layer = Head(wide.name, wide.module)
        with peak_memory() as peak:
            start = time.perf_counter()
            entering, coarse = (
                Rows(StatelessModule(network, dtype=dtype), layer, x, stop=True).rows(0, len(x))
                for dtype in (torch.float64, torch.float32)
            )
            error = feature_rounding(coarse, entering)
            features_seconds = time.perf_counter() - start
            del coarse
            found = certify_expressivity(
                Rows(StatelessModule(network), head, x),
                method="distinct",
                entering=entering,
                feature_error=error,
                progress=logged(options.log),
            )
        yield row("distinct", name, found, entering=layer.width, features_seconds=features_seconds, peak=peak)


def singular(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Certify rank n at the initial weights, with features that are never held in memory at once."""
    for n in options.n or ([2000, 5000, 10_000] if options.data else [1797]):
        x = images(options.data, n)
        network = fully_connected(x, len(x))
        head = find_head(network, x[:2])
        fine, coarse = (Rows(StatelessModule(network, dtype=d), head, x) for d in (torch.float64, torch.float32))
        count = min(SAMPLED, len(x))
        error = feature_rounding(coarse.rows(0, count), fine.rows(0, count)) * (len(x) / count) ** 0.5
        limit = int(options.max_memory * 2**30)
        with peak_memory() as peak:
            found = certify_expressivity(
                fine,
                method="singular",
                feature_error=error,
                max_memory=limit,
                folder=options.folder,
                progress=logged(options.log),
            )
        yield row("singular", FULLY_CONNECTED, found, max_memory=limit, folder=options.folder is not None, peak=peak)


def ranks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare ``torch.linalg.matrix_rank`` with certified ranks."""
    for n in options.n or ([500, 1000, 2000] if options.data else [500, 1000]):
        x = images(options.data, n)
        network = fully_connected(x, len(x))
        head = find_head(network, x[:2])
        fine, coarse = (
            Rows(StatelessModule(network, dtype=d), head, x).rows(0, len(x)) for d in (torch.float64, torch.float32)
        )
        found = certify_expressivity(coarse, recompute=lambda fine=fine: fine)
        said = {
            str(h.dtype): int(torch.linalg.matrix_rank(torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)))
            for h in (coarse, fine)
        }
        yield row("ranks", FULLY_CONNECTED, found, matrix_rank=said)


def main() -> None:
    """Certify, add to the records and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "distinct", "singular", "ranks", "page"), default="all")
    parser.add_argument("--data", type=Path, help="folder of torchvision's MNIST")
    parser.add_argument(
        "--networks", nargs="+", default=["*"], metavar="PATTERN", help=f"for distinct: {', '.join(NETWORKS)}"
    )
    parser.add_argument("--n", type=int, nargs="+", help="training samples; the first of them for distinct")
    parser.add_argument("--max-memory", type=float, default=8.0, help="GiB, for singular")
    parser.add_argument("--folder", type=Path, help="where singular keeps its matrices and its journal")
    parser.add_argument("--log", type=Path, help="file that progress is written to")
    parser.add_argument(
        "--add", type=Path, help="with page: a certificates.json whose records are added to those that are there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of certificates.md and certificates.json")
    options = parser.parse_args()
    records = options.out / "certificates.json"
    rows: list[dict[str, Any]] = json.loads(records.read_text()) if records.exists() else []
    kinds = {"distinct": distinct, "singular": singular, "ranks": ranks}
    for kind in kinds if options.what == "all" else [options.what] if options.what in kinds else []:
        for new in kinds[kind](options):
            new["command"] = " ".join(["python benchmarks/certificates.py", *sys.argv[1:]])
            print(json.dumps(new, indent=1), flush=True)
            if options.data is not None:
                rows = added(rows, [new])
                records.parent.mkdir(parents=True, exist_ok=True)
                records.write_text(json.dumps(rows, indent=1) + "\n")
    if options.add is not None:
        rows = added(rows, json.loads(options.add.read_text()))
        records.write_text(json.dumps(rows, indent=1) + "\n")
    if rows and (options.data is not None or options.what == "page"):
        write_page(options.out / "certificates.md", rows)


if __name__ == "__main__":
    main()
