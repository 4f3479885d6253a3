"""What the plan promises about memory, against the peak of the process that keeps to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torchvision
from torch import nn
from lightning_conv import ntk_gram
from lightning_conv.kernels import plan_ntk

def peak(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def mlp(*widths):
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.Softplus())]
    return nn.Sequential(*layers[:-1])

cases = {
    "mlp": lambda: (mlp(784, 1024, 1024, 10), torch.randn(512, 784)),
    "wide": lambda: (mlp(256, 2048, 2048, 1), torch.randn(1500, 256)),
    "resnet18": lambda: (torchvision.models.resnet18(num_classes=4).eval(), torch.randn(12, 3, 64, 64)),
    "transformer": lambda: (Tokens(), torch.randn(16, 64, 96)),
    "lstm": lambda: (Recurrent(), torch.randn(64, 16, 64)),
    "general": lambda: (Tied(), torch.randn(64, 512)),
    "vocabulary": lambda: (Language(), torch.randint(50_000, (32, 8))),
}

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(96, 4, 384, batch_first=True), 2)
        self.head = nn.Linear(96, 4)
    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50_000, 16), nn.Linear(16, 50_000)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    def forward(self, x):
        return self.head(self.layer(self.table(x)))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 3)
    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(512, 256), nn.Linear(512, 3)
    def forward(self, x):
        return self.head(torch.tanh(nn.functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t())))

case, outputs, precision, limit = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(2)
model, inputs = cases[case]()
ntk_gram(mlp(4, 8, 2), torch.randn(3, 4), precision=precision)  # libraries load what they load
of = {"outputs": outputs}
if outputs == "cotangents":
    of = {"cotangents": torch.randn(*inputs.shape, 50_000)}
plan = plan_ntk(model, inputs, **of, precision=precision, max_memory=limit)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak("VmRSS")
ntk_gram(model, inputs, **of, precision=precision, max_memory=limit)
print(json.dumps({"used": peak("VmHWM") - before, "promised": plan.bytes, "passes": len(plan.passes)}))
"""


def run(*what):
    # What glibc keeps after it was freed differs from process to process (0.5 to 1.25 of what was used). Told to give it
    # back at once, the peak is that of what is in use, and two processes agree to 1 %.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read the way Linux tells it")
@pytest.mark.parametrize(
    ("case", "outputs", "precision", "limit"),
    [
        ("mlp", "trace", "fast", None),
        ("mlp", "full", "exact", None),
        ("wide", "trace", "exact", None),
        ("wide", "trace", "certified", None),
        ("resnet18", "trace", "fast", None),
        ("resnet18", "full", "exact", None),
        ("resnet18", "trace", "fast", 300 * 2**20),
        ("transformer", "trace", "fast", None),
        ("lstm", "trace", "fast", None),
        ("general", "trace", "fast", None),
        ("general", "full", "fast", None),
        ("vocabulary", "cotangents", "fast", None),
        ("vocabulary", "cotangents", "exact", 200 * 2**20),
        ("mlp", "sum", "exact", None),
    ],
)
def test_peak_memory_stays_within_the_plan(case, outputs, precision, limit):
    found = run(case, outputs, precision, limit)
    assert found["used"] <= 1.1 * found["promised"], found
    assert limit is None or found["promised"] <= limit
