"""The memory bound of a certificate against the memory of the process (without pages of mapped files)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, threading, torch
from lightning_conv import certify_expressivity
from lightning_conv.expressivity import HeldRows, plan_stream
from lightning_conv.expressivity.decomposition import decomposition_bytes

def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

class Generated:
    def __init__(self, samples, width):
        self.samples, self.width = samples, width
    def rows(self, start, stop):
        rows = torch.empty(stop - start, self.width, dtype=torch.float64)
        for k in range(start, stop):
            rows[k - start].normal_(generator=torch.Generator().manual_seed(k))
        return rows

samples, width, limit, folder = json.loads(sys.argv[1])
torch.set_num_threads(2)
peak, over = [0], threading.Event()
def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], own())
def certify(samples, width, limit, folder=None):
    return certify_expressivity(Generated(samples, width), max_memory=limit, folder=folder, progress=False)

certify(700, 800, None), certify(60, 300, None)  # libraries load what they load
before = own()
thread = threading.Thread(target=watch)
thread.start()
found = certify(samples, width, limit, folder)
over.set(), thread.join()
print(json.dumps({"used": peak[0] - before, "promised": found.cost.bytes, "disk": found.cost.disk_bytes, "verdict": found.verdict,
                  "method": found.sigma_min.method}))
"""
MIB = 2**20


def run(*what):
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(what)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="a process's own memory is read the way Linux tells it"
)
@pytest.mark.parametrize(
    ("samples", "width", "limit", "disk"),
    [
        (2600, 2900, 300 * MIB, False),  # both matrices in memory
        (2600, 2900, 70 * MIB, True),  # on disk, two strips at a time
        (500, 6000, None, False),  # all singular values
        (500, 520, None, False),
    ],
)
def test_the_memory_of_a_certificate_stays_within_its_limit_and_its_plan(samples, width, limit, disk, tmp_path):
    found = run(samples, width, limit, str(tmp_path) if disk else None)
    assert found["verdict"] == "certified"
    assert found["used"] <= 1.1 * found["promised"] + 4 * MIB, found
    assert limit is None or found["used"] <= limit, found
    assert (found["disk"] > 0) == disk
    assert ("Cholesky" in found["method"]) == (samples > 512)
